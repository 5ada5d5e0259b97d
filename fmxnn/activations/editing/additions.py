"""Vectors that are added to activations, whatever the codes are."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fmxnn.activations.editing.calls import at_tokens
from fmxnn.core.errors import ShapeError
from fmxnn.core.sizes import places_of, whole


class Additions:
    """`layers d_model` for every edited token, and `contexts context layers d_model` for those of one text.

    ```python
    from fmxnn.activations.editing.additions import Additions

    additions = Additions()
    additions.add(torch.ones(2, 8), layers=2)
    additions.at(torch.tensor([[False, True, True]]), past=0).shape  # (2, 2, 8)
    ```
    """

    def __init__(self) -> None:
        self._given = list[Callable[[], Tensor]]()

    def __len__(self) -> int:
        return len(self._given)

    def add(self, delta: Tensor, layers: int) -> None:
        """Adds one more. Raises ShapeError for other axes."""
        if delta.ndim not in (2, 4) or delta.shape[-2] != layers:
            raise ShapeError(
                f"what is added is (layers={layers}, d_model), or (contexts, context, layers={layers}, d_model), got "
                f"{tuple(delta.shape)}; one layer's vector goes in as delta.unsqueeze(-2)"
            )
        self._given.append(lambda: delta)

    def add_atoms(self, atoms: Tensor, strengths: Tensor) -> None:
        """`latents layers d_model, latents -> `: adds their sum, each times its strength, which may learn meanwhile."""

        def give() -> Tensor:
            return torch.einsum("f,flm->lm", strengths.to(atoms), atoms)

        self._given.append(give)

    def at(self, where: Tensor, past: int) -> Tensor | None:
        """`contexts context -> tokens layers d_model`: their sum at these tokens, None where there are none."""
        total: Tensor | None = None
        for give in self._given:
            delta = give()
            now = delta.to(where.device).expand(int(where.sum()), *delta.shape) if delta.ndim == 2 else None
            if now is None:
                known, rows = at_tokens(delta, where, past)
                now = rows.new_zeros(len(known), *delta.shape[-2:]).index_put((known,), rows)
            total = now if total is None else total + now
        return total


def check_latents(known: int, latents: int | Sequence[int]) -> list[int]:
    """Latents by their numbers. Raises ValueError for one that is not there, and TypeError for what is no number."""
    one = whole(latents)
    asked = places_of(latents) if one is None else (one,)
    if asked is None:
        raise TypeError(f"a latent is a whole number, got {latents!r:.200}; several are a list: [17, 23]")
    for latent in asked:
        if not 0 <= latent < known:
            raise ValueError(f"the crosscoder has the latents 0 to {known - 1}, got {latent}; choose one of them")
    return list(asked)


def factors_of(strength: float | Sequence[float] | Tensor, latents: int, like: Tensor) -> Tensor:
    """`-> latents`: one number for all latents, or one for each.

    Raises ShapeError for another count, TypeError for what is no number, and ValueError for infinity and NaN.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    try:
        given = torch.as_tensor(strength, dtype=wide, device=like.device)
    except (TypeError, ValueError) as error:
        raise TypeError(f"a latent is given a number, as in run.steer(5, 4.0), got {strength!r:.200}") from error
    if not given.isfinite().all():
        raise ValueError(f"a latent is given a finite number, got {strength!r:.200}")
    if given.ndim > 1 or (given.ndim == 1 and len(given) != latents):
        raise ShapeError(
            f"{latents} latents take one number, or {latents}, got {tuple(given.shape)}; give one for each latent"
        )
    return given.expand(latents)
