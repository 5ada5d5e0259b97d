"""The decoder of a decoupled gate."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fmxnn.core.errors import ShapeError
from fmxnn.gates.decoupled import Decoupled
from fmxnn.sparse.codes import Codes, to_dense_codes
from fmxnn.weights.factorized import DenseWeight
from fmxnn.weights.weight import Weight


class DecoupledDecoder(nn.Module):
    """`... latents -> ... layers d_model`: each layer from the codes that `gate` keeps for it.

    `gate` is the encoder's own Decoupled, so that both choose alike; a bias that starts at zero is added. A dense
    weight costs what it costs in a CrossLayerDecoder; any other writes all layers once for each layer.
    Raises ShapeError where gate and weight do not fit.

    ```python
    weight = fx.DenseWeight(2, 8, 16)
    gate = fx.Decoupled(fx.BatchTopK(4), fx.BatchTopK(4), weight=weight)
    decoder = fx.DecoupledDecoder(weight, gate)
    ```
    """

    def __init__(self, weight: Weight, gate: Decoupled):
        super().__init__()
        if not isinstance(gate, Decoupled):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"DecoupledDecoder takes the encoder's own Decoupled as its gate, got {type(gate).__name__}; "
                "use CrossLayerDecoder"
            )
        theirs, ours = (gate.weight.layers, gate.weight.latents), (weight.layers, weight.latents)
        if theirs != ours:
            raise ShapeError(
                f"the weight writes layers={ours[0]} from latents={ours[1]}, "
                f"and the gate is made for layers={theirs[0]}, latents={theirs[1]}; make them equal"
            )
        self.weight, self.gate = weight, gate
        self.bias = nn.Parameter(torch.zeros(weight.layers, weight.d_model))

    def forward(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`; codes dense or torch.sparse_csr. Raises ShapeError for other latents."""
        if z.shape[-1:] != (self.weight.latents,):
            raise ShapeError(f"the decoder reads codes of (..., latents={self.weight.latents}), got {tuple(z.shape)}")
        return self.write(self.gate.split(to_dense_codes(z)))

    def write(self, codes: list[Tensor]) -> Tensor:
        """What the codes of each layer, as `Decoupled.split` gives them, write there: `... layers d_model`."""
        return torch.stack([_write(self.weight, layer, code) for layer, code in enumerate(codes)], dim=-2) + self.bias

    def write_prefixes(self, z: Tensor | Codes, stops: Sequence[int]) -> Iterator[Tensor]:
        """What the latents before each stop write, `... layers d_model`, one after the other.

        Each layer chooses among all latents first: in training it would choose otherwise among fewer.
        """
        own = self.gate.split(to_dense_codes(z))
        places = torch.arange(self.weight.latents, device=own[0].device)
        for stop in stops:
            yield self.write([torch.where(places < stop, code, 0.0) for code in own])


def _write(weight: Weight, layer: int, z: Tensor) -> Tensor:
    """`... latents -> ... d_model`: one layer of `to_layers(z)`."""
    return z @ weight.to_dense()[layer].T if isinstance(weight, DenseWeight) else weight.to_layers(z)[..., layer, :]
