"""Formats of one layer and of causal layers: every number against loops over files that were written independently."""

import json
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import foreign_sae as foreign
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import randn, seeds
from torch.testing import assert_close

import fmxnn as fx
from fmxnn.formats import FormatError
from fmxnn.integrity import IntegrityError

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
small = st.integers(1, 4)


@contextmanager
def folder():
    with TemporaryDirectory() as name:
        yield Path(name) / "released"


def assert_same(module, x, expected, *, stacked=False):
    """Codes and reconstruction are those of the loops; the dtype says how nearly, relative to the largest number of each."""
    pre, codes, x_hat = expected
    rivals = torch.cat([pre.flatten(), _thresholds(module)]).sort().values
    assume(rivals.diff().min() > 1e-4 * rivals.abs().max())  # a tie may fall either way, folded or not
    dtype = next(module.parameters()).dtype
    given_x = (x if stacked else x.unsqueeze(-2)).to(dtype)
    with torch.no_grad():
        z, out = module.encode(given_x), module(given_x)
    assert z.dtype == out.dtype == dtype
    assert_near(z, codes, dtype)
    assert_near(out if stacked else out.squeeze(-2), x_hat, dtype)


def assert_near(got, expected, dtype):
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max() <= DTYPES[dtype] * (1 + expected.abs().max())


def _thresholds(module):
    """Zero and those of the gate, each once."""
    found = [buffer.double().flatten() for name, buffer in module.named_buffers() if name.endswith("threshold")]
    return torch.cat([torch.zeros(1, dtype=torch.float64), *found]).unique()


def tokens(*axes):
    return randn(6, *axes).float().double()  # the same numbers in both dtypes


# ---- SAELens ----


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


# ---- sparsify ----


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
        ({"signed": True}, "says signed=True, which keeps negative codes"),
        ({"activation": "softmax"}, "says activation='softmax' and k=2, and known are topk, and groupmax where k divides"),
        ({"activation": "groupmax"}, "says activation='groupmax' and k=2, and known are topk, and groupmax where k divides latents=3"),
        ({"k": 4}, "says k=4, and the weights have 3 latents"),
        ({"skip_connection": True}, "W_skip is missing"),
    ],
    ids=str,
)
def test_sparsify_settings_that_change_what_is_computed_are_refused(tmp_path, cfg, message):
    foreign.write_sparsify(tmp_path, foreign.sparsify_tensors(2, 3, skip=False), **cfg)
    with pytest.raises(FormatError, match=re.escape(message)):
        fx.from_pretrained(tmp_path)


# ---- dictionary_learning ----


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


# ---- PolySAE ----


@dtypes
@given(small, st.integers(1, 5), seeds, st.booleans(), st.integers(1, 3), st.sampled_from(["poly_topk", "poly_jumprelu"]), st.data())
def test_polysae_is_its_formula(dtype, d, f, seed, shared, order, architecture, data):
    torch.manual_seed(seed)
    ranks = sorted((data.draw(st.integers(1, f)) for _ in range(3)), reverse=True)
    jump = architecture == "poly_jumprelu"
    t = foreign.saelens_tensors(d, f, threshold=jump, dtype=dtype) | foreign.poly_tensors(d, f, ranks, shared=shared, dtype=dtype)
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


@given(seeds, st.booleans())
def test_polysae_takes_in_an_input_scale(seed, shared):
    torch.manual_seed(seed)
    t = foreign.saelens_tensors(3, 5, threshold=True) | foreign.poly_tensors(3, 5, (4, 3, 2), shared=shared)
    cfg = {"poly_order": 3, "poly_ranks": [4, 3, 2], "shared_u": shared, "normalize_activations": "expected_average_only_in"}
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
        (
            {"rescale_acts_by_decoder_norm": True},
            "says rescale_acts_by_decoder_norm=True, and PolySAE's training and inference mean different norms",
        ),
        ({"shared_u": False}, "U1 is missing"),
    ],
    ids=str,
)
def test_polysae_settings_that_do_not_fit_are_refused(tmp_path, cfg, message):
    t = foreign.saelens_tensors(3, 5, threshold=True) | foreign.poly_tensors(3, 5, (4, 3, 2), shared=True)
    t = {key: tensor for key, tensor in t.items() if key not in ("U1", "U2", "U3")}
    foreign.write_saelens(tmp_path, t, "poly_jumprelu", **({"poly_order": 3, "poly_ranks": [4, 3, 2], "shared_u": True} | cfg))
    with pytest.raises(FormatError, match=re.escape(message)):
        fx.from_pretrained(tmp_path)


# ---- causal layers ----


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
            lambda path: (path / "params_layer_3.safetensors").write_bytes((path / "params_layer_2.safetensors").read_bytes()),
            FormatError,
            "has params_layer_3.safetensors, and its tensors are of 3 layers",
        ),
        (lambda path: _say(path, affine_connection=True), FormatError, "affine_skip_connection is missing"),
        (lambda path: _say(path, architecture="topk"), FormatError, "says architecture='topk', and known here is jump_relu"),
        (lambda path: _say(path, hf_hook_point_out=["a"]), FormatError, "names 1 hook points, and the tensors are of 3 layers"),
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
    with pytest.raises(FormatError, match="says model_kind='transcoder_set', and known here is cross_layer_transcoder$"):
        fx.from_pretrained(tmp_path)
    files[1][0]["threshold"][0] = -1
    foreign.write_circuit_tracer(tmp_path, files)
    with pytest.raises(FormatError, match="has thresholds below zero, above which circuit-tracer keeps negative codes"):
        fx.from_pretrained(tmp_path)


# ---- what holds for each of them ----


def write_any(path, name, dtype=torch.float32):
    if name == "saelens":
        return foreign.write_saelens(path, foreign.saelens_tensors(3, 5, threshold=True, dtype=dtype), "jumprelu")
    if name == "polysae":
        t = foreign.saelens_tensors(3, 5, threshold=True, dtype=dtype) | foreign.poly_tensors(3, 5, (4, 3, 2), shared=False, dtype=dtype)
        del t["W_dec"]
        return foreign.write_saelens(path, t, "poly_jumprelu", poly_order=3, poly_ranks=[4, 3, 2], shared_u=False)
    if name == "sparsify":
        return foreign.write_sparsify(path, foreign.sparsify_tensors(3, 5, skip=True, dtype=dtype))
    if name == "dictionary_learning":
        return foreign.write_dictionary_learning(path, foreign.dictionary_learning_tensors(3, 5, k=2, threshold=0.4, dtype=dtype))
    if name == "gemma_scope":
        return foreign.write_gemma_scope(path, foreign.gemma_scope_files(3, 3, 5, skip=True, dtype=dtype), affine_connection=True)
    return foreign.write_circuit_tracer(path, foreign.circuit_tracer_files(3, 3, 5, threshold=True, dtype=dtype))


NAMES = ("saelens", "polysae", "sparsify", "dictionary_learning", "gemma_scope", "circuit_tracer")
formats = pytest.mark.parametrize("name", NAMES)


def load_any(path):
    return torch.load(path) if path.suffix == ".pt" else load_file(path)


def save_any(tensors, path):
    (torch.save if path.suffix == ".pt" else save_file)(tensors, path)


@formats
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_was_read_is_saved_in_our_format_and_comes_back_bit_for_bit(tmp_path, name, dtype):
    write_any(tmp_path / "theirs", name, dtype)
    module = fx.from_pretrained(tmp_path / "theirs")
    assert not module.training
    fx.save_pretrained(module, tmp_path / "ours", about=module.about)
    again = fx.from_pretrained(tmp_path / "ours")
    assert again.about == module.about
    assert again.about["format"] == name
    before, after = module.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    weight = getattr(module, "crosscoder", module).encoder.weight
    x = randn(4, weight.layers, weight.d_model).to(dtype)
    assert torch.equal(module(x), again(x))


@formats
def test_headers_alone_give_the_same_module_on_the_meta_device(tmp_path, name):
    write_any(tmp_path, name)
    module, headers = fx.from_pretrained(tmp_path), fx.from_pretrained(tmp_path, device="meta")
    assert fx.describe(module) == fx.describe(headers)
    assert all(parameter.is_meta for parameter in headers.parameters())


@formats
def test_a_file_with_one_fault_gives_one_sentence_that_names_it(tmp_path, name):
    for file in write_any(tmp_path, name):
        path, whole = tmp_path / file, load_any(tmp_path / file)
        for key in whole:
            save_any({other: tensor for other, tensor in whole.items() if other != key}, path)
            refused(tmp_path, f"{key} is missing")
            if whole[key].ndim:
                save_any(whole | {key: torch.cat([whole[key], whole[key][:1]])}, path)
                refused(tmp_path, " has the shape (")
                save_any(whole | {key: whole[key].unsqueeze(0)}, path)
                refused(tmp_path, f"{key} has the shape (1, ")
        save_any(whole | {"stranger": torch.ones(2)}, path)
        refused(tmp_path, "stranger is unknown")
        save_any(whole, path)
        content = path.read_bytes()
        for share in (0.3, 0.9):
            path.write_bytes(content[: int(share * len(content))])
            refused(tmp_path, f"{path} cannot be read", IntegrityError)
        path.write_bytes(content)
    fx.from_pretrained(tmp_path)


def refused(path, message, error=FormatError):
    with pytest.raises(error) as caught:
        fx.from_pretrained(path)
    said = str(caught.value)
    assert message in said, said
    assert str(path) in said
    assert "\n" not in said


class Mischief:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path):
    (file,) = write_any(tmp_path, "dictionary_learning")
    witness = tmp_path / "witness"
    torch.save(torch.load(tmp_path / file) | {"b_dec": Mischief(witness)}, tmp_path / file)
    with pytest.raises(FormatError, match="is a pickle that names code or classes and is refused: loading it would run them"):
        fx.from_pretrained(tmp_path)
    assert not witness.exists()


@pytest.mark.parametrize("name", ["saelens", "sparsify", "dictionary_learning"])
def test_several_layers_stack_into_one_dictionary_in_which_each_does_what_it_did_alone(tmp_path, name):
    torch.manual_seed(1)
    for i in range(3):
        if name == "sparsify":
            foreign.write_sparsify(tmp_path / f"layers.{i}", foreign.sparsify_tensors(3, 4 + i, skip=False))
        else:
            write_any(tmp_path / f"layers.{i}", name, torch.float64)
    alone = [fx.from_pretrained(tmp_path, subfolder=f"layers.{i}") for i in range(3)]
    together = fx.stack_layers(*alone)
    x = randn(7, 3, 3)
    assert_close(together(x), torch.cat([sae(x[:, i : i + 1]) for i, sae in enumerate(alone)], dim=-2))
    assert_close(together.encode(x), torch.cat([sae.encode(x[:, i : i + 1]) for i, sae in enumerate(alone)], dim=-1))
    assert not together.training
    fx.save_pretrained(together, tmp_path / "ours")
    assert torch.equal(fx.from_pretrained(tmp_path / "ours")(x), together(x))


PEAK = """
import re, sys
from pathlib import Path
import torch
import fmxnn as fx
from fmxnn.formats import gemma_scope, tensors

torch.set_num_threads(1)
small, large = sys.argv[1:]
fx.from_pretrained(small)  # what the libraries take, once
tensors.BLOCK = gemma_scope.BLOCK = 1 << 20
read = lambda word: int(re.search(word + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = read("VmRSS")
module = fx.from_pretrained(large)
kept = sum(p.numel() * p.element_size() for p in module.parameters())
print(kept, read("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peaks are read from Linux's /proc")
def test_what_is_not_kept_is_not_held(tmp_path):
    foreign.write_gemma_scope(tmp_path / "small", foreign.gemma_scope_files(2, 4, 8, skip=False, dtype=torch.float32))
    foreign.write_gemma_scope(tmp_path / "large", foreign.gemma_scope_files(4, 256, 4000, skip=False, dtype=torch.float32))
    run = subprocess.run([sys.executable, "-c", PEAK, tmp_path / "small", tmp_path / "large"], capture_output=True, text=True, check=True)
    kept, peak = map(int, run.stdout.split())
    assert 50e6 < kept < 60e6  # of 82 MB on disk
    assert peak < 1.2 * kept
