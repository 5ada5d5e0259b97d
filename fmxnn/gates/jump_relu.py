"""Gates with a threshold for each latent."""

from math import log

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.gates.axis import AlongAxis
from fmxnn.gates.gate import Thresholded, above
from fmxnn.sparse import codes as sparse


class JumpReLU(Thresholded, AlongAxis):
    """`... latents -> ... latents`: keeps what exceeds a latent's own threshold; the form for inference.

    `threshold` is a buffer in units of the pre-activations, zero until weights are loaded into it. `dim` is the axis
    of the latents. Raises ShapeError for another number of latents. (Rajamanoharan et al. 2024)

    ```python
    gate = fx.JumpReLU(3)
    gate.threshold.copy_(torch.tensor([0.5, 1.0, 2.0]))
    gate(torch.tensor([0.6, 0.6, 3.0]))  # 0.6, 0, 3
    ```
    """

    takes_tables = True

    threshold: Tensor

    def __init__(self, latents: int, *, dim: int = -1):
        super().__init__(dim=dim)
        if latents < 1:
            raise ValueError(f"JumpReLU needs latents >= 1, got latents={latents}")
        self.latents = latents
        self.register_buffer("threshold", torch.zeros(latents, dtype=torch.float32))

    @override
    def extra_repr(self) -> str:
        """The number of latents."""
        return f"latents={self.latents}{self.shown_axis()}"

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        return self.along(pre, lambda last: above(last, self.threshold.clamp(min=0)))

    def choose(self, read: Tensor, table: Tensor, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`: sparse codes, without the pre-activations.

        `propose` is for BatchTopK.
        """
        return sparse.choose(read, table, bias, "above", self.threshold)


class TrainedJumpReLU(Thresholded, AlongAxis):
    """`... latents -> ... latents`: a JumpReLU that learns its thresholds, as `log_threshold`.

    The step at a threshold has no gradient. So a threshold takes one from the pre-activations within `bandwidth` / 2
    of it: a straight-through window of height 1 / bandwidth. All else is exact: codes pass gradients to the
    pre-activations that are kept, and to no others. `frozen()` is the form for inference.

    `start` and `bandwidth` are in units of the pre-activations; the defaults suit activations scaled to a mean norm
    of sqrt(d_model). `dim` is the axis of the latents. Raises ShapeError for another number of latents.
    (Rajamanoharan et al. 2024, equations 10 to 12; Anthropic, January 2025 update)

    ```python
    gate = fx.TrainedJumpReLU(3, start=1.0)
    gate(torch.tensor([0.5, 1.5, 2.0])).sum().backward()
    gate.log_threshold.grad  # -0.5, -0.5, 0: the first two lie within the window
    ```
    """

    takes_tables = True

    def __init__(self, latents: int, *, start: float = 0.1, bandwidth: float = 2.0, dim: int = -1):
        super().__init__(dim=dim)
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
    @override
    def obstacle(self) -> str:
        """Why codes cannot be sparse, if they cannot: in training, and along another axis than the last."""
        if self.training:
            return f"{type(self).__name__} learns its thresholds from pre-activations that it does not keep"
        return self.why_not_last()

    @override
    def extra_repr(self) -> str:
        """The number of latents and the window."""
        return f"latents={self.latents}, bandwidth={self.bandwidth}{self.shown_axis()}"

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        return self.along(pre, self._jump)

    def active(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`: 1 where a latent is kept and 0 elsewhere, with the window's gradient.

        Its sum over the latents is L0, and the gradient moves the thresholds alone.
        """
        return self.along(pre, lambda last: (last > self.threshold) + self._window(last))

    def choose(self, read: Tensor, table: Tensor, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`: sparse codes, without the pre-activations.

        No gradient reaches the thresholds. `propose` is for BatchTopK.
        """
        return sparse.choose(read, table, bias, "above", self.threshold)

    @torch.no_grad()
    def frozen(self) -> JumpReLU:
        """A JumpReLU with the thresholds of now, which makes the same choice."""
        made = JumpReLU(self.latents, dim=self.dim).to(self.log_threshold.device, self.log_threshold.dtype)
        made.threshold.copy_(self.threshold)
        return made.train(self.training)

    def _jump(self, pre: Tensor) -> Tensor:
        threshold = self.threshold
        z = above(pre, threshold)
        return (z + threshold.detach() * self._window(pre)).to(pre.dtype) if self.training else z

    def _window(self, pre: Tensor) -> Tensor:
        """Exactly 0, with the gradient -1 / bandwidth to the thresholds that are nearer than half a bandwidth."""
        ramp = ((pre.detach() - self.threshold) / self.bandwidth + 0.5).clamp(0, 1)
        return ramp - ramp.detach()
