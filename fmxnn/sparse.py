"""Codes, dense or in CSR, and the maps between codes and the rows of a table."""

import torch
from torch import Tensor
from torch.nn import functional

from fmxnn.contraction import ShapeError


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
        raise ShapeError(f"CSR codes are (tokens, latents), got {tuple(z.shape)}; flatten the batch axes first: z.flatten(0, -2)")
    rows, columns = z.detach().nonzero(as_tuple=True)
    starts = functional.pad(torch.bincount(rows, minlength=z.shape[0]).cumsum(0), (1, 0))
    return torch.sparse_csr_tensor(starts, columns, z[rows, columns], size=z.shape, check_invariants=False)


def to_dense_codes(z: Tensor) -> Tensor:
    """`... latents -> ... latents`: the same codes as a dense tensor, from dense or torch.sparse_csr ones."""
    return z.to_dense() if is_sparse(z) else z


def sum_rows(z: Tensor, table: Tensor) -> Tensor:
    """`... latents, latents bonds -> ... bonds`: the table's rows, weighted by the codes and summed; codes dense or torch.sparse_csr."""
    if is_sparse(z):
        return functional.embedding_bag(
            z.col_indices(), table, z.crow_indices(), mode="sum", per_sample_weights=z.values(), include_last_offset=True
        )
    return z @ table
