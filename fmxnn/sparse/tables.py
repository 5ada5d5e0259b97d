"""Several tables as one: each for latents and bonds of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tables:
    """`latents bonds`: tables along the diagonal; the zeros beside them are neither held nor multiplied.

    A gate's `choose` gets it in place of one table where latents read different things. It can be scaled by rows, cast,
    transposed, indexed by ascending latents, and multiplied from the left.

    ```python
    from fmxnn.sparse import Tables

    tables = Tables((torch.ones(2, 3), torch.ones(4, 5)))
    tables.shape  # (6, 8)
    torch.ones(1, 6) @ tables  # three times 2, five times 4
    ```
    """

    blocks: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Latents and bonds, over all tables."""
        return sum(block.shape[0] for block in self.blocks), sum(block.shape[1] for block in self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds all of them."""
        dtype = self.blocks[0].dtype
        for block in self.blocks[1:]:
            dtype = torch.promote_types(dtype, block.dtype)
        return dtype

    @property
    def T(self) -> "Tables":
        """`bonds latents`"""
        return Tables(tuple(block.T for block in self.blocks))

    def numel(self) -> int:
        """How many numbers are held."""
        return sum(prod(block.shape) for block in self.blocks)

    def to(self, dtype: torch.dtype) -> "Tables":
        """The same in another dtype."""
        return Tables(tuple(block.to(dtype) for block in self.blocks))

    def along(self, read: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        """`tokens bonds`: each table with what it reads of all bonds before it and its first latent after it."""
        first = bond = 0
        for block in self.blocks:
            yield read[..., bond : bond + block.shape[1]], block, first
            first, bond = first + block.shape[0], bond + block.shape[1]

    def __mul__(self, factors: Tensor) -> "Tables":
        """Rows times `latents 1`."""
        split = factors.split([block.shape[0] for block in self.blocks])
        return Tables(tuple(block * factor for block, factor in zip(self.blocks, split, strict=True)))

    def __rmatmul__(self, z: Tensor) -> Tensor:
        """`... latents -> ... bonds`: the product from the left, block by block."""
        split = z.split([block.shape[0] for block in self.blocks], dim=-1)
        return torch.cat([part @ block for part, block in zip(split, self.blocks, strict=True)], dim=-1)

    def __getitem__(self, index: Tensor) -> "Tables":
        """The rows of these latents. Raises IndexError unless they ascend."""
        if bool((index.diff() < 0).any()):
            raise IndexError("the rows of several tables are taken in ascending order of latents; sort the index first")
        ends = torch.tensor([block.shape[0] for block in self.blocks], device=index.device).cumsum(0)
        counts = torch.searchsorted(index, ends).diff(prepend=ends.new_zeros(1)).tolist()
        firsts = [0, *ends.tolist()]
        return Tables(
            tuple(
                block[at - first]
                for block, at, first in zip(self.blocks, index.split(counts), firsts[:-1], strict=True)
            )
        )


def split_rows(
    read: Tensor, table: Tensor | Tables, lengths: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor | Tables]]:
    """`tokens bonds, latents bonds`: the table cut into runs of neighbouring latents, each with what its rows read."""
    if isinstance(table, Tensor):
        yield from ((read, rows) for rows in table.split(list(lengths)))
        return
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        own = [
            (bonds, block[max(end - length - first, 0) : end - first])
            for bonds, block, first in table.along(read)
            if first < end and first + len(block) > end - length
        ]
        yield torch.cat([bonds for bonds, _ in own], dim=-1), Tables(tuple(rows for _, rows in own))
