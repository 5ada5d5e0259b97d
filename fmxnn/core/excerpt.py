"""Values as an error shows them: however large, in 200 characters."""

import reprlib
from collections.abc import Collection

LONGEST = 200
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxset = 3, 8, 8, 8, 8
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = LONGEST


def excerpt(value: object, longest: int = LONGEST) -> str:
    """The repr of a value, cut to `longest` characters; a large nest is not walked to its end."""
    try:
        text = repr(value[: longest + 1]) if isinstance(value, str) else _SHORT.repr(value)
    except ValueError:  # Python writes no whole number of more than some 4,300 digits
        text = f"a value of type {type(value).__name__} that has no short form"
    return cut(text, longest)


def cut(text: str, longest: int = LONGEST) -> str:
    """The text itself, on one line and cut to `longest` characters."""
    line = " ".join(text[: 2 * longest].split())
    return line if len(line) <= longest else line[: longest - 3] + "..."


def listed(faults: Collection[str], most: int = 8) -> str:
    """The first in their order, each cut, and how many more there are."""
    more = len(faults) - most
    return "; ".join([*(cut(fault) for fault in sorted(faults)[:most]), *([f"and {more:,} more"] if more > 0 else [])])
