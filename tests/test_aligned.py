"""Pairs of tokens of different tokenizers, against answers made byte by byte."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from several_tokenizers import byte_level, ends, metaspace, spelled
from tokenizers import AddedToken

from fmxnn.activations import Contexts
from fmxnn.activations.aligned import Count, aligned_to, finished, pairs, tokens_of
from fmxnn.activations.aligned_text import aligned_contexts
from fmxnn.activations.vocabularies import check_offsets, same_tokens

PIECES = [
    "the whale ",
    "was",
    " ",
    "  ",
    "\n",
    "é",
    "e\u0301",
    "🙂",
    "👩\u200d👧",
    "漢字",
    "ß",
    "a",
    "Zw",
    "<|endoftext|>",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=25).map("".join),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30),
)


@given(TEXTS)
def test_a_byte_level_token_ends_where_its_bytes_do(text):
    (made,) = tokens_of([text], byte_level())
    ids, expected = ends(text, byte_level())
    assert made.ids.tolist() == ids
    assert {int(end): number for number, end in enumerate(made.ends) if end} == expected


@given(TEXTS, st.sampled_from(["always", "first", "never"]))
def test_a_sentencepiece_token_ends_where_its_text_does(text, prefix):
    (made,) = tokens_of([text], metaspace(prefix))
    ids, expected = ends(text, metaspace(prefix))
    found = {int(end): number for number, end in enumerate(made.ends) if end}
    assert made.ids.tolist() == ids
    assert found.items() <= expected.items()
    # a run of unknown characters is one unknown piece, of which the bytes all have the place
    piece = metaspace(prefix).convert_ids_to_tokens
    assert all(piece(ids[expected[end]]).startswith("<0x") for end in set(expected) - set(found))


@given(TEXTS)
def test_pairs_are_the_tokens_behind_the_same_characters(text):
    sides = [tokens_of([text], tokenizer)[0] for tokenizer in (byte_level(), metaspace(), metaspace("never"))]
    exact = [ends(text, tokenizer)[1] for tokenizer in (byte_level(), metaspace(), metaspace("never"))]
    at = pairs([side.ends for side in sides])
    for three in zip(*(each.tolist() for each in at), strict=True):
        (character,) = {end for end, number in exact[0].items() if number == three[0]}
        assert [each[character] for each in exact] == list(three)
    assert all(a < b for each in at for a, b in pairwise(each.tolist()))
    told = [{int(end) for end in side.ends if end} for side in sides]
    assert len(at[0]) == len(set.intersection(*told))


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), max_size=8))
@example([(0, 1), (1, 0)])  # a token of no characters behind the last one
def test_a_token_ends_a_text_if_what_stands_before_it_is_read_and_what_comes_is_not(spans):
    given_spans = [(start, start + length) for start, length in spans]
    expected = []
    for number, (_, end) in enumerate(given_spans):
        before, behind = given_spans[: number + 1], given_spans[number + 1 :]
        whole = all(stop <= end for _, stop in before) and all(start >= end for start, _ in behind)
        expected.append(end if whole and not any(stop == end for _, stop in behind[:1]) else 0)
    assert finished(torch.tensor(given_spans).view(-1, 2)).tolist() == expected


def spelled_row(ids, tokenizer):
    return b"".join(spelled(tokenizer, token) for token in ids)


def whole_text(documents, tokenizer):
    """All tokens as they are joined: each document and one EOS."""
    return [
        token
        for text in documents
        for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]


@given(st.lists(TEXTS.filter(lambda text: "<|" not in text), min_size=1, max_size=5), st.integers(2, 20))
def test_windows_spell_the_same_text_for_every_tokenizer_and_lose_none_that_fits(documents, context):
    tokenizers = [byte_level(), metaspace("never")]
    texts = [[text] for text in documents]
    alone = [[tokens_of(text, tokenizer)[0] for text in texts] for tokenizer in tokenizers]
    both = [pairs([one.ends, other.ends]) for one, other in zip(*alone, strict=True)]
    if not any(len(at[0]) for at in both):
        with pytest.raises(ValueError, match="nowhere in the text .* one tokenizer for all"):
            aligned_contexts(documents, tokenizers, context=context)
        return
    try:
        made = aligned_contexts(documents, tokenizers, context=context)
    except ValueError as error:
        assert "nowhere in the text" in str(error)
        assert context < 20
        return
    for number, (contexts, tokenizer, count) in enumerate(zip(made.each, tokenizers, made.counts, strict=True)):
        first = tokenizer.bos_token_id
        assert contexts.ids.shape[1] <= context
        assert (contexts.ids[:, 0] == first).all()
        assert not contexts.keep[:, 0].any()
        assert contexts.tokens == count.paired
        assert count.tokens == sum(len(side.ids) for side in alone[number])
        assert torch.equal(contexts.keep.sum(1), made.contexts.keep.sum(1))
    flat = [[(int(a.ids[i]), int(b.ids[j])) for (a, b), at in zip(zip(*alone), both) for i, j in zip(*at)]]
    kept = list(zip(*(contexts.ids[contexts.keep].tolist() for contexts in made.each), strict=True))
    rest = iter(flat[0])
    assert all(pair in rest for pair in kept)  # in order, none twice
    longest = max(len(whole_text(documents, tokenizer)) for tokenizer in tokenizers)
    if longest < context:
        assert kept == flat[0]
    # a row of both spells the same text
    for row in range(len(made.contexts)):
        said = []
        for contexts, tokenizer in zip(made.each, tokenizers, strict=True):
            last = int(contexts.keep[row].nonzero().max())
            text = b"".join(
                b"|" if token in tokenizer.all_special_ids else spelled(tokenizer, token)
                for token in contexts.ids[row, 1 : last + 1].tolist()
            )
            said.append(text)
        assert said[0] == said[1]


def test_the_text_is_read_no_further_than_the_pairs_asked_for():
    taken = []

    def texts():
        for number in range(10_000):
            taken.append(number)
            yield f"the whale number {number} was seen off the coast again"

    made = aligned_contexts(texts(), [byte_level(), metaspace()], context=24, tokens=100)
    assert 100 <= made.contexts.tokens < 100 + 24
    assert len(taken) < 1000


def test_a_long_document_is_cut_into_parts_and_none_is_lost(monkeypatch):
    text = "the whale was seen off the coast again, said nobody " * 40
    tokenizers = [byte_level(), metaspace("never")]
    whole = aligned_contexts([text], tokenizers, context=24)
    monkeypatch.setattr("fmxnn.activations.aligned_text.LONGEST", 100)
    parts = aligned_contexts([text], tokenizers, context=24)
    assert torch.equal(whole.contexts.ids, parts.contexts.ids)
    assert torch.equal(whole.contexts.keep, parts.contexts.keep)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(3, 20))
def test_equal_tokenizers_read_what_contexts_reads(lengths, context):
    documents = ["the whale was seen off the coast again, said nobody "[:length] for length in lengths]
    tokenizer = byte_level()
    made = aligned_contexts(documents, [tokenizer, tokenizer], context=context)
    assert made.counts[0].dropped == made.counts[1].dropped == 0
    flat = whole_text(documents, tokenizer)
    rows = [flat[start : start + context - 1] for start in range(0, len(flat), context - 1)]
    rows = [[0, *row] for row in rows if set(row) - {0}]
    found = [row[: len(want)] for row, want in zip(made.contexts.ids.tolist(), rows, strict=True)]
    assert found == rows
    assert torch.equal(made.contexts.keep, made.contexts.ids != 0)
    assert torch.equal(made.each[0].ids, made.each[1].ids)


def test_a_special_token_of_one_is_kept_by_none():
    text = "the whale<|endoftext|>was seen"
    made = aligned_contexts([text], [byte_level(), metaspace()], context=60)
    plain, _ = made.each
    assert int((plain.ids[0] == byte_level().eos_token_id).sum()) > 1
    assert not plain.keep[plain.ids == byte_level().eos_token_id].any()
    assert made.counts[0].paired == plain.tokens == int(made.each[1].keep.sum())


@dataclass(frozen=True)
class Chat(Contexts):
    roles: torch.Tensor = field()
    rendered: tuple[str, ...]

    def __getitem__(self, some):
        return replace(
            self, ids=self.ids[some], keep=self.keep[some], roles=self.roles[some], rendered=self.rendered[some]
        )


def chat(texts, tokenizer, context, keep=lambda row: row % 5 != 2):
    """Rows as a chat template makes them: nothing in front but what the text itself begins with."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:context] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in rows], dtype=torch.int32)
    there = torch.arange(width) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    roles = torch.where(there, torch.arange(width) // 3 % 3, -1).to(torch.int8)
    kept = there & keep(torch.arange(width))
    kept[:, 0] = False
    return Chat(ids, kept, roles, tuple(texts))


@given(
    st.lists(TEXTS.map(lambda text: "the whale was" + text), min_size=1, max_size=4), st.integers(16, 40), st.booleans()
)
def test_conversations_are_paired_from_their_text_and_keep_their_roles(texts, context, second):
    tokenizers = [byte_level(), metaspace()]
    mine = tokenizers[1] if second else tokenizers[0]
    talk = chat(texts, mine, context)
    made = aligned_to(talk, talk.rendered, tokenizers, longest=context)
    known, other = (1, 0) if second else (0, 1)
    assert made.each[known] is made.contexts
    assert isinstance(made.contexts, Chat)
    assert torch.equal(made.contexts.roles, talk.roles)
    assert torch.equal(made.contexts.ids, talk.ids)
    assert not (made.contexts.keep & ~talk.keep).any()
    theirs = made.each[other]
    assert theirs.ids.shape[1] <= context
    assert (theirs.ids[:, 0] == tokenizers[other].bos_token_id).all()
    kept = 0
    for row, text in enumerate(texts):
        at = pairs([tokens_of([text], tokenizer)[0].ends for tokenizer in (mine, tokenizers[other])])
        bos = int(tokens_of([text], tokenizers[other])[0].ids[0]) != tokenizers[other].bos_token_id
        expected = [(i, j + bos) for i, j in zip(*(each.tolist() for each in at)) if i < context and talk.keep[row, i]]
        banned = tokenizers[other].bos_token_id
        expected = [(i, j) for i, j in expected if j < context and theirs.ids[row, j] != banned]
        found = [each.keep[row].nonzero().flatten().tolist() for each in (made.contexts, theirs)]
        assert list(zip(*found, strict=True)) == expected
        kept += len(expected)
    assert made.counts[known] == Count(talk.tokens, kept)
    assert made.counts[other].paired == kept


def test_a_text_that_begins_with_a_bos_gets_no_second_one():
    texts = ["<|endoftext|>the whale was seen", "<s>the whale was seen"]
    for text in texts:
        talk = chat([text], byte_level(), 30, keep=lambda row: row >= 0)
        made = aligned_to(talk, talk.rendered, [byte_level(), metaspace()], longest=None)
        row = made.each[1].ids[0].tolist()
        assert row.count(metaspace().bos_token_id) == 1
        assert row[0] == metaspace().bos_token_id
        assert not made.each[1].keep[0, 0]


def test_contexts_may_have_a_bos_before_their_text():
    talk = chat(["the whale was seen", "again"], byte_level(), 30, keep=lambda row: row >= 0)
    first = torch.full((2, 1), byte_level().bos_token_id, dtype=torch.int32)
    keep = torch.cat([torch.zeros(2, 1, dtype=torch.bool), talk.ids != byte_level().eos_token_id], 1)
    behind = replace(talk, ids=torch.cat([first, talk.ids], 1), keep=keep)
    without, with_it = (
        aligned_to(each, each.rendered, [byte_level(), metaspace()], longest=None) for each in (talk, behind)
    )
    assert torch.equal(with_it.contexts.keep[:, 2:], without.contexts.keep[:, 1:])
    assert torch.equal(with_it.each[1].ids, without.each[1].ids)


def test_contexts_of_another_tokenizer_are_refused():
    talk = chat(["the whale was seen"], byte_level(), 30)
    with pytest.raises(ValueError, match="contexts hold other tokens than .*TokenizersBackend.* make them with"):
        aligned_to(talk, talk.rendered, [metaspace(), metaspace("never")], longest=None)
    nothing = replace(talk, keep=torch.zeros_like(talk.keep))
    with pytest.raises(ValueError, match="nowhere in the text"):
        aligned_to(nothing, talk.rendered, [byte_level(), metaspace()], longest=None)


def test_tokenizers_are_the_same_by_what_they_do():
    added = metaspace.__wrapped__("always")
    assert added is not metaspace()
    assert same_tokens(added, metaspace())
    added.chat_template = "{{ messages }}"
    assert same_tokens(added, metaspace())
    added.add_tokens([AddedToken("<turn>", special=True)])
    assert not same_tokens(added, metaspace())
    assert not same_tokens(metaspace("never"), metaspace())
    other = metaspace.__wrapped__("always")
    other.backend_tokenizer.pre_tokenizer = metaspace("never").backend_tokenizer.pre_tokenizer
    assert other.get_vocab() == metaspace().get_vocab()
    assert not same_tokens(other, metaspace())
    assert not same_tokens(byte_level(), metaspace())
    slow = SimpleNamespace(get_vocab=lambda: {"a": 0}), SimpleNamespace(get_vocab=lambda: {"a": 0})
    assert same_tokens(*slow)
    assert not same_tokens(slow[0], SimpleNamespace(get_vocab=lambda: {"b": 0}))
    nameless = SimpleNamespace()
    assert same_tokens(nameless, nameless)
    assert not same_tokens(nameless, SimpleNamespace())


def test_a_tokenizer_without_characters_is_refused():
    check_offsets(byte_level(), "base")
    with pytest.raises(ValueError, match="SimpleNamespace of base does not tell .*; give its fast tokenizer"):
        check_offsets(SimpleNamespace(is_fast=False), "base")
