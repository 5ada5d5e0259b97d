"""Gates of other libraries: the largest of each group of latents, and choices that keep values whatever their sign."""

from abc import ABC

import torch
from torch import Tensor
from typing_extensions import override

from fmxnn.gates.gate import Counted, fitting_k


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
