"""Dictionaries of single layers side by side, as one dictionary of all of them."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.decoder import CrossLayerDecoder
from fmxnn.coders.encoder import CrossLayerEncoder
from fmxnn.coders.normalisation import Normalisation, Normalised
from fmxnn.core.errors import ShapeError
from fmxnn.gates.split import SplitGate
from fmxnn.weights.combined import ConcatWeight
from fmxnn.weights.connectivity import PlacedWeight


@torch.no_grad()
def stack_layers(*crosscoders: nn.Module) -> Crosscoder | Normalised:
    """One crosscoder of the layers of all, in which each does what it did alone; from single-layer dictionaries the per-layer baseline.

    Its weights are theirs, each at its place and nothing elsewhere; weights and gates are shared with what was given, biases copied. Latents stand in the
    order given. Where one is a Normalised, so is the whole, with the scale and mean of each layer. Raises TypeError for anything but crosscoders
    with CrossLayerDecoders and ShapeError where one does not write the layers it reads.
    """
    if any(isinstance(one, Normalised) for one in crosscoders):
        stacked = stack_layers(*(one.crosscoder if isinstance(one, Normalised) else one for one in crosscoders))
        read, written = (_beside(crosscoders, which) for which in ("normalisation", "output"))
        return Normalised(cast("Crosscoder", stacked), read, output=written).train(stacked.training)
    given = [_stackable(crosscoder) for crosscoder in crosscoders]
    if not given:
        raise ValueError("stack_layers puts crosscoders side by side, got none; pass one for each layer")
    sizes = [coder.encoder.weight.layers for coder in given]
    at = [sum(sizes[:i]) for i in range(len(sizes))]
    readers = [
        PlacedWeight(coder.encoder.weight, layers=sum(sizes), at=first) for coder, first in zip(given, at, strict=True)
    ]
    writers = [
        PlacedWeight(coder.decoder.weight, layers=sum(sizes), at=first) for coder, first in zip(given, at, strict=True)
    ]
    gate = SplitGate(*(coder.encoder.sparsifier for coder in given), runs=tuple(weight.latents for weight in readers))
    encoder, decoder = CrossLayerEncoder(ConcatWeight(*readers), gate), CrossLayerDecoder(ConcatWeight(*writers))
    encoder.bias = nn.Parameter(torch.cat([coder.encoder.bias for coder in given]))
    decoder.bias = nn.Parameter(torch.cat([coder.decoder.bias for coder in given]))
    return Crosscoder(encoder, decoder).train(given[0].training)


def _beside(crosscoders: Sequence[nn.Module], which: str) -> Normalisation:
    """The normalisations of all, side by side; of one that has none, scale 1 and mean 0."""
    parts: list[Normalisation] = []
    for one in crosscoders:
        if isinstance(one, Normalised):
            parts.append(cast("Normalisation", one.get_submodule(which)))
        else:
            coder = cast("Crosscoder", one)
            weight = coder.encoder.weight
            parts.append(
                Normalisation(weight.layers, weight.d_model).to(coder.encoder.bias.device, coder.encoder.bias.dtype)
            )
    return Normalisation.of(*(torch.cat([part.get_buffer(name) for part in parts]) for name in ("scale", "mean")))


def _stackable(given: nn.Module) -> Crosscoder:
    if not isinstance(given, Crosscoder):
        raise TypeError(
            f"stack_layers takes crosscoders, each with a CrossLayerDecoder, got {type(given).__name__}; it adds nothing beside latents"
        )
    for part, known in ((given, Crosscoder), (given.encoder, CrossLayerEncoder), (given.decoder, CrossLayerDecoder)):
        if type(part) is not known:  # a subclass may do what its weight does not say
            raise TypeError(
                f"stack_layers takes crosscoders, each with a {known.__name__}, got {type(part).__name__}; it adds nothing beside latents"
            )
    read, written = given.encoder.weight, given.decoder.weight
    if (read.layers, read.d_model) != (written.layers, written.d_model):
        raise ShapeError(
            f"stack_layers takes crosscoders that write the layers they read, got one that reads layers={read.layers}, d_model={read.d_model} "
            f"and writes layers={written.layers}, d_model={written.d_model}; place their weights yourself: PlacedWeight"
        )
    return given
