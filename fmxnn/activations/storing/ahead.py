"""Blocks of a store, read by a thread before they are needed, and batches picked from them in one pass."""

import os
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from fmxnn.activations.source import Sides
from fmxnn.activations.storing.layout import NAMES, unpack
from fmxnn.activations.storing.memory import Recycled
from fmxnn.activations.storing.source import StoreSource

_AT_ONCE = 2**20
"""Bytes that are converted at once, so that they stay in the processor's cache."""
Planned = tuple[Tensor, Tensor, Tensor]
"""Of each token of a batch: its number among those that can be read, its context, and its position."""


class _Waiting(NamedTuple):
    batch: Planned
    blocks: tuple[int, ...]


class Ahead:
    """`tokens, tokens, tokens -> tokens layers d_model`: batches of a store, whose blocks are read ahead.

    The memory holds a few blocks as they are stored: two for the window that is mixed, one that is being read, and
    more where a batch needs more.
    """

    def __init__(self, source: StoreSource, block: int, batch: int):
        self.source, self.block = source, block
        kept = torch.stack([keep.sum() for keep in source.contexts.keep.split(block)])
        self.first = kept.cumsum(0) - kept  # the number of the first row of each block
        self.most = max(1, int(kept.max()))
        self.slots = min(len(kept), 3 + batch * len(kept) // max(1, int(kept.sum())))
        self.ring = source.room(self.slots * self.most)
        self.place = torch.zeros_like(self.first)  # what brings the number of a row to its place in the ring
        self.memory = Recycled()
        self.held = dict[int, tuple[int, Future[None]]]()  # the longest unused first
        self.pinned = Counter[int]()

    def batches(self, plan: Iterable[Planned]) -> Iterator[tuple[Sides, Tensor, Tensor]]:
        """The activations of each batch of the plan, and its contexts and positions."""
        planned, waiting, following, tokens = iter(plan), deque[_Waiting](), None, 0
        reader = ThreadPoolExecutor(1, thread_name_prefix="fmxnn-store")
        process = os.getpid()
        is_ending = sys.is_finalizing  # held here: where an iterator outlives it, a module has lost its names
        try:
            while True:
                while tokens < self.slots * self.most:
                    following = following or self._next(planned)
                    if following is None or not self._read_ahead(reader, following.blocks):
                        break
                    self.pinned.update(following.blocks)
                    waiting.append(following)
                    following, tokens = None, tokens + len(following.batch[0])
                if not waiting:
                    if following is None:
                        return
                    self._grow(len(following.blocks))
                    continue
                (numbers, context, position), blocks = waiting[0]
                sides = self._picked(numbers, context, blocks)
                waiting.popleft()
                tokens -= len(context)
                self.pinned.subtract(blocks)
                yield sides, context, position
                if os.getpid() != process:
                    raise RuntimeError(
                        "this iterator over a store was begun before the process was forked, and its thread reads for "
                        "the first process alone; call iter(store) in the new process"
                    )
        finally:
            if not is_ending() and os.getpid() == process:  # else there is no such thread
                reader.shutdown(cancel_futures=True)

    def _next(self, planned: Iterator[Planned]) -> _Waiting | None:
        batch = next(planned, None)
        return None if batch is None else _Waiting(batch, tuple((batch[1] // self.block).unique().tolist()))

    def _read_ahead(self, reader: ThreadPoolExecutor, blocks: tuple[int, ...]) -> bool:
        """Whether these blocks are held, or being read; false where too many others are still needed."""
        missing = [block for block in blocks if block not in self.held]
        free = set(range(self.slots)).difference(slot for slot, _ in self.held.values())
        unused = [block for block in self.held if not self.pinned[block] and block not in blocks]
        if len(missing) > len(free) + len(unused):
            return False
        while len(free) < len(missing):
            free.add(self.held.pop(unused.pop(0))[0])
        for block in set(blocks).difference(missing):
            self.held[block] = self.held.pop(block)
        for block, slot in zip(missing, free, strict=False):
            self.held[block] = slot, reader.submit(self._load, block, slot)
            self.place[block] = slot * self.most - self.first[block]
        return True

    def _load(self, block: int, slot: int) -> None:
        before, end = self.source.before, min((block + 1) * self.block, len(self.source.contexts))
        into = {name: rows[slot * self.most : (slot + 1) * self.most] for name, rows in self.ring.items()}
        self.source.read_into(int(before[block * self.block]), int(before[end]), into)

    def _grow(self, slots: int) -> None:
        self.slots, self.ring, self.held = slots, self.source.room(slots * self.most), {}

    def _picked(self, numbers: Tensor, context: Tensor, blocks: tuple[int, ...]) -> Sides:
        for block in blocks:
            self.held[block][1].result()
        places = numbers + self.place[context // self.block]
        return tuple(self._gathered(name, places) for name in NAMES if name in self.ring)

    def _gathered(self, name: str, places: Tensor) -> Tensor:
        rows, scale, dtype = self.ring[name], self.ring.get(f"{name}_scale"), self.source.dtype
        made = self.memory.room((len(places), *rows.shape[1:]), dtype)
        if scale is None and rows.dtype == dtype:
            return torch.index_select(rows, 0, places, out=made)
        some = max(1, _AT_ONCE // (rows[0].numel() * dtype.itemsize))
        for part, into in zip(places.split(some), made.split(some), strict=True):
            steps = None if scale is None else scale.index_select(0, part)
            into.copy_(unpack(rows.index_select(0, part), steps, dtype))
        return made
