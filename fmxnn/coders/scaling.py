"""The scale of training, taken into the weights."""

from copy import deepcopy
from math import isclose
from typing import cast

import torch

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.polynomial import NonlinearDecoder
from fmxnn.gates.decoupled import Decoupled, DecoupledDecoder
from fmxnn.training.starts import Startable
from fmxnn.weights.factorized import Weight


@torch.no_grad()
def fold_scale(crosscoder: Crosscoder, scale: float) -> Crosscoder:
    """Makes a crosscoder trained on `scale * x` read and write `x` itself, exactly; codes and thresholds stay as they are.

    A weight that encoder and decoder share becomes two, and a gate that scores by norms keeps, in a copy, those it was trained with.
    The crosscoder keeps the scale as `folded_scale`, also where it is saved. Raises ValueError where one is folded in already;
    fold 1 / scale to take it out again.
    """
    before = crosscoder.folded_scale
    after = before * scale
    if before != 1 and scale != 1 and not isclose(after, 1.0, rel_tol=1e-6):
        raise ValueError(
            f"this crosscoder has the scale {before:.6g} folded in already, and folding {scale:.6g} would make it read other units; "
            f"take the first out before another: fold_scale(crosscoder, 1 / {before!r})"
        )
    encoder, decoder = crosscoder.encoder, crosscoder.decoder
    if _share(encoder.sparsifier, encoder.weight) or _share(encoder.sparsifier, decoder.weight):
        encoder.sparsifier = deepcopy(encoder.sparsifier)
    if isinstance(decoder, DecoupledDecoder):
        decoder.gate = cast("Decoupled", encoder.sparsifier)
    if _share(encoder.weight, cast("torch.nn.Module", decoder)):
        encoder.weight = deepcopy(encoder.weight)
    reader, writer = _scalable(encoder.weight), _scalable(decoder.weight)
    reader.scale_(scale)
    if isinstance(decoder, NonlinearDecoder):
        decoder.scale_(1 / scale)
    else:
        writer.scale_(1 / scale)
        decoder.bias.div_(scale)
    crosscoder.folded_scale = 1.0 if isclose(after, 1.0, rel_tol=1e-6) else float(after)
    return crosscoder


def _share(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return not {id(p) for p in one.parameters()}.isdisjoint(map(id, other.parameters()))


def _scalable(weight: Weight) -> Startable:
    if not isinstance(weight, Startable):
        raise TypeError(f"fold_scale needs a weight with scale_(factor), and {type(weight).__name__} lacks it")
    return weight
