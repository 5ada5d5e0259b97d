"""Dictionaries of single layers side by side, as one dictionary of all of them."""

from functools import singledispatch
from typing import NamedTuple

import torch
from torch import nn

from fmxnn.coders.crosscoder import Crosscoder, check_plain
from fmxnn.coders.decoder import CrossLayerDecoder
from fmxnn.coders.encoder import CrossLayerEncoder
from fmxnn.coders.normalisation import Normalisation, Normalised
from fmxnn.core.errors import ShapeError
from fmxnn.gates.split import SplitGate
from fmxnn.weights.combined import ConcatWeight
from fmxnn.weights.connectivity import PlacedWeight


class _Stackable(NamedTuple):
    """A crosscoder with what normalises its input and its output, if anything does."""

    crosscoder: Crosscoder
    read: Normalisation | None = None
    written: Normalisation | None = None


@torch.no_grad()
def stack_layers(*crosscoders: nn.Module) -> Crosscoder | Normalised:
    """One crosscoder of the layers of all, in which each does what it did alone.

    From single-layer dictionaries it makes the per-layer baseline. Each weight stands at its layers, with nothing
    elsewhere; weights and gates are shared with what was given, biases copied. Latents stand in the order given. Where
    one is a Normalised, so is the whole, with the scale and mean of each layer.
    Raises TypeError for anything but crosscoders with CrossLayerDecoders and ShapeError where one does not write the
    layers it reads.
    """
    if not crosscoders:
        raise ValueError("stack_layers puts crosscoders side by side, got none; pass one for each layer")
    parts = [_stackable(given) for given in crosscoders]
    for part in parts:
        _check(part.crosscoder)
    stacked = _stack([part.crosscoder for part in parts])
    if all(part.read is None for part in parts):
        return stacked
    read = _beside([part.read or _plain(part.crosscoder) for part in parts])
    written = _beside([part.written or _plain(part.crosscoder) for part in parts])
    return Normalised(stacked, read, output=written).train(stacked.training)


@singledispatch
def _stackable(given: nn.Module) -> _Stackable:
    raise TypeError(
        f"stack_layers takes crosscoders, each with a CrossLayerDecoder, got {type(given).__name__}; "
        "it adds nothing beside latents"
    )


@_stackable.register
def _(given: Crosscoder) -> _Stackable:
    return _Stackable(given)


@_stackable.register
def _(given: Normalised) -> _Stackable:
    return _stackable(given.crosscoder)._replace(read=given.normalisation, written=given.output)


def _stack(given: list[Crosscoder]) -> Crosscoder:
    sizes = [coder.encoder.weight.layers for coder in given]
    layers, at = sum(sizes), [sum(sizes[:i]) for i in range(len(sizes))]
    readers, writers = (
        [PlacedWeight(weight, layers=layers, at=first) for weight, first in zip(weights, at, strict=True)]
        for weights in ([coder.encoder.weight for coder in given], [coder.decoder.weight for coder in given])
    )
    gate = SplitGate(*(coder.encoder.sparsifier for coder in given), runs=tuple(weight.latents for weight in readers))
    encoder, decoder = CrossLayerEncoder(ConcatWeight(*readers), gate), CrossLayerDecoder(ConcatWeight(*writers))
    encoder.bias = nn.Parameter(torch.cat([coder.encoder.bias for coder in given]))
    decoder.bias = nn.Parameter(torch.cat([coder.decoder.bias for coder in given]))
    return Crosscoder(encoder, decoder).train(given[0].training)


def _beside(parts: list[Normalisation]) -> Normalisation:
    return Normalisation.of(*(torch.cat([part.get_buffer(name) for part in parts]) for name in ("scale", "mean")))


def _plain(crosscoder: Crosscoder) -> Normalisation:
    """Scale 1 and mean 0."""
    weight, bias = crosscoder.encoder.weight, crosscoder.encoder.bias
    return Normalisation(weight.layers, weight.d_model).to(bias.device, bias.dtype)


def _check(crosscoder: Crosscoder) -> None:
    check_plain("stack_layers", crosscoder)
    read, written = crosscoder.encoder.weight, crosscoder.decoder.weight
    if (read.layers, read.d_model) != (written.layers, written.d_model):
        raise ShapeError(
            "stack_layers takes crosscoders that write the layers they read, "
            f"got one that reads layers={read.layers}, d_model={read.d_model} "
            f"and writes layers={written.layers}, d_model={written.d_model}; place their weights yourself: PlacedWeight"
        )
