"""Activations in the order of their text: what the measures read, harvested or from a loop of your own."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fmxnn.activations.own_batches import Rows, rows_of
from fmxnn.activations.places import Layer, check_layers
from fmxnn.activations.source import OfText, Sides
from fmxnn.activations.text import Contexts
from fmxnn.core.errors import ShapeError

POSITIONS = 1 << 20
"""A context of activations of one's own spans at most so many positions."""
NO_TOKEN = -1
"""Stands in the ids where a context of one's own is over, or has a token that was not given."""


class InOrder(OfText, Protocol):
    """Activations that can be read in the order of their text: every `Stream`, and `OwnActivations`."""

    def in_order(self, at_once: int) -> Iterator[tuple[Sides, int, int]]:
        """The sides of whole contexts, the first of these contexts, and the one after the last."""
        ...


class Passage(NamedTuple):
    """`tokens layers d_model`, each: the sides of some whole contexts, with their `text`.

    `start` is the number of the first context. The text is None where activations came without tokens.

    ```python
    from fmxnn.activations.own import in_text_order, passages

    x, ids, positions = torch.randn(6, 2, 8), torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2])
    first, second = passages(in_text_order([(x, ids, positions)]), at_once=1)
    second.text.ids, second.start  # [[3, 4, 5]] and 1
    ```
    """

    sides: Sides
    text: Contexts | None
    start: int


def in_text_order(given: object, *, layers: Sequence[Layer] | None = None, name: str = "") -> InOrder:
    """Activations as the measures read them: a stream as it is, batches of your own as `OwnActivations`."""
    if hasattr(given, "in_order"):
        return cast("InOrder", given)
    return OwnActivations(given, layers=layers, name=name)


def told_apart(given: object) -> tuple[object, bool]:
    """What was given, and whether it is activations and no text; a generator that was looked into is made whole.

    A text is a path, contexts, or an iterable that begins with a document; all else is activations, or said to be none.
    """
    if hasattr(given, "in_order") or _is_single(given):
        return given, True
    if isinstance(given, Contexts) or _is_document(given):
        return given, False
    started = iter(cast("Iterable[object]", given))
    first = list(islice(started, 1))
    whole = chain(first, started) if started is given else given
    return whole, not all(map(_is_document, first))


def _is_document(one: object) -> bool:
    return isinstance(one, (str, Path, Mapping))


def portions(activations: InOrder, at_once: int) -> int | None:
    """How many times `at_once` contexts there are, for a bar; None of activations of one's own, which do not know."""
    return None if isinstance(activations, OwnActivations) else -(-len(activations.contexts) // at_once)


def passages(activations: InOrder, at_once: int = 32) -> Iterator[Passage]:
    """`tokens layers d_model`, each: all that is kept, in the order of the text, `at_once` contexts at a time."""
    if isinstance(activations, OwnActivations):
        yield from activations.passages(at_once)
        return
    for sides, start, stop in activations.in_order(at_once):
        yield Passage(sides, activations.contexts[start:stop], start)


class OwnActivations:
    """`tokens layers d_model`: activations of your own, in the order of their text.

    A batch is x, or (x, ids, positions) with the id and the position of each token. Its axes may also be
    `contexts context layers d_model`, with ids of `contexts context`; positions may be left out then. A pair (x, y) may
    stand in the place of x, as a transcoder needs. A context begins where the position does not rise, and it may go on
    in the next batch. All tokens that are given count.

    - `batches`: an iterable of such batches, or a single one with tokens, or one tensor x; a generator can be read once
    - `layers`: the layers of x, for reports; None numbers them from 0
    - `name`: the language model, for reports

    Raises ValueError for no batch at all. Raises ShapeError or TypeError, naming the batch, for one that does not fit.

    ```python
    from fmxnn.activations.own import OwnActivations

    x, ids, positions = torch.randn(6, 2, 8), torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2])
    OwnActivations([(x, ids, positions)], layers=[3, 7], name="my model")
    ```
    """

    def __init__(self, batches: object, *, layers: Sequence[Layer] | None = None, name: str = ""):
        self._batches = cast("Iterable[object]", [batches] if _is_single(batches) else batches)
        started = iter(self._batches)
        first = next(started, None)
        if first is None:
            raise ValueError(
                "these activations hold no batch; give at least one, and a generator, which can be read once, anew"
            )
        self._first, self._once = rows_of(first), started is self._batches
        self._started: Iterator[object] | None = chain([first], started)
        count = self._first.sides[0].shape[-2]
        self.layers: tuple[Layer, ...] = tuple(range(count)) if layers is None else check_layers(layers)
        if len(self.layers) != count:
            raise ShapeError(
                f"the activations have layers={count}, and the layers {', '.join(map(str, self.layers))[:200]} were "
                "named; name as many as x has"
            )
        self.name = name or "activations of one's own"
        self._read = list[Contexts]()

    @property
    def d_model(self) -> int:
        """The width of x."""
        return self._first.sides[0].shape[-1]

    @property
    def is_pairs(self) -> bool:
        """Whether each batch has targets y beside x."""
        return len(self._first.sides) > 1

    @property
    def has_tokens(self) -> bool:
        """Whether token ids came with the activations."""
        return self._first.ids is not None

    @property
    def contexts(self) -> Contexts:
        """`contexts context`: the tokens that were read so far, with -1 where there is none.

        Raises ValueError where the activations came without tokens.
        """
        if not self.has_tokens:
            raise ValueError(lacking_tokens())
        if not self._read:
            return _contexts([])
        self._read = [_contexts([row for some in self._read for row in some.ids])]
        return self._read[0]

    def in_order(self, at_once: int) -> Iterator[tuple[Sides, int, int]]:
        """The sides of whole contexts, the first of these contexts, and the one after the last."""
        for sides, text, start in self.passages(at_once):
            yield sides, start, start + (0 if text is None else len(text))

    def passages(self, at_once: int) -> Iterator[Passage]:
        """`tokens layers d_model`, each: whole contexts, `at_once` at a time; without tokens the batches as they are.

        Raises ValueError where a generator was read before.
        """
        self._read, held, start = [], None, 0
        for number, batch in enumerate(self._again()):
            rows = rows_of(batch, number)
            self._check_like_first(rows, number)
            if rows.ids is None:
                yield Passage(rows.sides, None, 0)
                continue
            whole, held = _cut(rows if held is None else _joined(held, rows))
            for passage in _passages(whole, at_once, start):
                self._read.append(cast("Contexts", passage.text))
                start += len(self._read[-1])
                yield passage
        if held is not None:  # the last context ends with the activations
            for passage in _passages(held, at_once, start):
                self._read.append(cast("Contexts", passage.text))
                yield passage

    def _again(self) -> Iterator[object]:
        """The batches from the first on."""
        started, self._started = self._started, None
        if started is None and self._once:
            raise ValueError(
                "these activations come from a generator, which can be read once, and are read a second time; give a "
                "list of batches, or an object whose __iter__ begins anew"
            )
        return iter(self._batches) if started is None else started

    def _check_like_first(self, rows: Rows, number: int) -> None:
        if rows.kind != self._first.kind:
            raise ShapeError(
                f"batch {number} of the activations has {rows.kind}, and the first has {self._first.kind}; "
                "make all batches alike"
            )


def _is_single(batches: object) -> bool:
    """Whether it is one batch and no iterable of them: x alone, or a tuple with token ids, which are no batch."""
    if isinstance(batches, Tensor):
        return True
    return isinstance(batches, tuple) and any(map(_is_whole_numbers, cast("tuple[object, ...]", batches)))


def _is_whole_numbers(part: object) -> bool:
    return isinstance(part, Tensor) and not part.is_floating_point()


def lacking_tokens() -> str:
    """What is said where tokens are needed and were not given."""
    return (
        "these activations came without tokens, by which it is shown what latents fire on; give batches of "
        "(x, ids, positions) in the place of x"
    )


def _joined(one: Rows, other: Rows) -> Rows:
    sides = tuple(torch.cat([mine, theirs.to(mine)]) for mine, theirs in zip(one.sides, other.sides, strict=True))
    columns = zip(one[1:], other[1:], strict=True)
    return Rows(sides, *(torch.cat([cast("Tensor", part) for part in both]) for both in columns))


def _some(rows: Rows, start: int, stop: int) -> Rows:
    return Rows(
        tuple(side[start:stop] for side in rows.sides), *(cast("Tensor", part)[start:stop] for part in rows[1:])
    )


def _begins(rows: Rows) -> Tensor:
    """`-> contexts`: where each context begins, the first at 0."""
    positions = cast("Tensor", rows.positions)
    falls = (positions[1:] <= positions[:-1]).nonzero().squeeze(1) + 1
    return torch.cat([falls.new_zeros(min(len(positions), 1)), falls])


def _cut(rows: Rows) -> tuple[Rows, Rows]:
    """The contexts that are over, and the last one, which may go on."""
    begins = _begins(rows)
    last = int(begins[-1]) if len(begins) else 0
    return _some(rows, 0, last), _some(rows, last, len(rows.sides[0]))


def _passages(rows: Rows, at_once: int, start: int) -> Iterator[Passage]:
    """`at_once` contexts at a time; `start` is the number of the first."""
    begins = [*_begins(rows).tolist(), len(rows.sides[0])]
    for first in range(0, len(begins) - 1, at_once):
        bounds = begins[first : first + at_once + 1]
        some = _some(rows, bounds[0], bounds[-1])
        ids, positions = cast("Tensor", some.ids), cast("Tensor", some.positions)
        edges = [bound - bounds[0] for bound in bounds]
        lines = [_line(ids[one:two], positions[one:two]) for one, two in pairwise(edges)]
        yield Passage(some.sides, _contexts(lines), start + first)


def _line(ids: Tensor, positions: Tensor) -> Tensor:
    """`tokens, tokens -> context`: the ids of one context at their positions, the first at 0."""
    span = int(positions[-1] - positions[0]) + 1
    if span > POSITIONS:
        raise ValueError(
            f"a context of the activations goes from position {int(positions[0])} to {int(positions[-1])}, and spans "
            f"at most {POSITIONS:,}; a context begins where the position does not rise, so count each from 0"
        )
    return torch.full((span,), NO_TOKEN, dtype=torch.int32).index_put((positions - positions[0],), ids.int())


def _contexts(lines: Sequence[Tensor]) -> Contexts:
    if not lines:
        return Contexts(torch.zeros(0, 0, dtype=torch.int32), torch.zeros(0, 0, dtype=torch.bool))
    ids = pad_sequence(list(lines), batch_first=True, padding_value=NO_TOKEN)
    return Contexts(ids, ids != NO_TOKEN)
