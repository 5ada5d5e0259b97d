"""Triton kernels for a GPU, loaded when first called; everything runs without them."""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["available", "dots", "sum_dtype", "sums"]

_FOUND = importlib.util.find_spec("triton") is not None


def available() -> bool:
    """Whether Triton is installed."""
    return _FOUND


def sums(values: Tensor, columns: Tensor, starts: Tensor, table: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`entries, entries, rows+1, latents bonds -> rows bonds`: `row_sums.sums` on a GPU, in `dtype`.

    By default that is the dtype of the values. Raises ImportError without Triton.
    """
    return _kernels().sums(values, columns, starts, table, dtype)


def dots(grad: Tensor, rows: Tensor, table: Tensor, columns: Tensor) -> Tensor:
    """`rows bonds, entries, latents bonds, entries -> entries`: dot products of named rows, on a GPU.

    Raises ImportError without Triton.
    """
    return _kernels().dots(grad, rows, table, columns)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel sums in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _kernels() -> ModuleType:
    if not available():
        raise ImportError(
            "fmxnn.sparse.kernels needs Triton, which is not installed; pip install triton, or leave the stock "
            "operators to it"
        )
    return importlib.import_module("fmxnn.sparse.kernels.row_sums")
