"""Gates that make codes sparse."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fmxnn.gates.gate import Counted, Thresholded, above, fitting_k
from fmxnn.gates.thresholds import Calibrated, warn_unset
from fmxnn.sparse import codes as sparse


class TopK(Counted):
    """`... latents -> ... latents`: keeps the `k` largest positive pre-activations of each token.

    ```python
    gate = fx.TopK(2)
    gate(torch.tensor([3.0, 1.0, -5.0, 2.0]))  # 3, 0, 0, 2
    ```
    """

    takes_tables = True

    def extra_repr(self) -> str:
        """The number kept."""
        return f"k={self.k}"

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        top = pre.relu().topk(fitting_k(self, pre.shape[-1]), dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)

    def choose(self, read: Tensor, table: Tensor, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`: sparse codes, without the pre-activations; `propose` is for BatchTopK."""
        return sparse.choose(read, table, bias, "each", fitting_k(self, len(bias)))


class BatchTopK(Thresholded, Counted, Calibrated):
    """`... latents -> ... latents`: keeps the `tokens k` largest positive pre-activations of a whole batch.

    In training the count is exact (fewer only where fewer are positive) and a token may hold more or fewer
    than `k`. In eval mode each token stands alone: kept is what exceeds `threshold`, the exponential moving
    average of the smallest value kept in training, in units of the pre-activations. It starts at the first of
    these values, and each later step keeps the share `decay` of it; `calibrate` sets it from data. Before either
    the threshold is -1, and eval keeps every positive and warns. (Bussmann et al. 2024; fmxcoders, section 3)
    """

    takes_tables = True

    threshold: Tensor
    asked = False
    """Whether eval mode has looked if the threshold was ever set; see `warn_unset`."""

    def __init__(self, k: int, *, decay: float = 0.9):
        super().__init__(k)
        if not 0 <= decay < 1:
            raise ValueError(
                f"BatchTopK needs 0 <= decay < 1, the share of the old threshold that stays at a step, got decay={decay}"
            )
        self.decay = decay
        self.register_buffer("threshold", torch.full((), -1.0, dtype=torch.float32))

    def extra_repr(self) -> str:
        """The number kept a token."""
        return f"k={self.k}"

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        if not self.training:
            warn_unset(self)
            return above(pre, self.threshold.clamp(min=0))
        z = self.select(pre)
        self._follow(z)
        return z

    def choose(self, read: Tensor, table: Tensor, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`: sparse codes, the same ones, without the pre-activations."""
        if not self.training:
            warn_unset(self)
            return sparse.choose(read, table, bias, "above", self.threshold, propose=propose)
        z = sparse.choose(read, table, bias, "batch", read.shape[0] * fitting_k(self, len(bias)), propose=propose)
        self._follow(z.values)
        return z

    def select(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`: the exact choice over these tokens, in any mode, the threshold untouched."""
        kept = sparse.keep_largest(
            pre.reshape(-1, pre.shape[-1]), pre.shape[:-1].numel() * fitting_k(self, pre.shape[-1])
        )
        return torch.where(kept.view_as(pre), pre, 0.0)

    def ranked(self, pre: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """`... latents -> `: itself and all of them."""
        yield self, pre

    @torch.no_grad()
    def _follow(self, z: Tensor) -> None:
        if not z.numel():
            return
        smallest = z.detach().masked_fill(z <= 0, torch.inf).amin().to(self.threshold.dtype)
        moved = torch.where(self.threshold < 0, smallest, self.decay * self.threshold + (1 - self.decay) * smallest)
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))
