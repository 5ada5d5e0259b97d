"""Pre-activations a block of latents at a time, in float32 or, for a first look, in bf16."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fmxnn.sparse.tables import Tables

BUDGET = 8 * 2**20
"""Bytes of float32 pre-activations held at a time."""

GROUP = 32
"""Neighbouring entries that are looked at by their largest first."""

_ROUNDING = 2**-9
"""The largest relative error of a number rounded to bf16."""

_SUMMING = 2**-23
"""Twice float32's: the largest error of a sum a term, in the bf16 product and in the float32 one that it stands for."""

Piece = tuple[Tensor, Tensor, int]
"""What one table reads, the table, and its first latent."""


class Block(NamedTuple):
    """`tokens width`: pre-activations of the latents `start, start + step, ...`

    `width` is a multiple of the group, padded with -inf.
    """

    start: int
    step: int
    pre: Tensor


@dataclass(frozen=True)
class Products:
    """`tokens bonds, latents bonds, latents`: pre-activations `read @ table.T + bias`, a block of latents at a time.

    Every block takes latents from the whole table, or from all tables, at even steps, so that each is a fair sample of
    all.

    ```python
    from fmxnn.sparse.pre_activations import Products

    source = Products(torch.randn(7, 4), torch.randn(100, 4), torch.zeros(100))
    [block.pre.shape for block in source.blocks()]  # one block of 128, padded
    ```
    """

    read: Tensor
    table: Tensor | Tables
    bias: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """How many tokens and latents there are."""
        return len(self.read), len(self.bias)

    def parts(self) -> list[Piece]:
        """Each table with what it reads before it and its first latent after it."""
        return list(self.table.along(self.read)) if isinstance(self.table, Tables) else [(self.read, self.table, 0)]

    def steps(self) -> int:
        """The number of blocks, each of at most BUDGET bytes in float32 (or of one group a token)."""
        tokens, latents = self.shape
        groups = max(BUDGET // (max(tokens, 1) * 4 * GROUP), 1)
        return -(-latents // (groups * GROUP))

    def blocks(self) -> Iterator[Block]:
        """Every block in turn, all in one buffer."""
        step, (tokens, latents) = self.steps(), self.shape
        width, parts = _padded(-(-latents // step)), self.parts()
        buffer = self.read.new_empty((tokens, width), dtype=torch.promote_types(self.read.dtype, self.bias.dtype))
        for start in range(step):
            end = 0
            for part, rows, bias in _strided(parts, self.bias, start, step):
                read = parts[part][0]
                pre, end = buffer[:, end : end + len(rows)], end + len(rows)
                if read.dtype == bias.dtype:
                    torch.addmm(bias, read, rows.to(bias.dtype).T, out=pre)
                else:
                    torch.add(read @ rows.T, bias, out=pre)
            buffer[:, end:] = -torch.inf
            yield Block(start, step, buffer)


@dataclass(frozen=True)
class Given:
    """`tokens latents`: pre-activations that are there already.

    ```python
    from fmxnn.sparse.pre_activations import Given

    [block.pre.shape for block in Given(torch.randn(7, 32)).blocks()]  # one block
    ```
    """

    pre: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """How many tokens and latents there are."""
        return len(self.pre), self.pre.shape[1]

    def steps(self) -> int:
        """How many blocks there are: one."""
        return 1

    def blocks(self) -> Iterator[Block]:
        """All latents in one block, padded."""
        padding = _padded(self.pre.shape[1]) - self.pre.shape[1]
        yield Block(0, 1, functional.pad(self.pre, (0, padding), value=-torch.inf) if padding else self.pre)


def halved(source: Products) -> Iterator[tuple[Block, Tensor]]:
    """`products`: blocks in bf16, and how far their entries may be from the float32 ones.

    The bound (`tokens 1`) holds for each token, before rounding. No second table is held.
    """
    step, (tokens, latents), parts = source.steps(), source.shape, source.parts()
    width = _padded(-(-latents // step))
    reads = [_rounded(read) for read, _, _ in parts]
    widest = max(table.shape[1] for _, table, _ in parts)
    rows, pre = (source.read.new_empty(size, dtype=torch.bfloat16) for size in ((width, widest), (tokens, width)))
    for start in range(step):
        end, bounds = 0, list[Tensor]()
        for part, exact, bias in _strided(parts, source.bias, start, step):
            read, loss = reads[part]
            bounds.append(loss * exact.norm(dim=1).amax() + 2 * _ROUNDING * bias.abs().amax())
            half = rows[: len(exact), : exact.shape[1]].copy_(exact)
            torch.addmm(bias.bfloat16(), read, half.T, out=pre[:, end : end + len(exact)])
            end += len(exact)
        pre[:, end:] = -torch.inf
        yield Block(start, step, pre), bounds[0] if len(bounds) == 1 else torch.stack(bounds).amax(0)


def _rounded(read: Tensor) -> tuple[Tensor, Tensor]:
    """In bf16, and what that and the sums may take from the product with a row of length one, for each token."""
    half, length = read.bfloat16(), read.norm(dim=1, keepdim=True) * (1 + 2 * _ROUNDING)
    return half, (read - half).norm(dim=1, keepdim=True) + (_ROUNDING + _SUMMING * read.shape[1]) * length


def _strided(parts: list[Piece], bias: Tensor, start: int, step: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of the latents `start, start + step, ...` in their order: the number of each table, its rows among them, and
    their bias.
    """
    for number, (_, table, first) in enumerate(parts):
        own = slice((start - first) % step, None, step)
        if own.start < len(table):
            yield number, table[own], bias[first : first + len(table)][own]


def _padded(width: int) -> int:
    return -(-width // GROUP) * GROUP
