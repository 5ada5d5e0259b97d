import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language import FAMILIES, VOCABULARY, make_model, make_tokenizer
from strategies import weights
from torch import nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

import fmxnn as fx
from fmxnn.activations.families import find_beside
from fmxnn.coders.folding import fold_scale
from fmxnn.metrics import logit_weights
from fmxnn.metrics.excerpts import Pieces
from fmxnn.metrics.logits import FinalNorm, TokenWeight

LAYERS, D_MODEL, LATENTS = 3, 16, 10


def coder(layers=LAYERS, d_model=D_MODEL, latents=LATENTS, weight=fx.CPWeight):
    parts = [weight(layers, d_model, latents) for _ in range(2)]
    return fx.Crosscoder(fx.CrossLayerEncoder(parts[0], fx.TopK(3)), fx.CrossLayerDecoder(parts[1])).double()


def scaled(model):
    """With norms and biases that are not those of a fresh model."""
    with torch.no_grad():
        for parameter in find_beside(model, "final_norm").parameters():
            parameter.normal_()
    return model


TOLERANCE = {family: {"rtol": 1e-6, "atol": 1e-6} for family in ("gemma2", "llama")}  # their norms work in float32
MODELS = {family: scaled(make_model(family)) for family in FAMILIES}


def by_hand(model, atom):
    """Every weight of the vocabulary, one by one, from the formulas of the families' own norms."""
    atom, norm, head = (
        atom.detach(),
        find_beside(model, "final_norm").requires_grad_(False),
        model.get_output_embeddings().weight.detach(),
    )
    gain = 1 + norm.weight if "Gemma" in type(norm).__name__ else norm.weight
    mean = sum(float(value) for value in atom) / len(atom) if isinstance(norm, nn.LayerNorm) else 0.0
    shown = [float(gain[i]) * (float(atom[i]) - mean) for i in range(len(atom))]
    return [sum(float(head[v, i]) * shown[i] for i in range(len(shown))) for v in range(len(head))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [-1, 0])
def test_the_weights_are_those_of_a_slow_loop(family, layer, monkeypatch):
    monkeypatch.setattr("fmxnn.metrics.logits._ROWS", 7)
    monkeypatch.setattr("fmxnn.metrics.logits.BLOCK", 3)
    crosscoder, model = coder(), MODELS[family]
    found = logit_weights(crosscoder, model, layer=layer, tokens=4)
    assert found.latents == tuple(range(LATENTS))
    assert found.layer == layer % LAYERS
    for latent in range(LATENTS):
        expected = by_hand(model, crosscoder.decoder.weight.to_dense()[layer, :, latent])
        order = sorted(range(VOCABULARY), key=lambda v: -expected[v])
        assert found.promoted[latent].tolist() == order[:4]
        assert found.demoted[latent].tolist() == order[::-1][:4]
        assert_close(
            found.promoted_weights[latent].tolist(), [expected[v] for v in order[:4]], **TOLERANCE.get(family, {})
        )
        assert_close(
            found.demoted_weights[latent].tolist(), [expected[v] for v in order[::-1][:4]], **TOLERANCE.get(family, {})
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_norms_divisor_held_logits_change_by_the_weights(family):
    """The law: logits(x + eps d) - logits(x) = eps * weights / divisor, through the model's own norm and head."""
    crosscoder, model = coder(), MODELS[family]
    norm, head = find_beside(model, "final_norm"), model.get_output_embeddings()
    found = logit_weights(crosscoder, model, [2], tokens=VOCABULARY)
    atom = crosscoder.decoder.weight.atoms([2])[-1, :, 0].detach()
    x, eps = torch.randn(D_MODEL, dtype=torch.float64), 0.5
    bias = norm(torch.zeros_like(x))

    def divisor(given):
        centred = given - given.mean() if isinstance(norm, nn.LayerNorm) else given
        return (centred.pow(2).mean() + getattr(norm, "eps", getattr(norm, "variance_epsilon", None))).sqrt()

    held = divisor(x)  # what is normed is divided by that of x, not by its own
    moved = head((norm(x + eps * atom) - bias) * divisor(x + eps * atom) / held + bias) - head(norm(x))
    expected = torch.empty(VOCABULARY, dtype=torch.float64)
    expected[found.promoted[0]] = eps * found.promoted_weights[0] / held
    assert_close(moved, expected, **TOLERANCE.get(family, {}))


@given(weights(), st.integers(0, 10**6))
def test_any_weight_and_any_layer_have_the_weights_of_their_dense_form(weight, seed):
    torch.manual_seed(seed)
    decoder = fx.CrossLayerDecoder(weight)
    encoder = fx.CrossLayerEncoder(fx.DenseWeight(weight.layers, weight.d_model, weight.latents).double(), fx.TopK(1))
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=9, n_positions=4, n_embd=weight.d_model, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
        )
    ).double()
    layer = seed % weight.layers
    found = logit_weights(fx.Crosscoder(encoder, decoder), model, layer=layer, tokens=9)
    dense = weight.to_dense()[layer].detach()
    norm, head = find_beside(model, "final_norm"), model.get_output_embeddings().weight
    expected = head @ (norm.weight.unsqueeze(1) * (dense - dense.mean(0)))
    assert_close(found.promoted_weights, expected.T.sort(descending=True).values.detach())
    assert_close(found.demoted_weights, expected.T.sort().values.detach())


def test_normalised_and_folded_crosscoders_have_one_answer():
    crosscoder, model = coder(weight=fx.DenseWeight), MODELS["gpt2"]
    scale, mean = torch.tensor([2.0, 0.5, 3.0]).double(), torch.randn(3, D_MODEL).double() * 100
    normalised = fx.Normalised(crosscoder, fx.Normalisation.of(scale, mean))
    expected, plain = logit_weights(fx.fold(normalised), model), logit_weights(crosscoder, model)
    for given_ in (normalised, fx.SkipCrosscoder(normalised)):
        found = logit_weights(given_, model)
        assert torch.equal(found.promoted, expected.promoted)
        assert_close(found.promoted_weights, expected.promoted_weights)
        assert_close(found.demoted_weights, plain.demoted_weights / 3)
    assert_close(logit_weights(fold_scale(crosscoder, 4.0), model).promoted_weights, plain.promoted_weights / 4)


def test_layers_of_other_widths_are_read_without_their_padding():
    weight = fx.RaggedWeight(fx.DenseWeight(2, 24, 5), widths=[16, 24]).double()
    crosscoder = fx.Crosscoder(fx.CrossLayerEncoder(weight, fx.TopK(1)), fx.CrossLayerDecoder(weight))
    found = logit_weights(crosscoder, MODELS["gpt2"], [1], layer=0, tokens=3)
    expected = torch.tensor(by_hand(MODELS["gpt2"], weight.to_dense()[0, :16, 1])).double()
    assert_close(found.promoted_weights[0], expected.topk(3).values)
    with pytest.raises(fx.ShapeError, match=r"d_model=24 at layer -1.*unembeds d_model=16; give the model"):
        logit_weights(crosscoder, MODELS["gpt2"])


def test_a_model_in_bfloat16_is_read_in_float32():
    model, crosscoder = make_model("gemma2").to(torch.bfloat16), coder().float()
    found = logit_weights(crosscoder, model)
    expected = logit_weights(crosscoder.double(), model.double())
    assert found.promoted_weights.dtype == torch.float32
    assert_close(found.promoted_weights.double(), expected.promoted_weights, rtol=1e-4, atol=1e-6)


def test_weights_have_text_and_a_zero_atom_promotes_nothing():
    crosscoder = coder(weight=fx.DenseWeight)
    with torch.no_grad():
        crosscoder.decoder.weight.factors[0][1] = 0
    found = logit_weights(crosscoder, MODELS["gpt2"], [1, 4], tokens=2)
    assert found.of(1, make_tokenizer()) == ((), ())
    up, down = found.of(4, make_tokenizer())
    assert up[0] == TokenWeight(
        Pieces(make_tokenizer()).split([int(found.promoted[1, 0])])[0].text, float(found.promoted_weights[1, 0])
    )
    assert [one.weight for one in down] == found.demoted_weights[1].tolist()
    assert re.fullmatch(r"<the \d+ tokens that each of 2 latents promotes, and demotes, at layer \d+>", repr(found))
    with pytest.raises(ValueError, match=r"of 2 latents, and 3 is none of them; name it"):
        found.of(3, make_tokenizer())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(model=nn.Linear(2, 2)), ValueError, "needs a model with an unembedding, and Linear has none; give"),
        (dict(model="gpt2"), ValueError, "and str has none.*nor its name"),
        (dict(model=MODELS["gpt2"].transformer), ValueError, "GPT2Model has none.*neither its body alone"),
        (dict(latents=[10]), ValueError, "has the latents 0 to 9, got 10"),
        (dict(latents=3), TypeError, r"latents are whole numbers in a list, got 3; write latents=\[3, 17\]"),
        (dict(latents=["3"]), TypeError, r"latents are whole numbers in a list, got \['3'\]"),
        (dict(layer=3), IndexError, r"layer in range\(3\).*got 3"),
        (dict(tokens=0), ValueError, "tokens >= 1 of each side, got tokens=0"),
        (dict(crosscoder=coder(d_model=8)), fx.ShapeError, "writes d_model=8 at layer -1, and GPT2LM.* unembeds"),
        (dict(crosscoder=nn.Linear(2, 2)), TypeError, "expected a Crosscoder"),
    ],
)  # fmt: skip
def test_what_has_no_logit_weights_is_named(change, error, words):
    given_ = dict(crosscoder=coder(), model=MODELS["gpt2"]) | change
    with pytest.raises(error, match=words):
        logit_weights(**given_)


def test_a_norm_that_is_none_is_refused():
    with pytest.raises(ValueError, match="a LayerNorm or an RMSNorm.*Identity divides by something else"):
        FinalNorm(nn.Identity(), torch.empty(4))


@given(st.integers(2, 9), st.booleans())
def test_the_norms_scale_is_found_for_any_width(d_model, layer_norm):
    norm = (nn.LayerNorm if layer_norm else nn.RMSNorm)(d_model).double()
    nn.init.normal_(norm.weight)
    direction = torch.randn(3, d_model, dtype=torch.float64)
    shown = FinalNorm(norm, direction)
    assert shown.centred == layer_norm
    assert_close(shown(direction), norm.weight * (direction - layer_norm * direction.mean(-1, keepdim=True)))
