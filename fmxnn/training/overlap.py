"""Harvesting beside training on one GPU."""

from collections.abc import Iterable, Iterator
from typing import TypeVar, cast

import torch
from torch import Tensor

BatchT = TypeVar("BatchT", Tensor, tuple[Tensor, Tensor])


def overlapped(batches: Iterable[BatchT], device: torch.device | str) -> Iterator[BatchT]:
    """`tokens layers d_model`: the same batches in the same order; on a GPU they are made in a stream of its own.

    A batch is a tensor or a pair (x, y). On a GPU the language model's forward for the next batch runs while the GPU
    still works at the end of the last step, and what is trained does not change. Batches of a store, which are made in
    the processor's memory, are copied to the GPU. On a CPU the batches pass as they are.
    """
    place = torch.device(device)
    if place.type != "cuda":
        yield from batches
        return
    source, side = iter(batches), torch.cuda.Stream(place)
    side.wait_stream(torch.cuda.current_stream(place))  # the model's weights must be there before it runs
    while True:
        with torch.cuda.stream(side):
            batch = next(source, None)
            if batch is None:
                return
            batch = _on(place, batch)
            ready = side.record_event()
        worker = torch.cuda.current_stream(place)
        worker.wait_event(ready)
        for x in (batch,) if isinstance(batch, Tensor) else batch:
            x.record_stream(worker)  # or the allocator gives its memory to a later batch while this one is still read
        yield batch


def _on(place: torch.device, batch: BatchT) -> BatchT:
    moved = batch.to(place) if isinstance(batch, Tensor) else tuple(side.to(place) for side in batch)
    return cast("BatchT", moved)
