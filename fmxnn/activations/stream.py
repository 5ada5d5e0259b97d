"""Activations as a shuffled, reproducible stream."""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from fmxnn.activations.batches import Shuffle
from fmxnn.activations.layer_reader import LayerReader
from fmxnn.activations.places import Layer
from fmxnn.activations.source import ModelSource, Sides, Source
from fmxnn.activations.text import Contexts
from fmxnn.core.seeds import seed_of

BatchT = TypeVar("BatchT")
_Rows = tuple[Tensor, ...]  # the sides, and last the context and the position of each token


class Stream(Generic[BatchT]):
    """Batches of exactly `batch` tokens from any `Source`; see `Activations` and `ActivationPairs`.

    You can iterate as often as you like. The order depends on the seed, the epoch and the block alone, so batch t is
    always the same and no token comes twice in an epoch. `starting_at(t)` goes on from batch t without a saved buffer:
    it reads two blocks again. A last short batch of an epoch is dropped.
    """

    def __init__(self, source: Source, shuffle: Shuffle, *, dtype: torch.dtype | None = None):
        self.source, self.shuffle, self.dtype = source, shuffle, dtype
        self.first, self.part = 0, (0, 1)
        if len(self) == 0:
            raise ValueError(
                f"the text gives {self.rows:,} tokens, and one batch needs {shuffle.batch:,}; give more text or a "
                "smaller batch"
            )

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

        Add it to the `arguments` of a run, so that a checkpoint knows its text. The weights of the language model and
        the number of epochs are not in it.
        """
        shuffle = self.shuffle
        return {**self.source.identity(), "batch": shuffle.batch, "block": shuffle.block, "seed": shuffle.seed}

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

    def with_tokens(self) -> Iterator[tuple[BatchT, Tensor, Tensor]]:
        """Each batch, and for each of its tokens the index of its context and its position there."""
        rank, world = self.part
        per_epoch = self.rows // self.shuffle.batch
        for epoch in range(self.first // per_epoch, self.shuffle.epochs):
            skip = max(0, self.first - epoch * per_epoch)
            for rows in self._epoch(epoch, skip, per_epoch):
                *sides, context, position = (column[rank::world] for column in rows)
                yield self._batch(tuple(sides)), context, position

    def in_order(self, at_once: int) -> Iterator[tuple[Sides, int, int]]:
        """The sides of all kept tokens in the order of the text, `at_once` contexts at a time.

        Beside them stand the first of these contexts and the one after the last. Contexts without a kept token are left
        out. The dtype is that of the source.
        """
        for start in range(0, len(self.contexts), at_once):
            stop = min(start + at_once, len(self.contexts))
            if self.contexts.keep[start:stop].any():
                yield self.source.read(start, stop), start, stop

    def _batch(self, sides: Sides) -> BatchT:
        """One side as it is, two as a pair."""
        return cast("BatchT", sides[0] if len(sides) == 1 else sides)

    def _epoch(self, epoch: int, skip: int, per_epoch: int) -> Iterator[_Rows]:
        batch, waiting = self.shuffle.batch, list[_Rows]()
        drop = skip * batch
        for window in self._windows(epoch, drop):
            waiting.append(window)
            pooled = tuple(torch.cat(column) for column in zip(*waiting, strict=True))
            whole = len(pooled[0]) // batch * batch
            for start in range(0, min(whole, (per_epoch - skip) * batch), batch):
                yield tuple(column[start : start + batch] for column in pooled)
                skip += 1
            waiting = [tuple(column[whole:] for column in pooled)]

    def _windows(self, epoch: int, drop: int) -> Iterator[_Rows]:
        """Window j: the second half of the block visited before and the first half of block j, permuted, without its
        first `drop` rows.
        """
        blocks = -(-len(self.contexts) // self.shuffle.block)
        order = self._permutation(blocks, "order", epoch).tolist()
        left: _Rows | None = None
        for j in range(blocks + 1):
            kept = (len(self._places(order[j - 1], epoch)[1]) if j else 0) + (
                len(self._places(order[j], epoch)[0]) if j < blocks else 0
            )
            if drop >= kept:
                drop, left = drop - kept, None
                continue
            parts: list[_Rows] = []
            if j:
                parts.append(self._harvest(order[j - 1], epoch)[1] if left is None else left)
            if j < blocks:
                first, left = self._harvest(order[j], epoch)
                parts.append(first)
            mixed = self._permutation(kept, "window", epoch, j)[drop:]
            drop = 0
            yield _picked([torch.cat(column) for column in zip(*parts, strict=True)], mixed)

    def _places(self, block: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Which kept tokens of a block go to the window before and after, counted in the order of the text."""
        kept = int(self.contexts.keep[block * self.shuffle.block : (block + 1) * self.shuffle.block].sum())
        places = self._permutation(kept, "halves", epoch, block)
        return places[: kept // 2], places[kept // 2 :]

    def _harvest(self, block: int, epoch: int) -> tuple[_Rows, _Rows]:
        start, stop = block * self.shuffle.block, min((block + 1) * self.shuffle.block, len(self.contexts))
        context, position = self.contexts.keep[start:stop].nonzero(as_tuple=True)
        sides = (x if self.dtype is None else x.to(self.dtype) for x in self.source.read(start, stop))
        rows = (*sides, start + context, position)
        first, second = self._places(block, epoch)
        return _picked(rows, first), _picked(rows, second)

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
        """The language model that is read."""
        return cast("ModelSource", self.source).model

    @property
    def reader(self) -> LayerReader:
        """Reads contexts that are no part of the text."""
        return cast("ModelSource", self.source).reader


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
        """The language model that is read."""
        return cast("ModelSource", self.source).model


def _picked(rows: Sequence[Tensor], places: Tensor) -> _Rows:
    return tuple(column[places.to(column.device)] for column in rows)
