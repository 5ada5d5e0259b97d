"""More codes a token at the start of a run than at its end."""

from typing import Any, cast

from fmxnn.gates import GroupMax, SignedGroupMax
from fmxnn.training.step import Trainer


def anneal_k(trainer: Trainer, *, start: int, k: int, steps: int) -> None:
    """Lets the sparsifier's k go from `start` to `k` in a straight line over so many steps, and stay there.

    k follows from the number of steps done alone, so a resumed run only calls this again, before `load_checkpoint`. Raises TypeError for a
    sparsifier whose k cannot move and ValueError for a k that is no number of latents.
    """
    encoder = trainer.crosscoder.encoder
    sparsifier, latents = encoder.sparsifier, encoder.weight.latents
    if not hasattr(sparsifier, "k") or isinstance(sparsifier, (GroupMax, SignedGroupMax)):
        raise TypeError(f"anneal_k moves the k of a sparsifier, and that of {type(sparsifier).__name__} cannot move; use TopK or BatchTopK")
    if not (1 <= start <= latents and 1 <= k <= latents and steps >= 1):
        raise ValueError(
            f"anneal_k goes from start to k, each from 1 to latents={latents}, over at least one step, got start={start}, k={k} and steps={steps}"
        )

    def follow(done: int) -> None:
        cast("Any", sparsifier).k = round(start + (k - start) * min(done / steps, 1.0))

    trainer.schedule = follow
    trainer.follow_schedule(trainer.steps)
