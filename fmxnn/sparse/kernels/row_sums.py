"""Weighted sums and dot products of table rows in Triton: float32 sums, no atomics, the same bits every time.

The bonds are cut into tiles, and the tile is the slowest axis of the grid: all rows of one tile are done before
the next begins, so that the slice of the table in use, `latents tile`, stays in the L2 cache (16,384 x 128 in
bf16 is 4 MB of an H100's 50). Offsets are 64-bit: a table may hold more than 2^31 numbers.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false
# Triton reads the types of a kernel's arguments from what it is called with.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmxnn.sparse.kernels import sum_dtype

TILE = 128
"""Bonds done by one program."""
_ENTRIES = 16


@triton.jit
def _sums_kernel(
    values, columns, starts, table, out, bonds, tile: tl.constexpr, entries: tl.constexpr, dtype: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = at < bonds
    total = tl.zeros(
        (entries, tile), dtype
    )  # summed over entries once, after the loop: in it that would be a barrier a step
    last = tl.load(starts + row + 1)
    for first in range(tl.load(starts + row), last, entries):
        entry = first + tl.arange(0, entries)
        real = entry < last
        weights = tl.load(values + entry, mask=real, other=0.0).to(dtype)
        named = tl.load(columns + entry, mask=real, other=0).to(tl.int64)
        block = tl.load(table + named[:, None] * bonds + at[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        total += weights[:, None] * block.to(dtype)
    tl.store(out + row * bonds + at, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dots_kernel(
    grad, rows, table, columns, out, bonds, count, tile: tl.constexpr, entries: tl.constexpr, dtype: tl.constexpr
):
    entry = tl.program_id(0).to(tl.int64) * entries + tl.arange(0, entries)
    real = entry < count
    left = tl.load(rows + entry, mask=real, other=0).to(tl.int64) * bonds
    right = tl.load(columns + entry, mask=real, other=0).to(tl.int64) * bonds
    at = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = real[:, None] & (at < bonds)[None, :]
    product = tl.load(grad + left[:, None] + at[None, :], mask=inside, other=0.0).to(dtype)
    product *= tl.load(table + right[:, None] + at[None, :], mask=inside, other=0.0).to(dtype)
    tl.store(out + tl.program_id(1).to(tl.int64) * count + entry, tl.sum(product, axis=1), mask=real)


def sums(values: Tensor, columns: Tensor, starts: Tensor, table: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`entries, entries, rows+1, latents bonds -> rows bonds`: each row's weighted sum of the table's rows.

    It is in `dtype`, by default that of the values. With the entries sorted by latent it is the transposed map. A row
    of many entries is one program's loop.
    """
    table = table.contiguous()
    rows, bonds = starts.shape[0] - 1, table.shape[1]
    out = table.new_empty((rows, bonds), dtype=dtype or values.dtype)
    if rows and bonds:
        operands = (values.contiguous(), columns.contiguous(), starts.contiguous(), table, out)
        with torch.cuda.device_of(table):
            _sums_kernel[(rows, triton.cdiv(bonds, TILE))](*operands, bonds, **_constants(values, table))
    return out


def dots(grad: Tensor, rows: Tensor, table: Tensor, columns: Tensor) -> Tensor:
    """`rows bonds, entries, latents bonds, entries -> entries`: the dot product of each entry's two rows.

    It is in float32, or float64 for float64. Every tile of the bonds writes its own partial sum, and one pass adds the
    tiles in order.
    """
    grad, table = grad.contiguous(), table.contiguous()
    count, bonds = len(columns), table.shape[1]
    tiles = -(-bonds // TILE)
    parts = table.new_empty((tiles, count), dtype=sum_dtype(torch.promote_types(grad.dtype, table.dtype)))
    if count and bonds:
        operands = (grad, rows.contiguous(), table, columns.contiguous(), parts)
        with torch.cuda.device_of(table):
            _dots_kernel[(triton.cdiv(count, _ENTRIES), tiles)](*operands, bonds, count, **_constants(grad, table))
    return parts.sum(0)


def _constants(left: Tensor, right: Tensor) -> dict[str, Any]:
    """Fusion of multiply and add is named because Triton 3.10 changes its default, and with it the last bits."""
    double = sum_dtype(torch.promote_types(left.dtype, right.dtype)) == torch.float64
    return {"tile": TILE, "entries": _ENTRIES, "dtype": tl.float64 if double else tl.float32, "enable_fp_fusion": True}
