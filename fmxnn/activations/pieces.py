"""The tokens of documents of any length, made in pieces of bounded size."""

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Protocol

Part = tuple[str, bool]
"""A part of a document, and whether it is the last one."""
LONGEST = 2**18
"""Characters of a document that is tokenised whole, and of all documents that are tokenised at once."""
_DOCUMENTS = 256
_REACH, _WINDOW, _TRIES = (
    2**14,
    64,
    16,
)  # how far before its end a piece is cut, what a cut is tried on, and how many are tried


Piece = tuple[list[int], bool]
"""The token ids of a piece of a document, and whether it is the last one."""


class Tokenize(Protocol):
    """What turns texts into tokens."""

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Mapping[str, list[list[int]]]:
        """The token ids of each text, under `input_ids`."""
        ...


class Tokenizer(Tokenize, Protocol):
    """What is asked of a tokenizer; every transformers one has it."""

    bos_token_id: int | None
    eos_token_id: int | None
    all_special_ids: list[int]


class Separable:
    """Tokenises as the tokenizer given, and after `separate` as a copy of it.

    A tokenizer keeps settings, such as padding, from one call for the next. One that is used in two threads would take
    those of the other.

    ```python
    from fmxnn.activations.models import open_tokenizer
    from fmxnn.activations.pieces import Separable

    tokenise = Separable(open_tokenizer("examples/tiny-lm"))
    tokenise.separate()
    tokenise(["The whale"], add_special_tokens=False, verbose=False)["input_ids"]
    ```
    """

    def __init__(self, tokenizer: Tokenize):
        self._tokenizer = tokenizer

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Mapping[str, list[list[int]]]:
        """The token ids of each text, under `input_ids`."""
        return self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=verbose)

    def separate(self) -> None:
        """Goes on with a copy."""
        self._tokenizer = deepcopy(self._tokenizer)


def parts(text: str) -> Iterator[Part]:
    """A document in parts of at most LONGEST characters."""
    for start in range(0, max(len(text), 1), LONGEST):
        yield text[start : start + LONGEST], start + LONGEST >= len(text)


def tokenised(stream: Iterable[Part], reader: Tokenize) -> Iterator[list[Piece]]:
    """The token ids of pieces of documents, as many at a time as are tokenised at once.

    Beside each piece stands whether it is the last of its document. A document of up to LONGEST characters is one
    piece. A longer one is cut where both sides alone have the same tokens as both together.
    """
    for some in grouped(_pieces(stream, reader)):
        ids = _ids([text for text, _ in some], reader)
        yield [(tokens, last) for tokens, (_, last) in zip(ids, some, strict=True)]


def _ids(texts: list[str], reader: Tokenize) -> list[list[int]]:
    return reader(texts, add_special_tokens=False, verbose=False)["input_ids"]


def grouped(pieces: Iterable[Part]) -> Iterator[list[Part]]:
    """As many pieces at a time as are tokenised at once."""
    some, size = list[Part](), 0
    for piece in pieces:
        if some and (len(some) == _DOCUMENTS or size + len(piece[0]) > LONGEST):
            yield some
            some, size = [], 0
        some.append(piece)
        size += len(piece[0])
    if some:
        yield some


def _pieces(stream: Iterable[Part], reader: Tokenize) -> Iterator[Part]:
    held = ""
    for text, last in stream:
        held += text
        while len(held) > LONGEST:
            end, start = _cut(held[:LONGEST], reader)
            yield held[:end], False
            held = held[start:]
        if last:
            yield held, True
            held = ""


def _cut(text: str, reader: Tokenize) -> tuple[int, int]:
    """Where a piece ends and where the next one starts, which is one later where the tokenizer puts back the space
    between them.
    """
    first, last = max(_WINDOW, len(text) - _REACH), len(text) - _WINDOW
    spaces = [first + found.start() for found in re.finditer(r"(?<=\S)\s", text[first:last])][-_TRIES:]
    ways = [(at, at + skipped) for at in reversed(spaces) for skipped in (0, 1)] + [
        (last - back, last - back) for back in range(_TRIES)
    ]
    sides = [
        (text[end - _WINDOW : end], text[start : end + _WINDOW], text[end - _WINDOW : end + _WINDOW])
        for end, start in ways
    ]
    ids = iter(_ids([side for three in sides for side in three], reader))
    for way, left, right, both in zip(ways, ids, ids, ids, strict=False):
        if [*left, *right] == [*both]:
            return way
    return ways[0]
