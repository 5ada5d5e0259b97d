"""Memory of large batches, taken again once nobody uses it."""

import sys

import torch
from torch import Tensor

_LARGE = 2**23
"""What is larger may come from the system anew each time, which clears it page by page: half the time of a batch."""
_KEPT = 4


class Recycled:
    """Uninitialised tensors, in the memory of earlier ones that no tensor and no view looks at any more.

    A tensor made from a buffer holds a reference to it as long as anything needs its numbers, so the count of
    references says whether the buffer is free. Whoever keeps a batch keeps its memory.
    """

    def __init__(self) -> None:
        self._buffers = list[bytearray]()
        self._free = 0

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape on the processor, whose numbers are not set."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if size < _LARGE:
            return torch.empty(shape, dtype=dtype)
        for number in range(len(self._buffers)):
            if self._references(number) == self._free and len(self._buffers[number]) == size:
                return torch.frombuffer(self._buffers[number], dtype=dtype).view(shape)
        self._buffers = [bytearray(size), *self._buffers[: _KEPT - 1]]
        self._free = self._references(0)
        return torch.frombuffer(self._buffers[0], dtype=dtype).view(shape)

    def _references(self, number: int) -> int:
        return sys.getrefcount(self._buffers[number])
