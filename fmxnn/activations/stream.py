"""Activations of a language model as a shuffled, reproducible stream."""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from fmxnn.activations.batches import Shuffle
from fmxnn.activations.layer_reader import LayerReader
from fmxnn.activations.text import Contexts
from fmxnn.core.seeds import seed_of

Rows = tuple[Tensor, Tensor, Tensor]


class Activations:
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

    def __init__(self, reader: LayerReader, text: Contexts, shuffle: Shuffle, *, dtype: torch.dtype | None = None):
        self.reader, self.contexts, self.shuffle, self.dtype = reader, text, shuffle, dtype
        self.first = 0
        if len(self) == 0:
            raise ValueError(
                f"the text gives {self.rows:,} tokens, and one batch needs {shuffle.batch:,}; give more text or a "
                "smaller batch"
            )

    @property
    def model(self) -> nn.Module:
        """The language model that is read."""
        return self.reader.model

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers read, in the order of the axis."""
        return self.reader.layers

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self._read(self.contexts.ids[:1, :2]).shape[-1]

    @property
    def rows(self) -> int:
        """Tokens of one epoch."""
        return self.contexts.tokens

    @property
    def device(self) -> torch.device:
        """Where the language model runs, and where batches are."""
        return next(self.model.parameters()).device

    def __repr__(self) -> str:
        size, name = self.shuffle.batch, type(self.model).__name__
        return (
            f"Activations({len(self):,} batches of {size:,} tokens from the layers "
            f"{', '.join(map(str, self.layers))} of {name})"
        )

    def __len__(self) -> int:
        return max(0, self.rows // self.shuffle.batch * self.shuffle.epochs - self.first)

    def __iter__(self) -> Iterator[Tensor]:
        return (x for x, _, _ in self.with_tokens())

    def identity(self) -> dict[str, Any]:
        """What its batches depend on, as plain values: a digest of the token ids, the layers, and how they are mixed.

        Add it to the `arguments` of a run, so that a checkpoint knows its text. The weights of the language model and
        the number of epochs are not in it.
        """
        shuffle = self.shuffle
        mixed = {"batch": shuffle.batch, "block": shuffle.block, "seed": shuffle.seed}
        return {"text": self.contexts.digest, "layers": list(self.layers), **mixed}

    def starting_at(self, batch: int) -> "Activations":
        """The same stream from batch `batch` on, without running the model for those before."""
        later = copy(self)
        later.first = self.first + batch
        return later

    def with_tokens(self) -> Iterator[Rows]:
        """`tokens layers d_model`, and for each token the index of its context and its position there."""
        per_epoch = self.rows // self.shuffle.batch
        for epoch in range(self.first // per_epoch, self.shuffle.epochs):
            skip = max(0, self.first - epoch * per_epoch)
            yield from self._epoch(epoch, skip, per_epoch)

    def _epoch(self, epoch: int, skip: int, per_epoch: int) -> Iterator[Rows]:
        batch, waiting = self.shuffle.batch, list[Rows]()
        drop = skip * batch
        for window in self._windows(epoch, drop):
            waiting.append(window)
            x, context, position = (torch.cat(column) for column in zip(*waiting, strict=True))
            pooled: Rows = x, context, position
            whole = len(pooled[0]) // batch * batch
            for start in range(0, min(whole, (per_epoch - skip) * batch), batch):
                yield (
                    pooled[0][start : start + batch],
                    pooled[1][start : start + batch],
                    pooled[2][start : start + batch],
                )
                skip += 1
            waiting = [(pooled[0][whole:], pooled[1][whole:], pooled[2][whole:])]

    def _windows(self, epoch: int, drop: int) -> Iterator[Rows]:
        """Window j: the second half of the block visited before and the first half of block j, permuted, without its
        first `drop` rows.
        """
        blocks = -(-len(self.contexts) // self.shuffle.block)
        order = self._permutation(blocks, "order", epoch).tolist()
        left: Rows | None = None
        for j in range(blocks + 1):
            kept = (len(self._places(order[j - 1], epoch)[1]) if j else 0) + (
                len(self._places(order[j], epoch)[0]) if j < blocks else 0
            )
            if drop >= kept:
                drop, left = drop - kept, None
                continue
            parts: list[Rows] = []
            if j:
                parts.append(self._harvest(order[j - 1], epoch)[1] if left is None else left)
            if j < blocks:
                first, left = self._harvest(order[j], epoch)
                parts.append(first)
            mixed = self._permutation(kept, "window", epoch, j)[drop:]
            drop = 0
            yield _picked([torch.cat(column) for column in zip(*parts, strict=True)], mixed)

    def _places(self, block: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Which kept tokens of a block go to the window before and after: places in its contexts, flattened."""
        keep = self.contexts.keep[block * self.shuffle.block : (block + 1) * self.shuffle.block]
        places = keep.flatten().nonzero().squeeze(1)
        places = places[self._permutation(len(places), "halves", epoch, block)]
        return places[: len(places) // 2], places[len(places) // 2 :]

    def _harvest(self, block: int, epoch: int) -> tuple[Rows, Rows]:
        start, context = block * self.shuffle.block, self.contexts.ids.shape[1]
        ids = self.contexts.ids[start : start + self.shuffle.block]
        x = torch.cat([self._read(some) for some in ids.split(self.shuffle.at_once)]).flatten(0, 1)
        rows = [
            x,
            torch.arange(start, start + len(ids)).repeat_interleave(context),
            torch.arange(context).repeat(len(ids)),
        ]
        first, second = self._places(block, epoch)
        return _picked(rows, first), _picked(rows, second)

    def _read(self, ids: Tensor) -> Tensor:
        x = self.reader(ids.to(self.device).long())
        return x if self.dtype is None else x.to(self.dtype)

    def _permutation(self, size: int, *what: int | str) -> Tensor:
        return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(self.shuffle.seed, *what)))


def _picked(rows: Sequence[Tensor], places: Tensor) -> Rows:
    x, context, position = rows
    return x[places.to(x.device)], context[places], position[places]
