"""Pre-activations a block of latents at a time, in float32 or, for a first look, in bf16."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

BUDGET = 8 * 2**20
"""Bytes of float32 pre-activations held at a time."""

GROUP = 32
"""Neighbouring entries that are looked at by their largest first."""

_ROUNDING = 2**-9
"""The largest relative error of a number rounded to bf16."""

_SUMMING = 2**-23
"""Twice float32's: the largest error of a sum a term, in the bf16 product and in the float32 one that it stands for."""


class Block(NamedTuple):
    """`tokens width`: pre-activations of the latents `start, start + step, ...`; `width` is a multiple of the group, padded with -inf."""

    start: int
    step: int
    pre: Tensor


@dataclass(frozen=True)
class Products:
    """`tokens bonds, latents bonds, latents`: pre-activations `read @ table.T + bias`, a block of latents at a time.

    Every block takes latents from the whole table at even steps, so that each is a fair sample of all.
    """

    read: Tensor
    table: Tensor
    bias: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and latents."""
        return len(self.read), len(self.table)

    def steps(self) -> int:
        """The number of blocks, each of at most BUDGET bytes in float32 (or of one group a token)."""
        tokens, latents = self.shape
        groups = max(BUDGET // (max(tokens, 1) * 4 * GROUP), 1)
        return -(-latents // (groups * GROUP))

    def blocks(self) -> Iterator[Block]:
        """Every block in turn, all in one buffer."""
        step, (tokens, latents) = self.steps(), self.shape
        width = _padded(-(-latents // step))
        buffer = self.read.new_empty((tokens, width), dtype=torch.promote_types(self.read.dtype, self.bias.dtype))
        for start in range(step):
            rows, bias = self.table[start::step], self.bias[start::step]
            pre = buffer[:, : len(rows)]
            if self.read.dtype == self.bias.dtype:
                torch.addmm(bias, self.read, rows.to(bias.dtype).T, out=pre)
            else:
                torch.add(self.read @ rows.T, bias, out=pre)
            buffer[:, len(rows) :] = -torch.inf
            yield Block(start, step, buffer)


@dataclass(frozen=True)
class Given:
    """`tokens latents`: pre-activations that are there already."""

    pre: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and latents."""
        return len(self.pre), self.pre.shape[1]

    def steps(self) -> int:
        """One block."""
        return 1

    def blocks(self) -> Iterator[Block]:
        """The one block."""
        padding = _padded(self.pre.shape[1]) - self.pre.shape[1]
        yield Block(0, 1, functional.pad(self.pre, (0, padding), value=-torch.inf) if padding else self.pre)


def halved(source: Products) -> Iterator[tuple[Block, Tensor]]:
    """`products`: blocks in bf16, and how far each token's entries (`tokens 1`) may be from float32's before they are rounded; no second table is held."""
    step, read, (tokens, latents) = source.steps(), source.read.bfloat16(), source.shape
    width = _padded(-(-latents // step))
    rows, pre = read.new_empty(width, read.shape[1]), read.new_empty(tokens, width)
    length = source.read.norm(dim=1, keepdim=True) * (1 + 2 * _ROUNDING)
    loss = (source.read - read).norm(dim=1, keepdim=True) + (_ROUNDING + _SUMMING * read.shape[1]) * length
    for start in range(step):
        exact, bias = source.table[start::step], source.bias[start::step]
        bound = loss * exact.norm(dim=1).amax() + 2 * _ROUNDING * bias.abs().amax()
        torch.addmm(bias.bfloat16(), read, rows[: len(exact)].copy_(exact).T, out=pre[:, : len(exact)])
        pre[:, len(exact) :] = -torch.inf
        yield Block(start, step, pre), bound


def _padded(width: int) -> int:
    return -(-width // GROUP) * GROUP
