"""How many FLOP the operators of sparse codes do, for `torch.utils.flop_counter.FlopCounterMode`.

As torch does, they count products only: two FLOP for a multiplication and its addition. An operator over codes counts
the entries that are stored. Without data (fake or meta tensors) it counts the room for them. What `choose` computes a
second time, where a first look in bf16 left candidates, is not counted.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fmxnn.sparse import operators
from fmxnn.sparse.row_sums import within

_ops = torch.ops.fmxnn


@register_flop_formula(_ops.choose, get_raw=True)
def _choose(read: Tensor, table: Tensor, *_: Any, **__: Any) -> int:
    return 2 * read.shape[0] * table.numel()


@register_flop_formula(_ops.choose_at_tables, get_raw=True)
def _choose_at_tables(read: Tensor, tables: list[Tensor], *_: Any, **__: Any) -> int:
    return sum(2 * read.shape[0] * table.numel() for table in tables)


@register_flop_formula(_ops.decode, get_raw=True)
def _decode(values: Tensor, columns: Tensor, starts: Tensor, *more: Any, **__: Any) -> int:
    *_, table, first = more if len(more) == 5 else (*more, -1)
    return 2 * _entries(columns, starts, table, first) * table.shape[1]


@register_flop_formula(_ops.bag, get_raw=True)
def _bag(values: Tensor, columns: Tensor, starts: Tensor, table: Tensor, **_: Any) -> int:
    return 2 * _entries(columns, starts, table) * table.shape[1]


@register_flop_formula(_ops.dots, get_raw=True)
def _dots(grad: Tensor, columns: Tensor, starts: Tensor, table: Tensor, first: int = -1, **_: Any) -> int:
    return 2 * _entries(columns, starts, table, first) * table.shape[1]


def _entries(columns: Tensor, starts: Tensor, table: Tensor, first: int = -1) -> int:
    """How many entries name a row of the table."""
    if operators.is_without_data(starts):
        return columns.shape[0]
    if first >= 0:
        return len(within(columns, starts, first, len(table))[0])
    return int(starts[-1] - starts[0])
