"""Codes, dense or sparse, and the two maps at a table: choosing codes from it, and summing its rows by them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmxnn.core.errors import ShapeError
from fmxnn.sparse import flops, operators, row_sums
from fmxnn.sparse.tables import Tables

Indices = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_NARROWED = {"cuda"}
"""Devices that gather rows of half precision at twice the speed; a CPU does not."""


class Codes(NamedTuple):
    """`tokens latents` in compressed rows, and once more in order of latents for the gradient of a table.

    `starts` (`tokens+1`) says where each token's `values` and `columns` begin. `order`, `rows` and `firsts`
    (`latents+1`) say the same from the side of latents. Entries beyond `starts[-1]` are spare room. All values are
    positive.

    ```python
    from fmxnn.sparse import sum_rows, to_codes, to_csr

    codes = to_codes(to_csr(torch.tensor([[0.0, 2.0], [1.0, 3.0]])))
    codes.shape, codes.values  # (2, 2), tensor([2., 1., 3.])
    sum_rows(codes, torch.eye(2))  # the dense codes again
    ```
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    order: Tensor
    rows: Tensor
    firsts: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """How many tokens and latents there are."""
        return self.starts.shape[0] - 1, self.firsts.shape[0] - 1

    @property
    def indices(self) -> Indices:
        """All but the values."""
        return self.columns, self.starts, self.order, self.rows, self.firsts

    def rows_of(self, table: Tensor, first: int) -> Tensor:
        """`latents bonds -> tokens bonds`: `sum_rows` by those latents alone that the table has, from `first` on."""
        flops.tell_counter()
        return operators.decode(self.values, *self.indices, _narrowed(table), first)

    def to_csr(self) -> Tensor:
        """`-> tokens latents`: as torch.sparse_csr; gradients reach the values."""
        kept = int(self.starts[-1])
        return torch.sparse_csr_tensor(
            self.starts, self.columns[:kept], self.values[:kept], size=self.shape, check_invariants=False
        )


def is_sparse(z: Tensor) -> bool:
    """Whether codes are held as torch.sparse_csr."""
    return z.layout == torch.sparse_csr


def to_csr(z: Tensor) -> Tensor:
    """`tokens latents -> tokens latents`: the same codes as torch.sparse_csr; gradients reach the dense codes.

    CSR has one batch axis: flatten the others first. Raises ShapeError for any other rank.
    """
    if is_sparse(z):
        return z
    if z.ndim != 2:
        raise ShapeError(
            f"CSR codes are (tokens, latents), got {tuple(z.shape)}; flatten the batch axes first: z.flatten(0, -2)"
        )
    rows, columns = z.detach().nonzero(as_tuple=True)
    starts = torch.nn.functional.pad(torch.bincount(rows, minlength=z.shape[0]).cumsum(0), (1, 0))
    return torch.sparse_csr_tensor(starts, columns, z[rows, columns], size=z.shape, check_invariants=False)


def to_codes(z: Tensor) -> Codes:
    """`tokens latents -> tokens latents`: torch.sparse_csr codes with their order by latent."""
    columns, starts = z.col_indices().long(), z.crow_indices().long()
    return Codes(z.values(), columns, starts, *row_sums.transpose(columns, starts, z.shape[1]))


def side_by_side(parts: Sequence[Codes]) -> Codes:
    """Codes of neighbouring latents for the same tokens, as codes of all of them; gradients reach the values."""
    latents = [part.shape[1] for part in parts]
    columns = torch.cat([part.columns + sum(latents[:i]) for i, part in enumerate(parts)])
    order = (
        torch.cat([row_sums.rows_of(part.starts, len(part.columns), spare=True) for part in parts])
        .sort(stable=True)
        .indices
    )
    columns, starts = columns[order], torch.stack([part.starts for part in parts]).sum(0)
    return Codes(
        torch.cat([part.values for part in parts])[order],
        columns,
        starts,
        *row_sums.transpose(columns, starts, sum(latents)),
    )


def to_dense_codes(z: Tensor | Codes) -> Tensor:
    """`... latents -> ... latents`: the same codes as a dense tensor."""
    if isinstance(z, Codes):
        rows = row_sums.rows_of(z.starts, len(z.columns))
        return z.values.new_zeros(z.shape).index_put((rows, z.columns), z.values, accumulate=True)
    return z.to_dense() if is_sparse(z) else z


def sum_rows(z: Tensor | Codes, table: Tensor | Tables) -> Tensor:
    """`... latents, latents bonds -> ... bonds`: the table's rows, weighted by the codes and summed.

    Sparse codes touch only the rows they name, forward and backward; the gradients are those of the dense product.
    Differentiable once. Raises RuntimeError in a double backward.
    """
    if isinstance(z, Codes):
        if isinstance(table, Tables):
            return torch.cat([z.rows_of(block, first) for _, block, first in table.along(z.values)], dim=-1)
        flops.tell_counter()
        return operators.decode(z.values, *z.indices, _narrowed(table))
    if is_sparse(z):
        return sum_rows(to_codes(z), table)
    return z @ table


def choose(
    read: Tensor,
    table: Tensor | Tables,
    bias: Tensor,
    rule: str,
    amount: int | Tensor,
    *,
    propose: bool = False,
    group: str = "",
) -> Codes:
    """`tokens bonds, latents bonds, latents -> tokens latents`: codes of `read @ table.T + bias`, never held whole.

    `rule` is `batch` (the `amount` largest positives of all tokens), `each` (of each token), `ranks` (the
    `tokens amount` largest of all ranks of the process group of that name) or `above` (all that exceed the `amount`,
    one number or one a latent). `propose` lets all but `each` compute in bf16 and decide in float32 (`above` where it
    is one number): the same codes, sooner where the processor multiplies bf16 fast. Gradients reach all three, through
    kept entries only, once.
    """
    flops.tell_counter()
    threshold, number = (amount.detach(), 0) if isinstance(amount, Tensor) else (read.new_zeros(()), amount)
    if isinstance(table, Tables):
        return Codes(
            *operators.choose_at_tables(
                read, [_narrowed(block) for block in table.blocks], bias, threshold, rule, number, propose, group
            )
        )
    return Codes(*operators.choose(read, _narrowed(table), bias, threshold, rule, number, propose, group))


def keep_largest(pre: Tensor, count: int) -> Tensor:
    """`tokens latents -> tokens latents`: True at the `count` largest positive entries, the earlier of equals first."""
    return operators.keep_largest(pre.detach(), count)


def keep_largest_of_ranks(pre: Tensor, k: int, group: str) -> Tensor:
    """`keep_largest` over all ranks of the process group of that name: True at this rank's share of them."""
    return operators.keep_largest_of_ranks(pre.detach(), k, group)


def _narrowed(table: Tensor) -> Tensor:
    """`latents bonds -> latents bonds`: under autocast on a GPU a copy in its dtype, written once, which the products
    and sums of a step read forward and backward at half the bytes; the gradient is rounded to it, as autocast rounds
    every other.
    """
    device = table.device.type
    if device not in _NARROWED or table.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return table
    return table.to(torch.get_autocast_dtype(device))
