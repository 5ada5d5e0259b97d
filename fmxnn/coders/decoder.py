"""What a crosscoder asks of its decoder."""

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from fmxnn.core.errors import ShapeError
from fmxnn.sparse.codes import Codes
from fmxnn.weights.parted import write_codes
from fmxnn.weights.weight import Weight


class Decoder(Protocol):
    """A module with a linear part and a bias, and whatever it adds to them; CrossLayerDecoder adds nothing.

    It is handed tensors. One that takes sparse codes gives `from_codes(z: Codes)` beside `forward`, which is then run in its place.
    """

    @property
    def weight(self) -> Weight:
        """The linear part, which starts, metrics and the auxiliary loss read."""
        ...

    @property
    def bias(self) -> nn.Parameter:
        """`layers d_model`"""
        ...

    def __call__(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`; codes dense or torch.sparse_csr"""
        ...


class CrossLayerDecoder(nn.Module):
    """`... latents -> ... layers d_model`: every layer back from one code, plus a bias per layer and coordinate that starts at zero.

    Codes dense or torch.sparse_csr. (fmxcoders, equation 1)
    """

    def __init__(self, weight: Weight):
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(weight.layers, weight.d_model))

    def forward(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`. Raises ShapeError for other latents."""
        if z.shape[-1:] != (self.weight.latents,):
            raise ShapeError(f"the decoder reads codes of (..., latents={self.weight.latents}), got {tuple(z.shape)}")
        return self.weight.to_layers(z) + self.bias

    def from_codes(self, z: Codes) -> Tensor:
        """`tokens latents -> tokens layers d_model`: `forward` from the codes that `CrossLayerEncoder.choose` gave."""
        return write_codes(self.weight, z) + self.bias


def written(decoder: Decoder, z: Codes) -> Tensor:
    """`tokens latents -> tokens layers d_model`: what a decoder without an obstacle writes from sparse codes."""
    return cast("CrossLayerDecoder", decoder).from_codes(z)
