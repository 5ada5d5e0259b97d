"""Whole numbers, as users give them: sizes, and the k of a gate."""

from operator import index
from typing import SupportsIndex, cast


def whole(value: object) -> int | None:
    """`value` as an int where it is a whole number, as numpy's are and True is not; None for anything else."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return index(cast("SupportsIndex", value))
    except TypeError:  # a tensor of several numbers
        return None
