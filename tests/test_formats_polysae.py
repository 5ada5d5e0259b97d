"""PolySAE: every number against loops over files that were written independently."""

import re

import foreign_sae as foreign
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from released import assert_same, dtypes, folder, small, tokens
from strategies import seeds

import fmxnn as fx
from fmxnn.saving.formats import FormatError


@dtypes
@given(
    small,
    st.integers(1, 5),
    seeds,
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from(["poly_topk", "poly_jumprelu"]),
    st.data(),
)
def test_polysae_is_its_formula(dtype, d, f, seed, shared, order, architecture, data):
    torch.manual_seed(seed)
    ranks = sorted((data.draw(st.integers(1, f)) for _ in range(3)), reverse=True)
    jump = architecture == "poly_jumprelu"
    t = foreign.saelens_tensors(d, f, threshold=jump, dtype=dtype) | foreign.poly_tensors(
        d, f, ranks, shared=shared, dtype=dtype
    )
    if data.draw(st.booleans()):  # what decodes nothing may be there or not
        t |= {"W_dec": torch.full((f, d), torch.nan, dtype=dtype)}
    x, k = tokens(d), min(2, f)
    gate = (foreign.JUMP, foreign.lists(t["threshold"])) if jump else (foreign.TOPK, k)
    expected = foreign.poly(x, t, ranks, gate=gate, order=order, shared=shared)
    with folder() as path:
        foreign.write_saelens(path, t, architecture, k=k, poly_order=order, poly_ranks=ranks, shared_u=shared)
        module = fx.from_pretrained(path)
    assert module.about["format"] == "polysae"
    assert_same(module, x, expected)


@dtypes
@given(
    small, st.integers(1, 5), seeds, st.booleans(), st.integers(1, 3), st.sampled_from(["W_dec", "alone"]), st.data()
)
def test_polysae_chooses_in_units_of_norms_and_its_classes_mean_different_ones(
    dtype, d, f, seed, shared, order, rescale, data
):
    torch.manual_seed(seed)
    ranks = sorted((data.draw(st.integers(1, f)) for _ in range(3)), reverse=True)
    t = foreign.saelens_tensors(d, f, threshold=False, dtype=dtype) | foreign.poly_tensors(
        d, f, ranks, shared=shared, dtype=dtype
    )
    x, k = tokens(d), min(2, f)
    expected = foreign.poly(x, t, ranks, gate=(foreign.TOPK, k), order=order, shared=shared, rescale=rescale)
    cfg = {"k": k, "poly_order": order, "poly_ranks": ranks, "shared_u": shared, "rescale_acts_by_decoder_norm": True}
    cfg |= {"aux_loss_coefficient": 1.0, "decoder_init_norm": 0.1} if rescale == "alone" else {}
    with folder() as path:
        foreign.write_saelens(path, t, "poly_topk", **cfg)
        module = fx.from_pretrained(path)
    assert module.about["folded"] == "decoder norms; b_dec kept beside, and fx.fold folds what is"
    assert_same(module, x, expected)


@given(seeds, st.booleans())
def test_polysae_takes_in_an_input_scale(seed, shared):
    torch.manual_seed(seed)
    t = foreign.saelens_tensors(3, 5, threshold=True) | foreign.poly_tensors(3, 5, (4, 3, 2), shared=shared)
    cfg = {
        "poly_order": 3,
        "poly_ranks": [4, 3, 2],
        "shared_u": shared,
        "normalize_activations": "expected_average_only_in",
    }
    with folder() as path:
        foreign.write_saelens(path, t, "poly_jumprelu", **cfg)
        module = fx.from_pretrained(path, input_scale=torch.tensor(4.0))
    x, gate = tokens(3), (foreign.JUMP, foreign.lists(t["threshold"]))
    pre, codes, x_hat = foreign.poly(4 * x, t, (4, 3, 2), gate=gate, shared=shared)
    assert_same(module, x, (pre, codes, x_hat / 4))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"poly_order": 4}, "says poly_order=4, and known are 1, 2 and 3"),
        ({"poly_ranks": [2, 2, 2]}, "C1 has the shape (3, 4), expected (d_model=3, r1=2)"),
        ({"shared_u": False}, "U1 is missing"),
    ],
    ids=str,
)
def test_polysae_settings_that_do_not_fit_are_refused(tmp_path, cfg, message):
    t = foreign.saelens_tensors(3, 5, threshold=True) | foreign.poly_tensors(3, 5, (4, 3, 2), shared=True)
    t = {key: tensor for key, tensor in t.items() if key not in ("U1", "U2", "U3")}
    foreign.write_saelens(
        tmp_path, t, "poly_jumprelu", **({"poly_order": 3, "poly_ranks": [4, 3, 2], "shared_u": True} | cfg)
    )
    with pytest.raises(FormatError, match=re.escape(message)):
        fx.from_pretrained(tmp_path)
