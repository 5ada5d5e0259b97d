"""Token ids back as text, piece by piece, and a piece among its neighbours."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

from fmxnn.activations.own import NO_TOKEN
from fmxnn.activations.text import Contexts
from fmxnn.activations.vocabularies import check_tokenizer

_BROKEN = "\ufffd"
_CONTEXTS_HELD = 4096
_MOST_TOKENS = 4  # a character has at most four bytes in UTF-8


@dataclass(frozen=True)
class Piece:
    """The text of one token, or of several that make one character together.

    `position` is that of the first token, `word` numbers the text, and `tokens` counts them.

    ```python
    from fmxnn.metrics.excerpts import Piece

    Piece(" whale", word=0, position=3, tokens=1)
    ```
    """

    text: str
    word: int
    position: int
    tokens: int


@dataclass(frozen=True)
class Excerpt:
    """A token in its own document: pieces of text, the latent's activation on each, and where the token stands.

    The activation is 0 where the latent is silent; `at` is the token's place among the pieces.

    ```python
    from fmxnn.metrics.excerpts import Excerpt

    str(Excerpt((" the", " whale"), (0.0, 2.5), at=1))  # ' the<< whale>>'
    ```
    """

    pieces: tuple[str, ...]
    activations: tuple[float, ...]
    at: int

    def __str__(self) -> str:
        """The text with the token in << >>."""
        return "".join((*self.pieces[: self.at], "<<", self.pieces[self.at], ">>", *self.pieces[self.at + 1 :]))


@dataclass(frozen=True)
class FiredToken:
    """A distinct token that a latent fires on: its text, its largest activation, and where it stands.

    ```python
    from fmxnn.metrics.excerpts import Excerpt, FiredToken

    FiredToken(" whale", 2.5, (Excerpt((" the", " whale"), (0.0, 2.5), at=1),))
    ```
    """

    token: str
    activation: float
    excerpts: tuple[Excerpt, ...]


class Pieces:
    """The text of token ids, one piece a token; tokens that make one UTF-8 character together are one piece.

    A piece is the shortest run of up to four tokens that decodes without U+FFFD. Where there is none (a context may
    begin or end inside a character) each token is a piece of its own and shows as U+FFFD. Spaces stay where the
    tokenizer has them. Where a context has no token (-1), the piece is empty. `texts` has the text of each word.

    ```python
    from fmxnn.activations.models import open_tokenizer
    from fmxnn.metrics.excerpts import Pieces

    tokenizer = open_tokenizer("examples/tiny-lm")
    pieces = Pieces(tokenizer).split(tokenizer("the whale")["input_ids"])
    "".join(piece.text for piece in pieces)  # 'the whale'
    ```
    """

    def __init__(self, tokenizer: Any):
        check_tokenizer("the text of tokens", tokenizer)
        anchor = tuple(
            tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        )  # some decoders drop the space before a first token
        self._text = cache(partial(_decoded, tokenizer, anchor))
        self._words: dict[str, int] = {}
        self.texts: list[str] = []

    def split(self, ids: Sequence[int]) -> list[Piece]:
        """The pieces of a context, in order, all tokens covered."""
        pieces, position = list[Piece](), 0
        while position < len(ids):
            text, count = self._shortest(ids, position)
            word = self._words.setdefault(text, len(self.texts))
            self.texts += [text] if word == len(self.texts) else []
            pieces.append(Piece(text, word, position, count))
            position += count
        return pieces

    def _shortest(self, ids: Sequence[int], position: int) -> tuple[str, int]:
        alone = self._text((ids[position],))
        if _BROKEN not in alone:
            return alone, 1
        for count in range(2, min(_MOST_TOKENS, len(ids) - position) + 1):
            text = self._text(tuple(ids[position : position + count]))
            if _BROKEN not in text:
                return text, count
        return alone, 1


class Excerpts:
    """Excerpts of one text, each with up to `characters` to each side of its token.

    `texts` has the text of each word.

    ```python
    from fmxnn.activations import Contexts
    from fmxnn.activations.models import open_tokenizer
    from fmxnn.metrics.excerpts import Excerpts, Pieces

    tokenizer = open_tokenizer("examples/tiny-lm")
    ids = torch.tensor([tokenizer("the whale")["input_ids"]])
    there = Excerpts(Pieces(tokenizer), Contexts(ids, ids >= 0), characters=80)
    there.at(0, 1, {1: 2.5}).activations[1]  # 2.5
    ```
    """

    def __init__(self, pieces: Pieces, text: Contexts, *, characters: int):
        self.texts, self.characters = pieces.texts, characters
        self._pieces, self._text = pieces, text
        self._read = lru_cache(_CONTEXTS_HELD)(self._line)

    def at(self, context: int, position: int, trail: Mapping[int, float]) -> Excerpt:
        """The excerpt around a token; `trail` has the activation at each position of its context where one fires."""
        line, starts, stops = self._read(context)
        shown = [trail.get(start, 0.0) for start in starts]
        return excerpt(line, shown, bisect_left(starts, position), stops, characters=self.characters)

    def _line(self, context: int) -> tuple[list[Piece], list[int], list[bool]]:
        line, keep = self._pieces.split(self._text.ids[context].tolist()), self._text.keep[context].tolist()
        return line, [piece.position for piece in line], [not keep[piece.position] for piece in line]


def excerpt(
    pieces: Sequence[Piece], activations: Sequence[float], at: int, stops: Sequence[bool], *, characters: int
) -> Excerpt:
    """Up to `characters` of text to each side of piece `at`.

    It ends early at a piece that `stops`: the edge of its document.
    """
    before, left = list[tuple[str, float]](), characters
    for i in range(at - 1, -1, -1):
        if stops[i] or left == 0:
            break
        before.append((pieces[i].text[-left:], activations[i]))
        left -= len(before[-1][0])
    after, left = list[tuple[str, float]](), characters
    for i in range(at + 1, len(pieces)):
        if stops[i] or left == 0:
            break
        after.append((pieces[i].text[:left], activations[i]))
        left -= len(after[-1][0])
    whole = [*reversed(before), (pieces[at].text, activations[at]), *after]
    return Excerpt(tuple(text for text, _ in whole), tuple(activation for _, activation in whole), len(before))


def _decoded(tokenizer: Any, anchor: tuple[int, ...], ids: tuple[int, ...]) -> str:
    """The text of `ids` behind the anchor's; no character reaches over a place without a token."""
    if NO_TOKEN in ids:
        return "" if len(ids) == 1 else _BROKEN
    before, whole = (
        tokenizer.decode(list(some), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for some in (anchor, anchor + ids)
    )
    return whole[len(before) :]
