"""Sums and dot products over the rows of a table that codes name: no dense product, no atomics."""

import warnings
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from fmxnn.sparse import kernels

_CHUNK = 1024


def sums(values: Tensor, columns: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """`entries, entries, rows+1, latents bonds -> rows bonds`: each row's weighted sum of the table's rows.

    It is deterministic. With the entries sorted by latent it is the transposed map, the gradient of a table. The first
    row may begin after the first entry. Half precision is summed in float32.
    """
    values, table = values.to(table.dtype), table.contiguous()
    if table.is_cuda and kernels.available():
        return kernels.sums(values, columns, starts, table)
    first, last = int(starts[0]), int(starts[-1])
    starts = starts - first if first else starts
    values, columns = values[first:last], columns[first:last]
    return functional.embedding_bag(
        columns, table, starts, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def dots(grad: Tensor, columns: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """`rows bonds, entries, rows+1, latents bonds -> entries`: the dot product of each entry's row and table row.

    It is deterministic, in float32 at least, and 0 for entries beyond the last row.
    """
    if table.is_cuda and kernels.available():
        found = kernels.dots(grad, rows_of(starts, len(columns)), table, columns)
        return found.masked_fill(torch.arange(len(columns), device=table.device) >= starts[-1], 0)
    last = int(starts[-1])
    if grad.dtype in (torch.float32, torch.float64) and grad.dtype == table.dtype and last:
        _hear_of_the_beta_state()
        sampled = torch.sparse_csr_tensor(
            starts, columns[:last], grad.new_zeros(last), size=(len(grad), len(table)), check_invariants=False
        )
        found = torch.sparse.sampled_addmm(sampled, grad.contiguous(), table.contiguous().T, beta=0.0).values()
    else:
        found = _gathered(grad, rows_of(starts, last), table, columns[:last])
    return functional.pad(found, (0, len(columns) - last))


def rows_of(starts: Tensor, entries: int, *, spare: bool = False) -> Tensor:
    """`rows+1 -> entries`: the row of each entry.

    Entries beyond the last row count to the last one, or with `spare` to one more.
    """
    return torch.searchsorted(
        starts[1:] if spare else starts[1:-1], torch.arange(entries, device=starts.device), right=True
    )


def within(columns: Tensor, starts: Tensor, first: int, latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """`entries, rows+1 -> entries, entries, rows+1`: the entries of some neighbouring latents alone.

    Given are where they are, their columns less `first`, and where each row begins.
    """
    named = columns[: int(starts[-1])]
    at = ((named >= first) & (named < first + latents)).nonzero().flatten()
    return at, named[at] - first, torch.searchsorted(at, starts)


def transpose(columns: Tensor, starts: Tensor, latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """`entries, rows+1 -> entries, entries, latents+1`: the entries ordered by latent.

    Given are that order, the row of each entry in it, and where each latent starts.
    """
    entries = torch.arange(len(columns), device=columns.device)
    keys = torch.where(entries < starts[-1], columns, latents)
    ordered, order = keys.sort(stable=True)
    firsts = torch.searchsorted(ordered, torch.arange(latents + 1, device=columns.device))
    return order, rows_of(starts, len(columns))[order], firsts


@cache
def _hear_of_the_beta_state() -> None:
    """torch warns once a process that its CSR tensors are in beta; nobody who trains a crosscoder has asked for one."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), check_invariants=False)


def _gathered(grad: Tensor, rows: Tensor, table: Tensor, columns: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(grad.dtype, table.dtype), torch.float32)
    parts = [grad.new_empty(0, dtype=dtype)]
    for row, column in zip(rows.split(_CHUNK), columns.split(_CHUNK), strict=True):
        parts.append(torch.linalg.vecdot(grad[row].to(dtype), table[column].to(dtype)))
    return torch.cat(parts)
