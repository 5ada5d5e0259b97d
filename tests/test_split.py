"""A stream cut in two: each token is in one part, and each part is a stream like any other."""

import os
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from language import make_model, make_tokenizer, words
from sources import RandomSource, as_sides, random_stream

from fmxnn.activations import Activations, ActivationStore, Shuffle, contexts, harvest, store
from fmxnn.activations.growing import GrowingContexts, Parts
from fmxnn.activations.several import SeveralSource

KINDS = st.sampled_from(["alone", "pairs", "several", "stored", "stored pairs", "growing"])
SIZES = {"count": st.integers(2, 30), "context": st.integers(2, 9), "draw": st.integers(0, 99)}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _handle: None)  # a shared disk makes it wait


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Gives a new folder at each call."""
    return lambda: tmp_path_factory.mktemp("split") / "cache"


def growing(text, sizes=(1, 2)):
    """The same contexts, of which one part after another is read."""
    cuts = [0, *(min(sum(sizes[: n + 1]), len(text)) for n in range(len(sizes))), len(text)]
    parts = (text[start:stop] for start, stop in pairwise(cuts) if start < stop)
    return GrowingContexts(Parts(parts, begun=(next(parts),)))


def make_stream(kind, places, batch=1, block=3, seed=0, **sizes):
    stream = random_stream(batch, block, seed=seed, pairs="pairs" in kind, roles=kind != "growing", **sizes)
    source = stream.source
    if kind == "several":
        other = RandomSource(**sizes, roles=True)
        other.x = other.x + 1
        return Activations(SeveralSource({"a": source, "b": other}), stream.shuffle)
    if kind == "growing":
        text, source.contexts = source.contexts, growing(source.contexts)
        assert source.contexts[: len(text)].tokens == text.tokens
        return Activations(source, stream.shuffle)
    return store(stream, places(), shard_bytes=300) if "stored" in kind else stream


def in_order(stream, at_once):
    sides, kept = zip(*((sides, stream.contexts[start:stop]) for sides, start, stop in stream.in_order(at_once)))
    ids = torch.cat([text.ids[text.keep] for text in kept])
    roles = [] if kept[0].roles is None else [torch.cat([text.roles[text.keep] for text in kept])]
    return [*(torch.cat(side) for side in zip(*sides)), ids, *roles]


def cut(stream, tokens):
    """The two parts; a split that would leave a part without a token is no case of a law."""
    kept = stream.contexts.keep.sum(1).cumsum(0)
    first = int((kept < tokens).sum()) + 1
    assume(first < len(kept) and 0 < kept[first - 1] < kept[-1])
    return first, *stream.split(tokens)


@given(KINDS, st.fixed_dictionaries(SIZES), st.integers(1, 60), st.integers(1, 5))
def test_the_parts_together_are_the_whole(places, kind, sizes, tokens, at_once):
    stream = make_stream(kind, places, **sizes)
    first, heldout, rest = cut(stream, tokens)
    assert len(heldout.contexts) == first
    assert heldout.rows >= tokens
    assert heldout.rows + rest.rows == stream.rows
    together = [torch.cat(both) for both in zip(in_order(heldout, at_once), in_order(rest, at_once), strict=True)]
    assert all(map(torch.equal, in_order(stream, at_once), together))
    assert {type(part) for part in (heldout, rest)} == {type(stream)}
    assert (rest.layers, rest.d_model, rest.name) == (stream.layers, stream.d_model, stream.name)


@given(KINDS, st.fixed_dictionaries(SIZES), st.integers(1, 40), st.integers(1, 7), st.integers(1, 4))
def test_a_part_is_mixed_as_a_stream_of_its_contexts_alone(places, kind, sizes, tokens, batch, block):
    stream = make_stream(kind, places, block=block, seed=3, **sizes)
    first, *parts = cut(stream, tokens)
    for start, part in zip((0, first), parts):
        batch = part.shuffle.batch
        source = RandomSource(**sizes, pairs="pairs" in kind, roles=kind != "growing")
        stop = start + len(part.contexts)
        for name in ("x", "y"):
            whole = getattr(source, name)
            setattr(source, name, None if whole is None else whole[start:stop])
        source.contexts = source.contexts[start:stop]
        alone = type(random_stream(pairs="pairs" in kind))(source, part.shuffle)
        for mine, theirs in zip(part.with_tokens(), alone.with_tokens(), strict=True):
            sides = [x[:, :2] if kind == "several" else x for x in as_sides(mine[0])]
            assert all(map(torch.equal, [*sides, *mine[1:]], [*as_sides(theirs[0]), *theirs[1:]]))
            assert len(sides[0]) == batch


@given(KINDS, st.fixed_dictionaries(SIZES), st.integers(1, 20), st.integers(1, 20))
def test_a_part_is_split_again_and_named_as_one_of_the_whole(places, kind, sizes, tokens, more):
    stream = make_stream(kind, places, **sizes)
    first, heldout, rest = cut(stream, tokens)
    second, middle, last = cut(rest, more)
    assert heldout.identity()["contexts"] == [0, first]
    assert middle.identity()["contexts"] == [first, first + second]
    assert last.identity() == stream.identity() | {"contexts": [first + second, len(stream.contexts)]}
    assert torch.equal(in_order(last, 3)[0], in_order(stream, 3)[0][heldout.rows + middle.rows :])


def test_a_split_begins_at_the_first_batch_and_keeps_the_rank():
    stream = random_stream(count=40, batch=4)
    rest, whole = (some.split(30)[1] for some in (stream.starting_at(2).rank(1, 2), stream))
    assert torch.equal(next(iter(rest)), next(iter(whole))[1::2])


def test_a_text_that_grows_is_not_waited_for():
    text, asked = random_stream(count=40, context=9).contexts, []

    def parts():
        for start in range(0, 40, 4):
            asked.append(start)
            yield text[start : start + 4]

    source = RandomSource(40, 9)
    source.contexts = GrowingContexts(Parts(parts()))
    heldout, rest = Activations(source, Shuffle(batch=4, block=4)).split(30)
    assert heldout.rows >= 30
    assert asked == [0, 4]
    assert rest.rows + heldout.rows == text.tokens


def test_the_parts_of_a_harvested_stream_are_those_of_its_text():
    model, text = make_model(), contexts([words(400)], make_tokenizer(), context=9)
    how = {"layers": (0, 2), "at": "mlp_in", "to": "mlp_out", "batch": 16, "block": 5, "dtype": torch.float64}
    parts = harvest(model, text, **how).split(100)
    assert parts[1].model is model
    for part, some in zip(parts, text.split(100)):
        for mine, theirs in zip(part, harvest(model, some, **how), strict=True):
            assert all(map(torch.equal, mine, theirs))


def test_a_part_can_be_stored(tmp_path):
    _, rest = random_stream(count=20, pairs=True).split(30)
    again = store(rest, tmp_path / "cache", shard_bytes=300)
    assert again.identity() == rest.identity()
    assert all(map(torch.equal, in_order(rest, 3), in_order(again, 3)))
    with pytest.raises(ValueError, match="holds a store of something else: rows was"):
        store(random_stream(count=20, pairs=True), tmp_path / "cache", shard_bytes=300)


def test_the_parts_of_a_damaged_store_leave_out_the_same_tokens(tmp_path):
    store(random_stream(count=30), tmp_path / "cache", shard_bytes=600)
    damaged = tmp_path / "cache" / "shard-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    whole = ActivationStore(tmp_path / "cache", damaged="skip")
    heldout, rest = whole.split(40)
    assert heldout.rows + rest.rows == whole.rows < ActivationStore(tmp_path / "cache").rows
    together = [torch.cat(both) for both in zip(in_order(heldout, 4), in_order(rest, 4), strict=True)]
    assert all(map(torch.equal, in_order(whole, 4), together))


def test_a_split_that_leaves_too_little_says_so():
    stream = random_stream(batch=6, count=13)
    with pytest.raises(ValueError, match="a split at 10,000 tokens needs more than that, and the text gives"):
        stream.split(10_000)
    with pytest.raises(ValueError, match=r"the text gives \d tokens, and one batch needs 6; give more text or a small"):
        stream.split(1)
