"""A crosscoder of dense weights, allocated to be filled from a file."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fmxnn.coders import Crosscoder, CrossLayerDecoder, CrossLayerEncoder
from fmxnn.decoupled import Decoupled, DecoupledDecoder
from fmxnn.folding import Normalised
from fmxnn.formats.format import FormatError, Options, allocate
from fmxnn.formats.tensors import Tensors
from fmxnn.normalisation import Normalisation
from fmxnn.weights import DenseWeight, Weight

Gate = Callable[[DenseWeight], nn.Module]
"""Makes the sparsifier, given the decoder's weight to score by."""


def dense(tensors: Tensors, sizes: Mapping[str, int], gate: Gate, options: Options) -> Crosscoder:
    """A crosscoder of `layers d_model latents`, and of as many layers to write as `writes` says, once all of it is known to fit.

    Where the gate chooses for each layer, each layer is written from its own codes.
    """
    dtype = tensors.room(options)

    def make() -> Crosscoder:
        decoder = DenseWeight(sizes.get("writes", sizes["layers"]), sizes["d_model"], sizes["latents"])
        encoder = DenseWeight(sizes["layers"], sizes["d_model"], sizes["latents"])
        sparsifier = gate(decoder)
        written = DecoupledDecoder(decoder, sparsifier) if isinstance(sparsifier, Decoupled) else CrossLayerDecoder(decoder)
        return Crosscoder(CrossLayerEncoder(encoder, sparsifier), written)

    return allocate(make, dtype, options.device)


def rows(weight: Weight) -> Tensor:
    """`-> latents layers d_model`: the one factor of a dense weight, to be filled."""
    return weight.get_parameter("factors.0")


@torch.no_grad()
def normalised(module: Crosscoder, who: str, scale: Tensor, mean: Tensor | None = None, *, written: Tensor | None = None) -> Normalised:
    """The crosscoder on `(x - mean) * scale`, its output divided by `written` (None: `scale`); scales of `layers`, the mean of `layers d_model`.

    `who` said so, and is named in the FormatError for what cannot be a scale.
    """
    weight, bias = module.encoder.weight, module.encoder.bias
    dtype = torch.promote_types(bias.dtype, torch.float32)
    if scale.shape != (weight.layers,):
        raise FormatError(f"input_scale is one number for each of the {weight.layers} layers, got the shape {tuple(scale.shape)}")
    mean = torch.zeros(weight.layers, weight.d_model) if mean is None else mean
    try:
        read, write = (
            Normalisation.of(by.to(dtype), mean.to(dtype)).to(bias.device) for by in (scale, scale if written is None else written)
        )
    except ValueError as error:
        raise FormatError(f"{who}: {error}") from error
    return Normalised(module, read, output=None if written is None else write).eval()


def scaled_by_caller(module: Crosscoder, options: Options, path: Path) -> Crosscoder | Normalised:
    """For files that do not say by what each layer was multiplied in training: what the caller says, or the crosscoder as it is, and a warning."""
    if options.input_scale is not None:
        if module.decoder.weight.layers != module.encoder.weight.layers:
            raise FormatError(
                f"{path} reads layers={module.encoder.weight.layers} and writes layers={module.decoder.weight.layers}, which one input_scale cannot "
                "be for; leave it out and give a scale to each: fx.Normalised(crosscoder, normalisation, output=...)"
            )
        return normalised(module, "input_scale", options.input_scale)
    warnings.warn(
        f"{path} does not say by what each layer was multiplied in training, so this reads and writes x * input_scale; "
        "give it, sqrt(d_model) / mean norm of each layer: input_scale=torch.tensor([...])",
        stacklevel=2,
    )
    return module
