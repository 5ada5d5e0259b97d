"""The decoder of a decoupled gate."""

import torch
from torch import Tensor, nn

from fmxnn.core.errors import ShapeError
from fmxnn.gates.decoupled import Decoupled
from fmxnn.sparse.codes import to_dense_codes
from fmxnn.weights.factorized import DenseWeight
from fmxnn.weights.weight import Weight


class DecoupledDecoder(nn.Module):
    """`... latents -> ... layers d_model`: each layer written from the codes that `gate` keeps for it, plus a bias that starts at zero.

    `gate` is the encoder's own Decoupled, so that both choose alike. Any weight; a dense one costs what it costs undivided, any other is written
    once a layer. Raises ShapeError where gate and weight do not fit.
    """

    def __init__(self, weight: Weight, gate: Decoupled):
        super().__init__()
        if not isinstance(gate, Decoupled):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"DecoupledDecoder takes the encoder's own Decoupled as its gate, got {type(gate).__name__}; use CrossLayerDecoder"
            )
        theirs, ours = (gate.weight.layers, gate.weight.latents), (weight.layers, weight.latents)
        if theirs != ours:
            raise ShapeError(
                f"the weight writes layers={ours[0]} from latents={ours[1]}, and the gate is made for layers={theirs[0]}, latents={theirs[1]}; "
                "make them equal"
            )
        self.weight, self.gate = weight, gate
        self.bias = nn.Parameter(torch.zeros(weight.layers, weight.d_model))

    def forward(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`; codes dense or torch.sparse_csr. Raises ShapeError for other latents."""
        if z.shape[-1:] != (self.weight.latents,):
            raise ShapeError(f"the decoder reads codes of (..., latents={self.weight.latents}), got {tuple(z.shape)}")
        return self.write(self.gate.split(to_dense_codes(z)))

    def write(self, codes: list[Tensor]) -> Tensor:
        """What the codes of each layer, as `Decoupled.split` gives them, write there, bias included: `... layers d_model`."""
        return torch.stack([_write(self.weight, layer, code) for layer, code in enumerate(codes)], dim=-2) + self.bias


def _write(weight: Weight, layer: int, z: Tensor) -> Tensor:
    """`... latents -> ... d_model`: one layer of `to_layers(z)`."""
    return z @ weight.to_dense()[layer].T if isinstance(weight, DenseWeight) else weight.to_layers(z)[..., layer, :]
