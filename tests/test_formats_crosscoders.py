import tempfile
from pathlib import Path

import foreign_crosscoders as foreign
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

import fmxnn as fx

dtypes = st.sampled_from([torch.float32, torch.float64])
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}


@st.composite
def axes(draw):
    return draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 6))


def assert_parity(write, sizes, seed, dtype, *, scale=None, codes=None, **options):
    """What is read computes what the formula says of the files, and our own format keeps it bit for bit."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "foreign"
        folder.mkdir()
        formula = write(folder, *sizes, dtype, **options)
        module = fx.from_pretrained(folder, input_scale=scale)
        fx.save_pretrained(module, Path(parent) / "ours", about=module.about)
        again = fx.from_pretrained(Path(parent) / "ours")
    layers = 1 if options.get("transcoder") else sizes[0]
    x = torch.randn(5, layers, sizes[1], dtype=dtype)
    z, x_hat = formula(x) if scale is None else formula(x, scale)
    found, rebuilt = module.encode(x), module(x)
    assert rebuilt.dtype == dtype
    torch.testing.assert_close(found.double(), z if codes is None else codes(z), **TOLERANCE[dtype])
    torch.testing.assert_close(rebuilt.double(), x_hat, **TOLERANCE[dtype])
    assert torch.equal(again(x), rebuilt)
    assert fx.describe(again) == fx.describe(module)
    return module


def any_layers(z):
    """`tokens layers latents -> tokens latents`: one code where any layer has it; all that have it have the same."""
    return z.amax(1)


@given(axes(), seeds, dtypes, st.sampled_from(["cc_weights", "3"]))
def test_ckkissane(sizes, seed, dtype, stem):
    scale = torch.rand(sizes[0], dtype=dtype) + 0.1
    assert_parity(foreign.ckkissane, sizes, seed, dtype, scale=scale, stem=stem)


@given(
    axes(),
    seeds,
    dtypes,
    st.sampled_from(["newer", "older", "nan"]),
    st.booleans(),
    st.sampled_from(["model.safetensors", "model_final.pt"]),
)
def test_dictionary_learning_crosscoder(sizes, seed, dtype, scaled, old, file):
    prefix = "_orig_mod." if old else ""
    assert_parity(foreign.dictionary_learning, sizes, seed, dtype, batch=False, scaled=scaled, old=old, file=file, prefix=prefix)


@given(axes(), seeds, dtypes, st.sampled_from(["newer", "older", "nan"]), st.integers(1, 5), st.floats(0, 3))
def test_dictionary_learning_batch_top_k(sizes, seed, dtype, scaled, code, threshold):
    codes = any_layers if code == 5 else None
    assert_parity(foreign.dictionary_learning, sizes, seed, dtype, codes=codes, scaled=scaled, code=code, threshold=threshold, k=1)


@given(axes(), seeds, dtypes, st.sampled_from(foreign.ACTIVATIONS), st.booleans(), st.booleans())
def test_crosscode(sizes, seed, dtype, activation, transcoder, biases):
    k = sizes[2] // 2 if sizes[2] % 2 == 0 else 1
    assert_parity(foreign.crosscode, sizes, seed, dtype, activation=activation, k=k, transcoder=transcoder, biases=biases)


def test_crosscode_stacks_models_and_hook_points_in_one_axis():
    module = assert_parity(foreign.crosscode, (6, 3, 4), 0, torch.float64, stacked=(2, 3))
    assert module.encoder.weight.layers == 6


@given(axes(), seeds, dtypes, st.booleans(), st.sampled_from(["relu", "topk", "jumprelu"]))
def test_llamascopium(sizes, seed, dtype, scaled, act):
    assert_parity(foreign.llamascopium, sizes, seed, dtype, codes=any_layers, scaled=scaled, act=act, k=min(2, sizes[2]))
