"""Gates of other libraries: the largest of each group of latents, and choices that keep values whatever their sign."""

from abc import ABC

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.core.sizes import Counted, checked_k, fitting_k


class _Signed(Counted, ABC):
    """Keeps `k` a token or on average, with dense codes alone: there is no `choose`, since sparse codes are positive."""

    @override
    def extra_repr(self) -> str:
        """The number kept."""
        return f"k={self.k}"


class SignedTopK(_Signed):
    """`... latents -> ... latents`: keeps the `k` largest pre-activations of each token, whatever their sign. (crosscode, TopkActivation)"""

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        top = pre.topk(fitting_k(self, pre.shape[-1]), dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)


class SignedBatchTopK(_Signed):
    """`... latents -> ... latents`: keeps the `tokens k` largest pre-activations of a whole batch, in any mode, whatever their sign.

    Without a threshold a token's codes depend on the batch it stands in, in eval mode too; BatchTopK's do not. (crosscode, BatchTopkActivation)
    """

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        flat = pre.flatten()
        top = flat.topk(pre.shape[:-1].numel() * fitting_k(self, pre.shape[-1]), sorted=False)
        return torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(pre)


class _Grouped(nn.Module, ABC):
    """`k` groups of neighbouring latents, of equal size."""

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
