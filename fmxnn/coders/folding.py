"""A normalisation folded into a crosscoder, exactly, and taken out again."""

from copy import deepcopy
from functools import singledispatch
from math import isclose
from typing import TypeVar, cast
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn

from fmxnn.coders.crosscoder import Crosscoder, own_code
from fmxnn.coders.decoder import CrossLayerDecoder, Decoder
from fmxnn.coders.decoupled import DecoupledDecoder
from fmxnn.coders.encoder import CrossLayerEncoder
from fmxnn.coders.normalisation import Normalisation, Normalised
from fmxnn.coders.polynomial import NonlinearDecoder
from fmxnn.gates.decoupled import Decoupled
from fmxnn.weights.questions import scalable
from fmxnn.weights.scaling import scale_
from fmxnn.weights.table_rows import check_stored
from fmxnn.weights.weight import LayerScalable, Scalable, Weight

_Made = TypeVar("_Made", bound=nn.Module)


@singledispatch
def weights_of(decoder: nn.Module) -> tuple[Weight, ...]:
    """Every weight that a decoder writes with; what it writes beside its bias scales with these.

    A decoder of your own joins with one line: `weights_of.register(Mine, lambda decoder: (decoder.weight,))`; or it has
    `scale_layers_` and `scale_`. Raises TypeError for one that did neither.
    """
    name = type(decoder).__name__
    raise TypeError(
        f"fold and fold_scale multiply what a decoder writes, and {name} does not say by which weights; register them: "
        f"fmxnn.coders.folding.weights_of.register({name}, lambda decoder: (decoder.weight,)), or give it "
        "scale_layers_(factors)"
    )


@weights_of.register
def _(decoder: CrossLayerDecoder) -> tuple[Weight, ...]:
    return (decoder.weight,)


@weights_of.register
def _(decoder: DecoupledDecoder) -> tuple[Weight, ...]:
    return (decoder.weight,)


@weights_of.register
def _(decoder: NonlinearDecoder) -> tuple[Weight, ...]:
    return (decoder.weight, *(cast("Weight", term.get_submodule("weight")) for term in decoder.terms))


@torch.no_grad()
def fold(normalised: Normalised) -> Crosscoder:
    """The plain crosscoder that does what `normalised` does, up to rounding; a copy, `normalised` stays as it is.

    With s and m for what is read, and s' and m' for what is written, the encoder's weight is E s, its bias
    b - <E s, m>, the decoder's weight D / s' and its bias b / s' + m'. Pre-activations stay what they were, and so do
    codes, gate and thresholds, whatever the gate.

    Parts that are shared are copied apart first. A tied weight becomes two, and a gate that scores by the decoder's
    norms keeps the norms it was trained with. A mask that drops a layer in training now leaves 0 there, no longer the
    mean. A crosscoder and encoder of your own keep their class and their hooks. Raises ValueError for a scale or mean
    that cannot be folded, and TypeError for a weight or decoder that cannot be scaled and where code of your own would
    then give something else. What `from_pretrained` found saved `about` it stays beside it, such as its layers.
    """
    if not isinstance(normalised, Normalised):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"fold takes a Normalised, got {type(normalised).__name__}; "
            "wrap it: fold(Normalised(crosscoder, normalisation))"
        )
    old, read, written = normalised.crosscoder, normalised.normalisation, normalised.output
    if not isinstance(old, Crosscoder):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"fold makes a plain crosscoder, and a {type(old).__name__} adds what is not written from latents; "
            "keep the Normalised as it is"
        )
    read.check()
    written.check()
    _check_own_code(normalised)
    return _known_as(normalised, _folded(normalised))


def _folded(normalised: Normalised) -> Crosscoder:
    """A copy in which weights and biases have taken up both normalisations."""
    old, read, written = normalised.crosscoder, normalised.normalisation, normalised.output
    bias = old.encoder.bias
    scale, mean, scale_out, mean_out = (
        v.to(bias.device, torch.float64) for v in (read.scale, read.mean, written.scale, written.mean)
    )
    weight, decoder = deepcopy(old.encoder.weight), deepcopy(old.decoder)
    scale_((weight,), scale)
    _scale_layers_(decoder, 1 / scale_out)
    # of the rounded weight, so that at x = mean nothing but the bias is left
    shift = deepcopy(weight).double().to_latents(mean)
    gate = old.encoder.sparsifier  # copied apart, so that one that scores by norms keeps those it was trained with
    apart = {id(gate): deepcopy(gate), id(old.encoder.weight): weight, id(old.decoder): decoder}
    made = deepcopy(old, cast("dict[int, object]", apart))
    made.encoder.weight, made.decoder = weight, decoder
    made.encoder.bias = nn.Parameter((bias - shift).to(bias.dtype), requires_grad=bias.requires_grad)
    _share_gate(made.encoder, decoder)
    decoder.bias.copy_(decoder.bias / scale_out.unsqueeze(-1) + mean_out)
    return made


def _known_as(before: nn.Module, made: _Made) -> _Made:
    """With what was said about the module it was made of, but for what is folded in it."""
    about = vars(before).get("about")
    if about is not None:
        vars(made)["about"] = {name: said for name, said in about.items() if name != "folded"}
    return made


def _check_own_code(normalised: Normalised) -> None:
    """Raises TypeError where code of the user's own, or a hook, reads or writes otherwise than weights and biases say.

    Only a trial can tell: in float64, on tokens that the normalisation brings to unit variance.
    """
    why = own_code(normalised.crosscoder)
    if not why:
        return
    trial = deepcopy(normalised).double().eval()
    read = trial.normalisation
    drawn = torch.randn(16, *read.mean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = drawn.to(read.mean) / read.scale.unsqueeze(-1) + read.mean
    with catch_warnings():
        simplefilter("ignore")  # of a threshold that was never set: the caller's own pass says so
        expected, got = trial(x), _folded(trial)(x)
    if not bool((got - expected).abs().max() <= 1e-6 * expected.abs().max()):
        raise TypeError(
            f"fold puts a scale and a mean into weights and biases, and {why}, which then gives something else; "
            "keep the Normalised as it is"
        )


def unfold(crosscoder: Crosscoder, normalisation: Normalisation, *, output: Normalisation | None = None) -> Normalised:
    """The way back: a copy that works on normalised activations inside and does what `crosscoder` does.

    Say, to train on. Raises as `fold` does.
    """
    back = Normalised(crosscoder, normalisation.inverted(), output=None if output is None else output.inverted())
    return _known_as(crosscoder, Normalised(fold(back), normalisation, output=output).train(crosscoder.training))


@torch.no_grad()
def fold_scale(crosscoder: Crosscoder, scale: float) -> Crosscoder:
    """Makes a crosscoder trained on `scale * x` read and write `x` itself; codes and thresholds stay as they are.

    It is changed in place. A weight that encoder and decoder share becomes two, and a gate that scores by norms keeps,
    in a copy, those it was trained with. The crosscoder keeps the scale as `folded_scale`, also where it is saved.
    Raises ValueError where one is folded in already (fold 1 / scale to take it out again), and TypeError for a weight
    or decoder that cannot be scaled.
    """
    before = crosscoder.folded_scale
    after = before * scale
    if before != 1 and scale != 1 and not isclose(after, 1.0, rel_tol=1e-6):
        raise ValueError(
            f"this crosscoder has the scale {before:.6g} folded in already, and folding {scale:.6g} would make it read "
            f"other units; take the first out before another: fold_scale(crosscoder, 1 / {before!r})"
        )
    encoder, decoder = crosscoder.encoder, crosscoder.decoder
    check_stored("a scale", encoder.weight, cast("nn.Module", decoder))
    for weight in (encoder.weight, decoder.weight):
        scalable(weight)
    if _share(encoder.sparsifier, encoder.weight) or _share(encoder.sparsifier, decoder.weight):
        encoder.sparsifier = deepcopy(encoder.sparsifier)
    _share_gate(encoder, decoder)
    if _share(encoder.weight, cast("nn.Module", decoder)):
        encoder.weight = deepcopy(encoder.weight)
    _scale_written_(decoder, 1 / scale)  # before the encoder: it may refuse
    if not isinstance(decoder, Scalable):  # one that is has scaled its bias as well
        decoder.bias.div_(scale)
    scale_((encoder.weight,), scale)
    crosscoder.folded_scale = 1.0 if isclose(after, 1.0, rel_tol=1e-6) else float(after)
    return crosscoder


def _scale_written_(decoder: Decoder, by: float) -> None:
    """Multiplies what a decoder writes beside its bias, in its own way where it has one."""
    if isinstance(decoder, Scalable):
        decoder.scale_(by)
    elif isinstance(decoder, LayerScalable):
        decoder.scale_layers_(torch.full_like(decoder.bias[:, 0].double(), by))
    else:
        scale_(weights_of(cast("nn.Module", decoder)), by)


def _scale_layers_(decoder: Decoder, factors: Tensor) -> None:
    """`layers -> `: multiplies what a decoder writes to each layer beside its bias."""
    if isinstance(decoder, LayerScalable):
        decoder.scale_layers_(factors)
    else:
        scale_(weights_of(cast("nn.Module", decoder)), factors)


def _share_gate(encoder: CrossLayerEncoder, decoder: Decoder) -> None:
    """A decoder that chooses for each layer does so by the encoder's own gate."""
    if isinstance(decoder, DecoupledDecoder):
        decoder.gate = cast("Decoupled", encoder.sparsifier)


def _share(one: nn.Module, other: nn.Module) -> bool:
    return not {id(p) for p in one.parameters()}.isdisjoint(map(id, other.parameters()))
