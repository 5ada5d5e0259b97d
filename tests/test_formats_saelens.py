"""SAELens: every number against loops over files that were written independently."""

import re

import foreign_sae as foreign
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from released import assert_same, dtypes, folder, plain, small, tokens
from strategies import seeds

import fmxnn as fx
from fmxnn.saving.formats import FormatError


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
@given(
    small,
    st.integers(1, 6),
    seeds,
    st.sampled_from([3, 4, 5]),
    st.sampled_from(["relu", "topk", "jump"]),
    st.booleans(),
)
def test_versions_3_to_5_are_read_as_their_own_conversion_reads_them(dtype, d, f, seed, version, kind, ones):
    torch.manual_seed(seed)
    kind = "relu" if version == 3 and kind == "jump" else kind
    t, k = foreign.saelens_tensors(d, f, threshold=kind == "jump", dtype=dtype), min(2, f) if kind == "topk" else None
    x = tokens(d)
    with folder() as path:
        foreign.write_old_saelens(path, t, version=version, k=k, ones=ones)
        module = fx.from_pretrained(path)
    assert (module.about["format"], module.about["hook_point"]) == ("saelens", "blocks.8.hook_resid_pre")
    assert_same(module, x, foreign.saelens(x, t, kind=kind, k=k))


def test_what_was_normalised_by_version_3_asks_for_its_scale(tmp_path):
    t = foreign.saelens_tensors(2, 3, threshold=False)
    foreign.write_old_saelens(tmp_path, t, version=3, normalize_activations=True)
    with pytest.raises(FormatError, match="says normalize_activations='expected_average_only_in', and not what"):
        fx.from_pretrained(tmp_path)


def test_a_scaling_factor_other_than_one_is_refused(tmp_path):
    t = foreign.saelens_tensors(2, 3, threshold=False)
    foreign.write_old_saelens(tmp_path, t | {"scaling_factor": torch.tensor([1.0, 2.0, 1.0])}, version=3)
    with pytest.raises(
        FormatError,
        match="sae_weights.safetensors holds a scaling_factor other than one, of a fine-tuning that SAELens 6 no",
    ):
        fx.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_coordinate_costs_16_bits_no_accuracy(tmp_path, dtype):
    """As residual streams have them: one entry of 3,000 that b_dec takes away, and what varies is of size one."""
    d, f = 64, 512
    b_dec = torch.randn(d)
    b_dec[3] = 3000
    w_dec = torch.nn.functional.normalize(torch.randn(f, d), dim=-1)
    t = {"W_enc": w_dec.T.contiguous(), "b_enc": torch.full((f,), -0.1), "W_dec": w_dec, "b_dec": b_dec}
    foreign.write_saelens(tmp_path, {key: value.to(dtype) for key, value in t.items()}, "standard")
    x = (b_dec + torch.randn(256, d)).to(dtype).unsqueeze(-2)
    exact = fx.fold(fx.from_pretrained(tmp_path, dtype=torch.float64))(x.double())
    rebuilt = fx.from_pretrained(tmp_path)(x)
    assert rebuilt.dtype == dtype
    spread = (exact - exact.mean(0))[
        ..., torch.arange(d) != 3
    ]  # the other coordinates, which a type of 16 bits can hold
    error = (rebuilt.double() - exact)[..., torch.arange(d) != 3]
    assert error.square().sum() < 1e-3 * spread.square().sum()


@dtypes
@given(small, st.integers(1, 5), seeds, st.floats(0.1, 100))
def test_an_input_scale_is_kept_beside_and_leaves_codes_and_thresholds(dtype, d, f, seed, scale):
    torch.manual_seed(seed)
    t = foreign.saelens_tensors(d, f, threshold=True, dtype=dtype)
    scale = torch.tensor(scale).item()
    x = tokens(d) / scale
    with folder() as path:
        foreign.write_saelens(path, t, "jumprelu", normalize_activations="expected_average_only_in")
        with pytest.raises(
            FormatError,
            match=r"not what activations were multiplied by; give it, sqrt\(d_in\) / their mean norm: input_scale=",
        ):
            fx.from_pretrained(path)
        module = fx.from_pretrained(path, input_scale=torch.tensor([scale]))
    assert torch.equal(plain(module).encoder.sparsifier.threshold, t["threshold"])
    assert module.about["folded"] == "nothing; b_dec and input_scale kept beside, and fx.fold folds what is"
    assert_same(module, x, foreign.saelens(x, t, kind=foreign.JUMP, scale=scale))


@pytest.mark.parametrize("how", ["layer_norm", "constant_norm_rescale", "covariance_whitening"])
def test_a_normalisation_that_cannot_be_folded_is_refused_by_its_name(tmp_path, how):
    foreign.write_saelens(
        tmp_path, foreign.saelens_tensors(2, 3, threshold=True), "jumprelu", normalize_activations=how
    )
    with pytest.raises(FormatError) as caught:
        fx.from_pretrained(tmp_path, input_scale=torch.ones(1))
    assert str(caught.value) == (
        f"{tmp_path}/cfg.json says normalize_activations={how!r}, which no weights can take in without numbers that "
        "the files do not hold; "
        "normalise the activations yourself and write 'none' there"
    )


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"architecture": "gated"}, "says architecture='gated', and known here are standard, topk, jumprelu"),
        (
            {"activation_fn": "tanh-relu"},
            "says activation_fn='tanh-relu', which SAELens 6 no longer computes; use it in the version that",
        ),
        ({"activation_fn_str": "tanh-relu"}, "says activation_fn='tanh-relu', which SAELens 6 no longer computes"),
        (
            {"finetuning_scaling_factor": True},
            "says finetuning_scaling_factor=True, which SAELens 6 no longer computes",
        ),
        ({"activation_fn_str": "topk"}, "needs k, of type int, got none"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": "5"}}, "needs k, of type int, got k='5'"),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": 5},
            "needs activation_fn_kwargs, of type dict, got activation_fn_kwargs=5",
        ),
        ({"d_in": 7}, "W_enc has the shape (2, 3), expected (d_model=7, latents=3)"),
        ({"architecture": "topk", "k": 9}, "says k=9, and the weights have 3 latents"),
    ],
    ids=str,
)
def test_saelens_settings_that_change_what_is_computed_are_refused(tmp_path, cfg, message):
    tensors = foreign.saelens_tensors(2, 3, threshold="topk" not in cfg.values())
    foreign.write_saelens(tmp_path, tensors, **({"architecture": "jumprelu"} | cfg))
    with pytest.raises(FormatError, match=re.escape(message)):
        fx.from_pretrained(tmp_path)


def test_a_scale_that_nothing_asks_for_is_refused(tmp_path):
    foreign.write_saelens(tmp_path, foreign.saelens_tensors(2, 3, threshold=True), "jumprelu")
    with pytest.raises(
        FormatError, match="cfg.json says itself how its input is scaled, got an input_scale; leave it out$"
    ):
        fx.from_pretrained(tmp_path, input_scale=torch.ones(1))
