"""Stochastic layer masking."""

import torch
from torch import Tensor, nn


class LayerMask(nn.Module):
    """`... layers d_model -> ... layers d_model`: zeroes whole layers at random while training.

    Each token and layer is dropped with probability `p`, independently, and nothing is rescaled by 1/(1-p). A dropped layer
    is 0 whatever it held, NaN too. In eval mode it is the identity. The loss targets the unmasked activations. (fmxcoders, section 3.3)
    Raises ValueError for p outside [0, 1).
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"LayerMask needs 0 <= p < 1, the probability that a layer is dropped, got p={p}")
        self.p = p

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... layers d_model`"""
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(x.shape[:-1], device=x.device) >= self.p
        return torch.where(keep.unsqueeze(-1), x, 0.0)  # a product would leave NaN where it is
