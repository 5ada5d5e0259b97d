"""Gates that make codes sparse."""

from abc import ABC
from collections.abc import Callable, Iterator
from math import log
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fmxnn.core.shortcuts import GATE, why_overridden
from fmxnn.core.sizes import Counted, fitting_k
from fmxnn.gates.thresholds import Calibrated, warn_unset
from fmxnn.sparse import codes as sparse


@runtime_checkable
class Chooser(Protocol):
    """A sparsifier that finds its codes at a table; see BatchTopK.choose. One that cannot always do so says why not: `obstacle`."""

    def choose(self, read: Tensor, table: Tensor, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`"""
        ...


def why_dense(sparsifier: nn.Module) -> str:
    """Why this sparsifier's codes are found densely; nothing where they need not be. A subclass that overrides `forward` alone is not passed by."""
    return why_overridden(sparsifier, GATE) or getattr(sparsifier, "obstacle", "")


class _Thresholded(nn.Module, ABC):
    """Holds thresholds that stay float32 or wider however the module is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Thresholded":
        def widely(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        super()._apply(widely, recurse)
        return self


class TopK(Counted):
    """`... latents -> ... latents`: keeps the `k` largest positive pre-activations of each token."""

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


class BatchTopK(_Thresholded, Counted, Calibrated):
    """`... latents -> ... latents`: keeps the `tokens k` largest positive pre-activations of a whole batch.

    In training the count is exact (fewer only where fewer are positive) and a token may hold more or fewer
    than `k`. In eval mode each token stands alone: kept is what exceeds `threshold`, the exponential moving
    average of the smallest value kept in training, in units of the pre-activations. It starts at the first of
    these values, and each later step keeps the share `decay` of it; `calibrate` sets it from data. Before either
    the threshold is -1, and eval keeps every positive and warns. (Bussmann et al. 2024; fmxcoders, section 3)
    """

    threshold: Tensor
    asked = False
    """Whether eval mode has looked if the threshold was ever set; see `warn_unset`."""

    def __init__(self, k: int, *, decay: float = 0.9):
        super().__init__(k)
        if not 0 <= decay < 1:
            raise ValueError(f"BatchTopK needs 0 <= decay < 1, the share of the old threshold that stays at a step, got decay={decay}")
        self.decay = decay
        self.register_buffer("threshold", torch.full((), -1.0, dtype=torch.float32))

    def extra_repr(self) -> str:
        """The number kept a token."""
        return f"k={self.k}"

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        if not self.training:
            warn_unset(self)
            return _above(pre, self.threshold.clamp(min=0))
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
        kept = sparse.keep_largest(pre.reshape(-1, pre.shape[-1]), pre.shape[:-1].numel() * fitting_k(self, pre.shape[-1]))
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


class JumpReLU(_Thresholded):
    """`... latents -> ... latents`: keeps what exceeds a threshold of its own for each latent; the form for inference.

    `threshold` is a buffer in units of the pre-activations, zero until weights are loaded into it. (Rajamanoharan et al. 2024)
    """

    threshold: Tensor

    def __init__(self, latents: int):
        super().__init__()
        if latents < 1:
            raise ValueError(f"JumpReLU needs latents >= 1, got latents={latents}")
        self.latents = latents
        self.register_buffer("threshold", torch.zeros(latents, dtype=torch.float32))

    def extra_repr(self) -> str:
        """The number of latents."""
        return f"latents={self.latents}"

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        return _above(pre, self.threshold.clamp(min=0))

    def choose(self, read: Tensor, table: Tensor, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`: sparse codes, without the pre-activations; `propose` is for BatchTopK."""
        return sparse.choose(read, table, bias, "above", self.threshold)


class TrainedJumpReLU(_Thresholded):
    """`... latents -> ... latents`: a JumpReLU that learns its thresholds, as `log_threshold`; `frozen()` is its form for inference.

    The step at a threshold has no gradient, so thresholds take one from pre-activations within `bandwidth` / 2 of them: a straight-through
    window of height 1 / bandwidth. Everything else is exact: codes pass gradients to the pre-activations of the kept alone. `start` and `bandwidth` are in
    units of the pre-activations; the defaults suit activations scaled to a mean norm of sqrt(d_model).
    (Rajamanoharan et al. 2024, equations 10 to 12; Anthropic, January 2025 update)
    """

    def __init__(self, latents: int, *, start: float = 0.1, bandwidth: float = 2.0):
        super().__init__()
        if latents < 1 or not (0 < start < float("inf") and 0 < bandwidth < float("inf")):
            raise ValueError(
                f"TrainedJumpReLU needs latents >= 1, a finite start > 0 and a finite bandwidth > 0, "
                f"got latents={latents}, start={start} and bandwidth={bandwidth}"
            )
        self.latents, self.start, self.bandwidth = latents, start, bandwidth
        self.log_threshold = nn.Parameter(torch.full((latents,), log(start), dtype=torch.float32))

    @property
    def threshold(self) -> Tensor:
        """`latents`: in units of the pre-activations; gradients reach `log_threshold`."""
        return self.log_threshold.exp()

    @property
    def obstacle(self) -> str:
        """Why codes cannot be sparse in training."""
        return f"{type(self).__name__} learns its thresholds from pre-activations that it does not keep" if self.training else ""

    def extra_repr(self) -> str:
        """The number of latents and the window."""
        return f"latents={self.latents}, bandwidth={self.bandwidth}"

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        threshold = self.threshold
        z = _above(pre, threshold)
        return (z + threshold.detach() * self._window(pre)).to(pre.dtype) if self.training else z

    def active(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`: 1 where a latent is kept and 0 elsewhere, with the window's gradient to the thresholds; summed, L0."""
        return (pre > self.threshold) + self._window(pre)

    def choose(self, read: Tensor, table: Tensor, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`: sparse codes, without the pre-activations; no gradient reaches the thresholds."""
        return sparse.choose(read, table, bias, "above", self.threshold)

    @torch.no_grad()
    def frozen(self) -> JumpReLU:
        """A JumpReLU with the thresholds of now, which makes the same choice."""
        made = JumpReLU(self.latents).to(self.log_threshold.device, self.log_threshold.dtype)
        made.threshold.copy_(self.threshold)
        return made.train(self.training)

    def _window(self, pre: Tensor) -> Tensor:
        """Exactly 0, with the gradient -1 / bandwidth to the thresholds that are nearer than half a bandwidth."""
        ramp = ((pre.detach() - self.threshold) / self.bandwidth + 0.5).clamp(0, 1)
        return ramp - ramp.detach()


def _above(pre: Tensor, threshold: Tensor) -> Tensor:
    """What exceeds the threshold, decided in the wider dtype of the two; NaN stays, so that it is seen."""
    return torch.where(pre <= threshold.reshape(-1), 0.0, pre)  # a number without axes would be rounded to the dtype of `pre`
