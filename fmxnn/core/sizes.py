"""Whole numbers, as users give them: sizes, and the k of a gate."""

from collections.abc import Iterable
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


def sizes_of(who: str, **given: object) -> tuple[int, ...]:
    """Sizes by name, as ints. Raises ValueError, naming who asks, for anything but whole numbers of 1 or more."""
    found = {name: whole(value) for name, value in given.items()}
    for name, size in found.items():
        if size is None or size < 1:
            raise ValueError(f"{who} needs a whole {name} >= 1, got {name}={given[name]!r:.200}")
    return tuple(cast("dict[str, int]", found).values())


def places_of(given: object) -> tuple[int, ...] | None:
    """Several whole numbers as ints, as a list, range or array has them; None for anything else."""
    try:
        found = [whole(value) for value in cast("Iterable[object]", given)]
    except TypeError:  # not several
        return None
    return None if None in found else tuple(cast("list[int]", found))
