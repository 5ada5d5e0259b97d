"""Gates of another library: choices that keep values whatever their sign."""

from abc import ABC

import torch
from torch import Tensor
from typing_extensions import override

from fmxnn.gates.axis import AlongAxis
from fmxnn.gates.gate import Counted, fitting_k


class _Signed(Counted, AlongAxis, ABC):
    """Keeps `k` a token or on average. There is no `choose`, since sparse codes are positive."""

    def __init__(self, k: int, *, dim: int = -1):
        super().__init__(k)
        self.dim = dim

    @override
    def extra_repr(self) -> str:
        """The number kept."""
        return f"k={self.k}{self.shown_axis()}"


class SignedTopK(_Signed):
    """`... latents -> ... latents`: keeps the `k` largest pre-activations of each token, whatever their sign.

    `dim` is the axis of the latents. (crosscode, TopkActivation)

    ```python
    gate = fx.SignedTopK(3)
    gate(torch.tensor([3.0, -1.0, -5.0, 2.0]))  # 3, -1, 0, 2
    ```
    """

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        return self.along(pre, self._largest)

    def _largest(self, pre: Tensor) -> Tensor:
        top = pre.topk(fitting_k(self, pre.shape[-1]), dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)


class SignedBatchTopK(_Signed):
    """`... latents -> ... latents`: keeps the `tokens k` largest pre-activations of a batch, whatever their sign.

    It does so in any mode, without a threshold. So a token's codes depend on the batch it stands in, in eval mode
    too; BatchTopK's do not. The batch is that of this process. `dim` is the axis of the latents.
    (crosscode, BatchTopkActivation)

    ```python
    gate = fx.SignedBatchTopK(1)
    gate(torch.tensor([[9.0, 8.0], [-1.0, -2.0]]))  # 9 and 8
    ```
    """

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        return self.along(pre, self._largest)

    def _largest(self, pre: Tensor) -> Tensor:
        flat = pre.flatten()
        top = flat.topk(pre.shape[:-1].numel() * fitting_k(self, pre.shape[-1]), sorted=False)
        return torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(pre)
