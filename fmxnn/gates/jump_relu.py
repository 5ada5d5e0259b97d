"""Gates with a threshold for each latent."""

from math import log

import torch
from torch import Tensor, nn

from fmxnn.gates.gate import Thresholded, above
from fmxnn.sparse import codes as sparse


class JumpReLU(Thresholded):
    """`... latents -> ... latents`: keeps what exceeds a threshold of its own for each latent; the form for inference.

    `threshold` is a buffer in units of the pre-activations, zero until weights are loaded into it. (Rajamanoharan et al. 2024)
    """

    takes_tables = True

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
        return above(pre, self.threshold.clamp(min=0))

    def choose(self, read: Tensor, table: Tensor, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`: sparse codes, without the pre-activations; `propose` is for BatchTopK."""
        return sparse.choose(read, table, bias, "above", self.threshold)


class TrainedJumpReLU(Thresholded):
    """`... latents -> ... latents`: a JumpReLU that learns its thresholds, as `log_threshold`; `frozen()` is its form for inference.

    The step at a threshold has no gradient, so thresholds take one from pre-activations within `bandwidth` / 2 of them: a straight-through
    window of height 1 / bandwidth. Everything else is exact: codes pass gradients to the pre-activations of the kept alone. `start` and `bandwidth` are in
    units of the pre-activations; the defaults suit activations scaled to a mean norm of sqrt(d_model).
    (Rajamanoharan et al. 2024, equations 10 to 12; Anthropic, January 2025 update)
    """

    takes_tables = True

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
        return (
            f"{type(self).__name__} learns its thresholds from pre-activations that it does not keep"
            if self.training
            else ""
        )

    def extra_repr(self) -> str:
        """The number of latents and the window."""
        return f"latents={self.latents}, bandwidth={self.bandwidth}"

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        threshold = self.threshold
        z = above(pre, threshold)
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
