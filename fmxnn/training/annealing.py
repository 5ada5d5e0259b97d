"""More codes a token at the start of a run than at its end."""

from typing import Any, cast

from fmxnn.core.sizes import whole
from fmxnn.gates.questions import fixed_k
from fmxnn.training.trainer import Trainer


def anneal_k(trainer: Trainer, *, start: int, k: int, steps: int) -> None:
    """Lets the sparsifier's k go from `start` to `k` in a straight line over so many steps, and stay there.

    It stands beside the trainer's other `schedules`. k follows from the number of steps done alone, so a resumed run
    only calls this again, before `load_checkpoint`. Raises TypeError for a sparsifier whose k cannot move and
    ValueError for a k that is no number of latents.
    """
    encoder = trainer.objective.coder.encoder
    sparsifier, latents = encoder.sparsifier, encoder.weight.latents
    fixed = fixed_k(sparsifier)
    if fixed is not None:
        name = type(fixed).__name__
        raise TypeError(f"anneal_k moves the k of a sparsifier, and that of {name} cannot move; use TopK or BatchTopK")
    if any(whole(number) is None for number in (start, k, steps)) or not (
        1 <= start <= latents and 1 <= k <= latents and steps >= 1
    ):
        raise ValueError(
            f"anneal_k goes from start to k, whole numbers from 1 to latents={latents}, over at least one step, "
            f"got start={start}, k={k} and steps={steps}"
        )

    def follow(done: int) -> None:
        cast("Any", sparsifier).k = round(start + (k - start) * min(done / steps, 1.0))

    trainer.schedules.append(follow)
    trainer.follow_schedule(trainer.steps)
