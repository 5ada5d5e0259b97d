"""The contract of a gate: which codes are kept, and how it may say so at a table."""

from abc import ABC
from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from fmxnn.core.shortcuts import GATE, why_overridden
from fmxnn.core.sizes import whole
from fmxnn.sparse import codes as sparse


@runtime_checkable
class Chooser(Protocol):
    """A sparsifier that finds its codes at a table; see BatchTopK.choose. One that cannot always do so says why not: `obstacle`."""

    def choose(self, read: Tensor, table: Tensor, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`"""
        ...


def why_dense(sparsifier: nn.Module) -> str:
    """Why this sparsifier's codes are found densely; nothing where they need not be. A subclass that overrides `forward` alone is not passed by."""
    return why_overridden(sparsifier, GATE) or getattr(sparsifier, "obstacle", "")


class Thresholded(nn.Module, ABC):
    """Holds thresholds that stay float32 or wider however the module is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Thresholded":
        def widely(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        super()._apply(widely, recurse)
        return self


def above(pre: Tensor, threshold: Tensor) -> Tensor:
    """What exceeds the threshold, decided in the wider dtype of the two; NaN stays, so that it is seen."""
    return torch.where(
        pre <= threshold.reshape(-1), 0.0, pre
    )  # a number without axes would be rounded to the dtype of `pre`


class Counted(nn.Module):
    """Keeps `k` latents a token, or on average. Raises ValueError when k is set to anything but a whole number from 1."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    @property
    def k(self) -> int:
        """How many are kept."""
        return self._k

    @k.setter
    def k(self, k: int) -> None:
        """Checks it at once, so that a mistake is found where it is made."""
        self._k = checked_k(type(self).__name__, k)


def checked_k(who: str, k: int) -> int:
    """`k` as an int from 1; any whole number will do, numpy's too. Raises ValueError, naming who asks."""
    found = whole(k)
    if found is None or found < 1:
        raise ValueError(f"{who} needs a whole k >= 1, got k={k!r:.200}")
    return found


def set_k(sparsifier: nn.Module, k: int) -> None:
    """Sets the k of a sparsifier inside another. Raises ValueError for anything but a whole number from 1, and TypeError where it has no k."""
    name = type(sparsifier).__name__
    if not hasattr(sparsifier, "k"):
        raise TypeError(
            f"{name} keeps no set number of latents, so its k cannot be set, got k={k!r:.200}; use TopK or BatchTopK"
        )
    cast("Any", sparsifier).k = checked_k(name, k)


def fitting_k(sparsifier: Counted, latents: int) -> int:
    """Its k, which may have moved since it was checked. Raises ValueError for more than there are latents."""
    if sparsifier.k > latents:
        raise ValueError(
            f"{type(sparsifier).__name__} cannot keep k={sparsifier.k} of latents={latents}; set k <= {latents}"
        )
    return sparsifier.k
