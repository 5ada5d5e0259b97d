"""SAELens: every number against loops over files that were written independently."""

import re

import foreign_sae as foreign
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from released import assert_same, dtypes, folder, small, tokens
from strategies import seeds

import fmxnn as fx
from fmxnn.formats import FormatError


@dtypes
@given(small, st.integers(1, 6), seeds, st.sampled_from(["standard", "topk", "jumprelu"]), st.booleans(), st.booleans())
def test_saelens_is_its_formula(dtype, d, f, seed, architecture, apply, rescale):
    torch.manual_seed(seed)
    t = foreign.saelens_tensors(d, f, threshold=architecture == "jumprelu", dtype=dtype)
    cfg = {"apply_b_dec_to_input": apply}
    rescale = rescale and architecture == "topk"
    if architecture == "topk":
        cfg |= {"k": min(2, f), "rescale_acts_by_decoder_norm": rescale}
    x = tokens(d)
    kind = {"standard": foreign.RELU, "topk": foreign.TOPK, "jumprelu": foreign.JUMP}[architecture]
    expected = foreign.saelens(x, t, kind=kind, k=cfg.get("k"), apply=apply, rescale=rescale)
    with folder() as path:
        foreign.write_saelens(path, t, architecture, **cfg)
        module = fx.from_pretrained(path)
    assert module.about["format"] == "saelens"
    assert_same(module, x, expected)


@dtypes
@given(small, st.integers(1, 5), seeds, st.floats(0.1, 100))
def test_an_input_scale_is_folded_and_leaves_codes_and_thresholds(dtype, d, f, seed, scale):
    torch.manual_seed(seed)
    t = foreign.saelens_tensors(d, f, threshold=True, dtype=dtype)
    scale = torch.tensor(scale).item()
    x = tokens(d) / scale
    with folder() as path:
        foreign.write_saelens(path, t, "jumprelu", normalize_activations="expected_average_only_in")
        with pytest.raises(
            FormatError, match=r"not what activations were multiplied by; give it, sqrt\(d_in\) / their mean norm: input_scale="
        ):
            fx.from_pretrained(path)
        module = fx.from_pretrained(path, input_scale=torch.tensor([scale]))
    assert torch.equal(module.encoder.sparsifier.threshold, t["threshold"])
    assert module.about["folded"] == "b_dec, input_scale"
    assert_same(module, x, foreign.saelens(x, t, kind=foreign.JUMP, scale=scale))


@pytest.mark.parametrize("how", ["layer_norm", "constant_norm_rescale", "covariance_whitening"])
def test_a_normalisation_that_cannot_be_folded_is_refused_by_its_name(tmp_path, how):
    foreign.write_saelens(tmp_path, foreign.saelens_tensors(2, 3, threshold=True), "jumprelu", normalize_activations=how)
    with pytest.raises(FormatError) as caught:
        fx.from_pretrained(tmp_path, input_scale=torch.ones(1))
    assert str(caught.value) == (
        f"{tmp_path}/cfg.json says normalize_activations={how!r}, which no weights can take in without numbers that the files do not hold; "
        "normalise the activations yourself and write 'none' there"
    )


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"architecture": "gated"}, "says architecture='gated', and known here are standard, topk, jumprelu"),
        ({"activation_fn": "tanh-relu"}, "says activation_fn='tanh-relu', which SAELens 6 no longer has; save it again with SAELens 6"),
        ({"d_in": 7}, "W_enc has the shape (2, 3), expected (d_model=7, latents=3)"),
        ({"architecture": "topk", "k": 9}, "threshold is unknown"),
    ],
    ids=str,
)
def test_saelens_settings_that_change_what_is_computed_are_refused(tmp_path, cfg, message):
    foreign.write_saelens(tmp_path, foreign.saelens_tensors(2, 3, threshold=True), **({"architecture": "jumprelu"} | cfg))
    with pytest.raises(FormatError, match=re.escape(message)):
        fx.from_pretrained(tmp_path)


def test_a_scale_that_nothing_asks_for_is_refused(tmp_path):
    foreign.write_saelens(tmp_path, foreign.saelens_tensors(2, 3, threshold=True), "jumprelu")
    with pytest.raises(FormatError, match="cfg.json says itself how its input is scaled, got an input_scale; leave it out$"):
        fx.from_pretrained(tmp_path, input_scale=torch.ones(1))
