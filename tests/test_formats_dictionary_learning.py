"""dictionary_learning's autoencoders: every number against loops over files that were written independently."""

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
@given(small, st.integers(1, 6), seeds, st.sampled_from(["BatchTopKSAE", "AutoEncoderTopK"]), st.floats(0, 1))
def test_dictionary_learning_is_its_formula(dtype, d, f, seed, dict_class, threshold):
    torch.manual_seed(seed)
    t = foreign.dictionary_learning_tensors(d, f, k=min(2, f), threshold=threshold, dtype=dtype)
    x = tokens(d)
    with folder() as path:
        foreign.write_dictionary_learning(path, t, dict_class)
        module = fx.from_pretrained(path)
    assert module.about["format"] == "dictionary_learning"
    assert module.encoder.sparsifier.k == min(2, f)  # the buffer's; the settings have where annealing started
    assert module.encoder.sparsifier.threshold == t["threshold"]
    assert_same(module, x, foreign.dictionary_learning(x, t, (foreign.JUMP, [float(t["threshold"])] * f)))


@given(small, st.integers(2, 6), seeds)
def test_a_threshold_that_was_never_set_keeps_the_k_largest_or_every_positive(d, f, seed):
    torch.manual_seed(seed)
    t = foreign.dictionary_learning_tensors(d, f, k=2, threshold=-1.0)
    x = tokens(d)
    with folder() as path:
        foreign.write_dictionary_learning(path, t, "AutoEncoderTopK")
        assert_same(fx.from_pretrained(path), x, foreign.dictionary_learning(x, t, (foreign.TOPK, 2)))
        foreign.write_dictionary_learning(path, t, "BatchTopKSAE")
        with pytest.warns(UserWarning, match="has a threshold that was never set, so every positive code is kept; calibrate it"):
            module = fx.from_pretrained(path)
    assert_same(module, x, foreign.dictionary_learning(x, t, (foreign.RELU,)))


def test_a_class_that_is_not_known_is_refused_by_its_name(tmp_path):
    foreign.write_dictionary_learning(tmp_path, foreign.dictionary_learning_tensors(2, 3, k=1, threshold=0.5), "GatedAutoEncoder")
    with pytest.raises(FormatError, match="says dict_class='GatedAutoEncoder', and known here are BatchTopKSAE, AutoEncoderTopK$"):
        fx.from_pretrained(tmp_path)
