"""How two runs differ, in phrases."""

from collections.abc import Callable
from dataclasses import asdict, is_dataclass

from fmxnn.core.excerpt import cut

_SHOWN = 5


def noted(term: Callable[..., object] | None) -> object:
    """A term of a loss as a checkpoint notes it: the options of a dataclass, else what `name_of` gives."""
    return asdict(term) if is_dataclass(term) and not isinstance(term, type) else name_of(term)


def name_of(function: Callable[..., object] | None) -> str | None:
    """What a penalty or a schedule is called: a function's name, an object's class; a lambda has none."""
    if function is None:
        return None
    name = str(getattr(function, "__qualname__", type(function).__qualname__))
    return "a lambda" if name.endswith("<lambda>") else name


def differences(saved: object, now: object, at: str = "") -> list[str]:
    """A phrase for each value that differs between two trees of plain JSON values."""
    match saved, now:
        case {**one}, {**other}:
            pairs = [(str(key), one.get(key), other.get(key)) for key in sorted({*one, *other})]
        case [*one], [*other] if len(one) == len(other):
            pairs = [(str(i), *pair) for i, pair in enumerate(zip(one, other, strict=True))]
        case _:
            return [] if saved == now else [f"{at[-200:]} was {cut(repr(saved))} and is {cut(repr(now))}"]
    return [phrase for key, mine, theirs in pairs for phrase in differences(mine, theirs, f"{at}.{key}" if at else key)]


def phrased(found: list[str]) -> str:
    """The first differences, and how many more there are."""
    return "; ".join(found[:_SHOWN]) + (f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
