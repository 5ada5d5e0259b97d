"""Stores that are killed, that find the disk full, and that are damaged afterwards."""

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attempts import attempt, tries
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import as_sides, random_stream

from fmxnn.activations import ActivationStore, Contexts, store
from fmxnn.core.errors import FormatError, IntegrityError

KILLS, SEED = tries(ci=50, thorough=1_000), tries(ci=7, thorough=random.SystemRandom().randrange(2**32))
SHARD = 300


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _handle: None)  # a shared disk makes it wait


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_store_killed_at_any_file_operation_ends_with_the_same_bytes(tmp_path):
    script = Path(__file__).with_name("killed_stores.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, str(KILLS), str(SEED)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["whole"] == 0
    assert result["files"] > 10
    assert result["operations"] > 8 * result["files"]
    for life in result["lives"]:
        for place in life["places"]:
            with attempt("SIGKILL while activations are stored", case=(place, SEED, life["wrong"])):
                assert not life["wrong"], (SEED, life)
    assert sum(len(life["places"]) for life in result["lives"]) == KILLS


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A stored folder, and its bytes."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    store(random_stream(roles=True), folder, shard_bytes=SHARD)
    return folder, contents(folder)


@given(st.integers(0, 2_500))
@settings(max_examples=tries(ci=25, thorough=500))
def test_a_disk_that_is_full_at_any_byte_keeps_what_is_whole_and_goes_on(whole, room):
    source, bytes_of = whole
    folder, before = source.with_name("full"), resource.getrlimit(resource.RLIMIT_FSIZE)
    shutil.rmtree(folder, ignore_errors=True)
    with attempt("a full disk while activations are stored", case=room):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # a write beyond it fails as on a full disk
        try:
            store(random_stream(roles=True), folder, shard_bytes=SHARD)
            failed = False
        except IntegrityError as error:
            failed = "could not be written" in str(error) and "the same call goes on from it" in str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert failed or max(map(len, bytes_of.values())) <= room
        left = contents(folder)
        assert all(left[name] == bytes_of[name] for name in left if name != "journal.sha256")
        store(random_stream(roles=True), folder, shard_bytes=SHARD)
        assert contents(folder) == bytes_of


@given(st.integers(0, 120), st.sampled_from([errno.ENOSPC, errno.EIO, errno.EDQUOT]))
@settings(max_examples=tries(ci=25, thorough=500))
def test_an_operation_that_fails_while_storing_can_be_gone_on_from(whole, at, number):
    source, bytes_of = whole
    folder, done = source.with_name("failing"), []
    shutil.rmtree(folder, ignore_errors=True)

    def failing(operation):
        def tried(*arguments, **options):
            done.append(operation.__name__)
            if len(done) == at:
                raise OSError(number, os.strerror(number))
            return operation(*arguments, **options)

        return tried

    with (
        attempt("an operation that fails while activations are stored", case=(at, number)),
        pytest.MonkeyPatch.context() as patched,
    ):
        for name in ("fsync", "rename", "mkdir", "unlink", "chmod"):
            patched.setattr(os, name, failing(getattr(os, name)))
        try:
            store(random_stream(roles=True), folder, shard_bytes=SHARD)
        except IntegrityError as error:
            assert os.strerror(number) in str(error)
        patched.undo()
        store(random_stream(roles=True), folder, shard_bytes=SHARD)
        assert contents(folder) == bytes_of


def test_going_on_asks_only_for_what_is_missing_and_for_the_same_contexts_at_once(whole):
    source, bytes_of = whole
    folder, stream = source.with_name("short"), random_stream(roles=True)
    shutil.copytree(source, folder)
    shards = sorted(folder.glob("shard-*"))
    names = [path.name for path in shards if path not in (shards[2], shards[-1])]
    (folder / "manifest.json").unlink()
    known = json.loads(bytes_of["manifest.json"])["sha256"]
    lines = "".join(f"{known[name]}  {name}\n" for name in ("text.safetensors", *names))
    (folder / "journal.sha256").write_text(lines + "0123")  # a line that a kill cut
    shards[4].write_bytes(shards[4].read_bytes()[:-1] + b"?")
    store(stream, folder, dtype="float32", shard_bytes=SHARD)
    assert contents(folder) == bytes_of
    assert 3 <= len(stream.source.reads) <= 5  # a read that learns no dtype, and three shards of one or two blocks
    assert all((start % 3, stop - start) in ((0, 3), (0, 1)) for start, stop in stream.source.reads)


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7), st.booleans(), st.booleans(), st.data())
@settings(max_examples=tries(ci=60, thorough=2_000))
def test_a_flipped_bit_or_a_cut_is_named(whole, place, bit, cut, lazily, data):
    folder, bytes_of = whole
    name = data.draw(st.sampled_from(sorted(bytes_of)))
    body = bytes_of[name]
    at = int(place * (len(body) - 1))
    (folder / name).write_bytes(body[:at] if cut else body[:at] + bytes([body[at] ^ 1 << bit]) + body[at + 1 :])
    try:
        with (
            attempt("a cut file of a store" if cut else "a flipped bit of a store", case=(name, place, bit)),
            pytest.raises((IntegrityError, FormatError)) as caught,
        ):
            list(ActivationStore(folder, verify="first" if lazily else "all"))
        assert name in str(caught.value) or name == "manifest.json"
    finally:
        (folder / name).write_bytes(body)


@given(st.sets(st.integers(0, 12), min_size=1, max_size=4), st.sampled_from(["flip", "cut", "gone"]), st.integers(0, 9))
@settings(max_examples=tries(ci=25, thorough=500))
def test_damaged_shards_are_left_out_counted_and_the_rest_is_a_stream_of_its_own(whole, damaged, how, seed):
    source, bytes_of = whole
    folder = source.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    stream, shards = random_stream(roles=True), sorted(name for name in bytes_of if name.startswith("shard"))
    damaged = sorted({n % len(shards) for n in damaged})
    for number in damaged:
        path, body = folder / shards[number], bytes_of[shards[number]]
        path.unlink() if how == "gone" else path.write_bytes(body[:-3] + (b"???" if how == "flip" else b""))
    with attempt("damaged shards left out", case=(damaged, how)):
        again = ActivationStore(folder, damaged="skip", batch=4, seed=seed)
        a_shard = again.stored.layout.rows_a_shard
        assert again.damaged == tuple(shards[number] for number in damaged)
        lost = torch.cat([torch.arange(n * a_shard, min((n + 1) * a_shard, stream.rows)) for n in damaged])
        assert again.left_out == len(lost)
        keep = stream.contexts.keep.clone()
        at = keep.flatten().nonzero().squeeze(1)[lost]
        keep.view(-1)[at] = False
        assert torch.equal(again.contexts.keep, keep)
        rest = random_stream(roles=True, batch=4, seed=seed)
        rest.source.contexts = Contexts(rest.contexts.ids, keep, rest.contexts.roles)
        assert again.identity() == rest.identity()
        for (mine, *where), (theirs, *there) in zip(again.with_tokens(), rest.with_tokens(), strict=True):
            assert all(map(torch.equal, (*as_sides(mine), *where), (*as_sides(theirs), *there)))
        with pytest.raises(
            IntegrityError, match=shards[damaged[0]].replace(".", r"\.") if len(damaged) == 1 else "shard"
        ):
            list(ActivationStore(folder))


def test_all_damaged_leaves_too_little(whole):
    source, _ = whole
    folder = source.with_name("nothing")
    shutil.copytree(source, folder)
    for path in folder.glob("shard-*"):
        path.unlink()
    with pytest.raises(ValueError, match="the text gives 0 tokens"):
        ActivationStore(folder, damaged="skip")
