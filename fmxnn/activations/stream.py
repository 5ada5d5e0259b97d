"""Activations as a shuffled, reproducible stream."""

from collections.abc import Iterator
from copy import copy
from itertools import chain, count, pairwise
from typing import Any, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from fmxnn.activations.batches import GROUP, Rows, Shuffle, mixed_rows
from fmxnn.activations.layer_reader import LayerReader
from fmxnn.activations.part import PartSource
from fmxnn.activations.places import Layer
from fmxnn.activations.source import Sides, Source
from fmxnn.activations.tokens import Contexts
from fmxnn.core.seeds import seed_of

BatchT = TypeVar("BatchT")


class Stream(Generic[BatchT]):
    """Batches of exactly `batch` tokens from any `Source`; see `Activations` and `ActivationPairs`.

    You can iterate as often as you like. The order depends on the seed, the epoch and the block alone, so batch t is
    always the same and no token comes twice in an epoch. `starting_at(t)` goes on from batch t without a saved buffer:
    it reads two blocks again. A last short batch of an epoch is dropped.
    """

    def __init__(self, source: Source, shuffle: Shuffle, *, dtype: torch.dtype | None = None):
        self.source, self.shuffle, self.dtype = source, shuffle, dtype
        self.first, self.part = 0, (0, 1)
        self._check_filled()

    @property
    def name(self) -> str:
        """The language model, as a report names it."""
        return self.source.name

    @property
    def contexts(self) -> Contexts:
        """The tokens that are read, which are kept, and their roles."""
        return self.source.contexts

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers read, in the order of the axis."""
        return self.source.layers

    @property
    def d_model(self) -> int:
        """The width of the activations x."""
        return self.source.d_model

    @property
    def rows(self) -> int:
        """Tokens of one epoch."""
        return self.contexts.tokens

    @property
    def device(self) -> torch.device:
        """The device on which batches are made."""
        return self.source.device

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self):,} batches of {self.shuffle.batch:,} tokens from the layers "
            f"{', '.join(map(str, self.layers))} of {self.source.name})"
        )

    def __len__(self) -> int:
        return max(0, self.rows // self.shuffle.batch * self.shuffle.epochs - self.first)

    def __iter__(self) -> Iterator[BatchT]:
        return (batch for batch, _, _ in self.with_tokens())

    def identity(self) -> dict[str, Any]:
        """What its batches depend on, as plain values: a digest of the token ids, the layers, and how they are mixed.

        Add it to the `arguments` of a run, so that a checkpoint knows its text. It waits for the end of the text. The
        weights of the language model and the number of epochs are not in it.
        """
        shuffle, group = self.shuffle, self._group()
        grouped = {"group": group} if len(self.contexts) > group * shuffle.block else {}
        mixed = {"batch": shuffle.batch, "block": shuffle.block, "seed": shuffle.seed}
        return {**self.source.identity(), **mixed, **grouped}

    def starting_at(self, batch: int) -> Self:
        """The same stream from batch `batch` on, without reading those before."""
        later = copy(self)
        later.first = self.first + batch
        return later

    def rank(self, rank: int, world: int) -> Self:
        """The share of one of `world` processes: of each batch the rows `rank`, `rank + world`, and so on.

        Together they are the batches of one process, whatever their number. Each process reads all of the text. Raises
        ValueError for a rank that is none, and for a batch that does not split into equal shares.
        """
        if not 0 <= rank < world:
            raise ValueError(f"the rank is 0 or more and less than world={world}, got rank={rank}")
        if self.shuffle.batch % world:
            raise ValueError(
                f"{world} processes take equal shares of a batch, got batch={self.shuffle.batch}; take a batch that "
                f"{world} divides"
            )
        share = copy(self)
        share.part = rank, world
        return share

    def split(self, tokens: int) -> tuple[Self, Self]:
        """The first contexts that hold at least `tokens` kept tokens, and the rest: held-out tokens and those to train.

        No token is in both. Each part is mixed on its own and begins at its first batch. It waits for no more of the
        text than that. Raises ValueError where either would have less than one batch.
        """
        first, rest = self.contexts.split(tokens)
        return self._over(first, 0), self._over(rest, len(first))

    def with_tokens(self) -> Iterator[tuple[BatchT, Tensor, Tensor]]:
        """Each batch, and for each of its tokens the index of its context and its position there."""
        rank, world = self.part
        batch = self.shuffle.batch
        begun = self._holds((self.first + 1) * batch)  # if so, the length of an epoch is not asked for
        first, skip = (0, self.first) if begun else divmod(self.first, self.rows // batch)
        for epoch in range(first, self.shuffle.epochs):
            for rows in self._epoch(epoch, skip if epoch == first else 0):
                *sides, context, position = (column[rank::world] for column in rows)
                yield self._batch(tuple(sides)), context, position

    def in_order(self, at_once: int) -> Iterator[tuple[Sides, int, int]]:
        """The sides of all kept tokens in the order of the text, `at_once` contexts at a time.

        Beside them stand the first of these contexts and the one after the last. Contexts without a kept token are left
        out. The dtype is that of the source.
        """
        start = 0
        while (stop := self.contexts.up_to(start + at_once)) > start:
            if self.contexts[start:stop].keep.any():
                yield self.source.read(start, stop), start, stop
            start = stop

    def _check_filled(self) -> None:
        """Raises ValueError for a text of less than one batch."""
        batch = self.shuffle.batch
        if not self._holds(batch):
            raise ValueError(
                f"the text gives {self.rows:,} tokens, and one batch needs {batch:,}; give more text or a smaller batch"
            )

    def _holds(self, tokens: int) -> bool:
        """Whether an epoch has at least so many tokens."""
        return self.contexts.holds(tokens)

    def _over(self, contexts: Contexts, start: int) -> Self:
        """The same over some of its contexts, which begin with number `start`."""
        some = copy(self)
        some.source, some.first = self._part(contexts, start), 0
        some._check_filled()
        return some

    def _part(self, contexts: Contexts, start: int) -> Source:
        """What gives the activations of some contexts."""
        return PartSource(self.source, contexts, start)

    def _batch(self, sides: Sides) -> BatchT:
        """One side as it is, two as a pair."""
        return cast("BatchT", sides[0] if len(sides) == 1 else sides)

    def _epoch(self, epoch: int, skip: int) -> Iterator[Rows]:
        batch = self.shuffle.batch
        rest: Rows | None = None
        for window in self._windows(epoch, skip * batch):
            start = 0 if rest is None else min(batch - len(rest[0]), len(window[0]))
            if rest is not None:
                rest = tuple(torch.cat(pair) for pair in zip(rest, _cut(window, 0, start), strict=True))
                if len(rest[0]) < batch:
                    continue
                yield rest
            for end in range(start + batch, len(window[0]) + 1, batch):
                yield _cut(window, end - batch, end)
                start = end
            rest = tuple(column.clone() for column in _cut(window, start, len(window[0])))  # the window is let go

    def _windows(self, epoch: int, drop: int) -> Iterator[Rows]:
        """Window j: the second half of the block visited before and the first half of block j, permuted, without its
        first `drop` rows.
        """
        before: Rows | None = None
        for j, (last, block) in enumerate(pairwise(chain([None], self._order(epoch), [None]))):
            halves = (self._halves(last, epoch)[1], self._halves(block, epoch)[0])
            kept = sum(map(len, halves))
            if drop >= kept:
                drop, before = drop - kept, None
                continue
            mixed = self._permutation(kept, "window", epoch, j)[drop:]
            drop = 0
            if last is not None and before is None:
                before = self._read(last)
            now = None if block is None else self._read(block)
            yield mixed_rows(((before, halves[0]), (now, halves[1])), mixed)
            before = now

    def _order(self, epoch: int) -> Iterator[int]:
        """The blocks as they are visited: in the first epoch group by group, later over the whole text."""
        block, group = self.shuffle.block, self._group()
        if epoch:
            yield from self._permutation(-(-len(self.contexts) // block), "order", epoch).tolist()
            return
        for first in count(0, group):
            blocks = -(-self.contexts.up_to((first + group) * block) // block) - first
            if blocks <= 0:
                return
            number = (first // group,) if first else ()
            yield from (first + some for some in self._permutation(blocks, "order", epoch, *number).tolist())

    def _group(self) -> int:
        return max(1, GROUP // self.shuffle.block)

    def _halves(self, block: int | None, epoch: int) -> tuple[Tensor, Tensor]:
        """Which kept tokens of a block go to the window before and after, counted in the order of the text."""
        if block is None:
            return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
        kept = self._text(block)[1].tokens
        places = self._permutation(kept, "halves", epoch, block)
        return places[: kept // 2], places[kept // 2 :]

    def _text(self, block: int) -> tuple[int, Contexts]:
        start = block * self.shuffle.block
        return start, self.contexts[start : start + self.shuffle.block]

    def _read(self, block: int) -> Rows:
        start, text = self._text(block)
        context, position = text.keep.nonzero(as_tuple=True)
        sides = (x if self.dtype is None else x.to(self.dtype) for x in self.source.read(start, start + len(text)))
        return (*sides, start + context, position)

    def _permutation(self, size: int, *what: int | str) -> Tensor:
        return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(self.shuffle.seed, *what)))


class Activations(Stream[Tensor]):
    """`tokens layers d_model`: batches of exactly `batch` tokens; the language model runs while you iterate.

    You can iterate as often as you like. The order depends on the seed, the epoch and the block alone, so batch t is
    always the same and no token comes twice in an epoch. `starting_at(t)` goes on from batch t without a saved buffer:
    it reads two blocks again. A last short batch of an epoch is dropped.

    ```python
    from fmxnn.activations import harvest

    text = ["The whale was seen off the coast again. " * 20]
    stream = harvest("examples/tiny-lm", text, layers=[1, 2], context=32, batch=64, block=2)
    x = next(iter(stream))  # 64 tokens, 2 layers, d_model
    ```
    """

    @property
    def model(self) -> nn.Module:
        """The language model that is read. Raises AttributeError where several are read, or none."""
        return cast("nn.Module", _of_one_model(self, "model"))

    @property
    def reader(self) -> LayerReader:
        """Reads contexts that are no part of the text. Raises AttributeError where no single model is read."""
        return cast("LayerReader", _of_one_model(self, "reader"))


class ActivationPairs(Stream[tuple[Tensor, Tensor]]):
    """`tokens layers d_model, tokens layers d_model`: x and the targets y of the same tokens, as a transcoder needs.

    It is mixed as `Activations` is; a batch is a pair.

    ```python
    from fmxnn.activations import harvest

    text = ["The whale was seen off the coast again. " * 20]
    stream = harvest("examples/tiny-lm", text, layers=[1, 2], at="mlp_in", to="mlp_out", context=32, batch=64)
    x, y = next(iter(stream))
    ```
    """

    @property
    def model(self) -> nn.Module:
        """The language model that is read. Raises AttributeError where several are read, or none."""
        return cast("nn.Module", _of_one_model(self, "model"))


def _of_one_model(stream: Stream[Any], what: str) -> object:
    found = getattr(stream.source, what, None)
    if found is None:
        raise AttributeError(
            f"these activations are of {stream.name:.200} and have no single {what}: a {type(stream.source).__name__} "
            "gives them; of several models, stream.source.sources has each under its name"
        )
    return found


def _cut(rows: Rows, start: int, stop: int) -> Rows:
    return tuple(column[start:stop] for column in rows)
