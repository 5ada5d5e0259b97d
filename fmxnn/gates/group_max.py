"""Gates that keep the largest of each group of latents."""

from abc import ABC

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.gates.gate import checked_k


class _Grouped(nn.Module, ABC):
    """`k` groups of neighbouring latents, of equal size."""

    k_is_fixed = True

    def __init__(self, k: int, latents: int):
        super().__init__()
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
                f"{type(self).__name__} makes k groups of equal size, got k={found} and latents={self.latents}; take a k that divides latents"
            )
        self._k = found

    @override
    def extra_repr(self) -> str:
        """The groups and the latents."""
        return f"k={self.k}, latents={self.latents}"


class GroupMax(_Grouped):
    """`... latents -> ... latents`: keeps the largest pre-activation of each of `k` groups of neighbouring latents, where it is positive."""

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        return _largest(pre, self.k).relu()


class SignedGroupMax(_Grouped):
    """`... latents -> ... latents`: keeps the largest pre-activation of each of `k` groups of neighbours, whatever its sign. (crosscode, GroupMaxActivation)"""

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        return _largest(pre, self.k)


def _largest(pre: Tensor, k: int) -> Tensor:
    groups = pre.unflatten(-1, (k, -1))
    top = groups.max(-1, keepdim=True)
    return torch.zeros_like(groups).scatter(-1, top.indices, top.values).flatten(-2)
