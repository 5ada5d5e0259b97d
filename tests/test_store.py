"""Activations on disk: the batches of the stream that was stored, whatever holds them."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language import make_model, make_tokenizer, words
from safetensors.torch import load_file, save_file
from sources import RandomSource, as_sides, random_stream
from torch import nn

import fmxnn as fx
from fmxnn.activations import ActivationStore, Contexts, contexts, harvest, store
from fmxnn.activations.storing import memory
from fmxnn.activations.storing.layout import pack, unpack
from fmxnn.core.errors import FormatError, IntegrityError, LockedError
from fmxnn.core.files import locked, verify_folder

STREAMS = st.fixed_dictionaries(
    {
        "count": st.integers(1, 30),
        "context": st.integers(2, 9),
        "draw": st.integers(0, 99),
        "pairs": st.booleans(),
        "roles": st.booleans(),
    }
)
MIXING = {"batch": st.integers(1, 9), "block": st.integers(1, 8), "epochs": st.integers(1, 2)}
SHARDS = st.sampled_from([1, 100, 777, 10**6])


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _handle: None)  # a shared disk makes it wait


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Gives a new folder at each call."""
    return lambda: tmp_path_factory.mktemp("store") / "cache"


def made(stream_arguments, **mixing):
    source = RandomSource(**stream_arguments)
    mixing["batch"] = min(mixing["batch"], source.contexts.tokens)
    return random_stream(**stream_arguments, **mixing)


def same(one, other):
    """Whether two iterators of `with_tokens` give the same bits."""
    for (mine, *where), (theirs, *there) in zip(one, other, strict=True):
        for a, b in zip((*as_sides(mine), *where), (*as_sides(theirs), *there), strict=True):
            if a.dtype != b.dtype or not torch.equal(a, b):
                return False
    return True


@given(STREAMS, st.fixed_dictionaries(MIXING), SHARDS, st.integers(0, 30), st.integers(1, 3))
def test_a_store_gives_the_batches_of_the_stream(places, arguments, mixing, shard_bytes, first, world):
    stream = made(arguments, **mixing)
    again = store(stream, places(), shard_bytes=shard_bytes)
    assert repr(again) == repr(stream).replace(type(stream).__name__, "ActivationStore")
    assert again.identity() == stream.identity()
    assert again.contexts.digest == stream.contexts.digest
    assert same(stream.with_tokens(), again.with_tokens())
    assert same(stream.starting_at(first).with_tokens(), again.starting_at(first).with_tokens())
    if stream.shuffle.batch % world == 0:
        for rank in range(world):
            assert same(stream.rank(rank, world).with_tokens(), again.rank(rank, world).with_tokens())
    for (mine, *where), (theirs, *there) in zip(stream.in_order(4), again.in_order(4), strict=True):
        assert where == there
        assert all(map(torch.equal, mine, theirs))


@given(STREAMS, st.fixed_dictionaries(MIXING), st.fixed_dictionaries({**MIXING, "seed": st.integers(0, 9)}))
def test_a_store_mixes_its_tokens_as_a_stream_with_other_settings_does(places, arguments, mixing, other):
    stream = made(arguments, **mixing)
    other["batch"] = min(other["batch"], stream.rows)
    again = store(stream, places(), shard_bytes=300)
    changed = type(stream)(stream.source, fx.activations.Shuffle(**other))
    assert same(changed.with_tokens(), ActivationStore(again.folder, **other).with_tokens())


@given(STREAMS, st.sampled_from(["bfloat16", torch.float16, "int8"]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_is_rounded_is_rounded_once_and_alike_in_every_reading(places, arguments, dtype, given_dtype):
    stream = made({**arguments, "dtype": given_dtype}, batch=4, block=3)
    again = store(stream, places(), dtype=dtype, shard_bytes=200)
    for (theirs, *_), (mine, *_) in zip(stream.with_tokens(), again.with_tokens(), strict=True):
        for x, found in zip(as_sides(theirs), as_sides(mine), strict=True):
            assert found.dtype == x.dtype
            packed = pack((x,), str(dtype).removeprefix("torch."))
            assert torch.equal(found, unpack(packed["x"], packed.get("x_scale"), x.dtype))
    lossless = given_dtype == torch.bfloat16 and dtype == "bfloat16"
    assert (again.identity() == stream.identity()) is lossless
    assert next(iter(as_sides(next(iter(ActivationStore(again.folder, dtype=torch.float64)))))).dtype == torch.float64


@given(st.integers(0, 999), st.floats(1e-6, 1e6))
def test_eight_bits_are_within_half_a_step_of_each_token_and_layer(seed, size):
    x = torch.randn(9, 3, 17, generator=torch.Generator().manual_seed(seed)) * size
    x[0, 1] = 0
    packed = pack((x,), "int8")
    step = x.abs().amax(-1, keepdim=True) / 127
    assert packed["x"].dtype == torch.int8
    assert packed["x_scale"].shape == (9, 3)
    assert ((unpack(packed["x"], packed["x_scale"], torch.float32) - x).abs() <= step * 0.5001).all()


@given(STREAMS, st.integers(1, 3))
def test_ranks_together_are_the_batches_of_one_process_whatever_their_number(arguments, world):
    stream = made(arguments, batch=1, block=4)
    batch = min(6, stream.rows)
    stream = made(arguments, batch=batch - batch % world or world, block=4) if stream.rows >= world else stream
    world = world if stream.shuffle.batch % world == 0 else 1
    for whole, *shares in zip(stream.with_tokens(), *(stream.rank(r, world).with_tokens() for r in range(world))):
        for n, side in enumerate((*as_sides(whole[0]), *whole[1:])):
            parts = [(*as_sides(share[0]), *share[1:])[n] for share in shares]
            assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), side)


def test_a_rank_that_is_none_and_an_uneven_share_are_refused():
    with pytest.raises(ValueError, match=r"less than world=2, got rank=2"):
        random_stream().rank(2, 2)
    with pytest.raises(ValueError, match=r"4 processes take equal shares.*batch=6.*a batch that 4 divides"):
        random_stream(batch=6).rank(0, 4)


@pytest.mark.parametrize("to", [None, "mlp_out"])
def test_a_harvested_stream_comes_back_without_its_model(tmp_path, to):
    at = "block_out" if to is None else "mlp_in"
    model, text = make_model(), contexts([words(137, i) for i in range(7)], make_tokenizer(), context=9)
    stream = harvest(model, text, layers=(0, 2), at=at, to=to, batch=32, block=5, epochs=2, dtype=torch.float32)
    again = store(stream, tmp_path / "cache", shard_bytes=20_000)
    before = [(x, context, position) for x, context, position in stream.with_tokens()]
    del stream
    model.forward = None
    assert same(before, ActivationStore(tmp_path / "cache").with_tokens())
    again.check(model=model, text=text)
    assert again.source.name == "GPT2LMHeadModel"


def test_a_crosscoder_trains_on_a_store_as_on_the_stream(tmp_path):
    stream = random_stream(count=60, batch=16)
    again = store(stream, tmp_path / "cache")
    scales = [fx.activations.activation_scale(batches) for batches in (stream, again)]
    assert scales[0] == scales[1]


def test_a_shard_can_be_read_alone_and_the_folder_verified(tmp_path):
    stream = random_stream(roles=True)
    store(stream, tmp_path / "cache", shard_bytes=400)
    names = verify_folder(tmp_path / "cache")
    assert {"store.json", "text.safetensors"} < names.keys()
    rows = 0
    for path in sorted((tmp_path / "cache").glob("shard-*.safetensors")):
        held = load_file(path)
        at = held["contexts"].long(), held["positions"].long()
        assert torch.equal(held["x"], stream.source.x[at])
        assert torch.equal(held["ids"], stream.contexts.ids[at])
        assert torch.equal(held["roles"], stream.contexts.roles[at])
        assert held["x"].nbytes <= 400
        rows += len(held["x"])
    assert rows == stream.rows
    about = json.loads((tmp_path / "cache" / "store.json").read_text())
    assert about["source"] == stream.source.identity()
    assert about["model"] == "random"


def test_the_revision_of_a_model_is_noted_and_compared(tmp_path):
    stream = random_stream()
    stream.source.model = SimpleNamespace(config=SimpleNamespace(_commit_hash="a" * 40))
    again = store(stream, tmp_path / "cache")
    again.check(model="random", text=stream.contexts)
    other = nn.Linear(2, 2)
    other.config = SimpleNamespace(_commit_hash="b" * 40, name_or_path="random")
    with pytest.raises(ValueError, match="holds activations of random at aaaaaaaaaaaa, got random at bbbbbbbbbbbb"):
        again.check(model=other)
    with pytest.raises(ValueError, match="holds activations of random at aaaaaaaaaaaa, got gpt2; give that model"):
        again.check(model="gpt2")
    with pytest.raises(ValueError, match="activations of another text, 13 contexts.*got 12"):
        again.check(text=stream.contexts[:12])


def named(name, kind=nn.Linear):
    module = kind(2, 2)
    module.config = SimpleNamespace(name_or_path=name)
    return module


@pytest.mark.parametrize(
    ("stored", "given", "is_other"),
    [
        ("org/gpt2", "/home/models/gpt2", False),
        ("gpt2", "org/gpt2", False),
        ("gpt2", named("gpt2"), False),
        ("gpt2", "gpt2@step1000", False),
        ("gpt2", named(""), False),  # a module without a name
        ("Linear", named("gpt2"), False),  # and a store of one
        ("base, chat", named("gpt2"), False),  # of several, which layers say
        ("gpt2", "org/gpt2-xl", True),
        ("gpt2", named("gpt2-xl"), True),
    ],
)
def test_only_what_is_surely_another_model_is_refused(tmp_path, stored, given, is_other):
    stream = random_stream()
    stream.source.name = stored
    again = store(stream, tmp_path / "cache")
    if not is_other:
        again.check(model=given)
        return
    with pytest.raises(ValueError, match=f"holds activations of {stored}, got .*gpt2-xl; give that model, or store"):
        again.check(model=given)


def test_a_store_is_not_measured_with_another_model(tmp_path):
    model, text = make_model().float(), contexts([words(137)], make_tokenizer(), context=9)
    model.config.name_or_path = "base"
    again = store(harvest(model, text, layers=(0, 2), batch=32), tmp_path / "cache")
    crosscoder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(2, 16, 8), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 16, 8))
    )
    assert fx.evaluate(crosscoder, again, model=model).splice is not None
    model.config.name_or_path = "chat"
    with pytest.raises(ValueError, match="holds activations of base, got chat; give that model"):
        fx.evaluate(crosscoder, again, model=model)


def test_a_float32_crosscoder_trains_on_a_store_of_bfloat16(tmp_path):
    again = store(random_stream(batch=16, count=40, dtype=torch.bfloat16), tmp_path / "cache")
    sizes = 2, 5, 16
    crosscoder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(*sizes), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(*sizes))
    )
    trainer = fx.training.Trainer(crosscoder, torch.optim.Adam(crosscoder.parameters()))
    for x in again:
        assert x.dtype == torch.bfloat16
        assert trainer.step(x)["loss"].dtype == torch.float32
    with pytest.raises(TypeError, match=r"reads activations of that dtype, got torch.bfloat16; cast them: x.to"):
        crosscoder(x)


def test_storing_what_is_stored_does_nothing_and_reads_no_model(tmp_path):
    folder = tmp_path / "cache"
    store(random_stream(), folder, dtype="float32", shard_bytes=300)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    stream = random_stream()
    store(stream, folder, dtype="float32", shard_bytes=300)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert stream.source.reads == []


def test_a_store_can_be_stored_with_fewer_bits(tmp_path):
    stream = random_stream()
    once = store(stream, tmp_path / "once")
    twice = store(once, tmp_path / "twice", dtype="bfloat16")
    direct = store(stream, tmp_path / "direct", dtype="bfloat16")
    assert same(direct.with_tokens(), twice.with_tokens())


CHANGES = {
    "model was 'random' and is 'other'": lambda s: setattr(s.source, "name", "other"),
    "source.text was": lambda s: setattr(s.source, "contexts", s.contexts[:12]),
    r"layers was \[0, 2\] and is \[0, 3\]": lambda s: setattr(s.source, "layers", (0, 3)),
    "shuffle.seed was 0 and is 4": lambda s: setattr(s, "shuffle", fx.activations.Shuffle(6, 3, seed=4)),
    "revision was None and is 'c": lambda s: setattr(
        s.source, "model", SimpleNamespace(config=SimpleNamespace(_commit_hash="cafe"))
    ),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("said", [*CHANGES, "dtype was 'float32' and is 'int8'"])
def test_what_is_something_else_is_named_and_nothing_touched(tmp_path, said, finished):
    folder = tmp_path / "cache"
    store(random_stream(), folder, shard_bytes=300)
    if not finished:
        (folder / "manifest.json").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    stream = random_stream()
    CHANGES.get(said, lambda _: None)(stream)
    with pytest.raises(ValueError, match=f"holds a store of something else: .*{said}.*store into another folder"):
        store(stream, folder, shard_bytes=300, dtype="float32" if said in CHANGES else "int8")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_cannot_be_stored_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds 'float32', 'bfloat16', 'float16', 'int8', got dtype='float8'"):
        store(random_stream(), tmp_path / "cache", dtype="float8")
    with pytest.raises(ValueError, match=r"got dtype='float64'; give one of them as dtype="):
        store(random_stream(dtype=torch.float64), tmp_path / "cache")
    with pytest.raises(ValueError, match="shard_bytes >= 1, a whole number, got shard_bytes=0"):
        store(random_stream(), tmp_path / "cache", shard_bytes=0)
    assert not (tmp_path / "cache").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(IntegrityError, match="is a file, and a store is a folder"):
        store(random_stream(), tmp_path / "file")
    stream = random_stream()
    stream.source.x[2:4] = 70_000.0
    with pytest.raises(ValueError, match="more than float16 can hold in the contexts 0 to 2; .* store as bfloat16"):
        store(stream, tmp_path / "large", dtype="float16")
    stream.source.x[2:4] = torch.nan
    for dtype in ("float32", "int8"):
        with pytest.raises(ValueError, match="holds finite numbers, got NaN"):
            store(stream, tmp_path / dtype, dtype=dtype)


@pytest.mark.parametrize("name", ["text.safetensors", "store.json", "manifest.json", "shard-00000.safetensors"])
def test_files_of_others_stay(tmp_path, name):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "shard-00000.txt").write_text("mine")
    store(random_stream(), folder)
    assert (folder / "notes.txt").read_text() == (folder / "shard-00000.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / name).write_text("{}")
    with pytest.raises((IntegrityError, FormatError)) as caught:
        store(random_stream(), other)
    assert name in str(caught.value)
    assert [path.name for path in other.iterdir()] == [name]
    assert (other / name).read_text() == "{}"


def test_one_writer_at_a_time(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    with locked(folder), pytest.raises(LockedError, match=f"is being written by process {os.getpid()}"):
        store(random_stream(), folder)
    assert list(folder.iterdir()) == []


def test_what_is_no_store_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none'; write one with store"):
        ActivationStore(tmp_path / "none")
    with pytest.raises(FormatError, match=r"holds no store.json, so it is no store of activations; give the folder"):
        ActivationStore(tmp_path)
    folder = tmp_path / "cache"
    store(random_stream(), folder, shard_bytes=300)
    for name, value in (("verify", "often"), ("damaged", "mend")):
        with pytest.raises(ValueError, match=f"a store takes {name}=.* or .*, got {name}='{value}'"):
            ActivationStore(folder, **{name: value})
    with pytest.raises(ValueError, match="one batch needs 1,000"):
        ActivationStore(folder, batch=1000)
    with pytest.raises(ValueError, match="a stream needs batch >= 1, a whole number, got batch=0"):
        ActivationStore(folder, batch=0)
    (folder / "manifest.json").unlink()
    (folder / "shard-00001.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"is not finished: it holds \d+ of \d+ shards.*call store.*it goes on"):
        ActivationStore(folder)


def about_of(folder, **changed):
    """Writes another store.json, and its sha256 into the manifest."""
    about = json.loads((folder / "store.json").read_text()) | changed
    body = json.dumps({name: value for name, value in about.items() if value is not ...})
    (folder / "store.json").write_text(body)
    sign(folder, "store.json")


def sign(folder, name):
    """Writes the sha256 of a file into the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][name] = sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": "many"},
        {"rows": -1},
        {"rows_a_shard": 0},
        {"dtype": "float8"},
        {"given": "int8"},
        {"version": 2},
        {"sides": []},
        {"sides": [[2, "5"]]},
        {"sides": [[2, 5], [2, 5], [2, 5]]},
        {"layers": ...},
        {"model": None},
    ],
    ids=str,
)
def test_a_description_that_cannot_be_is_refused(tmp_path, changed):
    store(random_stream(), tmp_path / "cache")
    about_of(tmp_path / "cache", **changed)
    with pytest.raises(FormatError, match=r"store\.json"):
        ActivationStore(tmp_path / "cache")


@pytest.mark.parametrize("changed", [{"rows": 10**7}, {"sides": [[2, 4]]}, {"rows_a_shard": 3}, {"dtype": "bfloat16"}])
def test_a_description_that_does_not_fit_the_shards_is_named(tmp_path, changed):
    store(random_stream(), tmp_path / "cache")
    about_of(tmp_path / "cache", **changed)
    with pytest.raises(IntegrityError, match="shard-0000|manifest.json lists no"):
        list(ActivationStore(tmp_path / "cache"))


def test_a_text_of_other_tokens_is_named(tmp_path):
    stream, folder = random_stream(), tmp_path / "cache"
    store(stream, folder)
    save_file({"ids": stream.contexts.ids, "keep": torch.ones_like(stream.contexts.keep)}, folder / "text.safetensors")
    sign(folder, "text.safetensors")
    with pytest.raises(IntegrityError, match=f"text.safetensors keeps 91 tokens, and .* of {stream.rows}"):
        list(ActivationStore(folder))


def test_opening_a_store_reads_neither_rows_nor_text(tmp_path):
    stream = random_stream()
    store(stream, tmp_path / "cache", shard_bytes=300)
    for path in (tmp_path / "cache").glob("*.safetensors"):
        path.rename(path.with_suffix(".away"))
    again = ActivationStore(tmp_path / "cache")
    assert (len(again), again.rows, again.layers, again.d_model) == (len(stream), stream.rows, (0, 2), 5)


def test_a_batch_may_need_more_blocks_than_are_read_at_first(places):
    keep = torch.zeros(40, 6, dtype=torch.bool)
    keep[:20, 1] = True
    keep[20:] = True
    source = RandomSource(40, 6)
    source.contexts = Contexts(source.contexts.ids, keep)
    stream = fx.activations.Activations(source, fx.activations.Shuffle(batch=20, block=1, epochs=3))
    assert same(stream.with_tokens(), store(stream, places()).with_tokens())


def test_reading_may_stop_anywhere_and_leaves_no_thread(tmp_path):
    again = store(random_stream(count=40, batch=4, epochs=50), tmp_path / "cache", shard_bytes=100)
    for count in (0, 1, 7):
        assert len(list(islice(again, count))) == count
    one, other = iter(again), iter(again)
    assert all(torch.equal(next(one), next(other)) for _ in range(30))


def test_an_iterator_that_is_left_at_the_end_of_the_interpreter_says_nothing(tmp_path):
    store(random_stream(count=40, batch=4, epochs=50), tmp_path / "cache", shard_bytes=100)
    left = "from fmxnn.activations import ActivationStore; left = iter(ActivationStore('cache')); next(left)"
    done = subprocess.run([sys.executable, "-c", left], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
def test_an_iterator_of_before_a_fork_does_not_hang_and_a_new_one_works(tmp_path):
    store(random_stream(count=40, batch=4, epochs=50), tmp_path / "cache", shard_bytes=100)
    forked = """
import os, signal
from fmxnn.activations import ActivationStore
store = ActivationStore("cache")
begun = iter(store)
next(begun)
if os.fork() == 0:
    signal.alarm(30)
    assert len(list(store)) == len(store)
    try:
        list(begun)
    except RuntimeError as error:
        os._exit(0 if "call iter(store) in the new process" in str(error) else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
assert len(list(begun)) == len(store) - 1
"""
    done = subprocess.run([sys.executable, "-c", forked], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_tokens_are_read_ahead_but_not_for_ever(tmp_path, monkeypatch):
    again = store(random_stream(count=4, block=4, batch=4, epochs=10**6), tmp_path / "cache")
    assert len(list(islice(again, 5))) == 5


def test_progress_is_shown(tmp_path):
    shown = []

    def progress(items, *, desc, total):
        shown.append((desc, total))
        return items

    again = store(random_stream(), tmp_path / "cache", shard_bytes=300, progress=progress)
    assert shown == [("store", again.stored.layout.shards)]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_a_batch_that_somebody_keeps_never_changes(places, kept):
    """Memory is taken again only where neither the batch nor a view of it is left."""
    again, held = store(random_stream(count=30, batch=8, epochs=9), places()), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(memory, "_LARGE", 1)
        for number, x in enumerate(again):
            way = kept[number % len(kept)]
            look = {1: x, 2: x[3], 3: x.numpy()[1:], 4: x.transpose(0, 1), 5: x.view(-1)[2:]}.get(way)
            if look is not None:
                held.append((torch.as_tensor(look), torch.as_tensor(look).clone()))
        assert all(torch.equal(look, before) for look, before in held)


def test_the_memory_of_a_large_batch_is_taken_again_once_it_is_free(monkeypatch):
    monkeypatch.setattr(memory, "_LARGE", 1)
    recycled = memory.Recycled()
    first = recycled.room((4, 3), torch.float32)
    place, view = first.data_ptr(), first[1:]
    second = recycled.room((4, 3), torch.float32)
    del first
    third = recycled.room((4, 3), torch.float32)
    assert len({place, second.data_ptr(), third.data_ptr()}) == 3
    del view
    assert recycled.room((6, 2), torch.float32).data_ptr() == place
    many = [recycled.room((4, 3), torch.float32) for _ in range(9)]
    assert len({x.data_ptr() for x in many}) == 9
