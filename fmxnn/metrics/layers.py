"""Whether a crosscoder is one of the layers that it is measured on."""

from collections.abc import Sequence

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.core.contraction import ShapeError


def check_layers(crosscoder: Crosscoder, shape: Sequence[int], layers: Sequence[int] = (), *, writes: bool = False) -> None:
    """Raises ShapeError where activations of this shape are not of the layers and d_model that the crosscoder reads and, where asked, `writes`.

    The sentence names the `layers` of the language model where they are given.
    """
    sides = {"reads": crosscoder.encoder.weight} | ({"writes": crosscoder.decoder.weight} if writes else {})
    for verb, weight in sides.items():
        if tuple(shape[-2:]) != (weight.layers, weight.d_model):
            given = f" from the layers {', '.join(map(str, layers))}" if layers else ""
            raise ShapeError(
                f"the crosscoder {verb} (..., layers={weight.layers}, d_model={weight.d_model}), got {tuple(shape)}{given}; "
                "give it the layers that it was trained on, in their order"
            )
