"""How many FLOP the operators of sparse codes do, for `torch.utils.flop_counter.FlopCounterMode`.

As torch does, they count products only: two FLOP for a multiplication and its addition. An operator over codes counts
the entries that are stored. Without data (fake or meta tensors) it counts the room for them. What `choose` computes a
second time, where a first look in bf16 left candidates, is not counted.
"""

# pyright: reportPrivateUsage=false
# torch has no public name for the modes that are active.

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fmxnn.sparse import operators
from fmxnn.sparse.row_sums import within

_COUNTER = "torch.utils.flop_counter"
_told = False


def tell_counter() -> None:
    """Gives torch's counter the formulas, once it is loaded, and those counters too that are counting already.

    It is not loaded for it: that takes 70 ms and imports Triton.
    """
    global _told
    if _told or _COUNTER not in sys.modules or torch.compiler.is_compiling():
        return
    _told, counter = True, sys.modules[_COUNTER]
    for operator, formula in FORMULAS.items():
        counter.register_flop_formula(operator, get_raw=True)(formula)
    for mode in _get_current_dispatch_mode_stack():
        active: Any = getattr(mode, "counter", None)
        if isinstance(active, counter.FlopCounterMode):
            active.flop_registry |= {operator: counter.flop_registry[operator] for operator in FORMULAS}


def _choose(read: Tensor, table: Tensor, *_: Any, **__: Any) -> int:
    return 2 * read.shape[0] * table.numel()


def _choose_at_tables(read: Tensor, tables: list[Tensor], *_: Any, **__: Any) -> int:
    return sum(2 * read.shape[0] * table.numel() for table in tables)


def _decode(values: Tensor, columns: Tensor, starts: Tensor, *more: Any, **__: Any) -> int:
    *_, table, first = more if len(more) == 5 else (*more, -1)
    return 2 * _entries(columns, starts, table, first) * table.shape[1]


def _bag(values: Tensor, columns: Tensor, starts: Tensor, table: Tensor, **_: Any) -> int:
    return 2 * _entries(columns, starts, table) * table.shape[1]


def _dots(grad: Tensor, columns: Tensor, starts: Tensor, table: Tensor, first: int = -1, **_: Any) -> int:
    return 2 * _entries(columns, starts, table, first) * table.shape[1]


def _entries(columns: Tensor, starts: Tensor, table: Tensor, first: int = -1) -> int:
    """How many entries name a row of the table."""
    if operators.is_without_data(starts):
        return columns.shape[0]
    if first >= 0:
        return len(within(columns, starts, first, len(table))[0])
    return int(starts[-1] - starts[0])


FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.fmxnn.choose: _choose,
    torch.ops.fmxnn.choose_at_tables: _choose_at_tables,
    torch.ops.fmxnn.decode: _decode,
    torch.ops.fmxnn.bag: _bag,
    torch.ops.fmxnn.dots: _dots,
}
