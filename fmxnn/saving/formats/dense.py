"""A crosscoder of dense weights, allocated to be filled from a file."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.decoder import CrossLayerDecoder
from fmxnn.coders.decoupled import DecoupledDecoder
from fmxnn.coders.encoder import CrossLayerEncoder
from fmxnn.coders.normalisation import Normalisation, Normalised
from fmxnn.core.errors import FormatError
from fmxnn.gates.decoupled import Decoupled
from fmxnn.saving.formats.format import Options, allocate
from fmxnn.saving.formats.tensors import Tensors
from fmxnn.weights.connectivity import PlacedWeight
from fmxnn.weights.factorized import DenseWeight
from fmxnn.weights.weight import Weight

Gate = Callable[[DenseWeight], nn.Module]
"""Makes the sparsifier, given the decoder's weight to score by."""


def dense(
    tensors: Tensors, sizes: Mapping[str, int], gate: Gate, options: Options, *, reads: Sequence[int] | None = None
) -> Crosscoder:
    """A dense crosscoder of `layers d_model latents`, allocated once it is known to fit.

    The decoder has as many layers as `writes` says, if it is among the sizes. `reads` are the layers that the encoder
    reads, ascending, where it reads some alone. Where the gate chooses for each layer, each layer is written from its
    own codes.
    """
    dtype = tensors.fitting_dtype(options)

    def make() -> Crosscoder:
        decoder = DenseWeight(sizes.get("writes", sizes["layers"]), sizes["d_model"], sizes["latents"])
        layers = sizes["layers"]
        encoder: Weight = DenseWeight(layers if reads is None else len(reads), sizes["d_model"], sizes["latents"])
        if reads is not None and len(reads) < layers:
            encoder = PlacedWeight(encoder, layers=layers, at=reads)
        sparsifier = gate(decoder)
        written = (
            DecoupledDecoder(decoder, sparsifier) if isinstance(sparsifier, Decoupled) else CrossLayerDecoder(decoder)
        )
        return Crosscoder(CrossLayerEncoder(encoder, sparsifier), written)

    return allocate(make, dtype, options.device)


def rows(weight: Weight) -> Tensor:
    """`-> latents layers d_model`: the one factor of a dense weight, to be filled.

    Of a weight that is placed it has only the layers that are there.
    """
    return (weight.weight if isinstance(weight, PlacedWeight) else weight).get_parameter("factors.0")


@torch.no_grad()
def normalised(
    module: Crosscoder,
    who: str,
    scale: Tensor,
    mean: Tensor | None = None,
    *,
    written: tuple[Tensor, Tensor] | None = None,
) -> Normalised:
    """The crosscoder on `(x - mean) * scale`, its output brought back to the units of the data.

    `written` is the scale that the output is divided by and the mean that is then added; None takes the same two.
    Scales are of `layers`, means of `layers d_model`. `who` gave them, and is named in the FormatError for what cannot
    be a scale.
    """
    weight, bias = module.encoder.weight, module.encoder.bias
    dtype = torch.promote_types(bias.dtype, torch.float32)
    if scale.shape != (weight.layers,):
        raise FormatError(
            f"input_scale is one number for each of the {weight.layers} layers, got the shape {tuple(scale.shape)}"
        )
    mean = torch.zeros(weight.layers, weight.d_model) if mean is None else mean
    try:
        read, output = (
            None if pair is None else Normalisation.of(*(value.to(dtype) for value in pair)).to(bias.device)
            for pair in ((scale, mean), written)
        )
    except ValueError as error:
        raise FormatError(f"{who}: {error}") from error
    return Normalised(module, cast("Normalisation", read), output=output).eval()


def scaled_by_caller(module: Crosscoder, options: Options, path: Path) -> Crosscoder | Normalised:
    """The crosscoder with the caller's input scale, for files that do not say how training scaled each layer.

    Without one it is the crosscoder as it is, and a warning.
    """
    if options.input_scale is not None:
        if module.decoder.weight.layers != module.encoder.weight.layers:
            raise FormatError(
                f"{path} reads layers={module.encoder.weight.layers} and writes "
                f"layers={module.decoder.weight.layers}, which one input_scale cannot "
                "be for; leave it out and give a scale to each: fx.Normalised(crosscoder, normalisation, output=...)"
            )
        return normalised(module, "input_scale", options.input_scale)
    warnings.warn(
        f"{path} does not say by what each layer was multiplied in training, so this reads and writes x * input_scale; "
        "give it, sqrt(d_model) / mean norm of each layer: input_scale=torch.tensor([...])",
        stacklevel=2,
    )
    return module
