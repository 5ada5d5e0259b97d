"""dictionary_learning's autoencoders: every number against loops over files that were written independently."""

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
@given(small, st.integers(1, 6), seeds, st.floats(0, 1))
def test_batch_top_k_is_its_formula(dtype, d, f, seed, threshold):
    torch.manual_seed(seed)
    t = foreign.dictionary_learning_tensors(d, f, k=min(2, f), threshold=threshold, dtype=dtype)
    x = tokens(d)
    with folder() as path:
        foreign.write_dictionary_learning(path, t, "BatchTopKSAE")
        module = fx.from_pretrained(path)
    assert module.about["format"] == "dictionary_learning"
    assert plain(module).encoder.sparsifier.k == min(2, f)  # the buffer's; the settings have where annealing started
    assert plain(module).encoder.sparsifier.threshold == t["threshold"]
    assert_same(module, x, foreign.dictionary_learning(x, t, (foreign.JUMP, [float(t["threshold"])] * f)))


@dtypes
@given(small, st.integers(1, 6), seeds, st.floats(-1, 1))
def test_top_k_keeps_each_tokens_k_largest_and_says_its_threshold(dtype, d, f, seed, threshold):
    torch.manual_seed(seed)
    t = foreign.dictionary_learning_tensors(d, f, k=min(2, f), threshold=threshold, dtype=dtype)
    x = tokens(d)
    with folder() as path:
        foreign.write_dictionary_learning(path, t, "AutoEncoderTopK")
        module = fx.from_pretrained(path)
    assert_same(module, x, foreign.dictionary_learning(x, t, (foreign.TOPK, min(2, f))))
    assert module.about.get("threshold") == (float(t["threshold"]) if t["threshold"] >= 0 else None)
    gate = fx.BatchTopK(min(2, f)).eval()  # for those who ask
    gate.threshold.fill_(abs(threshold))
    plain(module).encoder.sparsifier = gate
    assert_same(module, x, foreign.dictionary_learning(x, t, (foreign.JUMP, [float(gate.threshold)] * f)))


@given(small, st.integers(2, 6), seeds)
def test_a_threshold_that_was_never_set_keeps_every_positive(d, f, seed):
    torch.manual_seed(seed)
    t = foreign.dictionary_learning_tensors(d, f, k=2, threshold=-1.0)
    x = tokens(d)
    with folder() as path:
        foreign.write_dictionary_learning(path, t, "BatchTopKSAE")
        with pytest.warns(
            UserWarning, match="has a threshold that was never set, so every positive code is kept; calibrate it"
        ):
            module = fx.from_pretrained(path)
    assert_same(module, x, foreign.dictionary_learning(x, t, (foreign.RELU,)))


def test_a_class_that_is_not_known_is_refused_by_its_name(tmp_path):
    foreign.write_dictionary_learning(
        tmp_path, foreign.dictionary_learning_tensors(2, 3, k=1, threshold=0.5), "GatedAutoEncoder"
    )
    with pytest.raises(
        FormatError, match="says dict_class='GatedAutoEncoder', and known here are BatchTopKSAE, AutoEncoderTopK$"
    ):
        fx.from_pretrained(tmp_path)
