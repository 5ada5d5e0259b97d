"""Gates that keep the largest of each group of latents."""

from abc import ABC

import torch
from torch import Tensor
from typing_extensions import override

from fmxnn.gates.axis import AlongAxis
from fmxnn.gates.gate import checked_k


class _Grouped(AlongAxis, ABC):
    """`k` groups of neighbouring latents, of equal size."""

    k_is_fixed = True

    def __init__(self, k: int, latents: int, *, dim: int = -1):
        super().__init__(dim=dim)
        self.latents, self.k = latents, k

    @property
    def k(self) -> int:
        """How many groups there are."""
        return self._k

    @k.setter
    def k(self, k: int) -> None:
        """Checks it at once. Raises ValueError for anything but a whole number that divides latents."""
        found = checked_k(type(self).__name__, k)
        if self.latents < 1 or self.latents % found:
            raise ValueError(
                f"{type(self).__name__} makes k groups of equal size, got k={found} and latents={self.latents}; "
                "take a k that divides latents"
            )
        self._k = found

    @override
    def extra_repr(self) -> str:
        """The groups and the latents."""
        return f"k={self.k}, latents={self.latents}{self.shown_axis()}"


class GroupMax(_Grouped):
    """`... latents -> ... latents`: keeps the largest of each of `k` groups of neighbours, where it is positive.

    `dim` is the axis of the latents. Raises ShapeError for another number of latents.

    ```python
    gate = fx.GroupMax(2, 4)
    gate(torch.tensor([1.0, 3.0, -2.0, -1.0]))  # 0, 3, 0, 0
    ```
    """

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        return self.along(pre, lambda last: _largest(last, self.k).relu())


class SignedGroupMax(_Grouped):
    """`... latents -> ... latents`: keeps the largest of each of `k` groups of neighbours, whatever its sign.

    `dim` is the axis of the latents. Raises ShapeError for another number of latents. (crosscode, GroupMaxActivation)

    ```python
    gate = fx.SignedGroupMax(2, 4)
    gate(torch.tensor([1.0, 3.0, -2.0, -1.0]))  # 0, 3, 0, -1
    ```
    """

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        return self.along(pre, lambda last: _largest(last, self.k))


def _largest(pre: Tensor, k: int) -> Tensor:
    groups = pre.unflatten(-1, (k, -1))
    top = groups.max(-1, keepdim=True)
    return torch.zeros_like(groups).scatter(-1, top.indices, top.values).flatten(-2)
