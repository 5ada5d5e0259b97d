import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import foreign_crosscoders as foreign
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategies import seeds

import fmxnn as fx
from fmxnn.core.files.integrity import IntegrityError
from fmxnn.saving.formats import FormatError, tensors

dtypes = st.sampled_from([torch.float32, torch.float64])
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}
FILES = ["model.safetensors", "model_final.pt"]


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
    held = again.state_dict()
    assert all(torch.equal(held[key], value) for key, value in module.state_dict().items())
    torch.testing.assert_close(
        again(x), rebuilt, **TOLERANCE[dtype]
    )  # products may round otherwise where memory is aligned otherwise
    if isinstance(module, fx.Normalised):
        torch.testing.assert_close(fx.fold(module.double())(x.double()), x_hat, **TOLERANCE[dtype])
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
    st.sampled_from(FILES),
)
def test_dictionary_learning_crosscoder(sizes, seed, dtype, scaled, old, file):
    prefix = "_orig_mod." if old else ""
    assert_parity(
        foreign.dictionary_learning, sizes, seed, dtype, batch=False, scaled=scaled, old=old, file=file, prefix=prefix
    )


@given(axes(), seeds, dtypes, st.sampled_from(["newer", "older", "nan"]), st.integers(1, 5), st.floats(0, 3))
def test_dictionary_learning_batch_top_k(sizes, seed, dtype, scaled, code, threshold):
    codes = any_layers if code == 5 else None
    assert_parity(
        foreign.dictionary_learning, sizes, seed, dtype, codes=codes, scaled=scaled, code=code, threshold=threshold, k=1
    )


@given(axes(), seeds, dtypes, st.sampled_from(foreign.ACTIVATIONS), st.booleans(), st.booleans())
def test_crosscode(sizes, seed, dtype, activation, transcoder, biases):
    k = sizes[2] // 2 if sizes[2] % 2 == 0 else 1
    assert_parity(
        foreign.crosscode, sizes, seed, dtype, activation=activation, k=k, transcoder=transcoder, biases=biases
    )


def test_crosscode_stacks_models_and_hook_points_in_one_axis():
    module = assert_parity(foreign.crosscode, (6, 3, 4), 0, torch.float64, stacked=(2, 3))
    assert module.encoder.weight.layers == 6


@given(axes(), seeds, dtypes, st.booleans(), st.sampled_from(["relu", "topk", "jumprelu"]))
def test_llamascopium(sizes, seed, dtype, scaled, act):
    assert_parity(
        foreign.llamascopium, sizes, seed, dtype, codes=any_layers, scaled=scaled, act=act, k=min(2, sizes[2])
    )


def read(write, folder, *sizes, **options):
    formula = write(folder, *sizes, torch.float64, **options)
    return fx.from_pretrained(folder), formula


@pytest.mark.parametrize("file", ["model.safetensors", "model_final.pt"])
@pytest.mark.parametrize("block", [1, 24, 100])
def test_any_size_of_block_reads_the_same(file, block, tmp_path, monkeypatch):
    torch.manual_seed(0)
    whole, formula = read(foreign.dictionary_learning, tmp_path, 3, 4, 5, file=file)
    monkeypatch.setattr(tensors, "BLOCK", block)
    in_blocks = fx.from_pretrained(tmp_path)
    assert all(
        torch.equal(one, other) for one, other in zip(whole.state_dict().values(), in_blocks.state_dict().values())
    )
    torch.testing.assert_close(in_blocks(torch.ones(1, 3, 4).double()), formula(torch.ones(1, 3, 4))[1])


def test_a_threshold_is_in_units_of_the_code_times_the_norms_and_stays_where_it_was_saved(tmp_path):
    module, _ = read(foreign.dictionary_learning, tmp_path / "", 2, 3, 4, threshold=2.5, k=3)
    gate = module.crosscoder.encoder.sparsifier
    assert (float(gate.threshold), gate.k) == (2.5, 3)  # the buffer, where the setting says 100
    fx.save_pretrained(module, tmp_path / "ours")
    assert float(fx.from_pretrained(tmp_path / "ours").crosscoder.encoder.sparsifier.threshold) == 2.5
    x = 3 * torch.randn(50, 2, 3, dtype=torch.float64)
    pre = module.crosscoder.encoder.pre_activations(module.normalisation(x))
    kept = pre.relu() * module.crosscoder.decoder.weight.norms().sum(0) > 2.5
    assert torch.equal(module.encode(x) > 0, kept)
    assert not torch.equal(kept, pre > 2.5)


@pytest.mark.parametrize("key", ["k", "threshold"])
def test_a_threshold_that_was_lost_is_an_error_and_never_a_relu(key, tmp_path):
    foreign.dictionary_learning(tmp_path, 2, 3, 4, torch.float32)
    path = tmp_path / "model.safetensors"
    held = load_file(path)
    held.pop(key)
    foreign.save(held, path)
    with pytest.raises(FormatError, match=f"does not fit its format: {key} is missing"):
        fx.from_pretrained(tmp_path)


def test_thresholds_of_layers_that_were_never_set_are_said_and_refused_in_use(tmp_path):
    foreign.dictionary_learning(tmp_path, 2, 3, 4, torch.float32, code=5, threshold=-1.0)
    with pytest.warns(
        UserWarning, match=r"threshold=\[-1.0, 0.0\], so it gives no codes until they are set; find it in data: "
    ):
        module = fx.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"those at layers axis \[0\] were never set"):
        module(torch.randn(5, 2, 3))
    module.crosscoder.encoder.sparsifier.calibrate(torch.randn(50, 4))
    assert module(torch.randn(5, 2, 3)).isfinite().all()


@pytest.mark.parametrize(("concat", "total"), [(0, 2.0), (0.5, 0), (None, 0.3)])
def test_the_settings_say_how_norms_are_mixed_and_zero_is_zero(concat, total, tmp_path):
    foreign.dictionary_learning(tmp_path, 2, 3, 4, torch.float32, code=3)
    said = json.loads((tmp_path / "config.json").read_text())
    said |= {"code_normalization_alpha_cc": total} | (
        {} if concat is None else {"code_normalization_alpha_sae": concat}
    )
    (tmp_path / "config.json").write_text(json.dumps(said))
    crosscoder = fx.from_pretrained(tmp_path).crosscoder
    each = crosscoder.decoder.weight.norms()
    expected = (1 if concat is None else concat) * each.pow(2).sum(0).sqrt() + total * each.sum(0)
    torch.testing.assert_close(crosscoder.encoder.sparsifier.score(), expected)
    for wrong in ("much", -1, True):
        (tmp_path / "config.json").write_text(json.dumps({**said, "code_normalization_alpha_cc": wrong}))
        sentence = (
            f"{tmp_path} says code_normalization_alpha_cc={wrong!r}, expected a finite number >= 0; write one there"
        )
        with pytest.raises(FormatError, match=re.escape(sentence)):
            fx.from_pretrained(tmp_path)


@pytest.mark.parametrize(("code", "limits"), [(5, torch.tensor(1.0)), (1, torch.ones(2))])
def test_thresholds_and_code_normalisation_that_disagree_are_refused(code, limits, tmp_path):
    foreign.dictionary_learning(tmp_path, 2, 3, 4, torch.float32)
    path = tmp_path / "model.safetensors"
    foreign.save(load_file(path) | {"code_normalization_id": torch.tensor(code), "threshold": limits}, path)
    with pytest.raises(
        FormatError,
        match=f"and code_normalization_id={code}; one a layer goes with 5, one number with any other; ask who wrote "
        "it, or take another file$",
    ):
        fx.from_pretrained(tmp_path)


@pytest.mark.parametrize("code", [0, 6])
def test_an_unknown_code_normalisation_is_refused(code, tmp_path):
    foreign.dictionary_learning(tmp_path, 2, 3, 4, torch.float32)
    path = tmp_path / "model.safetensors"
    foreign.save(load_file(path) | {"code_normalization_id": torch.tensor(code)}, path)
    with pytest.raises(FormatError) as caught:
        fx.from_pretrained(tmp_path)
    assert (
        str(caught.value)
        == f"{path} has the code normalisation {code}, and known are 1 CROSSCODER, 2 SAE, 3 MIXED, 4 NONE, 5 DECOUPLED"
    )


@pytest.mark.parametrize("activation", foreign.ACTIVATIONS)
def test_negative_codes_stay_where_crosscode_keeps_them(activation, tmp_path):
    module, _ = read(foreign.crosscode, tmp_path, 2, 3, 4, activation=activation, k=4)
    negative = bool((module.encode(torch.randn(100, 2, 3, dtype=torch.float64)) < 0).any())
    assert negative == (activation in ("TopkActivation", "BatchTopkActivation", "GroupMaxActivation"))


def test_scales_that_llamascopium_folded_itself_are_refused(tmp_path):
    foreign.llamascopium(tmp_path, 2, 3, 4, torch.float32)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("dataset-wise", "inference"))
    with pytest.raises(FormatError) as caught:
        fx.from_pretrained(tmp_path)
    assert str(caught.value) == (
        f"{config} says norm_activation='inference': llamascopium folds its scales into biases alone, which is wrong "
        "for layers of unequal norms; fetch "
        "the checkpoint from before, which says 'dataset-wise', or write 'none' where there never were scales"
    )


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("batch-wise", "by the mean norm of the batch"),
        ("token-wise", "by the norm of each token"),
        ("weird", "; known are"),
    ],
)
def test_a_normalisation_that_no_weights_can_do_is_refused_by_its_name(kind, how, tmp_path):
    foreign.llamascopium(tmp_path, 2, 3, 4, torch.float32)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("dataset-wise", kind))
    with pytest.raises(
        FormatError,
        match=f"says norm_activation='{kind}'.*{how}.*: normalise the activations yourself and write 'none'",
    ):
        fx.from_pretrained(tmp_path)


@pytest.mark.parametrize("stem", ["final", "pruned"])
def test_a_folder_of_checkpoints_is_read_where_the_folder_above_points_to_it(stem, tmp_path):
    formula = foreign.llamascopium(tmp_path, 2, 3, 4, torch.float64)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "sae_weights.safetensors").rename(tmp_path / "checkpoints" / f"{stem}.safetensors")
    with pytest.raises(IntegrityError, match="holds no weights; subfolder= can be 'checkpoints'$"):
        fx.from_pretrained(tmp_path)
    module, x = fx.from_pretrained(tmp_path, subfolder="checkpoints"), torch.randn(5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(module(x), formula(x)[1], **TOLERANCE[torch.float64])
    (tmp_path / "checkpoints" / f"{stem}.safetensors").rename(tmp_path / "checkpoints" / f"{stem}.pt")
    with pytest.raises(
        FormatError,
        match=f"{stem}.pt is a checkpoint for training; save it as sae_weights.safetensors with the library that "
        "wrote it",
    ):
        fx.from_pretrained(tmp_path, subfolder="checkpoints")


@pytest.mark.parametrize(
    ("write", "options"),
    [
        (foreign.ckkissane, {}),
        (foreign.dictionary_learning, {"batch": False}),
        (foreign.crosscode, {}),
        (foreign.llamascopium, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not say by what each layer was multiplied")
def test_every_layer_is_read_and_written_the_last_one_too(write, options, tmp_path):
    module, _ = read(write, tmp_path, 3, 4, 8, **options)
    x = torch.randn(20, 3, 4, dtype=torch.float64, requires_grad=True)
    for layer in range(3):
        (gradient,) = torch.autograd.grad(module(x)[:, layer].sum(), x)
        assert (gradient.abs().sum((0, 2)) > 0).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("file", ["cc_weights.pt", "model.safetensors"])
def test_loading_holds_little_more_than_it_keeps(file, tmp_path):
    """The peak of a fresh process, over what it had before; the operating system counts mapped pages too."""
    write = foreign.ckkissane if file.endswith(".pt") else foreign.dictionary_learning
    folders = [tmp_path / "large", tmp_path / "small"]
    for folder, latents in zip(folders, (32768, 32)):  # 134 MB
        folder.mkdir()
        write(folder, 2, 256, latents, torch.float32)
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK, *map(str, folders)], capture_output=True, text=True, check=True
    )
    assert 1 < float(found.stdout) < 1.2


PEAK = """
import sys
from pathlib import Path
import fmxnn as fx

def kilobytes(what):
    return int(Path("/proc/self/status").read_text().split(what + ":")[1].split()[0])

fx.from_pretrained(sys.argv[2])  # torch's own code, which is mapped when it first runs
Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
before = kilobytes("VmRSS")
module = fx.from_pretrained(sys.argv[1])
kept = sum(tensor.nbytes for tensor in module.parameters())
print((kilobytes("VmHWM") - before) * 1024 / kept)
"""
