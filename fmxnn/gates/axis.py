"""Along which axis the latents of a gate lie."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from fmxnn.core.errors import ShapeError
from fmxnn.core.sizes import whole


class AlongAxis(nn.Module):
    """A gate whose latents lie along `dim`, the last axis by default.

    Raises ValueError for a `dim` that is no whole number.
    """

    added_later: ClassVar[tuple[str, ...]] = ("dim",)

    def __init__(self, *, dim: int = -1):
        super().__init__()
        self.dim = dim

    @property
    def dim(self) -> int:
        """The axis of the latents."""
        return self._dim

    @dim.setter
    def dim(self, dim: int) -> None:
        """Checks it at once, so that a mistake is found where it is made."""
        self._dim = checked_dim(type(self).__name__, dim)

    @property
    def obstacle(self) -> str:
        """Why codes cannot be sparse, if they cannot."""
        return self.why_not_last()

    def why_not_last(self) -> str:
        """Says that the latents lie along another axis than the last, if they do."""
        return (
            "" if self.dim == -1 else f"{type(self).__name__} has its latents along dim={self.dim}, not along the last"
        )

    def along(self, pre: Tensor, choice: Callable[[Tensor], Tensor]) -> Tensor:
        """What `choice` makes of the pre-activations with their latents last, moved back.

        Raises ShapeError where there is no such axis, or one of another size than `latents`.
        """
        if not -pre.ndim <= self.dim < pre.ndim:
            raise ShapeError(
                f"{type(self).__name__} has its latents along dim={self.dim}, got {tuple(pre.shape)}; "
                f"take a dim from {-pre.ndim} to {pre.ndim - 1}"
            )
        latents = getattr(self, "latents", pre.shape[self.dim])
        if pre.shape[self.dim] != latents:
            raise ShapeError(
                f"{type(self).__name__} is made for latents={latents} along dim={self.dim}, got {tuple(pre.shape)}; "
                "make them equal, or set dim"
            )
        if self.dim in (-1, pre.ndim - 1):
            return choice(pre)
        return choice(pre.movedim(self.dim, -1)).movedim(-1, self.dim)

    def shown_axis(self) -> str:
        """What a repr says of it: nothing where it is the last."""
        return "" if self.dim == -1 else f", dim={self.dim}"


def checked_dim(who: str, dim: int) -> int:
    """`dim` as an int. Raises ValueError for anything but a whole number, naming who asks."""
    found = whole(dim)
    if found is None:
        raise ValueError(f"{who} needs a whole dim, the axis of the latents, got dim={dim!r:.200}; -1 is the last axis")
    return found
