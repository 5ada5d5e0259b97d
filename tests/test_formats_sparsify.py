"""sparsify: every number against loops over files that were written independently."""

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
@given(small, st.integers(1, 6), seeds, st.sampled_from(["topk", "groupmax"]), st.booleans(), st.booleans())
def test_sparsify_is_its_formula(dtype, d, f, seed, activation, skip, transcode):
    torch.manual_seed(seed)
    t = foreign.sparsify_tensors(d, f, skip=skip, dtype=dtype)
    k, x = 2 if f % 2 == 0 else 1, tokens(d)
    cfg = {"k": k, "transcode": transcode, "activation": activation}
    if f % d == 0:  # then the number may be left to the expansion factor
        cfg |= {"num_latents": 0, "expansion_factor": f // d}
    with folder() as path:
        foreign.write_sparsify(path, t, **cfg)
        module = fx.from_pretrained(path)
    assert module.about["format"] == "sparsify"
    assert_same(module, x, foreign.sparsify(x, t, k=k, transcode=transcode, kind=activation))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            {"signed": True},
            "says signed=True, which keeps the largest magnitudes, and SignedTopK keeps the largest values; "
            "build a Crosscoder of its tensors with a gate of your own",
        ),
        (
            {"activation": "softmax"},
            "says activation='softmax' and k=2, and known are topk, and groupmax where k divides",
        ),
        (
            {"activation": "groupmax"},
            "says activation='groupmax' and k=2, and known are topk, and groupmax where k divides latents=3",
        ),
        ({"k": 4}, "says k=4, and the weights have 3 latents"),
        ({"skip_connection": True}, "W_skip is missing"),
    ],
    ids=str,
)
def test_sparsify_settings_that_change_what_is_computed_are_refused(tmp_path, cfg, message):
    foreign.write_sparsify(tmp_path, foreign.sparsify_tensors(2, 3, skip=False), **cfg)
    with pytest.raises(FormatError, match=re.escape(message)):
        fx.from_pretrained(tmp_path)
