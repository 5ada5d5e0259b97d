import json
import os
import subprocess
import sys

import pytest
import torch
from language import make_model, make_tokenizer
from language import words as made_up

import fmxnn as fx
from fmxnn.activations import ActivationStore, conversations, harvest
from fmxnn.core import extras
from fmxnn.reports import command_line


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        command_line.main(["--version"])
    assert capsys.readouterr().out == f"fmxnn {fx.__version__}\n"


@pytest.mark.parametrize("command", ["inspect", "train", "evaluate", "harvest"])
def test_the_help_names_every_command_and_each_has_its_own(command, capsys):
    for words in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit, match="^0$"):
            command_line.main(words)
        assert command in capsys.readouterr().out


def test_a_missing_extra_is_one_sentence(monkeypatch, capsys):
    def missing(module):
        raise ModuleNotFoundError("No module named 'tyro'", name="tyro")

    monkeypatch.setattr(extras, "import_module", missing)
    assert command_line.main(["train", "--k", "3"]) == 1
    said = "error: train needs tyro, which is not installed; pip install 'fmxnn[train]'\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("words", "given", "again"),
    [(["train", "--k", "3"], None, True), (["train"], "active", False), (["inspect", "missing"], None, False)],
)
def test_a_run_begins_again_where_its_threads_would_wait_with_a_busy_core(monkeypatch, words, given, again):
    begun = []
    monkeypatch.setattr(os, "execv", lambda program, argv: begun.append([program, *argv]))
    monkeypatch.setattr(command_line, "main", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["fmxnn", *words])
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert command_line.run() == 0
    assert begun == ([[sys.executable, sys.executable, "-m", "fmxnn", *words]] if again else [])
    assert os.environ.get("OMP_WAIT_POLICY") == ("passive" if again else given)


def test_the_module_and_the_script_are_one_command():
    found = subprocess.run([sys.executable, "-m", "fmxnn", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout == f"fmxnn {fx.__version__}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a language model that chats, with a text and conversations beside it."""
    folder = tmp_path_factory.mktemp("home") / "model"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for one in messages %}w9 {{ one.content }} <eos> {% endfor %}"
    tokenizer.save_pretrained(folder)
    make_model().float().save_pretrained(folder)
    (folder / "text.txt").write_text(made_up(1000))
    talk = [{"role": "user", "content": made_up(6)}, {"role": "assistant", "content": made_up(9, seed=1)}]
    (folder / "chat.jsonl").write_text(f"{json.dumps(talk)}\n" * 4)
    return folder


def run_harvest(model, out, *more, of="text"):
    given = [f"--{of}", str(model / {"text": "text.txt", "chat": "chat.jsonl"}[of]), "--context", "16", "--device"]
    layers = [] if "--layers" in more else ["--layers", "0", "2"]
    return command_line.main(["harvest", str(model), *more, *given, "cpu", *layers, "--out", str(out)])


@pytest.mark.parametrize(
    ("more", "layers", "where"),
    [
        ((), (0, 2), "0, 2"),
        (("--layers", "-1", "2"), (-1, 2), "-1, 2"),
        (("--layers", "2", "-1"), (2, -1), "2, -1"),
        (("--layers", "embed", "1", "mlp_out.3", "final_norm"), ("embed", 1, "mlp_out.3", "final_norm"), "embed, 1, "),
        (("--at", "attn_out", "--tokens", "300"), (0, 2), "0, 2 (attn_out)"),
        (("--at", "mlp_in", "--to", "mlp_out"), (0, 2), "0, 2 (mlp_in to mlp_out)"),
    ],
)
def test_what_is_harvested_is_what_a_call_gives(model, tmp_path, capsys, more, layers, where):
    assert run_harvest(model, tmp_path / "cache", "--dtype", "float32", *more) == 0
    said = capsys.readouterr().out
    again = ActivationStore(tmp_path / "cache")
    assert said.startswith(f"{tmp_path / 'cache'} holds {again.rows:,} tokens of model at {where}")
    named = dict(zip(more[::2], more[1::2])) if "--layers" not in more else {}
    tokens = int(named["--tokens"]) if "--tokens" in named else None
    places = {"at": named.get("--at", "block_out"), "to": named.get("--to")}
    how = {"layers": layers, "context": 16, "tokens": tokens, "batch": again.rows, **places}
    ((x, *y),) = [batch if isinstance(batch, tuple) else (batch,) for batch in again]
    ((wanted, *targets),) = [
        b if isinstance(b, tuple) else (b,) for b in harvest(str(model), model / "text.txt", **how)
    ]
    assert all(map(torch.equal, [x, *y], [wanted, *targets]))
    assert command_line.main(["inspect", str(tmp_path / "cache")]) == 0
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_on_a_cpu_only_what_is_written_is_rounded(model, tmp_path, dtype):
    for name in ("float32", dtype):
        assert run_harvest(model, tmp_path / name, "--dtype", name) == 0
    exact, rounded = (next(iter(ActivationStore(tmp_path / name))) for name in ("float32", dtype))
    step = 2**-8 * exact.abs() if dtype == "bfloat16" else exact.abs().amax(-1, keepdim=True) / 127 * 0.5001
    assert rounded.dtype == torch.float32
    assert ((exact - rounded).abs() <= step).all()


def test_several_models_read_the_same_conversations(model, tmp_path, capsys):
    assert run_harvest(model, tmp_path / "cache", str(model), of="chat") == 0
    assert "tokens of model-1, model-2 at model-1:0, model-1:2, model-2:0, model-2:2 in bf" in capsys.readouterr().out
    again = ActivationStore(tmp_path / "cache")
    assert again.contexts.digest == conversations(model / "chat.jsonl", str(model), context=16).digest
    assert again.contexts.roles is not None


def test_the_first_conversations_that_hold_the_tokens_are_read(model, tmp_path):
    whole = conversations(model / "chat.jsonl", str(model), context=16)
    each = whole.tokens // 4
    for tokens, read in ((1, 1), (each, 1), (each + 1, 2), (3 * each + 1, 4), (10**6, 4)):
        assert run_harvest(model, tmp_path / str(tokens), "--tokens", str(tokens), of="chat") == 0
        assert ActivationStore(tmp_path / str(tokens)).contexts.digest == whole[:read].digest


def test_batches_from_disk_have_the_usual_size_or_all_tokens(model, tmp_path):
    assert run_harvest(model, tmp_path / "cache", "--tokens", "300") == 0
    again = ActivationStore(tmp_path / "cache")
    assert again.shuffle.batch == again.rows
    (model / "long.txt").write_text(made_up(6000))
    long = ["--text", str(model / "long.txt"), "--layers", "0", "--device", "cpu", "--out", str(tmp_path / "long")]
    assert command_line.main(["harvest", str(model), "--context", "16", *long]) == 0
    assert ActivationStore(tmp_path / "long").shuffle.batch == 4096


def test_a_harvest_that_stopped_goes_on_and_one_that_is_done_stays(model, tmp_path, capsys):
    out = tmp_path / "cache"
    assert run_harvest(model, out) == 0
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in ("manifest.json", "shard-00000.safetensors"):
        (out / name).unlink()
    assert command_line.main(["inspect", str(out)]) == 1
    assert "is not finished: it holds 0 of 1 shards" in capsys.readouterr().err
    assert run_harvest(model, out) == run_harvest(model, out) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layers", "0", "9", "--text", "text.txt"], "model has the layers 0 to 3, got 9"),
        (["--layers", "0", "mlp", "--text", "text.txt"], "mlp"),
        (["--layers", "0", "--text", "missing.txt"], "there is no text file 'missing.txt'; give the path of a file"),
        (["--layers", "0", "--chat", "missing.jsonl"], "there is no chat file 'missing.jsonl'"),
        (["--layers", "0"], "harvest reads either a text or conversations; give --text FILE or --chat FILE"),
        (["--layers", "0", "--text", "text.txt", "--chat", "chat.jsonl"], "reads either a text or conversations"),
    ],
)
def test_a_mistake_with_a_harvest_is_one_sentence_and_leaves_nothing(model, monkeypatch, capsys, words, said):
    monkeypatch.chdir(model)
    assert (
        command_line.main(["harvest", str(model), *words, "--context", "16", "--device", "cpu", "--out", "nothing"])
        == 1
    )
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ")
    assert said in error
    assert not (model / "nothing").exists()


def test_another_dtype_is_refused_before_a_model_is_opened(capsys):
    with pytest.raises(SystemExit, match="^2$"):
        command_line.main(["harvest", "missing", "--text", "a.txt", "--layers", "0", "--dtype", "float8"])
    assert "invalid choice: 'float8'" in capsys.readouterr().err


def test_a_crosscoder_of_several_models_is_not_measured_on_a_text(tmp_path, capsys):
    crosscoder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(2, 4, 8), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 4, 8))
    )
    about = {"base_model": ["base", "chat"], "layers": ["base:1", "chat:1"]}
    fx.save_pretrained(crosscoder, tmp_path / "both", about=about)
    assert command_line.main(["evaluate", str(tmp_path / "both"), "--text", "a.txt", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "evaluate reads a text with one language model, and " in error
    assert "was trained on base, chat; call fx.evaluate with what harvest or ActivationStore gives of them" in error
