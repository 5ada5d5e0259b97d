"""A normalisation folded into a crosscoder, exactly, and taken out again."""

from copy import deepcopy
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn

from fmxnn.coders.crosscoder import Crosscoder, CrossLayerDecoder, CrossLayerEncoder
from fmxnn.coders.normalisation import Normalisation
from fmxnn.coders.polynomial import NonlinearDecoder
from fmxnn.core.contraction import ShapeError
from fmxnn.gates.decoupled import Decoupled, DecoupledDecoder
from fmxnn.weights.combined import SumWeight
from fmxnn.weights.factorized import FactorizedWeight, Weight
from fmxnn.weights.parted import PartedWeight
from fmxnn.weights.projected import ProjectedWeight

_M = TypeVar("_M", bound=nn.Module)


class Normalised(nn.Module):
    """`... layers d_model -> ... layers d_model`: a crosscoder that reads and writes normalised activations, in the units of the data.

    `normalisation` is for what it reads and `output` for what it writes (None: the same); a cross-layer transcoder needs both.
    Codes are the crosscoder's own. Saved and loaded as any module; `fold` makes a plain crosscoder of it. A SkipCrosscoder is normalised
    as well: its skip reads and writes normalised activations too, and `decode` is without it; it is not folded.
    Raises ShapeError where a normalisation does not fit.
    """

    def __init__(self, crosscoder: nn.Module, normalisation: Normalisation, *, output: Normalisation | None = None):
        super().__init__()
        for part in (normalisation, output):
            if part is not None and not isinstance(part, Normalisation):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"Normalised takes a Normalisation, got {part!r}; make one: Normalisation.of(scale, mean)")
        if isinstance(crosscoder, Normalised):
            raise TypeError("Normalised takes a Crosscoder or a SkipCrosscoder, got Normalised; normalise what it holds")
        inner = crosscoder_in(crosscoder)
        self.crosscoder = cast("Crosscoder", crosscoder)
        self.normalisation = normalisation
        self.output = normalisation if output is None else output
        _check_fit("reads", inner.encoder.weight, self.normalisation, "")
        _check_fit("writes", inner.decoder.weight, self.output, "; give one for what it writes: output=...")

    def __getattr__(self, name: str) -> Any:
        """Says where encoder and decoder are: those inside read and write normalised activations. Raises AttributeError."""
        if name in ("encoder", "decoder"):
            raise AttributeError(
                f"a Normalised has no {name} in the units of the data; measure or train fx.fold(normalised), or normalised.crosscoder on "
                "normalised activations"
            )
        return super().__getattr__(name)

    def encode(self, x: Tensor, *, layout: torch.layout = torch.strided) -> Tensor:
        """`... layers d_model -> ... latents`: the codes of activations in the units of the data; see Crosscoder.encode."""
        return self.crosscoder.encode(self.normalisation(x), layout=layout)

    def decode(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`: in the units of the data; codes dense or torch.sparse_csr"""
        return self.output.inverse(self.crosscoder.decode(z))

    def forward(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... layers d_model`"""
        return self.output.inverse(self.crosscoder(self.normalisation(x)))


def crosscoder_in(module: nn.Module) -> Crosscoder:
    """The crosscoder itself, or the one inside a Normalised or a SkipCrosscoder. Raises TypeError for anything else."""
    inner = module
    while not isinstance(inner, Crosscoder):
        inner = getattr(inner, "crosscoder", None)
        if inner is None:
            raise TypeError(
                f"expected a Crosscoder, or a Normalised or SkipCrosscoder of one, got {type(module).__name__}; pass what it holds"
            )
    return inner


@runtime_checkable
class LayerScalable(Protocol):
    """A weight of your own, or a decoder, that `fold` can take in."""

    def scale_layers_(self, factors: Tensor) -> object:
        """`layers -> `: multiplies what a weight holds of each layer, or a decoder writes to it (its bias left alone), by that layer's factor, in place."""
        ...


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
        raise TypeError(f"fold takes a Normalised, got {type(normalised).__name__}; wrap it: fold(Normalised(crosscoder, normalisation))")
    old, read, written = normalised.crosscoder, normalised.normalisation, normalised.output
    if not isinstance(old, Crosscoder):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"fold makes a plain crosscoder, and a {type(old).__name__} adds what is not written from latents; keep the Normalised as it is"
        )
    read.check()
    written.check()
    bias = old.encoder.bias
    scale, mean, scale_out, mean_out = (v.to(bias.device, torch.float64) for v in (read.scale, read.mean, written.scale, written.mean))
    weight = _scaled(old.encoder.weight, scale)
    shift = deepcopy(weight).double().to_latents(mean)  # of the rounded weight, so that at x = mean nothing but the bias is left
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
                raise ValueError("two places hold one factor, which would be scaled twice; share the weight itself, or copy the factor")
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


def _check_fit(verb: str, weight: Weight, normalisation: Normalisation, way_out: str) -> None:
    theirs, ours = (weight.layers, weight.d_model), (normalisation.layers, normalisation.d_model)
    if theirs != ours:
        raise ShapeError(
            f"the crosscoder {verb} layers={theirs[0]}, d_model={theirs[1]}, and the normalisation is made for "
            f"layers={ours[0]}, d_model={ours[1]}{way_out or '; make them equal'}"
        )
