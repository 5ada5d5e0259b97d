import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language import make_model, make_tokenizer, words
from safetensors.torch import load_file, save_file
from trainers import assert_same, batch, bits, make_trainer

import fmxnn as fx
import fmxnn.training.checkpoint as checkpoint
from fmxnn.activations.harvesting import harvest
from fmxnn.activations.text import Contexts
from fmxnn.core.errors import LockedError
from fmxnn.core.files.integrity import write_folder
from fmxnn.core.files.locks import locked
from fmxnn.training import (
    AuxiliaryLoss,
    CheckpointError,
    NonFiniteError,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)

OTHER = make_trainer()
FILES = ("crosscoder.safetensors", "trainer.safetensors", "trainer.json")


def trained(steps=1, **options):
    trainer = make_trainer(**options)
    for step in range(steps):
        trainer.step(batch(step))
    return trainer


def flip(path):
    body = path.read_bytes()
    path.write_bytes(body[:-9] + bytes([body[-9] ^ 1]) + body[-8:])


def rewritten(folder, change):
    """The same checkpoint with other contents and a manifest that agrees with them."""
    kept = {name: (folder / name).read_bytes() for name in FILES}

    def fill(made):
        for name, body in kept.items():
            (made / name).write_bytes(body)
        change(made)

    for name in (*FILES, "manifest.json"):
        (folder / name).unlink()
    folder.rmdir()
    write_folder(folder, fill)


def contents(path):
    if path.is_symlink():
        return os.readlink(path)
    return path.read_bytes() if path.is_file() else {inner.name: contents(inner) for inner in path.iterdir()}


def put(folder, name, kind):
    path = folder / name
    if os.path.lexists(path):
        return
    if kind == "file":
        path.write_text("mine")
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "folder":
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    else:
        save_checkpoint(folder / "made", OTHER, {}).rename(path)
        shutil.rmtree(folder / "made")
        if kind == "damaged":
            flip(path / "trainer.safetensors")


KINDS = st.sampled_from(["file", "dangling link", "folder", "another run", "damaged"])
NAMES = st.one_of(
    st.integers(1, 12).map("step-{:08d}".format),
    st.sampled_from(["step-00990000", "step-100000001", "step-xyz", "step-7", "steps"]),
)


@given(st.lists(st.tuples(NAMES, KINDS), max_size=6), st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_what_was_just_saved_stays_and_what_is_no_whole_checkpoint_of_this_run_is_never_lost(others, steps):
    with tempfile.TemporaryDirectory() as name:
        folder, trainer, mine = Path(name), trained(), {}
        for other, kind in others:
            put(folder, other, kind)
        before = sorted(map(repr, map(contents, folder.iterdir())))
        for step in steps:
            trainer.steps = step
            path = save_checkpoint(folder, trainer, {})
            mine[path.name] = contents(path)
            kept = sorted(mine)
            for old in [each for each in kept if each != path.name][: max(0, len(kept) - 3)]:
                del mine[old]
            assert {each: contents(folder / each) for each in mine} == mine
            there = [contents(each) for each in folder.iterdir() if each.name not in mine]
            assert sorted(map(repr, there)) == before  # under their own names, or aside


def test_the_numbers_of_checkpoints_compare_as_numbers(tmp_path):
    trainer = trained()
    for step in range(99_999_996, 100_000_003):
        trainer.steps = step
        assert save_checkpoint(tmp_path, trainer, {}).exists()
        assert list_checkpoints(tmp_path)[-1].name == f"step-{step}"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-100000000", "step-100000001", "step-100000002"]


def test_three_whole_checkpoints_are_kept_beside_damaged_ones(tmp_path):
    trainer = make_trainer()
    for step in range(1, 7):
        trainer.steps = step
        path = save_checkpoint(tmp_path, trainer, {})
        if step in (2, 4):
            flip(path / FILES[step // 2 - 1])
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:08d}" for step in (2, 3, 4, 5, 6)]


def test_an_old_checkpoint_that_cannot_be_deleted_spoils_no_save(tmp_path, monkeypatch):
    trainer, rename = trained(), os.rename

    def barred(source, target, **options):
        if Path(source).name == "step-00000001":
            raise PermissionError(13, "Permission denied", str(source))
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", barred)
    for step in range(1, 6):
        trainer.steps = step
        assert save_checkpoint(tmp_path, trainer, {}).exists()
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:08d}" for step in (1, 3, 4, 5)]


def test_a_step_that_is_damaged_is_saved_again_and_what_stood_there_is_put_aside(tmp_path):
    trainer = trained()
    path = save_checkpoint(tmp_path, trainer, {})
    for number in (1, 2):
        flip(path / "trainer.safetensors")
        damaged = contents(path)
        assert save_checkpoint(tmp_path, trainer, {}) == path
        assert contents(tmp_path / f"step-00000001.aside-{number}") == damaged
    assert list_checkpoints(tmp_path) == [path]
    assert load_checkpoint(tmp_path, make_trainer(), {}) == []


def test_checkpoints_of_two_runs_in_one_folder_are_told_apart(tmp_path):
    one, other = trained(5), trained(2)
    save_checkpoint(tmp_path, one, {})
    save_checkpoint(tmp_path, other, {})
    resumed = make_trainer()
    assert load_checkpoint(tmp_path, resumed, {}) == [
        "step-00000002 is of another run than step-00000005, which was taken"
    ]
    assert resumed.run == one.run != other.run


def test_a_second_writer_is_told_of_the_first_and_harms_nothing(tmp_path):
    trainer = trained()
    path = save_checkpoint(tmp_path, trainer, {})
    before = contents(tmp_path)
    trainer.step(batch(1))
    with (
        locked(tmp_path),
        pytest.raises(LockedError, match=rf"is being written by process {os.getpid()} on .*; wait until it is done"),
    ):
        save_checkpoint(tmp_path, trainer, {})
    assert contents(tmp_path) == before
    assert list_checkpoints(tmp_path) == [path]


def test_what_killed_saves_left_is_cleared_by_the_next(tmp_path):
    for name in (".step-00000003.fmxnn-0123abcd", ".step-100000000.fmxnn-01234567"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "crosscoder.safetensors").write_bytes(b"half")
    (tmp_path / ".step-00000003.fmxnn.lock").write_text("1 here")
    for name in (".step-mine", ".stepping", ".step-00000001.backup"):
        (tmp_path / name).mkdir()
    save_checkpoint(tmp_path, trained(), {})
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-00000001",
        ".step-mine",
        ".stepping",
        ".step-00000001.backup",
    }


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_file_that_may_not_be_read_is_named_and_an_older_checkpoint_is_taken(name, tmp_path, monkeypatch):
    trainer = trained()
    save_checkpoint(tmp_path, trainer, {})
    trainer.step(batch(1))
    barred = save_checkpoint(tmp_path, trainer, {}) / name
    opened = open

    def checked(path, *args, **options):
        if str(path) == str(barred):  # chmod would not keep root out
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr("io.open", checked)
    resumed = make_trainer()
    (sentence,) = load_checkpoint(tmp_path, resumed, {})
    assert sentence.startswith("passed over step-00000002: ")
    assert str(barred) in sentence
    assert re.search("may not be opened by you|make it readable", sentence)
    assert resumed.steps == 1


def adam(trainer, parameters):
    trainer.optimizer = torch.optim.Adam(parameters, lr=1e-2)


def other_optimizer(trainer):
    trainer.optimizer = torch.optim.SGD(trainer.crosscoder.parameters(), lr=1e-2)


def other_order(trainer):
    adam(trainer, list(trainer.crosscoder.parameters())[::-1])


def other_groups(trainer):
    first, *rest = trainer.crosscoder.parameters()
    adam(trainer, [{"params": [first]}, {"params": rest}])


def fewer_parameters(trainer):
    adam(trainer, list(trainer.crosscoder.parameters())[:-1])


def my_penalty(run):
    return run.x_hat.sum()


def put_attribute(name, value):
    return lambda trainer: setattr(trainer, name, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_optimizer, r"other optimizer: class was 'Adam' and is 'SGD'"),
        (other_order, r"other optimizer: groups.0.0 was 'encoder.bias' and is 'decoder..*; and \d more"),
        (other_groups, r"other optimizer: groups was \[\['encoder.bias', .* and is \[\['encoder.bias'\], \["),
        (fewer_parameters, r"other optimizer: groups.0 was "),
        (put_attribute("dtype", torch.bfloat16), r"other objective: dtype was 'torch.float32' and is 'torch.bfloat16'"),
        (put_attribute("clip", 2.0), r"other objective: clip was '1.0' and is '2.0'"),
        (put_attribute("clip", float("inf")), r"other objective: clip was '1.0' and is 'inf'"),
        (put_attribute("seed", 3), r"other objective: seed was 0 and is 3"),
        (put_attribute("auxiliary", None), r"other objective: auxiliary was {'k': 4, .* and is None"),
        (put_attribute("auxiliary", AuxiliaryLoss(k=5, after=64)), r"other objective: auxiliary.k was 4 and is 5"),
        (put_attribute("penalty", my_penalty), r"other objective: penalty was 'a lambda' and is 'my_penalty'"),
        (lambda trainer: trainer.schedules.append(print), r"other objective: schedules was \[\] and is \['print'\]"),
        (
            lambda trainer: trainer.crosscoder.double(),
            r"other tensors: decoder.bias was 'torch.float32 \(3, 8\)' and is 'torch.float64",
        ),
        (
            lambda trainer: setattr(trainer.crosscoder.encoder.sparsifier, "k", 4),
            r"other crosscoder: .*BatchTopK.k was 3 and is 4",
        ),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else "words",
)
def test_another_run_is_refused_in_one_sentence_that_names_the_difference(change, words, tmp_path):
    def make():
        trainer = make_trainer(auxiliary=AuxiliaryLoss(k=4, after=64))
        trainer.penalty = lambda run: run.x_hat.new_zeros(())
        return trainer

    trainer = make()
    trainer.step(batch(0))
    path = save_checkpoint(tmp_path, trainer, {})
    resumed = make()
    change(resumed)
    before = {name: tensor.clone() for name, tensor in bits(resumed)[0].items()}
    with pytest.raises(
        CheckpointError, match=f"^{re.escape(str(path))} was saved with {words}.*; resume with the same"
    ):
        load_checkpoint(tmp_path, resumed, {})
    assert resumed.steps == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(resumed)[0].items())


def test_a_schedule_stands_where_it_stood_after_a_refusal(tmp_path):
    def make():
        trainer = make_trainer()
        trainer.schedules.append(lambda steps: trainer.optimizer.param_groups[0].update(lr=1e-2 / (1 + steps)))
        return trainer

    trainer = make()
    trainer.step(batch(0))
    save_checkpoint(tmp_path, trainer, {})
    resumed = make()
    assert load_checkpoint(tmp_path, resumed, {}) == []  # the rate of step 1
    resumed = make()
    resumed.clip = 3.0
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path, resumed, {})
    assert resumed.optimizer.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("settings", ["same", "saved", "new"])
@pytest.mark.parametrize("tensor", [False, True])
def test_a_new_learning_rate_is_refused_or_taken_and_said(settings, tensor, tmp_path):
    def make(rate):
        trainer = make_trainer()
        rate = torch.tensor(rate, dtype=torch.float64) if tensor else rate
        trainer.optimizer = torch.optim.AdamW(trainer.crosscoder.parameters(), lr=rate, betas=(0.8, 0.9), foreach=False)
        return trainer

    trainer = make(1e-2)
    trainer.step(batch(0))
    save_checkpoint(tmp_path, trainer, {})
    resumed = make(2e-3)
    if settings == "same":
        with pytest.raises(
            CheckpointError,
            match=r"other settings of the optimiser: group.0.lr was 0.01 and is 0.002; .*settings='saved' or 'new'",
        ):
            load_checkpoint(tmp_path, resumed, {})
        assert resumed.optimizer.param_groups[0]["lr"] == 2e-3
        return
    said = load_checkpoint(tmp_path, resumed, {}, settings=settings)
    assert said == [f"took the {settings} settings of the optimiser: group.0.lr was 0.01 and is 0.002"]
    group = resumed.optimizer.param_groups[0]
    assert isinstance(group["lr"], torch.Tensor) == tensor
    assert float(group["lr"]) == {"saved": 1e-2, "new": 2e-3}[settings]
    assert group["betas"] == (0.8, 0.9)
    if settings == "saved":
        resumed.step(batch(1))
        trainer.step(batch(1))
        assert_same(resumed, trainer)


def test_a_folder_may_be_a_string(tmp_path):
    trainer, resumed = make_trainer(), make_trainer()
    trainer.step(batch(0))
    save_checkpoint(str(tmp_path), trainer, {})
    load_checkpoint(str(tmp_path), resumed, {})
    assert_same(resumed, trainer)


def test_the_settings_to_take_are_called_by_one_of_three_names(tmp_path):
    with pytest.raises(ValueError, match="settings='same', 'saved' or 'new', got 'old'"):
        load_checkpoint(tmp_path, make_trainer(), {}, settings="old")


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "Adafactor", "RMSprop", "Rprop"])
def test_every_optimiser_goes_on_bit_for_bit(name, tmp_path):
    def make():
        trainer = make_trainer()
        options = {"momentum": 0.9} if name == "SGD" else {}
        parameters = list(trainer.crosscoder.parameters())
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 1e-4}]
        trainer.optimizer = getattr(torch.optim, name)(groups, lr=1e-3, **options)
        return trainer

    whole = make()
    for step in range(4):
        whole.step(batch(step))
        if step == 1:
            save_checkpoint(tmp_path, whole, {})
    resumed = make()
    assert load_checkpoint(tmp_path, resumed, {}) == []
    for step in range(2, 4):
        resumed.step(batch(step))
    assert_same(whole, resumed)


def test_other_versions_of_libraries_are_told_and_stop_nothing(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, trained(), {})
    monkeypatch.setattr(
        checkpoint, "_versions", lambda: {"fmxnn": fx.__version__, "torch": "9.9", "transformers": None}
    )
    (sentence,) = load_checkpoint(tmp_path, make_trainer(), {})
    assert sentence.startswith("saved with other versions, so that last bits may differ: torch was ")
    assert "is '9.9'" in sentence


@given(st.data())
def test_a_digest_of_the_text_notices_every_token(data):
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 5))
    ids = torch.randint(0, 50, (rows, width), dtype=torch.int32, generator=torch.Generator().manual_seed(rows))
    keep = ids > 5
    digest = Contexts(ids, keep).digest
    assert Contexts(ids.clone(), keep.clone()).digest == digest
    assert Contexts(ids.long(), keep).digest == digest
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, width - 1))
    other, flipped = ids.clone(), keep.clone()
    other[row, column] += 1
    flipped[row, column] ^= True
    assert len({digest, Contexts(other, keep).digest, Contexts(ids, flipped).digest}) == 3
    assert rows == 1 or Contexts(ids.view(1, -1), keep.view(1, -1)).digest != digest


def test_a_streams_identity_says_what_its_batches_follow_from():
    model, tokenizer = make_model(), make_tokenizer()
    given_options = {"layers": (0, 2), "context": 16, "batch": 32, "seed": 0}

    def identity(text=0, **options):
        return harvest(model, [words(600, seed=text)], tokenizer=tokenizer, **given_options | options).identity()

    first = identity()
    assert first == identity() == identity(epochs=3) == json.loads(json.dumps(first))
    stream = harvest(model, [words(600)], tokenizer=tokenizer, **given_options)
    assert stream.starting_at(2).identity() == first
    for options in ({"text": 1}, {"layers": (0, 1)}, {"context": 8}, {"batch": 16}, {"block": 3}, {"seed": 1}):
        assert identity(**options) != first


def test_another_text_is_refused(tmp_path):
    save_checkpoint(tmp_path, trained(), {"k": 3, "stream": {"text": "ab12", "layers": [0, 2], "seed": 0}})
    with pytest.raises(
        CheckpointError,
        match=r"other arguments: stream.layers.1 was 2 and is 3; stream.text was 'ab12' and is 'cd34'; resume",
    ):
        load_checkpoint(tmp_path, make_trainer(), {"k": 3, "stream": {"text": "cd34", "layers": [0, 3], "seed": 0}})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer.0.exp_avg", torch.zeros(2, 3), r"'optimizer.0.exp_avg' is \(2, 3\), and its parameter is"),
        ("optimizer.77.exp_avg", torch.zeros(2), r"'optimizer.77.exp_avg' is no state of an optimiser of 8 parameters"),
        ("optimizer", torch.zeros(2), r"'optimizer' is no state"),
        ("mine.1.x", torch.zeros(2), r"'mine.1.x' is no state"),
        (
            "silent",
            torch.zeros(15, dtype=torch.int64),
            r"'silent' counts tokens for each of 16 latents, got torch.int64 \(15,\)",
        ),
        ("silent", torch.zeros(16), r"'silent' .* got torch.float32 \(16,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_taken(key, value, words, tmp_path):
    path = save_checkpoint(tmp_path, trained(), {})
    name = "trainer.safetensors"
    rewritten(path, lambda made: save_file({**load_file(made / name), key: value}, made / name))
    resumed, fresh = make_trainer(), make_trainer()
    with pytest.raises(
        CheckpointError, match=rf"trainer.safetensors does not fit this run: {words}.*; start in a new folder"
    ):
        load_checkpoint(tmp_path, resumed, {})
    assert_same(resumed, fresh)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "trainer.json does not say run, steps, tokens, "),
        ("[1]", "trainer.json does not say run"),
        ("{", "trainer.json"),
        ('{"run": 1, "run": 2}', "run"),
    ],
)
def test_what_is_no_record_of_a_run_is_passed_over(text, words, tmp_path):
    trainer = trained()
    save_checkpoint(tmp_path, trainer, {})
    trainer.step(batch(1))
    rewritten(save_checkpoint(tmp_path, trainer, {}), lambda made: (made / "trainer.json").write_text(text))
    resumed = make_trainer()
    (sentence,) = load_checkpoint(tmp_path, resumed, {})
    assert sentence.startswith("passed over step-00000002: ")
    assert words in sentence
    assert resumed.steps == 1


def test_a_renamed_checkpoint_and_one_that_is_not_finite_are_passed_over(tmp_path):
    trainer = trained()
    save_checkpoint(tmp_path, trainer, {})
    save_checkpoint(tmp_path / "other", trainer, {}).rename(tmp_path / "step-00000003")
    trainer.step(batch(1))
    name = "crosscoder.safetensors"
    spoilt = {"decoder.bias": torch.full((3, 8), torch.nan)}
    path = save_checkpoint(tmp_path, trainer, {})
    rewritten(path, lambda made: save_file({**load_file(made / name), **spoilt}, made / name))
    resumed = make_trainer()
    assert load_checkpoint(tmp_path, resumed, {}) == [
        "passed over step-00000003: it holds step 1; give it its name again",
        "passed over step-00000002: decoder.bias holds NaN or infinity",
    ]
    assert resumed.steps == 1


@pytest.mark.parametrize("given_arguments", [{"out": Path("x")}, {"rate": float("nan")}], ids=["path", "nan"])
def test_arguments_that_are_no_json_are_one_sentence(given_arguments, tmp_path):
    with pytest.raises(CheckpointError, match="step 1 cannot be saved: .*plain JSON values"):
        save_checkpoint(tmp_path, trained(), given_arguments)
    save_checkpoint(tmp_path, trained(), {})
    with pytest.raises(CheckpointError, match="plain JSON values"):
        load_checkpoint(tmp_path, make_trainer(), given_arguments)


def test_arguments_that_could_not_be_read_again_are_not_saved(tmp_path):
    deep = []
    for _ in range(40):
        deep = [deep]
    with pytest.raises(
        CheckpointError, match="step 1 cannot be saved, since it could not be read again: .*trainer.json"
    ):
        save_checkpoint(tmp_path, trained(), {"deep": deep})
    assert not list(tmp_path.iterdir())


def test_a_parameter_that_no_checkpoint_would_hold_is_refused(tmp_path):
    trainer = make_trainer()
    mine = torch.nn.Parameter(torch.zeros(5))
    trainer.optimizer = torch.optim.Adam([*trainer.crosscoder.parameters(), mine])
    with pytest.raises(
        CheckpointError, match=r"group 0 of the optimiser trains a parameter of \(5,\) that is none of the crosscoder's"
    ):
        save_checkpoint(tmp_path, trainer, {})


def test_state_that_is_no_tensor_is_refused(tmp_path):
    trainer = trained()
    trainer.optimizer.state[trainer.crosscoder.encoder.bias]["history"] = ["a list"]
    with pytest.raises(CheckpointError, match="Adam keeps a list as 'history'"):
        save_checkpoint(tmp_path, trainer, {})


@given(st.data(), st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_state_that_is_not_finite_is_named_and_never_saved_over_good(data, bad):
    trainer = trained(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(folder, trainer, {})
        before = contents(folder)
        trainer.step(batch(2))
        floats = {key: value for key, value in bits(trainer)[0].items() if value.is_floating_point()}
        key = data.draw(st.sampled_from(sorted(floats)))
        with torch.no_grad():
            flat = floats[key].view(-1)
            flat[data.draw(st.integers(0, flat.numel() - 1))] = bad
        with pytest.raises(
            NonFiniteError, match=rf"^{re.escape(key)} holds NaN or infinity at step 3; nothing was saved"
        ):
            save_checkpoint(folder, trainer, {})
        assert contents(folder) == before


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("lr", float("nan"), "lr of the optimiser's group 0 is nan, expected a finite number from 0"),
        ("lr", float("inf"), "lr of the optimiser's group 0 is inf"),
        ("lr", -1e-3, "lr of the optimiser's group 0 is -0.001"),
        ("lr", torch.tensor(float("nan")), "lr of the optimiser's group 0 is nan"),
        ("weight_decay", float("inf"), "weight_decay of the optimiser's group 0 is inf, expected a finite number; "),
        ("betas", (0.9, float("nan")), "betas of the optimiser's group 0 is nan"),
        ("clip", float("nan"), "above 0, got clip=nan"),
        ("clip", 0.0, "above 0, got clip=0.0"),
    ],
)
def test_a_rate_that_would_spoil_the_weights_is_refused_before_the_step(key, value, words):
    trainer, untouched = trained(), trained()
    if key == "clip":
        trainer.clip = value
    else:
        trainer.optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=f"{words}.*nothing was updated"):
        trainer.step(batch(1))
    assert_same(trainer, untouched)
