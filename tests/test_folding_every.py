"""Folding, for every weight, decoder and gate that fmxnn has: a class that is not made below fails the first test."""

import inspect
from copy import deepcopy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import randn, seeds
from test_folding import WITHIN, assert_layers_close
from test_normalisation import normalisations

import fmxnn as fx
from fmxnn.training import fold_scale
from fmxnn.weights.connectivity import Restriction
from fmxnn.weights.ragged import RaggedPart

LAYERS, D_MODEL, LATENTS = AXES = 3, 4, 6
WEIGHTS = {
    fx.DenseWeight: lambda: fx.DenseWeight(*AXES),
    fx.CPWeight: lambda: fx.CPWeight(*AXES, rank=3),
    fx.TensorRingWeight: lambda: fx.TensorRingWeight(*AXES, ranks=(2, 2, 3)),
    fx.EinsumWeight: lambda: fx.EinsumWeight(
        "latents d_model, latents layers", layers=LAYERS, d_model=D_MODEL, latents=LATENTS
    ),
    fx.FactorizedWeight: lambda: fx.FactorizedWeight(
        "layers r, d_model latents r", layers=LAYERS, d_model=D_MODEL, latents=LATENTS, r=2
    ),
    fx.SumWeight: lambda: fx.SumWeight(fx.DenseWeight(*AXES), WEIGHTS[fx.TensorRingWeight]()),
    fx.ConcatWeight: lambda: fx.ConcatWeight(fx.CPWeight(LAYERS, D_MODEL, 2), fx.DenseWeight(LAYERS, D_MODEL, 4)),
    fx.ProjectedWeight: lambda: fx.ProjectedWeight(fx.Projection(LATENTS, 5), fx.CPWeight(LAYERS, D_MODEL, 5)),
    fx.PlacedWeight: lambda: fx.PlacedWeight(fx.CPWeight(2, 3, LATENTS), layers=LAYERS, at=(0, 2), d_model=D_MODEL),
    fx.RestrictedWeight: lambda: fx.RestrictedWeight(WEIGHTS[fx.TensorRingWeight](), at=[[0], [0, 2], [1, 2]]),
    fx.RaggedWeight: lambda: fx.RaggedWeight(WEIGHTS[fx.SumWeight](), widths=(2, 4, 3)),
}
GATES = {
    torch.nn.ReLU: lambda weight: torch.nn.ReLU(),
    fx.TopK: lambda weight: fx.TopK(2),
    fx.BatchTopK: lambda weight: fx.BatchTopK(2),
    fx.JumpReLU: lambda weight: fx.JumpReLU(LATENTS),
    fx.TrainedJumpReLU: lambda weight: fx.TrainedJumpReLU(LATENTS),
    fx.GroupMax: lambda weight: fx.GroupMax(2, LATENTS),
    fx.SignedTopK: lambda weight: fx.SignedTopK(2),
    fx.SignedBatchTopK: lambda weight: fx.SignedBatchTopK(2),
    fx.SignedGroupMax: lambda weight: fx.SignedGroupMax(2, LATENTS),
    fx.SplitGate: lambda weight: fx.SplitGate(fx.TopK(1), fx.JumpReLU(4), runs=(2, 4)),
    fx.Scored: lambda weight: fx.Scored(fx.BatchTopK(2), fx.MixedNorm(weight)),
    fx.Decoupled: lambda weight: fx.Decoupled(*(fx.BatchTopK(2) for _ in range(LAYERS)), weight=weight),
}
DECODERS = {
    fx.CrossLayerDecoder: lambda weight, gate: fx.CrossLayerDecoder(weight),
    fx.DecoupledDecoder: lambda weight, gate: fx.DecoupledDecoder(weight, gate),
    fx.PolynomialDecoder: lambda weight, gate: fx.PolynomialDecoder(
        fx.PowerTerm(fx.CPWeight(LAYERS, D_MODEL, 3), degree=2, start=-0.5),
        weight=weight,
        projection=fx.Projection(LATENTS, 4),
    ),
    fx.MultilinearDecoder: lambda weight, gate: fx.MultilinearDecoder(
        fx.ProductTerm(
            fx.Projection(LATENTS, 4), fx.Projection(LATENTS, 3), weight=fx.DenseWeight(LAYERS, D_MODEL, 3), start=0.5
        ),
        weight=weight,
    ),
}


def classes(within=torch.nn.Module):
    """Every class of fmxnn below a class, whether fmxnn names it or not; none that is abstract or private."""
    found = {part for child in within.__subclasses__() for part in {child} | classes(child)}
    return {
        part
        for part in found
        if part.__module__.startswith("fmxnn.") and not inspect.isabstract(part) and part.__name__[0] != "_"
    }


def promising(pattern):
    return {part for part in classes() if (inspect.getdoc(part.forward) or "").startswith(f"`{pattern}`")}


def test_no_class_is_forgotten():
    assert set(WEIGHTS) == classes(fx.Weight) - {Restriction, RaggedPart}  # which only look at a weight
    assert set(GATES) - {torch.nn.ReLU} == promising("... latents -> ... latents")
    assert set(DECODERS) == promising("... latents -> ... layers d_model") - {fx.ProductTerm}  # a part of one


def choices(gate, pre):
    """Which latents are kept; where layers choose on their own, by each layer."""
    z = gate(pre)
    return torch.stack(gate.split(z) if isinstance(gate, fx.Decoupled) else [z]) != 0


@st.composite
def crosscoders(draw, kind, normalisations):
    """A Normalised crosscoder with a part of this kind, the others any, and tokens whose choices no rounding moves."""
    normalisation = draw(normalisations)
    torch.manual_seed(draw(seeds))
    reader, writer = (WEIGHTS[kind if kind in WEIGHTS else draw(st.sampled_from(list(WEIGHTS)))]() for _ in range(2))
    decoder = (
        kind
        if kind in DECODERS
        else draw(st.sampled_from([part for part in DECODERS if part is not fx.DecoupledDecoder]))
    )
    gate = (
        kind if kind in GATES else fx.Decoupled if kind is fx.DecoupledDecoder else draw(st.sampled_from(list(GATES)))
    )
    gate = GATES[gate](writer)
    coder = fx.Crosscoder(fx.CrossLayerEncoder(reader, gate), DECODERS[decoder](writer, gate)).double()
    torch.nn.init.normal_(coder.encoder.bias)
    torch.nn.init.normal_(coder.decoder.bias)
    x = normalisation.mean + randn(12, LAYERS, D_MODEL)
    pre = coder.encoder.pre_activations(normalisation(x)).detach()
    for part in gate.modules():
        if isinstance(part, fx.TrainedJumpReLU):
            part.log_threshold.data.copy_((pre.abs().max() / 4 * torch.rand_like(part.log_threshold)).log())
        elif hasattr(part, "threshold"):
            part.threshold.copy_(pre.abs().max() / 4 * torch.rand_like(part.threshold))
    for mode in (False, True):
        kept = choices(deepcopy(gate).train(mode), pre)
        near = [pre + 1e-5 * pre.abs().max() * torch.randn_like(pre) for _ in range(4)]
        assume(all(torch.equal(choices(deepcopy(gate).train(mode), other), kept) for other in near))
    return fx.Normalised(coder, normalisation).eval(), x


every_kind = pytest.mark.parametrize("kind", [*WEIGHTS, *GATES, *DECODERS], ids=lambda kind: kind.__name__)


@every_kind
@settings(max_examples=4)  # of each kind, in two precisions and two modes; every other test draws it too
@given(st.data())
def test_every_class_is_folded(kind, data):
    drawn = data.draw(crosscoders(kind, normalisations(LAYERS, D_MODEL)))
    for dtype in WITHIN:
        whole, x = deepcopy(drawn[0]).to(dtype), drawn[1].to(dtype)
        folded = fx.fold(whole)
        for mode in (False, True):
            whole.train(mode)
            folded.train(mode)
            assert torch.equal(folded.encode(x) != 0, whole.encode(x) != 0)
            assert_layers_close(folded(x), whole(x), whole)


def one_scale(scale):
    return fx.Normalisation.of(
        torch.full((LAYERS,), scale, dtype=torch.float64), torch.zeros(LAYERS, D_MODEL, dtype=torch.float64)
    )


@every_kind
@settings(max_examples=4)
@given(st.data())
def test_every_class_takes_one_scale(kind, data):
    drawn = data.draw(crosscoders(kind, st.floats(0.1, 100).map(one_scale)))
    for dtype in WITHIN:
        whole, x = deepcopy(drawn[0]).to(dtype), drawn[1].to(dtype)
        expected = whole(x)
        assert_layers_close(fold_scale(whole.crosscoder, whole.normalisation.scale[0].item())(x), expected, whole)


def test_one_scale_parts_what_is_shared():
    torch.manual_seed(0)
    tied, part = fx.DenseWeight(*AXES), fx.CPWeight(*AXES)
    reader, writer = fx.SumWeight(part, fx.DenseWeight(*AXES)), fx.SumWeight(part, fx.DenseWeight(*AXES))
    gates = [torch.nn.ReLU(), fx.Scored(fx.TopK(2), fx.SumNorm(tied)), fx.Scored(fx.TopK(2), fx.SumNorm(reader))]
    for gate, read, written in [
        (gates[0], tied, tied),
        (gates[1], tied, tied),
        (gates[0], reader, writer),
        (gates[2], reader, tied),
    ]:
        coder = deepcopy(fx.Crosscoder(fx.CrossLayerEncoder(read, gate), fx.CrossLayerDecoder(written))).double().eval()
        torch.nn.init.normal_(coder.encoder.bias)
        x = randn(12, *AXES[:2])
        expected = coder(3.0 * x) / 3.0
        torch.testing.assert_close(fold_scale(coder, 3.0)(x), expected)
