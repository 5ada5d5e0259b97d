"""Which codes are kept where tokens lie on several ranks: exactly those that one process would keep of all of them.

No candidate is sent. The ranks find the smallest value that is kept digit by digit: each counts how many of its
candidates have which leading bits, the counts are summed, and the digit follows. Three sums of 2,048 counts decide
float32, whatever the number of tokens.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from fmxnn.core.sharding import has_processes
from fmxnn.sparse.selection import Found

WORLD, LOCAL = "world", "local"
_GROUPS: WeakValueDictionary[str, Any] = WeakValueDictionary()
"""Process groups by name, since a graph holds strings and no groups."""

_DIGIT = 11
"""Bits that one round decides."""


class Ranks:
    """The ranks of a process group, by the name that `name_of` gave it.

    Raises RuntimeError where it was never initialised.
    """

    def __init__(self, name: str):
        group = _GROUPS.get(name)
        if not has_processes() or (name != WORLD and group is None):
            raise RuntimeError(
                f"BatchTopK over group={name!r} needs an initialised process group, got none; call "
                "torch.distributed.init_process_group first, or choose among the tokens of this process: "
                "gate.group = 'local'"
            )
        self.group = dist.group.WORLD if name == WORLD else group
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def least(self, value: Tensor) -> Tensor:
        """The smallest over ranks; minus infinity where one is NaN, which not every backend would pass on."""
        value = torch.where(value.isnan(), -torch.inf, value)
        if self.size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MIN, group=self.group)
        return value

    def table(self, *row: int, device: torch.device) -> list[list[int]]:
        """`-> ranks numbers`: a row from each rank."""
        rows = torch.zeros(self.size, len(row), dtype=torch.int64, device=device)
        rows[self.rank] = torch.tensor(row, device=device)
        return self.sum(rows).tolist()


def name_of(group: object) -> str:
    """The name of a process group, by which a graph knows it. Raises ValueError for anything else."""
    if group == WORLD:
        return WORLD
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            "BatchTopK chooses over group=None, 'local', 'world' or a torch.distributed.ProcessGroup that this process "
            f"is in, got {group!r:.200}; give one of them"
        )
    _GROUPS[group.group_name] = group
    return group.group_name


def largest_of_ranks(
    find: Callable[[int], Found], shape: tuple[int, int], k: int, dtype: torch.dtype, group: str
) -> Found:
    """Those of this rank's entries that are among the `tokens k` largest positive ones of all ranks.

    The earlier of equals comes first, and lower ranks before higher ones. `find` gives this rank's largest entries,
    so many, in row-major order; `shape` is its tokens and latents. A rank without tokens takes part too. Raises
    ValueError on every rank where k, latents or the dtype differ.
    """
    ranks, (tokens, latents), wide = Ranks(group), shape, dtype == torch.float64
    device = find(0).keys.device
    rows = ranks.table(tokens, k, latents, int(wide), device=device)
    _check_alike(rows)
    total = k * sum(row[0] for row in rows)
    held = min(2 * k * tokens, total)  # a shard that should keep more is read again
    found = find(held)
    while True:
        order = _ordinals(found.values, wide=wide)
        smallest, left = _smallest_kept(ranks, order, total, wide=wide)
        tied = (order == smallest).nonzero().flatten()
        short = held < min(total, tokens * latents) and len(order) >= held and int(order.amin()) >= smallest
        counts = ranks.table(len(tied), int(short), device=device)
        if not any(row[1] for row in counts):
            break
        if short:
            held = total
            found = find(held)
    kept = order > smallest
    kept[tied[: max(left - sum(row[0] for row in counts[: ranks.rank]), 0)]] = True
    return Found(found.values[kept], found.keys[kept])


def _check_alike(rows: list[list[int]]) -> None:
    """Every rank sees the same rows, so that all raise or none."""
    _, k, latents, wide = (list(column) for column in zip(*rows, strict=True))
    if len({*k}) > 1 or len({*latents}) > 1 or len({*wide}) > 1:
        kinds = ["float64" if each else "float32 or narrower" for each in wide]
        raise ValueError(
            f"BatchTopK over {len(rows)} ranks needs the same k, latents and dtype on each, got k={k}, "
            f"latents={latents} and {kinds} in their order; build the same module on every rank"
        )
    if k[0] > latents[0]:
        raise ValueError(f"BatchTopK cannot keep k={k[0]} of latents={latents[0]}; set k <= {latents[0]}")


def _ordinals(values: Tensor, *, wide: bool) -> Tensor:
    """Positive values as whole numbers in the same order; NaN comes above all others."""
    bits = values.double().view(torch.int64) if wide else values.float().view(torch.int32).long()
    return torch.where(values.isnan(), 2**63 - 1 if wide else 2**31 - 1, bits)


def _smallest_kept(ranks: Ranks, order: Tensor, total: int, *, wide: bool) -> tuple[int, int]:
    """The `total`-th largest of all ranks' numbers, or the smallest of fewer; and how many equal to it are kept."""
    smallest, left = 0, total
    for shift in reversed(range(0, 63 if wide else 31, _DIGIT)):
        digits = order >> shift
        digits = digits[digits >> _DIGIT == smallest]
        counts = ranks.sum(torch.bincount(digits & (2**_DIGIT - 1), minlength=2**_DIGIT))
        reach = counts.flip(0).cumsum(0)
        left = min(left, int(reach[-1]))
        if not left:
            return 0, 0
        place = int(torch.searchsorted(reach, left))
        digit = 2**_DIGIT - 1 - place
        left -= int(reach[place] - counts[digit])
        smallest = (smallest << _DIGIT) + digit
    return smallest, left
