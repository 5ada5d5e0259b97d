"""Whole numbers, as users give them: sizes, and the k of a gate."""

from operator import index
from typing import Any, SupportsIndex, cast

from torch import nn


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


def whole(value: object) -> int | None:
    """`value` as an int where it is a whole number, as numpy's are and True is not; None for anything else."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return index(cast("SupportsIndex", value))
    except TypeError:  # a tensor of several numbers
        return None


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
        raise TypeError(f"{name} keeps no set number of latents, so its k cannot be set, got k={k!r:.200}; use TopK or BatchTopK")
    cast("Any", sparsifier).k = checked_k(name, k)


def fitting_k(sparsifier: Counted, latents: int) -> int:
    """Its k, which may have moved since it was checked. Raises ValueError for more than there are latents."""
    if sparsifier.k > latents:
        raise ValueError(f"{type(sparsifier).__name__} cannot keep k={sparsifier.k} of latents={latents}; set k <= {latents}")
    return sparsifier.k
