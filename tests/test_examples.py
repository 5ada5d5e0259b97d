import importlib
import json
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from language import make_model, make_tokenizer, words
from safetensors.torch import load_file

import fmxnn as fx
from fmxnn.core.files.locks import locked
from fmxnn.reports import command_line

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("fmxnn.reports.train")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(folder)
    make_model().save_pretrained(folder)
    (folder / "text.txt").write_text(words(6000))
    return folder


def run(arguments):
    return command_line.main(["train", *arguments])


def arguments(model, out, *more):
    sizes = (
        "--layers 0 2 --latents 32 --k 3 --context 16 --batch 64 --tokens 1280 --heldout 500 --device cpu --dtype "
        "float32 --evaluate-every 7"
    )
    return [*sizes.split(), "--model", str(model), "--text", str(model / "text.txt"), "--out", str(out), *more]


@pytest.mark.parametrize(
    ("more", "weight"),
    [
        (("--weight", "dense", "--start", "tied"), "DenseWeight"),
        (("--weight", "cp", "--start", "data"), "CPWeight"),
        (("--weight", "tr", "--share", "0.5"), "TensorRingWeight"),
        (("--weight", "tr-wide", "--start", "isometric", "--auxiliary"), "TensorRingWeight"),
        (("--weight", "cp", "--no-scale"), "CPWeight"),
        (("--weight", "latents r, d_model r, layers r; r=4", "--dtype", "bfloat16"), "EinsumWeight"),
    ],
)
def test_the_trainer_leaves_a_measured_dictionary_that_loads(train, model, tmp_path, more, weight):
    out = tmp_path / "run"
    assert run(arguments(model, out, *more)) == 0
    module = fx.from_pretrained(out / "crosscoder")
    assert type(module.encoder.weight).__name__ == weight
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [7, 14, 20]
    assert {"heldout/mse", "heldout/ev", "heldout/functional_coherence", "l0_before_calibration"} <= lines[-1].keys()
    assert "| tokens | 1280 |" in (out / "crosscoder" / "README.md").read_text()


def harvested(model, out, *more):
    given = ["--text", str(model / "text.txt"), "--context", "16", "--device", "cpu", "--out", str(out)]
    tokens = str(1280 + 500 + 16)  # as many as the runs of `arguments` read
    layers = ["--layers", "0", "2", "--dtype", "float32", "--tokens", tokens]
    assert command_line.main(["harvest", str(model), *more, *given, *layers]) == 0
    sizes = "--latents 32 --k 3 --batch 64 --tokens 1280 --heldout 500 --device cpu --dtype float32 --evaluate-every 7"
    return [*sizes.split(), "--activations", str(out)]


@pytest.mark.parametrize("places", [(), ("--at", "mlp_in", "--to", "mlp_out")])
def test_a_run_from_a_store_ends_with_the_bits_of_one_from_the_text(train, model, tmp_path, places):
    store, text, disk = (tmp_path / name for name in ("cache", "text", "disk"))
    given = harvested(model, store, *places)
    assert run(arguments(model, text, *places, "--weight", "dense")) == 0
    assert run([*given, "--weight", "dense", "--out", str(disk)]) == 0
    one, other = (load_file(out / "crosscoder" / "model.safetensors") for out in (text, disk))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (text / "log.jsonl").read_text() == (disk / "log.jsonl").read_text()
    about = fx.from_pretrained(disk / "crosscoder").about
    assert (about["base_model"], about["layers"], about["activations"]) == (model.name, [0, 2], "cache")
    assert (about.get("at"), about.get("to")) == (("mlp_in", "mlp_out") if places else (None, None))
    store.rename(tmp_path / "moved")
    assert (
        run([*given, "--activations", str(tmp_path / "moved"), "--weight", "dense", "--out", str(disk), "--resume"])
        == 0
    )


def test_a_run_of_several_models_names_them(train, model, tmp_path):
    given = harvested(model, tmp_path / "cache", str(model))
    assert run([*given, "--tokens", "640", "--out", str(tmp_path / "run")]) == 0
    about = fx.from_pretrained(tmp_path / "run" / "crosscoder").about
    names = [f"{model.name}-1", f"{model.name}-2"]
    assert about["base_model"] == names
    assert about["layers"] == [f"{name}:{layer}" for name in names for layer in (0, 2)]


def test_what_does_not_go_with_a_store_is_one_sentence(train, model, tmp_path, capsys):
    given = harvested(model, tmp_path / "cache")
    for name, value in (("layers", "1"), ("model", str(model)), ("text", "a.txt"), ("at", "mlp_in"), ("context", "9")):
        assert run([*given, f"--{name}", value, "--out", str(tmp_path / "run")]) == 1
        said = f"error: activations on disk are of one model, text and layers; leave out --{name}\n"
        assert said in capsys.readouterr().err
    assert run([*given, "--activations", str(tmp_path / "none"), "--out", str(tmp_path / "run")]) == 1
    assert "error: there is no folder " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_text_that_ends_early_is_said(train, model, tmp_path, capsys):
    assert run(arguments(model, tmp_path / "run", "--tokens", "12800")) == 0
    said = re.search(r"the text ended after ([\d,]+) of 12,800 tokens; give more", "".join(capsys.readouterr()))
    assert int(said[1].replace(",", "")) == fx.from_pretrained(tmp_path / "run" / "crosscoder").about["tokens"]


def test_one_name_without_a_dot_that_is_no_file_is_a_dataset(train, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.datasets, "load_dataset", lambda name, **options: (name, options))
    dataset = ("some/text", {"split": "train", "streaming": True})
    assert train.open_text(("some/text",)) == importlib.import_module("paper_data").open_text(("some/text",)) == dataset
    assert train.open_text(("some/text.txt",)) == [Path("some/text.txt")]
    assert train.open_text(("some/text", "more")) == [Path("some/text"), Path("more")]
    (tmp_path / "mine").write_text("a text")
    assert train.open_text(("mine",)) == [Path("mine")]


def test_resuming_a_run_that_is_done_changes_nothing(train, model, tmp_path):
    out = tmp_path / "run"
    assert run(arguments(model, out)) == 0
    files = [out / "crosscoder" / "model.safetensors", out / "log.jsonl"]
    first = [path.read_bytes() for path in files]
    with files[1].open("a") as log:
        log.write('{"step": 1')  # a line that a crash cut
    assert run(arguments(model, out, "--resume")) == 0
    assert [path.read_bytes() for path in files] == first
    assert {path.name for path in out.iterdir()} == {"crosscoder", "log.jsonl", "step-00000020"}


def test_another_text_under_the_same_name_is_not_resumed(train, model, tmp_path, capsys):
    out, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text(words(6000))
    assert run([*arguments(model, out), "--text", str(text)]) == 0
    text.write_text(words(6000, seed=1))
    assert run([*arguments(model, out, "--resume"), "--text", str(text)]) == 1
    assert re.search(
        r"error: .*step-00000020 was saved with other arguments: stream.text was '\w+' and is '\w+'; resume",
        capsys.readouterr().err,
    )


def test_a_second_run_in_a_folder_is_told_of_the_first(train, model, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    with locked(out / "log.jsonl"):
        assert run(arguments(model, out)) == 1
    assert f"error: {out / 'log.jsonl'} is being written by process {os.getpid()} on " in capsys.readouterr().err
    assert not list(out.iterdir())


class _KilledError(BaseException):
    """What no handler of the example catches."""


@pytest.mark.parametrize("before", ["calibrate", "fold_scale"])
def test_a_run_killed_before_or_after_its_threshold_is_set_ends_with_the_same_bits(
    train, model, tmp_path, monkeypatch, before
):
    def killed(*_):
        raise _KilledError

    assert run(arguments(model, tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, before, killed)
        with pytest.raises(_KilledError):
            run(arguments(model, tmp_path / "killed"))
    assert run(arguments(model, tmp_path / "killed", "--resume")) == 0
    whole, other = ((tmp_path / name / "crosscoder" / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == other
    tensors = load_file(tmp_path / "whole" / "crosscoder" / "model.safetensors")
    (newest,) = sorted((tmp_path / "whole").glob("step-*"))[-1:]
    followed = load_file(newest / "crosscoder.safetensors")["encoder.sparsifier.threshold"]
    assert tensors["encoder.sparsifier.threshold"] != followed  # a checkpoint goes on with the average of training


def test_a_logger_gets_every_line(train, model, tmp_path, monkeypatch):
    got = []
    fake = types.SimpleNamespace(
        init=lambda **options: got.append(options["config"]["k"]),
        log=lambda numbers, step: got.append(step),
        finish=lambda: got.append("done"),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    assert run(arguments(model, tmp_path / "run", "--logger", "trackio")) == 0
    assert got == [3, 7, 14, 20, "done"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--layers", "0", "9"), "model0 has the layers 0 to 3, got 9; name layers among these"),
        (("--k", "33"), "the sparsifier keeps k=33 latents a token, and the weight has latents=32; take k <= 32"),
        (
            ("--mask-p", "1.0"),
            "LayerMask needs 0 <= p < 1, the probability that a layer is dropped (or one for each layer), got p=1.0",
        ),
        (
            ("--weight", "latents r, d_model r"),
            "a weight has the axes layers, d_model and latents, and 'latents r, d_model r' has no layers",
        ),
        (
            ("--start", "data", "--at", "mlp_in", "--to", "mlp_out"),
            "--start data sets the decoder by x, and a transcoder rebuilds y; take another --start",
        ),
        (
            ("--text", "missing.txt"),
            "there is no text file 'missing.txt'; give the path of a file, or texts as a list of strings",
        ),
        (
            ("--heldout", "100000"),
            "a split at 100,000 tokens needs more than that, and the text gives 6,000; give more text or split earlier",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(train, model, tmp_path, capsys, more, sentence):
    out = tmp_path / "run"
    assert run(arguments(model, out, *more)) == 1
    assert f"error: {sentence}\n" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_where_there_is_none_is_one_sentence(train, model, tmp_path, capsys):
    assert run(arguments(model, tmp_path / "run", "--device", "cuda")) == 1
    assert "error: device 'cuda' was asked for and torch sees no GPU; use --device cpu\n" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_runs_on_a_text_of_ones_own(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    demo = importlib.import_module("demo")
    monkeypatch.setattr(demo, "HELDOUT", 1500)
    text = tmp_path / "text.py"
    text.write_text(Path(demo.__file__).read_text() * 3)
    demo.main(["--steps", "3", "--out", str(tmp_path / "demo"), "--text", str(text)])
    printed = capsys.readouterr().out
    assert "found every number the same to the last bit" in printed
    assert printed.count("| tensor ring") == 2
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {
        "best",
        "coherence.png",
        "profile.png",
        "report.md",
    }
    assert fx.from_pretrained(tmp_path / "demo" / "best").encoder.weight.latents == demo.LATENTS


@pytest.fixture
def planted(train):
    return importlib.import_module("planted")


def test_the_planted_example_measures_every_variant_and_goes_on_where_it_stopped(planted, tmp_path, capsys):
    given = ["seconds", "--steps", "5", "--device", "cpu", "--out", str(tmp_path), "--seeds", "1", "2", "--variants"]
    assert planted.main([*given, "dense-tied", "tr-wide-isometric-p0.1-aux"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| all | 96 | ") == 4
    files = sorted((tmp_path / "seconds" / "results").iterdir())
    assert [path.stem for path in files] == [
        f"{slug}-lr1-seed{seed}"
        for slug in ("dense-tied-p0-share1-aux0", "tr-wide-isometric-p0.1-share1-aux1")
        for seed in (1, 2)
    ]
    first = [json.loads(path.read_text()) for path in files]
    assert [record["oracle"]["mcc"] for record in first] == pytest.approx([1] * 4)
    assert first[0]["oracle"] != first[1]["oracle"]
    assert first[0]["by_kind"]["all"]["mcc"] == first[0]["recovery"]["mcc"]
    files[3].unlink()
    times = [path.stat().st_mtime_ns for path in files[:3]]
    assert planted.main([*given, "dense-tied", "tr-wide-isometric-p0.1-aux", "cp-paper"]) == 0
    assert [path.stat().st_mtime_ns for path in files[:3]] == times
    again = json.loads(files[3].read_text())
    assert json.dumps(again["by_kind"]) == json.dumps(first[3]["by_kind"])  # which compares nan as well
    assert capsys.readouterr().out.count("| all | 96 | ") == 3


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--variants", "ring"), "a variant is called dense, sae, tr, tr-wide, cp, then paper, tied, isometric, data, "
            "as in tr-wide-isometric-aux, got 'ring'"),
        (("--variants", "sae-tied"), "planted.py trains one crosscoder on all layers, got an SAE per layer; leave it "
            "out"),
        (("--steps", "2"), "{out}/seconds holds results of other steps or another learning rate; choose another --out"),
    ],
)  # fmt: skip
def test_a_mistake_with_planted_features_is_one_sentence(planted, tmp_path, capsys, more, sentence):
    given = ["seconds", "--device", "cpu", "--out", str(tmp_path), "--seeds", "0"]
    assert planted.main([*given, "--variants", "cp-tied", "--steps", "1"]) == 0
    capsys.readouterr()
    assert planted.main([*given, *more]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {sentence.format(out=tmp_path)}"


@pytest.fixture
def variants(train):
    return importlib.import_module("variants")


def test_every_variant_of_the_documentation_trains_comes_back_and_takes_both_paths_alike(variants, capsys):
    assert variants.main(["--steps", "4", "--tokens", "3000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:] == list(variants.VARIANTS)


@pytest.mark.parametrize("spoil", ["error", "bits", "paths"])
def test_a_variant_that_fails_a_check_is_named_and_exits_with_1(variants, monkeypatch, capsys, spoil):
    if spoil == "error":
        errors = iter([1.0, 2.0])
        monkeypatch.setattr(variants, "error", lambda *_: next(errors))
    if spoil == "bits":
        monkeypatch.setattr(variants.fx, "from_pretrained", lambda folder: variants.VARIANTS["TR"]([]).crosscoder)
    if spoil == "paths":
        monkeypatch.setattr(variants, "difference", lambda *_: 1e-3)
    assert variants.main(["--steps", "6", "--tokens", "3000", "--only", "TR"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "failed: TR"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--only", "TR", "sae"), "there is no variant 'sae'; take from 'dense', 'TR', "),
        (("--tokens", "2048"), "8 batches of 256 tokens are held out, and the text gives "),
        (("--text", "missing.txt"), "there is no text file 'missing.txt'; give the path of a file"),
        (("--steps", "0"), "a variant trains for at least one step and some seconds, got steps=0 and seconds=60.0"),
        (
            ("--seconds", "-1"),
            "a variant trains for at least one step and some seconds, got steps=None and seconds=-1.0",
        ),
    ],
)
def test_a_mistake_with_the_variants_is_one_sentence(variants, capsys, more, sentence):
    assert variants.main([*more]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {sentence}")


def run_example(name, monkeypatch, capsys, out, *sizes):
    """Trains, and gives the explained variance of each layer."""
    monkeypatch.syspath_prepend(EXAMPLES)
    importlib.import_module(name).main([*sizes, "--out", str(out)])
    rows = re.findall(r"^ *(\S+) +[\d.e-]+ +(-?[\d.]+) .*$", capsys.readouterr().out.split("by layer")[1], re.MULTILINE)
    page = (out / "report" / "features.html").read_text()
    return {layer: float(explained) for layer, explained in rows}, page


def test_the_transcoder_example_rebuilds_mlps_and_draws_a_page(monkeypatch, tmp_path, capsys):
    sizes = "--layers 5 6 --latents 96 --steps 150 --batch 256"
    explained, page = run_example("transcoder", monkeypatch, capsys, tmp_path, *sizes.split())
    assert explained.keys() == {"5", "6"}
    assert min(explained.values()) > 0.1
    transcoder = fx.from_pretrained(tmp_path / "transcoder")
    assert (transcoder.about["at"], transcoder.about["to"]) == ("mlp_in", "mlp_out")
    assert transcoder.decoder.weight.latents == 192
    assert page.count("<h2") > 8


def test_the_example_of_a_base_and_a_chat_model_draws_a_page_with_their_names(monkeypatch, tmp_path, capsys):
    sizes = "--conversations 200 --latents 96 --steps 60 --batch 128"
    explained, page = run_example("base_and_chat", monkeypatch, capsys, tmp_path, *sizes.split())
    assert explained.keys() == {"tiny-lm:6", "tiny-lm-chat:6"}
    assert min(explained.values()) > 0.5
    assert fx.from_pretrained(tmp_path / "crosscoder").about["layers"] == ["tiny-lm:6", "tiny-lm-chat:6"]
    assert "tiny-lm-chat:6" in page


def test_the_steering_example_writes_losses_texts_and_a_figure(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    steering = importlib.import_module("steering")
    sizes = ["--steps", "2", "--heldout", "600", "--strengths", "0", "2"]
    steering.main([*sizes, "--out", str(tmp_path), "--figure", str(tmp_path / "steering.png")])
    said = capsys.readouterr().out
    rows = re.findall(r"^\| +([02]) \| +([\d.]+) \| +([\d.]+) \| +([\d.]+) \|$", said, re.MULTILINE)
    assert [row[0] for row in rows] == ["0", "2"]
    assert len(set(rows[0][1:])) == 1  # strength zero does nothing
    assert (tmp_path / "steering.png").stat().st_size > 10_000
    assert fx.from_pretrained(tmp_path / "crosscoder").about["layers"] == list(steering.LAYERS)
