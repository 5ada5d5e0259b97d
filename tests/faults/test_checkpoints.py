"""Checkpoints under flips, cuts, full disks and numbers that are not finite."""

import errno
import os
import resource
import shutil

import pytest
import torch
from attempts import attempt, tries
from hypothesis import given, settings
from hypothesis import strategies as st
from trainers import assert_same, batch, bits, make_trainer

from fmxnn.core.files.integrity import IntegrityError
from fmxnn.training import NonFiniteError, load_checkpoint, save_checkpoint

FILES = ("crosscoder.safetensors", "trainer.safetensors", "trainer.json", "manifest.json")
PLACES = st.floats(0, 1, exclude_max=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three checkpoints, and the trainer as it was at each."""
    folder, trainer, states = tmp_path_factory.mktemp("run"), make_trainer(), {}
    for step in range(3):
        trainer.step(batch(step))
        save_checkpoint(folder, trainer, {})
        states[step + 1] = {name: tensor.clone() for name, tensor in bits(trainer)[0].items()}
    return folder, states


def is_at(trainer, states):
    return all(torch.equal(tensor, states[trainer.steps][name]) for name, tensor in bits(trainer)[0].items())


@given(st.sampled_from(FILES), PLACES, st.integers(0, 7), st.booleans(), st.integers(1, 2))
@settings(max_examples=tries(ci=60, thorough=2_000))
def test_a_flipped_bit_or_a_cut_is_named_and_passed_over(run, name, place, bit, cut, damaged):
    (folder, states), resumed = run, make_trainer()
    kept = {}
    for number in range(3, 3 - damaged, -1):
        path = folder / f"step-{number:08d}" / name
        kept[path] = body = path.read_bytes()
        at = int(place * (len(body) - 1))  # the line end at a manifest's end is no part of what it says
        path.write_bytes(body[:at] if cut else body[:at] + bytes([body[at] ^ 1 << bit]) + body[at + 1 :])
    try:
        with attempt("a cut file of a checkpoint" if cut else "a flipped bit of a checkpoint", case=(name, place, bit)):
            said = load_checkpoint(folder, resumed, {})
            assert [sentence.split(":")[0] for sentence in said] == [f"passed over {path.parent.name}" for path in kept]
            assert all(str(path.parent) in sentence for path, sentence in zip(kept, said, strict=True))
            assert all(name in sentence or name == "manifest.json" for sentence in said)
            assert resumed.steps == 3 - damaged
            assert is_at(resumed, states)
    finally:
        for path, body in kept.items():
            path.write_bytes(body)


@given(st.integers(0, 30_000))
@settings(max_examples=tries(ci=30, thorough=500))
def test_a_disk_that_is_full_at_any_byte_keeps_the_last_checkpoint(run, room):
    source, states = run
    folder, trainer = source.with_name("full"), make_trainer()
    shutil.copytree(source, folder)
    load_checkpoint(folder, trainer, {})
    trainer.step(batch(3))
    before, largest = resource.getrlimit(resource.RLIMIT_FSIZE), 0
    try:
        with attempt("a full disk while a checkpoint is saved", case=room):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # a write beyond it fails as on a full disk
            try:
                path, failed = save_checkpoint(folder, trainer, {}), False
                largest = max(file.stat().st_size for file in path.iterdir())
            except IntegrityError as error:
                failed = "nothing that stood there was changed" in str(error)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert failed or largest <= room
            assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
            resumed = make_trainer()
            assert load_checkpoint(folder, resumed, {}) == []
            assert is_at(resumed, states) if failed else resumed.steps == 4
            save_checkpoint(folder, trainer, {})
    finally:
        shutil.rmtree(folder)


@given(st.integers(0, 80), st.sampled_from([errno.ENOSPC, errno.EIO, errno.EDQUOT]))
@settings(max_examples=tries(ci=30, thorough=500))
def test_an_operation_that_fails_while_saving_keeps_the_last_checkpoint(run, at, number):
    source, states = run
    folder, trainer, done = source.with_name("failing"), make_trainer(), []
    shutil.copytree(source, folder)
    load_checkpoint(folder, trainer, {})
    trainer.step(batch(3))

    def failing(operation):
        def tried(*given_arguments, **options):
            done.append(operation.__name__)
            if len(done) == at:
                raise OSError(number, os.strerror(number))
            return operation(*given_arguments, **options)

        return tried

    try:
        with (
            attempt("an operation that fails while a checkpoint is saved", case=(at, number)),
            pytest.MonkeyPatch.context() as patched,
        ):
            for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
                patched.setattr(os, name, failing(getattr(os, name)))
            try:
                saved = save_checkpoint(folder, trainer, {})
            except OSError:
                saved = None
            patched.undo()
            resumed = make_trainer()
            assert load_checkpoint(folder, resumed, {}) == []
            assert resumed.steps == 4 if saved else resumed.steps in (3, 4)
            assert resumed.steps == 4 or is_at(resumed, states)
            save_checkpoint(folder, trainer, {})
            assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003", "step-00000004"]
    finally:
        shutil.rmtree(folder)


@given(
    st.sets(st.tuples(st.integers(0, 31), st.integers(0, 2), st.integers(0, 7)), min_size=1, max_size=5),
    st.sampled_from([torch.nan, torch.inf, -torch.inf]),
)
@settings(max_examples=tries(ci=30, thorough=500))
def test_a_batch_that_is_not_finite_leaves_the_weights(places, bad):
    trainer, untouched = make_trainer(), make_trainer()
    x = batch(0)
    for place in places:
        x[place] = bad
    with attempt("a batch with NaN or infinity", case=(places, bad)):
        with pytest.raises(
            NonFiniteError, match=f"{len({place[0] for place in places})} of its 32 tokens hold NaN or infinity"
        ):
            trainer.step(x)
        assert_same(trainer, untouched)
        trainer.step(batch(0))
        untouched.step(batch(0))
        assert_same(trainer, untouched)
