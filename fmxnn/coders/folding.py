"""A normalisation folded into a crosscoder, exactly, and taken out again."""

from copy import deepcopy
from math import isclose
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.decoder import CrossLayerDecoder
from fmxnn.coders.decoupled import DecoupledDecoder
from fmxnn.coders.encoder import CrossLayerEncoder
from fmxnn.coders.normalisation import Normalisation, Normalised
from fmxnn.coders.polynomial import NonlinearDecoder
from fmxnn.gates.decoupled import Decoupled
from fmxnn.weights.combined import SumWeight
from fmxnn.weights.factorized import FactorizedWeight
from fmxnn.weights.parted import PartedWeight
from fmxnn.weights.projected import ProjectedWeight
from fmxnn.weights.weight import LayerScalable, Startable, Weight

_M = TypeVar("_M", bound=nn.Module)


_Scaling = tuple[FactorizedWeight | LayerScalable, Tensor]


@torch.no_grad()
def fold(normalised: Normalised) -> Crosscoder:
    """The plain crosscoder that does what `normalised` does, exactly up to rounding; a copy, with `normalised` left as it is.

    With s and m for what is read and s', m' for what is written: encoder weight E s, encoder bias b - <E s, m>, decoder weight D / s', decoder bias
    b / s' + m'. Pre-activations stay what they were, so codes, gate and thresholds do, whatever the gate. What the encoder's weight,
    the decoder, the gate and the mask share is parted first: a tied weight becomes two, and a gate that scores by the decoder's
    norms keeps the norms it was trained with. A mask that drops a layer while training now leaves 0 there, no longer the mean.
    Raises ValueError for a scale or mean that cannot be folded and TypeError for a weight or decoder that cannot be scaled.
    """
    if not isinstance(normalised, Normalised):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"fold takes a Normalised, got {type(normalised).__name__}; wrap it: fold(Normalised(crosscoder, normalisation))"
        )
    old, read, written = normalised.crosscoder, normalised.normalisation, normalised.output
    if not isinstance(old, Crosscoder):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"fold makes a plain crosscoder, and a {type(old).__name__} adds what is not written from latents; keep the Normalised as it is"
        )
    read.check()
    written.check()
    bias = old.encoder.bias
    scale, mean, scale_out, mean_out = (
        v.to(bias.device, torch.float64) for v in (read.scale, read.mean, written.scale, written.mean)
    )
    weight = _scaled(old.encoder.weight, scale)
    shift = (
        deepcopy(weight).double().to_latents(mean)
    )  # of the rounded weight, so that at x = mean nothing but the bias is left
    encoder = CrossLayerEncoder(weight, deepcopy(old.encoder.sparsifier), mask=deepcopy(old.encoder.mask))
    encoder.bias = nn.Parameter((bias - shift).to(bias.dtype), requires_grad=bias.requires_grad)
    decoder = _scaled(cast("CrossLayerDecoder", old.decoder), 1 / scale_out)  # or any other kind of decoder
    if isinstance(decoder, DecoupledDecoder):
        decoder.gate = cast("Decoupled", encoder.sparsifier)
    decoder.bias.copy_(decoder.bias / scale_out.unsqueeze(-1) + mean_out)
    return Crosscoder(encoder, decoder, backend=old.backend, folded_scale=old.folded_scale).train(old.training)


def unfold(crosscoder: Crosscoder, normalisation: Normalisation, *, output: Normalisation | None = None) -> Normalised:
    """The way back: a copy that works on normalised activations inside and does what `crosscoder` does; say, to train on. Raises as `fold` does."""
    back = Normalised(crosscoder, normalisation.inverted(), output=None if output is None else output.inverted())
    return Normalised(fold(back), normalisation, output=output).train(crosscoder.training)


def _scaled(module: _M, factors: Tensor) -> _M:
    """A copy of a weight or a decoder with each layer multiplied by its factor."""
    copy = deepcopy(module)
    parts = _parts(copy, factors)
    held = [id(factor) for part, _ in parts if isinstance(part, FactorizedWeight) for factor in part.factors]
    for part, factors in parts:
        if isinstance(part, FactorizedWeight):
            at = _carrier(part)
            if held.count(id(part.factors[at])) > 1:
                raise ValueError(
                    "two places hold one factor, which would be scaled twice; share the weight itself, or copy the factor"
                )
            axis = part.terms[at].index("layers")
            part.factors[at].mul_(factors.reshape([-1 if i == axis else 1 for i in range(part.factors[at].ndim)]))
        else:
            part.scale_layers_(factors)
    return copy


def _parts(module: nn.Module, factors: Tensor) -> list[_Scaling]:
    """What is scaled when `module` is, and by what: each part once, in however many places it stands. Raises ValueError where two places scale it otherwise."""
    found: dict[FactorizedWeight | LayerScalable, Tensor] = {}
    for part, by in _places(module, factors):
        if not torch.equal(found.setdefault(part, by), by):
            raise ValueError(
                "one weight stands at several layers, each of another scale; give each place a weight of its own: copy.deepcopy(weight)"
            )
    return list(found.items())


def _places(module: nn.Module, factors: Tensor) -> list[_Scaling]:
    if isinstance(module, (LayerScalable, FactorizedWeight)):
        return [(module, factors)]
    if isinstance(module, (CrossLayerDecoder, DecoupledDecoder, ProjectedWeight)):
        return _places(module.weight, factors)
    if isinstance(module, NonlinearDecoder):
        written = [module.weight, *(term.get_submodule("weight") for term in module.terms)]
        return [place for weight in written for place in _places(weight, factors)]
    if isinstance(module, PartedWeight):
        return [place for weight, at in module.inner() for place in _places(weight, factors[list(at)])]
    if isinstance(module, SumWeight):
        return [place for weight in module.weights for place in _places(weight, factors)]
    raise TypeError(
        f"a normalisation is folded into each layer on its own, and {type(module).__name__} cannot scale its layers; "
        "give it scale_layers_(factors), which multiplies each layer by its factor"
    )


def _carrier(weight: FactorizedWeight) -> int:
    """The smallest factor that carries `layers`: scaling one of several scales the product."""
    return min((i for i, term in enumerate(weight.terms) if "layers" in term), key=lambda i: weight.factors[i].numel())


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
