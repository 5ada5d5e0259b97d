"""Plain text cut into windows, in the tokens of several tokenizers."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from fmxnn.activations.aligned import Aligned, Count, check_pairs, pairs, tokens_of
from fmxnn.activations.pieces import LONGEST, Part, grouped
from fmxnn.activations.text import Contexts, Source, documents, first_token


def aligned_contexts(text: Source, tokenizers: Sequence[Any], *, context: int, tokens: int | None = None) -> Aligned:
    """`-> contexts context`: documents joined by EOS and cut into windows that every tokenizer can hold.

    A window begins and ends where a token of every tokenizer ends, and stands behind the BOS (or EOS) of each. It has
    at most `context` tokens of each tokenizer; the rest of a row is padding. It reads no further than the first
    `tokens` pairs. Raises ValueError where no tokens end at the same character.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"harvest reads at least one token, got tokens={tokens}; leave it out to read all")
    firsts = [first_token(tokenizer, context) for tokenizer in tokenizers]
    special = [torch.tensor(tokenizer.all_special_ids, dtype=torch.int32) for tokenizer in tokenizers]
    rows, made, kept = [list[_Row]() for _ in tokenizers], [0] * len(tokenizers), 0
    for window in _windows(_pieces(text, tokenizers, special), context - 1):
        for number, side in enumerate(window):
            made[number] += int((~torch.isin(side.ids, special[number])).sum())
            if side.kept.any():
                rows[number].append(_behind(firsts[number], side))
        kept += int(window[0].kept.sum())
        if tokens is not None and kept >= tokens:
            break
    check_pairs(kept)
    each = tuple(_padded(some, first) for some, first in zip(rows, firsts, strict=True))
    return Aligned(each[0], each, tuple(Count(count, kept) for count in made))


class _Row(NamedTuple):
    """A stretch of text in one tokenizer's tokens: their ids, and which of them are in a pair that is kept."""

    ids: Tensor
    kept: Tensor


class _Piece(NamedTuple):
    """A stretch of text in all tokenizers' tokens: their ids, where pairs end, and which pairs are kept."""

    ids: list[Tensor]
    at: list[Tensor]
    kept: Tensor

    def before(self, later: "_Piece") -> "_Piece":
        """This one and the next one joined."""
        ids, at = zip(self.ids, later.ids, strict=True), zip(self.ids, self.at, later.at, strict=True)
        return _Piece(
            [torch.cat(both) for both in ids],
            [torch.cat([here, len(tokens) + there]) for tokens, here, there in at],
            torch.cat([self.kept, later.kept]),
        )

    def cut(self, first: int, last: int) -> "tuple[list[_Row], _Piece]":
        """The text up to the end of pair `last`, its pairs from `first` on kept, and the rest."""
        ends = [int(at[last]) + 1 for at in self.at]
        rows = list[_Row]()
        for ids, at, end in zip(self.ids, self.at, ends, strict=True):
            kept = torch.zeros(end, dtype=torch.bool)
            kept[at[first : last + 1][self.kept[first : last + 1]]] = True
            rows.append(_Row(ids[:end], kept))
        ids = [each[end:] for each, end in zip(self.ids, ends, strict=True)]
        at = [each[last + 1 :] - end for each, end in zip(self.at, ends, strict=True)]
        return rows, _Piece(ids, at, self.kept[last + 1 :])


def _windows(pieces: Iterable[_Piece], room: int) -> Iterator[list[_Row]]:
    """The whole text in stretches that end with a pair. Those of more than `room` tokens keep no pair."""
    held: _Piece | None = None
    for piece in pieces:
        held = piece if held is None else held.before(piece)
        while len(held.kept):
            fits = min(int(torch.searchsorted(at, room)) for at in held.at)
            if fits == len(held.kept):
                break
            # where not even the first pair fits, it is only where the next window begins
            window, held = held.cut(0, fits - 1) if fits else held.cut(1, 0)
            yield window
    if held is not None:
        if len(held.kept):
            window, held = held.cut(0, len(held.kept) - 1)
            yield window
        yield [_Row(ids, torch.zeros(len(ids), dtype=torch.bool)) for ids in held.ids]


def _pieces(text: Source, tokenizers: Sequence[Any], special: Sequence[Tensor]) -> Iterator[_Piece]:
    stops = [first_token(each, 2) if each.eos_token_id is None else each.eos_token_id for each in tokenizers]
    for some in grouped(_parts(documents(text))):
        made = [tokens_of([part for part, _ in some], tokenizer) for tokenizer in tokenizers]
        for (part, last), *sides in zip(some, *made, strict=True):
            if last:  # all tokenizers stop one character later
                sides = [side.then(stop, len(part) + 1) for side, stop in zip(sides, stops, strict=True)]
            at = pairs([side.ends for side in sides])
            kept = [~torch.isin(side.ids[there], ids) for side, there, ids in zip(sides, at, special, strict=True)]
            yield _Piece([side.ids for side in sides], at, torch.stack(kept).all(0))


def _parts(some: Iterable[str]) -> Iterator[Part]:
    """Documents in parts of at most LONGEST characters, cut before a space where there is one."""
    for document in some:
        start = 0
        while len(document) - start > LONGEST:
            stop = document.rfind(" ", start + LONGEST // 2, start + LONGEST)
            stop = start + LONGEST if stop < 0 else stop
            yield document[start:stop], False
            start = stop
        yield document[start:], True


def _behind(first: int, row: _Row) -> _Row:
    """A row behind its first token, which is not kept."""
    return _Row(functional.pad(row.ids, (1, 0), value=first), functional.pad(row.kept, (1, 0), value=False))


def _padded(rows: Sequence[_Row], first: int) -> Contexts:
    ids = pad_sequence([row.ids for row in rows], batch_first=True, padding_value=first)
    return Contexts(ids, pad_sequence([row.kept for row in rows], batch_first=True))
