"""The rows of a stream in the order of the text, as the tensors of a shard."""

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fmxnn.activations.source import Sides
from fmxnn.activations.storing.layout import Layout, pack
from fmxnn.activations.stream import Stream
from fmxnn.core.excerpt import excerpt


class StreamRows:
    """The kept tokens of a stream by their number in the text; blocks are read as the stream reads them.

    So a call that goes on asks the language model for the same contexts at once, and gets the same bits.
    """

    def __init__(self, stream: Stream[Any]):
        self.stream, self.contexts, self.size = stream, stream.contexts, stream.shuffle.block
        kept = torch.stack([keep.sum() for keep in self.contexts.keep.split(self.size)])
        self.before = [0, *kept.cumsum(0).tolist()]
        self._read: tuple[int, Sides] = -1, ()

    @property
    def dtype(self) -> str:
        """Of the batches that the stream gives."""
        return str(self._read[1][0].dtype).removeprefix("torch.")

    def block(self, number: int) -> Sides:
        """`tokens layers d_model`, each: of a block of contexts; the last one read is kept."""
        if self._read[0] != number:
            sides, dtype = self.stream.source.read(*self._span(number)), self.stream.dtype
            self._read = number, tuple(x if dtype is None else x.to(dtype) for x in sides)
        return self._read[1]

    def packed(self, start: int, stop: int, layout: Layout) -> dict[str, Tensor]:
        """`tokens layers d_model`: the tensors of a shard. Raises ValueError where one is not finite."""
        parts, number = list[dict[str, Tensor]](), bisect_right(self.before, start) - 1
        while self.before[number] < stop:
            first, last = max(start, self.before[number]), min(stop, self.before[number + 1])
            if first < last:
                rows = slice(first - self.before[number], last - self.before[number])
                sides = tuple(x[rows] for x in self.block(number))
                self._check_sides(sides, layout)
                packed = pack(sides, layout.dtype)
                self._check_finite(packed, number, layout)
                parts.append({**packed, **self._tokens(number, rows)})
            number += 1
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _check_sides(self, sides: Sides, layout: Layout) -> None:
        found = tuple((x.shape[-2], x.shape[-1]) for x in sides)
        if found != layout.sides:
            raise ValueError(
                f"the stream gives {excerpt(found)}, layers and d_model, and the store holds {excerpt(layout.sides)}; "
                "store into another folder"
            )

    def _check_finite(self, packed: Mapping[str, Tensor], number: int, layout: Layout) -> None:
        if all(x.isfinite().all() for x in packed.values() if x.is_floating_point()):
            return
        start, stop = self._span(number)
        raise ValueError(
            f"a store holds finite numbers, got NaN, infinity or more than {layout.dtype} can hold in the contexts "
            f"{start} to {stop - 1}; harvest in float32 and store as bfloat16, or leave those tokens out"
        )

    def _tokens(self, number: int, rows: slice) -> dict[str, Tensor]:
        """`tokens`: the ids of some rows of a block, where they stand in the text, and their roles."""
        start, stop = self._span(number)
        context, position = (column[rows] for column in self.contexts.keep[start:stop].nonzero(as_tuple=True))
        text = self.contexts[start:stop]
        given = {} if text.roles is None else {"roles": text.roles[context, position].to("cpu", torch.int8)}
        return {
            "contexts": (start + context).to("cpu", torch.int32),
            "positions": position.to("cpu", torch.int32),
            "ids": text.ids[context, position].to("cpu", torch.int32),
            **given,
        }

    def _span(self, number: int) -> tuple[int, int]:
        return number * self.size, min((number + 1) * self.size, len(self.contexts))
