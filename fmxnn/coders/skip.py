"""A linear map beside a crosscoder, for what needs no latents."""

import torch
from torch import Tensor, nn

from fmxnn.coders.crosscoder import Crosscoder, crosscoder_in
from fmxnn.coders.normalisation import Normalised
from fmxnn.core.errors import ShapeError


class SkipCrosscoder(nn.Module):
    """`... layers d_model -> ... layers d_model`: a crosscoder plus a linear map of each layer, x_hat_l + x_l S_l.

    It is made for transcoders: what is linear needs no latents. `skip` (`layers d_model d_model`, read by written)
    starts at zero. `encode` and `decode` are the crosscoder's own, without the skip. Around a Normalised the skip reads
    and writes the units of the data. (Paulo et al. 2025; Gemma Scope 2's affine connection)
    Raises ShapeError where the crosscoder reads and writes different numbers of layers.

    ```python
    transcoder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(2, 8, 16), fx.TopK(4)), fx.CrossLayerDecoder(fx.DenseWeight(2, 8, 16))
    )
    y_hat = fx.SkipCrosscoder(transcoder)(torch.randn(5, 2, 8))
    ```
    """

    def __init__(self, crosscoder: Crosscoder | Normalised):
        super().__init__()
        inner = crosscoder_in(crosscoder)
        read, written = inner.encoder.weight, inner.decoder.weight
        if read.layers != written.layers:
            raise ShapeError(
                f"a skip leads from each layer to the same layer, and the crosscoder reads layers={read.layers} "
                f"and writes layers={written.layers}; make them equal"
            )
        self.crosscoder = crosscoder
        self.skip = nn.Parameter(torch.zeros(read.layers, read.d_model, written.d_model))

    def encode(self, x: Tensor, *, layout: torch.layout = torch.strided) -> Tensor:
        """`... layers d_model -> ... latents`; see Crosscoder.encode."""
        return self.crosscoder.encode(x, layout=layout)

    def decode(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`: what the latents write, without the skip; codes as for Crosscoder"""
        return self.crosscoder.decode(z)

    def forward(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... layers d_model`"""
        return self.crosscoder(x) + self.linear(x)

    def within(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """`... layers d_model, ... layers d_model -> `: what the crosscoder reads in training, and is to rebuild."""
        return x, y - self.linear(x)

    def linear(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... layers d_model`: what the skip alone writes."""
        return torch.einsum("...lr, lrw -> ...lw", x, self.skip)
