"""What must not move a measure: cuts of batches, the order of layers and of latents, and the free scale of codes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import randn, seeds

import fmxnn as fx
from fmxnn.metrics import functional_coherence, measure_reconstruction, norm_coherence, off_to_on
from fmxnn.metrics.planted.recovery import cosines, match
from fmxnn.metrics.probing.probing import probe

LAYERS, D_MODEL, LATENTS, TOKENS = 3, 4, 6, 30
GATES = {
    "relu": torch.nn.ReLU,
    "topk": lambda: fx.TopK(2),
    "batchtopk": lambda: fx.BatchTopK(2),
    "jumprelu": lambda: fx.JumpReLU(LATENTS),
    "odd": lambda: torch.nn.Hardshrink(1.0),
}
gates, scales = st.sampled_from(sorted(set(GATES) - {"odd"})), st.floats(0.1, 10)


def make(gate, encoder, decoder, bias, threshold):
    """From `layers d_model latents`, twice, `latents` and a threshold of one number or one a latent."""
    made = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(LAYERS, D_MODEL, LATENTS), GATES[gate]()),
        fx.CrossLayerDecoder(fx.DenseWeight(LAYERS, D_MODEL, LATENTS)),
    )
    made.double().eval()
    with torch.no_grad():
        for weight, dense in ((made.encoder.weight, encoder), (made.decoder.weight, decoder)):
            weight.factors[0].copy_(dense.permute(2, 0, 1))
        made.encoder.bias.copy_(bias)
        if gate == "batchtopk":
            made.encoder.sparsifier.threshold = threshold.double().mean()
        if gate == "jumprelu":
            made.encoder.sparsifier.threshold.copy_(threshold)
    return made


def drawn(seed):
    """An encoder, a decoder, a bias, thresholds and activations."""
    torch.manual_seed(seed)
    decoder, threshold = randn(LAYERS, D_MODEL, LATENTS), randn(LATENTS).abs()
    return (
        decoder + 0.1 * randn(LAYERS, D_MODEL, LATENTS),
        decoder,
        0.1 * randn(LATENTS),
        threshold,
        2 * randn(TOKENS, LAYERS, D_MODEL),
    )


def measured(crosscoder, batches, layers=range(LAYERS), latents=range(LATENTS)):
    """All measures as one nest, with axes put back into the order that `layers` and `latents` say they came from."""
    layers, latents = (torch.tensor(list(order)).argsort() for order in (layers, latents))
    rebuilt = measure_reconstruction(crosscoder, batches)
    switched = off_to_on(crosscoder, batches)
    found = {
        name: getattr(rebuilt, name)[layers]
        for name in ("mse", "ev", "cos", "l2_ratio", "relative_reconstruction_bias")
    }
    found |= {
        "l0": rebuilt.l0,
        "dead": rebuilt.dead,
        "pooled": rebuilt.ev_pooled,
        "densities": rebuilt.densities[latents],
    }
    found |= {"switched": switched.switched[layers][:, latents], "off": switched.off[latents], "rate": switched.rate}
    functional = [
        functional_coherence(crosscoder, batches, estimator=each, min_active=1).values[latents]
        for each in ("active", "ratio")
    ]
    return found | {"norm": norm_coherence(crosscoder.decoder.weight).values[latents], "functional": functional}


def assert_same(one, other):
    torch.testing.assert_close(one, other, equal_nan=True)


@given(seeds, gates, st.lists(st.integers(0, TOKENS), max_size=4))
def test_where_batches_are_cut_moves_nothing(seed, gate, cuts):
    *parts, x = drawn(seed)
    crosscoder = make(gate, *parts)
    assert_same(measured(crosscoder, x.tensor_split(sorted(cuts))), measured(crosscoder, [x]))


@given(seeds, gates, st.permutations(range(LAYERS)), st.permutations(range(LATENTS)))
def test_the_order_of_layers_and_latents_moves_nothing(seed, gate, layers, latents):
    encoder, decoder, bias, threshold, x = drawn(seed)
    moved = make(
        gate,
        *(dense[list(layers)][:, :, list(latents)] for dense in (encoder, decoder)),
        bias[list(latents)],
        threshold[list(latents)],
    )
    assert_same(
        measured(moved, [x[:, list(layers)]], layers, latents),
        measured(make(gate, encoder, decoder, bias, threshold), [x]),
    )


@given(seeds, gates, scales)
def test_the_free_scale_of_codes_moves_nothing(seed, gate, scale):
    """One factor for all latents, which every gate lets through: z becomes scale z, and the atoms shrink."""
    encoder, decoder, bias, threshold, x = drawn(seed)
    scaled = make(gate, scale * encoder, decoder / scale, scale * bias, scale * threshold)
    assert_same(measured(scaled, [x]), measured(make(gate, encoder, decoder, bias, threshold), [x]))


@given(seeds, st.lists(st.sampled_from([-1.0, 1.0]), min_size=LATENTS, max_size=LATENTS))
def test_the_sign_of_a_code_moves_nothing(seed, signs):
    """Under an odd gate, as signed ones are, a latent whose code and atom change sign fires and writes as before."""
    encoder, decoder, bias, threshold, x = drawn(seed)
    by = torch.tensor(signs, dtype=torch.float64)
    flipped = make("odd", by * encoder, by * decoder, by * bias, threshold)
    assert_same(measured(flipped, [x]), measured(make("odd", encoder, decoder, bias, threshold), [x]))


@given(seeds, st.lists(scales, min_size=LATENTS, max_size=LATENTS))
def test_where_each_latent_is_gated_alone_each_may_have_its_own_scale(seed, each):
    encoder, decoder, bias, threshold, x = drawn(seed)
    by = torch.tensor(each, dtype=torch.float64)
    for gate in ("relu", "jumprelu"):
        scaled = make(gate, by * encoder, decoder / by, by * bias, by * threshold)
        assert_same(measured(scaled, [x]), measured(make(gate, encoder, decoder, bias, threshold), [x]))


@given(seeds, st.lists(scales, min_size=LATENTS, max_size=LATENTS), st.permutations(range(LATENTS)))
def test_recovery_matches_atoms_whatever_their_length_and_order(seed, each, latents):
    *_, decoder, _, _, _ = drawn(seed)
    true, weight, moved = (
        randn(4, LAYERS, D_MODEL),
        fx.DenseWeight(LAYERS, D_MODEL, LATENTS).double(),
        fx.DenseWeight(LAYERS, D_MODEL, LATENTS).double(),
    )
    with torch.no_grad():
        weight.factors[0].copy_(decoder.permute(2, 0, 1))
        moved.factors[0].copy_((decoder * torch.tensor(each, dtype=torch.float64)).permute(2, 0, 1)[list(latents)])
    one, other = cosines(weight, true), cosines(moved, true)
    assert_same(other, one[:, list(latents)])
    gained = [cosine.clamp(min=0)[torch.arange(4), match(cosine)][match(cosine) >= 0].sum() for cosine in (one, other)]
    assert_same(*gained)


@given(seeds, st.lists(scales, min_size=LATENTS, max_size=LATENTS), st.permutations(range(LATENTS)))
def test_probing_sees_neither_the_scale_of_codes_nor_their_order(seed, each, latents):
    torch.manual_seed(seed)
    train, test, labels = randn(20, LATENTS).relu(), randn(20, LATENTS).relu(), ["a", "b"] * 10
    by = torch.tensor(each, dtype=torch.float64)
    one = probe(train, labels, test, labels, resamples=20)
    other = probe((train * by)[:, list(latents)], labels, (test * by)[:, list(latents)], labels, resamples=20)
    for a, b in zip(one.classes, other.classes, strict=True):
        assert latents[b.latents[0]] == a.latents[0]
        for name in ("f1", "auroc", "balanced_accuracy", "wasserstein_scaled"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), nan_ok=True)
