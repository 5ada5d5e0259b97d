"""Contexts that are read while they are used: those of the text read whole, and no more of it than needed."""

import copy
import gc
import os
import re
import subprocess
import sys
from itertools import count, pairwise
from threading import Thread
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language import make_model, make_tokenizer, words

from fmxnn.activations import Activations, Contexts, Shuffle, contexts, harvest, pieces, stream
from fmxnn.activations import growing as growing_module
from fmxnn.activations.growing import GrowingContexts, Parts
from fmxnn.activations.text import documents
from fmxnn.core.seeds import seed_of

MODEL = make_model()
LENGTHS = st.lists(st.integers(1, 30), min_size=6, max_size=16)


class Slow:
    """A tokenizer that is no fast one: a text is then read by whoever needs it alone."""

    def __init__(self):
        self.made = make_tokenizer()
        self.bos_token_id, self.eos_token_id, self.all_special_ids = None, 0, [0]

    def __call__(self, texts, **options):
        return self.made(texts, **options)


class Counted:
    """Documents, one after another, and how many were asked for."""

    def __init__(self, texts):
        self.texts, self.asked = texts, 0

    def __iter__(self):
        for text in self.texts:
            self.asked += 1
            yield text


def in_parts(texts, *, fast=True, context=6, **options):
    """The contexts of a text of which each document is a part."""
    with patch.object(pieces, "_DOCUMENTS", 1):
        made = contexts(texts, make_tokenizer() if fast else Slow(), context=context, **options)
        if fast and isinstance(made, GrowingContexts):
            len(made)  # while the parts are small
    return made


def growing(rows, parts, *, behind=False, fault=None):
    """Made-up contexts in parts of these sizes, and a fault at the end."""
    starts = [sum(parts[:i]) for i in range(len(parts) + 1)]

    def made():
        for start, stop in pairwise(starts):
            yield rows[start:stop]
        if fault is not None:
            raise fault

    source = made()
    return GrowingContexts(Parts(source, begun=(next(source),), behind=behind))


def random_rows(number, seed=0, context=5):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (number, context), generator=draw, dtype=torch.int32)
    keep = torch.rand(number, context, generator=draw) < 0.7
    keep[:, 0] = False
    return Contexts(ids, keep)


def same(one, other):
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.keep, other.keep)


def keys(batches):
    return [(int(c), int(p)) for _, context, position in batches for c, p in zip(context, position, strict=True)]


@given(LENGTHS, st.integers(2, 7), st.booleans(), st.none() | st.integers(1, 120))
def test_a_text_read_in_parts_has_the_contexts_of_the_whole(lengths, context, fast, tokens):
    texts = [words(length, i) for i, length in enumerate(lengths)]
    whole = contexts(texts, make_tokenizer(), context=context, tokens=tokens)
    made = in_parts(texts, fast=fast, context=context, tokens=tokens)
    assert type(whole) is Contexts
    assert (len(made), made.context, made.tokens, made.digest) == (len(whole), context, whole.tokens, whole.digest)
    same(made, whole)


PARTS = st.lists(st.integers(1, 6), min_size=1, max_size=7)


@given(PARTS, st.integers(0, 50), st.integers(0, 50), st.integers(0, 120), st.booleans(), st.integers(0, 99))
def test_what_is_asked_of_growing_contexts_is_what_the_whole_says(parts, start, stop, tokens, behind, seed):
    rows = random_rows(sum(parts), seed)
    for view, whole in ((growing(rows, parts, behind=behind), rows), (growing(rows, parts)[start:], rows[start:])):
        assert view.holds(tokens) == whole.holds(tokens)
        assert view.up_to(stop) == whole.up_to(stop)
        same(view[start:stop], whole[start:stop])
        same(view[:stop], whole[:stop])
        same(view[-3:], whole[-3:])
        same(view[start:], whole[start:])
        assert len(view) == len(whole)
        assert view.digest == whole.digest
        same(copy.deepcopy(view), whole)
        assert type(copy.copy(view)) is Contexts


@given(PARTS, st.integers(-3, 90), st.integers(1, 60), st.booleans())
def test_growing_contexts_are_split_where_the_whole_is(parts, first, second, behind):
    rows = random_rows(sum(parts))
    halves = []
    for each in (rows, growing(rows, parts, behind=behind)):
        try:
            front, rest = each.split(first)
            halves.append([front, *rest.split(second)])
        except ValueError as error:
            halves.append(str(error))
    if isinstance(halves[0], str):
        assert halves[0] == halves[1]
    else:
        for mine, theirs in zip(*halves, strict=True):
            same(mine, theirs)


@given(st.integers(3, 20), st.integers(0, 40), st.integers(0, 150))
def test_no_more_of_a_text_is_read_than_what_is_asked_for(number, most, tokens):
    source = Counted([words(9, i) for i in range(number)])  # ten tokens with EOS, two contexts of five
    with patch.object(pieces, "_DOCUMENTS", 1):
        made = contexts(source, Slow(), context=6)
        assert source.asked <= 3  # two parts; a part is made when the next document comes
        made.up_to(most)
        assert source.asked <= max(3, most // 2 + 2)
        made.holds(tokens)
        assert source.asked <= max(3, most // 2 + 2, tokens // 9 + 3)
        made[:most]
        assert source.asked <= max(3, most // 2 + 2, tokens // 9 + 3)
        assert len(made) == number * 2
        assert source.asked == number


def test_a_stream_begins_before_its_text_is_read():
    source = Counted([words(9, i) for i in range(400)])
    with patch.object(pieces, "_DOCUMENTS", 1), patch.object(stream, "GROUP", 16):
        text = contexts(source, Slow(), context=6)
        heldout, train = text.split(20)
        made = harvest(MODEL, train, layers=(1,), batch=8, block=4)
        assert source.asked < 10
        assert made.d_model == 16
        assert len(next(iter(made))) == 8
        assert source.asked < 20
        assert len(next(iter(made.starting_at(30)))) == 8
        assert source.asked < 60
        assert heldout.tokens == 23
        assert len(made) == train.tokens // 8
        assert source.asked == 400


class Numbered:
    """A source whose activations say which token they are of."""

    name, layers, d_model, device = "numbers", (0,), 1, torch.device("cpu")

    def __init__(self, text):
        self.contexts = text

    def read(self, start, stop):
        context, position = self.contexts[start:stop].keep.nonzero(as_tuple=True)
        return ((100 * (start + context) + position).view(-1, 1, 1),)

    def identity(self):
        return {"text": self.contexts.digest}


def numbered(text, *, seed=0, batch=8, block=3, epochs=1):
    return Activations(Numbered(text), Shuffle(batch, block, seed=seed, epochs=epochs))


def shuffled(text, *, group, **shuffle):
    with patch.object(stream, "GROUP", group):
        made = numbered(text, **shuffle)
        return list(made.with_tokens()), made


SHUFFLES = {
    "seed": st.integers(0, 999),
    "block": st.integers(1, 5),
    "batch": st.integers(1, 30),
    "epochs": st.integers(1, 2),
}


@given(PARTS, st.integers(1, 20), st.fixed_dictionaries(SHUFFLES), st.integers(0, 40), st.booleans())
def test_batches_of_a_growing_text_are_those_of_the_text_read_whole(parts, group, shuffle, first, behind):
    rows = random_rows(40 + sum(parts))
    whole, made = shuffled(rows, group=group, **shuffle)
    again, _ = shuffled(growing(rows, [40, *parts], behind=behind), group=group, **shuffle)
    assert len(made) == len(whole) == len(again)
    for mine, theirs in zip(whole, again, strict=True):
        assert all(torch.equal(*both) for both in zip(mine, theirs, strict=True))
    per_epoch = made.rows // shuffle["batch"]
    for epoch in range(shuffle["epochs"]):
        seen = keys(whole[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert len(set(seen)) == len(seen) == per_epoch * shuffle["batch"]
        assert set(seen) <= {(int(c), int(p)) for c, p in rows.keep.nonzero()}
    with patch.object(stream, "GROUP", group):
        later = numbered(growing(rows, [40, *parts]), **shuffle).starting_at(first)
        assert keys(later.with_tokens()) == keys(whole[first:])
    for x, context, position in whole:
        assert torch.equal(x.flatten(), 100 * context + position)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_the_order_within_a_group_does_not_depend_on_the_text_behind_it(groups, more, seed):
    rows = random_rows(24 * (groups + more))
    short, _ = shuffled(rows[: 24 * groups], group=24, seed=seed, batch=1)
    long, _ = shuffled(rows, group=24, seed=seed, batch=1)
    certain = len(short) - 3 * 4  # the last window of the short text is a half one
    assert keys(long[:certain]) == keys(short[:certain])
    assert keys(long) != keys(shuffled(rows, group=2**14, seed=seed, batch=1)[0])


def test_a_text_of_one_group_is_visited_in_the_order_of_all_its_blocks_and_later_epochs_always():
    rows = random_rows(60)
    for group, epoch in ((60, 0), (2**14, 0), (9, 1), (2**14, 1)):
        _, made = shuffled(rows, group=group, seed=7, epochs=2)
        with patch.object(stream, "GROUP", group):
            order = list(made._order(epoch))
        generator = torch.Generator().manual_seed(seed_of(7, "order", epoch))
        assert order == torch.randperm(20, generator=generator).tolist()


@given(st.integers(0, 999), st.integers(1, 9), st.integers(1, 20))
def test_a_long_text_is_visited_group_by_group_each_in_an_order_of_its_own(seed, group, blocks):
    _, made = shuffled(random_rows(3 * blocks), group=3 * group, seed=seed, batch=1)
    expected = []
    for number, first in enumerate(range(0, blocks, group)):
        which = ("order", 0, number) if number else ("order", 0)
        generator = torch.Generator().manual_seed(seed_of(seed, *which))
        order = torch.randperm(min(group, blocks - first), generator=generator)
        expected += (first + order).tolist()
    with patch.object(stream, "GROUP", 3 * group):
        assert list(made._order(0)) == expected


def test_an_identity_says_where_the_order_is_one_of_groups():
    rows = random_rows(60)
    with patch.object(stream, "GROUP", 60):
        _, small = shuffled(rows, group=60)
        assert small.identity() == {**small.source.identity(), "batch": 8, "block": 3, "seed": 0}
    with patch.object(stream, "GROUP", 30):
        assert small.identity()["group"] == 10
        grown = numbered(growing(rows, [20, 20, 20]))
        assert grown.identity() == small.identity()


@pytest.mark.parametrize("fast", [True, False])
def test_a_broken_line_is_named_where_its_tokens_are_needed(tmp_path, fast):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "' + words(9) + '"}\n' + ('{"text": "' + words(9) + '"}\n') * 9 + "{broken\n")
    with pytest.raises(ValueError, match="line 11") as expected:
        list(documents(file))
    with patch.object(pieces, "_DOCUMENTS", 1):
        text = contexts(file, make_tokenizer() if fast else Slow(), context=6)
        made = harvest(MODEL, text, layers=(1,), batch=10, block=2)
        assert len(text[:18]) == 18
        for _ in range(2):  # it is told again to whoever asks again
            with pytest.raises(ValueError, match=f"^{re.escape(str(expected.value))}$"):
                len(text)
            seen = []
            with patch.object(stream, "GROUP", 4), pytest.raises(ValueError, match="line 11: no JSON"):
                seen.extend(iter(made))
            assert 4 < len(seen) < 9


def test_a_fault_in_the_thread_is_raised_in_the_thread_that_reads(recwarn):
    text = growing(random_rows(9), [3, 3, 3], behind=True, fault=OSError("the disk is gone"))
    text._parts._made.thread.join()
    assert len(text[:9]) == 9
    with pytest.raises(OSError, match="the disk is gone"):
        text.up_to(10)
    assert not recwarn.list


def test_token_ids_that_the_model_lacks_are_named_when_they_are_read():
    rows = random_rows(60)
    ids = rows.ids.clone()
    ids[50, 2] = 99
    made = harvest(MODEL, growing(Contexts(ids, rows.keep), [30, 30]), layers=(1,), batch=8, block=3)
    with pytest.raises(ValueError, match=r"knows the token ids 0 to 63, got 99; use the model's own tokenizer"):
        list(made)
    with pytest.raises(ValueError, match="got 99"):
        harvest(MODEL, Contexts(ids, rows.keep), layers=(1,), batch=8, block=3)


def endless():
    for number in count():
        yield words(40, number % 50)


def test_a_thread_ends_when_nobody_holds_its_text():
    with patch.object(pieces, "_DOCUMENTS", 1):
        text = contexts(endless(), make_tokenizer(), context=6)
        thread = text._parts._made.thread
        assert thread.is_alive()
        front, rest = text.split(200)
        del text
        gc.collect()
        assert rest[:30].context == front.context == 6
        assert thread.is_alive()
        del rest
        gc.collect()
        thread.join()


def test_the_end_of_the_interpreter_waits_for_the_part_that_is_made():
    with patch.object(pieces, "_DOCUMENTS", 1):
        text = contexts(endless(), make_tokenizer(), context=6)
        growing_module._end()
        assert not text._parts._made.thread.is_alive()
        there = len(text._parts._made.held.rows)
        assert len(text[: 8 * there + 80]) == 8 * there + 80  # whoever needs more can still read on


def test_threads_read_one_text_together():
    rows, found = random_rows(300), {}
    text = growing(rows, [3] * 100, behind=True)
    readers = [Thread(target=lambda i=i: found.update({i: text[i : i + 200]})) for i in range(0, 100, 10)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    for start, some in found.items():
        same(some, rows[start : start + 200])
    assert len(found) == 10


def test_a_text_is_read_with_the_tokenizer_as_it_was():
    texts, tokenizer = [f"{words(20, i)} new" for i in range(12)], make_tokenizer(eos_token="<eos>", unk_token="<unk>")
    whole = contexts(texts, tokenizer, context=6)
    with patch.object(pieces, "_DOCUMENTS", 1):
        with patch.object(growing_module._Made, "begin", lambda _: None):  # all but the start is read after the change
            text = contexts(texts, tokenizer, context=6)
        tokenizer.add_tokens(["new"])
        assert tokenizer(["new"])["input_ids"] == [[64]]
        same(text, whole)


def test_a_process_that_was_forked_says_that_it_cannot_read_on():
    text = growing(random_rows(9), [3, 3, 3])
    with patch.object(os, "getpid", lambda: -1):
        assert len(text[:3]) == 3
        with pytest.raises(RuntimeError, match=r"forked.*read it to its end before that, with len\(contexts\)"):
            len(text)
    assert len(text) == 9
    with patch.object(os, "getpid", lambda: -1):
        assert len(text[:9]) == 9


ENDLESS = """
from itertools import repeat
from tokenizers import Tokenizer, models, pre_tokenizers
from fmxnn.activations import contexts

class Fast:
    bos_token_id, eos_token_id, all_special_ids, is_fast = None, 0, [0], True
    made = Tokenizer(models.WordLevel({"end": 0, "word": 1}, unk_token="end"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    def __call__(self, texts, **_):
        return {"input_ids": [each.ids for each in self.made.encode_batch(texts)]}

text = contexts(repeat("word " * 4000), Fast(), context=9)
print(len(text[:10]))
"""


def test_an_interpreter_ends_while_a_text_without_an_end_is_read():
    ended = subprocess.run([sys.executable, "-c", ENDLESS], capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "10\n", "")
