from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from language import make_model, make_tokenizer, words
from tokenizers import Tokenizer, decoders, models
from torch.testing import assert_close
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import fmxnn as fx
from fmxnn.activations.harvesting import harvest
from fmxnn.activations.text import Contexts
from fmxnn.metrics import firing as file
from fmxnn.metrics.excerpts import Excerpt, Piece, Pieces
from fmxnn.metrics.firing import TopToken, TopTokens, top_tokens

MODEL = make_model()
LAYERS, WIDTH = (0, 2), 9
TINY = Path(__file__).parents[1] / "examples" / "tiny-lm"
BYTES = AutoTokenizer.from_pretrained(TINY)


def activations(text=None, at=LAYERS):
    text = [words(50, i) for i in range(5)] if text is None else text
    return harvest(MODEL, text, layers=at, tokenizer=make_tokenizer(), context=WIDTH, batch=16, dtype=torch.float64)


def make_crosscoder(sparsifier=None, layers=2, latents=12, weight=fx.DenseWeight):
    parts = [weight(layers, 16, latents) for _ in range(2)]
    return fx.Crosscoder(
        fx.CrossLayerEncoder(parts[0], sparsifier or fx.TopK(3)), fx.CrossLayerDecoder(parts[1])
    ).double()


class Numbered:
    """Pieces whose text is their place, so that an excerpt says where it is from."""

    def __init__(self, count):
        self.texts = [f"word {i}" for i in range(count)]

    def split(self, ids):
        return [Piece(str(place), 0, position, 1) for position, place in enumerate(ids)]


def places_of(kept, rows):
    """What a collector has found, in the form of the reference."""
    text = Contexts(torch.arange(rows * WIDTH).view(rows, WIDTH), torch.ones(rows, WIDTH, dtype=torch.bool))
    found = kept.compute(Numbered(8), text, characters=0)
    return {
        latent: [
            (int(one.token.split()[1]), one.activation, [int(ex.pieces[ex.at]) for ex in one.excerpts]) for one in fired
        ]
        for latent, fired in found.items()
        if fired
    }


@st.composite
def streams(draw):
    """Sparse codes with many ties, a few words, places of which some are shared, and cuts."""
    rows, latents = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    tokens = rows * WIDTH
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    z = (
        torch.randint(-9, draw(st.sampled_from([2, 4, 40])), (tokens, latents), generator=generator)
        .clamp(min=0)
        .double()
    )
    said = torch.randint(draw(st.integers(1, 8)), (tokens,), generator=generator)
    places = torch.arange(tokens)
    for at in draw(st.sets(st.integers(1, tokens - 1), max_size=3)):
        places[at], said[at] = places[at - 1], said[at - 1]
    order = torch.randperm(tokens, generator=generator) if draw(st.booleans()) else torch.arange(tokens)
    return z[order], said[order], places[order], sorted(draw(st.lists(st.integers(0, tokens), max_size=4))), rows


@given(streams(), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_the_collector_equals_a_loop_however_the_batches_are_cut(stream, tokens, contexts, sparse):
    z, said, places, cuts, rows = stream
    latents = list(range(z.shape[1]))[::-1]
    entries = [(n, int(said[t]), int(places[t]), float(z[t, n])) for t in range(len(z)) for n in latents]
    expected = reference.top_words(entries, tokens, contexts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "_WAITING", 0)
        kept = TopTokens(latents, WIDTH, tokens=tokens, contexts=contexts)
        for start, stop in zip([0, *cuts], [*cuts, len(z)], strict=True):
            part = z[start:stop]
            kept.update(fx.to_csr(part) if sparse else part, said[start:stop], places[start:stop])
    assert places_of(kept, rows) == expected


@given(streams())
def test_latents_may_be_permuted_and_chosen(stream):
    z, said, places, _, rows = stream
    order = torch.randperm(z.shape[1])
    one, other = TopTokens(range(z.shape[1]), WIDTH), TopTokens([int(order[0])], WIDTH)
    one.update(z[:, order], said, places)
    other.update(z, said, places)
    assert places_of(one, rows).get(0) == places_of(other, rows).get(int(order[0]))


def test_of_equal_activations_the_earlier_place_is_shown_whenever_it_comes(monkeypatch):
    monkeypatch.setattr(file, "_WAITING", 0)
    kept = TopTokens([0], WIDTH, tokens=1, contexts=1)
    kept.update(torch.ones(4, 1), torch.arange(4), torch.arange(5, 1, -1))
    kept.update(torch.ones(1, 1), torch.tensor([4]), torch.tensor([0]))
    assert places_of(kept, 1) == {0: [(4, 1.0, [0])]}


def test_what_is_held_is_bounded_by_latents_tokens_and_contexts():
    kept = TopTokens(range(5), WIDTH, tokens=2, contexts=3)
    for batch in range(30):
        kept.update(torch.rand(100, 5), torch.randint(1000, (100,)), torch.arange(100) + 100 * batch)
        kept._settle()
        assert len(kept._kept[0]) <= 5 * (2 * 4) * 3


@given(st.text(max_size=60).filter(lambda text: "\ufffd" not in text))
def test_pieces_make_up_the_text_and_none_is_part_of_a_character(text):
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    pieces = Pieces(BYTES).split(ids)
    assert "".join(piece.text for piece in pieces) == text
    assert sum(piece.tokens for piece in pieces) == len(ids)
    assert [piece.position for piece in pieces] == [
        sum(piece.tokens for piece in pieces[:i]) for i in range(len(pieces))
    ]
    assert not any("\ufffd" in piece.text for piece in pieces)


def test_a_character_of_several_tokens_is_one_piece_and_broken_bytes_are_shown_as_such():
    pieces = Pieces(BYTES)
    ids = BYTES("a’🎉b", add_special_tokens=False)["input_ids"]
    assert [(piece.text, piece.tokens) for piece in pieces.split(ids)] == [("a", 1), ("’", 3), ("🎉", 4), ("b", 1)]
    assert [(piece.text, piece.tokens) for piece in pieces.split(ids[2:6])] == [("\ufffd", 1)] * 4
    same = [piece.word for piece in pieces.split(ids + ids)]
    assert same[:4] == same[4:]
    assert pieces.texts[same[1]] == "’"


def sentencepiece():
    """A tokenizer whose decoder drops the first space, and whose characters may be cut into bytes, as Llama's and
    Gemma's are.
    """
    words = ["<unk>", "a", "▁the", "▁cat", "s", "<0xE2>", "<0x80>", "<0x99>", "▁"]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_spaces_and_bytes_of_other_tokenizers_come_back_too():
    pieces = Pieces(sentencepiece()).split([2, 3, 5, 6, 7, 4, 8, 5, 6])
    assert [piece.text for piece in pieces] == [" the", " cat", "’", "s", " ", "\ufffd", "\ufffd"]


def expected_contexts(made, characters):
    """By words and offsets: for each kept token its text and its excerpt."""
    for row, keep in zip(made.contexts.ids.tolist(), made.contexts.keep.tolist(), strict=True):
        for at in range(len(row)):
            if not keep[at]:
                continue
            start, stop = at, at + 1
            while keep[start - 1]:
                start -= 1
            while stop < len(row) and keep[stop]:
                stop += 1
            before, after = "".join(f" w{i}" for i in row[start:at]), "".join(f" w{i}" for i in row[at + 1 : stop])
            yield at, row, f"{before[max(0, len(before) - characters) :]}<< w{row[at]}>>{after[:characters]}"


@given(
    st.integers(0, 10**6),
    st.integers(0, 30),
    st.sampled_from([fx.TopK(3), fx.BatchTopK(2), fx.JumpReLU(12), torch.nn.ReLU()]),
)
def test_firing_equal_a_loop_over_the_text(seed, characters, sparsifier):
    torch.manual_seed(seed)
    made, crosscoder = activations([words(20, seed), "", words(31, seed + 1)]), make_crosscoder(sparsifier)
    direct = made.reader(made.contexts.ids.long())
    with torch.no_grad():
        codes = crosscoder.eval().encode(direct)
    best = {}
    shown = list(expected_contexts(made, characters))
    rows = [i for i, keep in enumerate(made.contexts.keep) for _ in range(int(keep.sum()))]
    for row, (at, ids, text) in zip(rows, shown, strict=True):
        for latent in range(12):
            if codes[row, at, latent] > 0:
                best.setdefault(latent, {}).setdefault(f" w{ids[at]}", []).append((float(codes[row, at, latent]), text))
    found = top_tokens(crosscoder.train(), made, make_tokenizer(), tokens=4, contexts=1, characters=characters)
    assert crosscoder.training
    assert list(found) == list(range(12))
    for latent, fired in found.items():
        there = best.get(latent, {})
        wanted = sorted(there, key=lambda token: -max(there[token])[0])[:4]
        assert [one.token for one in fired] == wanted
        for one in fired:
            largest = max(there[one.token])[0]
            assert_close(one.activation, largest)
            (context,) = one.contexts
            assert context in {
                text for a, text in there[one.token] if a > largest - 1e-12
            }  # the same words behind a BOS tie


def test_a_character_of_several_tokens_counts_once_and_stands_whole_in_its_context():
    text = ["He said “no”. " * 12]
    made = harvest(TINY, text, layers=(1,), context=16, batch=16)
    weights = [fx.DenseWeight(1, 128, 3) for _ in range(2)]
    crosscoder = fx.Crosscoder(fx.CrossLayerEncoder(weights[0], torch.nn.ReLU()), fx.CrossLayerDecoder(weights[1]))
    for fired in top_tokens(crosscoder, made, BYTES, [2, 0], tokens=50).values():
        said = [one.token for one in fired]
        assert len(set(said)) == len(said)
        assert {"“", "”"} < set(said)
        assert "<<“>>" in fired[said.index("“")].contexts[0]
        assert all("\ufffd" not in token or token == "\ufffd" for token in said)  # a context's edge may cut a character


def test_an_excerpt_as_text_marks_its_token():
    assert str(Excerpt(("a", " b", "\n"), (0.0, 2.0, 0.0), 1)) == "a<< b>>\n"
    assert TopToken(" b", 2.0, ("a<< b>>",)).contexts == ("a<< b>>",)


def test_a_latent_that_never_fires_has_an_empty_list():
    crosscoder = make_crosscoder(torch.nn.ReLU())
    with torch.no_grad():
        crosscoder.encoder.bias[5] = -1e6
    assert top_tokens(crosscoder, activations(), make_tokenizer(), [5, 4])[5] == []


def test_what_is_wrong_is_said():
    made, tokenizer = activations(), make_tokenizer()
    with pytest.raises(ValueError, match="^the crosscoder has the latents 0 to 11, got 12, -1$"):
        top_tokens(make_crosscoder(), made, tokenizer, [3, 12, -1])
    with pytest.raises(ValueError, match="^the crosscoder has the latents 0 to 11, got none$"):
        top_tokens(make_crosscoder(), made, tokenizer, [])
    with pytest.raises(ValueError, match="^top tokens need tokens >= 1 and contexts >= 1, got tokens=0, contexts=2$"):
        top_tokens(make_crosscoder(), made, tokenizer, tokens=0)
    with pytest.raises(
        ValueError, match="^the text gives 1 tokens, and one context needs 8; give more text or a shorter context$"
    ):
        activations([""])
