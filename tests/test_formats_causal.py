"""Gemma Scope 2 and circuit-tracer, whose latents write later layers: every number against loops over files that were
written independently.
"""

import json
import re

import foreign_sae as foreign
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from released import assert_same, dtypes, folder, small, tokens
from strategies import randn, seeds

import fmxnn as fx
from fmxnn.core.files.integrity import IntegrityError
from fmxnn.saving.formats import FormatError


@dtypes
@given(st.integers(1, 3), small, st.integers(1, 3), seeds, st.booleans(), st.booleans())
def test_gemma_scope_is_its_formula(dtype, layers, d, f, seed, skip, causal):
    torch.manual_seed(seed)
    files = foreign.gemma_scope_files(layers, d, f, skip=skip, causal=causal, dtype=dtype)
    x = tokens(layers, d)
    with folder() as path:
        foreign.write_gemma_scope(path, files)
        module = fx.from_pretrained(path)
    assert module.about["format"] == "gemma_scope"
    assert_same(module, x, foreign.gemma_scope(x, files), stacked=True)


@dtypes
@given(st.integers(1, 3), small, st.integers(1, 3), seeds, st.booleans())
def test_circuit_tracer_is_its_formula(dtype, layers, d, f, seed, threshold):
    torch.manual_seed(seed)
    files = foreign.circuit_tracer_files(layers, d, f, threshold=threshold, dtype=dtype)
    x = tokens(layers, d)
    with folder() as path:
        foreign.write_circuit_tracer(path, files)
        module = fx.from_pretrained(path)
    assert module.about["format"] == "circuit_tracer"
    assert_same(module, x, foreign.circuit_tracer(x, files), stacked=True)


def test_a_weakly_causal_decoder_stores_nothing_for_earlier_layers(tmp_path):
    layers, d, f = 4, 3, 5
    foreign.write_gemma_scope(tmp_path, foreign.gemma_scope_files(layers, d, f, skip=False))
    module = fx.from_pretrained(tmp_path)
    assert sum(p.numel() for p in module.encoder.weight.parameters()) == layers * d * f
    assert sum(p.numel() for p in module.decoder.weight.parameters()) == (4 + 3 + 2 + 1) * d * f


def test_the_last_layer_reads_and_writes(tmp_path):
    files = foreign.circuit_tracer_files(3, 2, 4, threshold=False)
    foreign.write_circuit_tracer(tmp_path, files)
    module, x = fx.from_pretrained(tmp_path), randn(8, 3, 2)
    moved = x.clone()
    moved[:, 2] += 1
    z, other = module.encode(x), module.encode(moved)
    assert torch.equal(z[:, :8], other[:, :8])
    assert not torch.equal(z[:, 8:], other[:, 8:])
    assert not torch.equal(module(x)[:, 2], module(moved)[:, 2])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda path: (path / "params_layer_1.safetensors").unlink(),
            IntegrityError,
            "params_layer_1.safetensors is missing; fetch it again",
        ),
        (
            lambda path: (path / "params_layer_3.safetensors").write_bytes(
                (path / "params_layer_2.safetensors").read_bytes()
            ),
            FormatError,
            "has params_layer_3.safetensors, and its tensors are of 3 layers",
        ),
        (lambda path: _say(path, affine_connection=True), FormatError, "affine_skip_connection is missing"),
        (
            lambda path: _say(path, architecture="topk"),
            FormatError,
            "says architecture='topk', and known here is jump_relu",
        ),
        (
            lambda path: _say(path, hf_hook_point_out=["a"]),
            FormatError,
            "names 1 hook points, and the tensors are of 3 layers",
        ),
    ],
)
def test_gemma_scope_files_that_do_not_fit_are_refused(tmp_path, spoil, error, message):
    foreign.write_gemma_scope(tmp_path, foreign.gemma_scope_files(3, 2, 4, skip=False))
    spoil(tmp_path)
    with pytest.raises(error, match=re.escape(message)):
        fx.from_pretrained(tmp_path)


def _say(path, **said):
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | said))


def test_circuit_tracer_files_that_do_not_fit_are_refused(tmp_path):
    files = foreign.circuit_tracer_files(2, 2, 3, threshold=True)
    foreign.write_circuit_tracer(tmp_path, files)
    (tmp_path / "config.yaml").write_text("model_kind: transcoder_set\n")
    with pytest.raises(
        FormatError, match="says model_kind='transcoder_set', and known here is cross_layer_transcoder$"
    ):
        fx.from_pretrained(tmp_path)
    files[1][0]["threshold"][0] = -1
    foreign.write_circuit_tracer(tmp_path, files)
    with pytest.raises(FormatError, match="has thresholds below zero, above which circuit-tracer keeps negative codes"):
        fx.from_pretrained(tmp_path)
