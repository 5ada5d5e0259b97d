"""JSON read strictly, and written so that it can be."""

import json
import math
import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import singledispatch
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fmxnn.core.cells import writable
from fmxnn.core.errors import RecipeError
from fmxnn.core.excerpt import cut, excerpt
from fmxnn.core.kinds import is_object
from fmxnn.core.recipe import MAX_DEPTH, MAX_NODES

LONGEST_NUMBER = 1000
_TOKEN = re.compile(
    rb'[\s,]*+(?:(?P<string>"(?:[^"\\]++|\\.)*+"?+)|(?P<opened>[\[{])|(?P<closed>[\]}])|(?P<colon>:)|'
    rb'(?P<word>[^\s"\[\]{}:,]++)|\Z)',
    re.DOTALL,
)
"""A string, also one that never ends; brackets; a bare word; each with what lies before it. Possessive, so that no text
is read twice.
"""
_HALF = re.compile("[\ud800-\udfff]")
LARGEST_INTEGER = 10 ** (LONGEST_NUMBER - 1)


class Limits(NamedTuple):
    """What a kind of file may hold: bytes, values (names are not counted), levels of brackets.

    `error` is raised for one that is broken or holds more, and ends in `way_out`.

    ```python
    from fmxnn.core.files.strict_json import Limits, parse_json

    parse_json(b'{"k": 8}', "settings.json", Limits("a file of settings", values=100))  # {'k': 8}
    ```
    """

    kind: str
    bytes: int = 1_000_000
    values: int = MAX_NODES
    depth: int = MAX_DEPTH
    error: type[Exception] = RecipeError
    way_out: str = "fetch or save it again"


CONFIG_LIMITS = Limits(
    "a config", values=MAX_NODES + 3, depth=MAX_DEPTH + 1
)  # it is one level above its recipe, and says its version
ABOUT_LIMITS = Limits("an about.json", values=20_000, depth=MAX_DEPTH + 1)
INDEX_LIMITS = Limits("an index", bytes=16_000_000, values=100_000)
MANIFEST_LIMITS = Limits("a manifest", bytes=16_000_000, values=100_000)
RUN_LIMITS = Limits("the record of a run", bytes=16_000_000, values=100_000, depth=MAX_DEPTH + 2)


class Refused(ValueError):
    """What is wrong with a file, which `naming` names."""


def strict_json(path: Path, limits: Limits = CONFIG_LIMITS) -> object:
    """What a JSON file holds: finite numbers, each name once, and no more than `limits` allows.

    Its size is asked before a byte is read, and its values and levels are counted before they are made.
    Raises `limits.error`, naming the file.
    """
    return parse_json(read_bytes(path, limits), path, limits)


def read_bytes(path: Path, limits: Limits) -> bytes:
    """All of a file that is no larger than `limits` allows. Raises `limits.error`."""
    try:
        if not path.is_file():  # a pipe or a device has no end
            raise limits.error(f"{path} is missing, or is no plain file; {limits.way_out}")
        size = path.stat().st_size
        if size > limits.bytes:
            raise limits.error(
                f"{path} has {size:,} bytes, and {limits.kind} has at most {limits.bytes:,}; {limits.way_out}"
            )
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        if isinstance(error, limits.error):
            raise
        raise limits.error(f"{path} cannot be read: {error.strerror}; make it readable, or {limits.way_out}") from error


def parse_json(data: bytes, name: object, limits: Limits = CONFIG_LIMITS) -> object:
    """What the bytes of a JSON file hold; `name` is what an error calls them. Raises `limits.error`."""
    with naming(name, limits, "JSON"):
        _count(data, limits)
        found: object = json.loads(
            data.decode(), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_each_once
        )
        if b"\\u" in data:  # nothing else writes half a character
            check_leaves(found)
        return found


@contextmanager
def naming(name: object, limits: Limits, language: str, *broken: type[Exception]) -> Generator[None]:
    """Turns what is refused inside into `limits.error`, which names the file.

    The same happens to a ValueError and to the errors in `broken`.
    """
    try:
        yield
    except Refused as error:
        raise limits.error(f"{name} {error}; {limits.way_out}") from error
    except (ValueError, *broken) as error:
        raise limits.error(f"{name} cannot be read: no {language}, {cut(str(error))}; {limits.way_out}") from error


def _count(data: bytes, limits: Limits) -> None:
    """Raises Refused at the first value, level or digit that is too many."""
    depth = values = 0
    for tokens, token in enumerate(_TOKEN.finditer(data)):
        match token.lastgroup:
            case "opened":
                depth, values = depth + 1, values + 1
            case "closed":
                depth -= 1
            case "colon":
                values -= 1  # what stood before it was a name
            case "string":
                values += 1
            case "word":
                values += 1
                length = token.end() - token.start("word")
                if length > LONGEST_NUMBER:
                    raise Refused(f"holds a number of {length:,} characters, and one has at most {LONGEST_NUMBER:,}")
            case _:
                continue
        if depth > limits.depth:
            raise Refused(f"is nested deeper than the {limits.depth} levels that {limits.kind} may have")
        if (
            values > limits.values or tokens > 4 * limits.values
        ):  # a value comes with a name, a colon and two brackets at most
            raise Refused(f"holds more than the {limits.values:,} values that {limits.kind} may hold")


def _no_constant(word: str) -> float:
    raise Refused(f"holds {word}, and numbers are finite")


def _finite(word: str) -> float:
    number = float(word)
    return number if math.isfinite(number) else _no_constant(cut(word))


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise Refused(f"gives {excerpt(twice)} twice, and each name stands once")
    return found


def check_leaves(tree: object) -> None:
    """Raises Refused for a number that is not finite and for half a character, wherever they stand in a tree."""
    waiting = [tree]
    while waiting:
        waiting += _inside(waiting.pop())


@singledispatch
def _inside(value: object) -> Iterable[object]:
    """What a value of a tree holds; a leaf that is refused raises."""
    return ()


@_inside.register
def _(value: str) -> Iterable[object]:
    if _HALF.search(value):
        raise Refused(f"holds half a character (a lone surrogate) in {excerpt(value)}")
    return ()


@_inside.register
def _(value: float) -> Iterable[object]:
    if not math.isfinite(value):
        raise Refused(f"holds {value}, and numbers are finite")
    return ()


@_inside.register(dict)
def _(value: dict[object, object]) -> Iterable[object]:
    return (part for pair in value.items() for part in pair)


@_inside.register(list)
def _(value: list[object]) -> Iterable[object]:
    return value


def entry(tree: object, name: str) -> object:
    """What a tree has under a name; None where it has none, or is no object."""
    return tree.get(name) if is_object(tree) else None


def to_json(value: object) -> str:
    """Any nest of mappings, sequences, tensors and plain values as JSON that can be read back and written in UTF-8.

    Numbers that are not finite become null, half a surrogate pair becomes the text of its escape, and other objects
    their str. Raises RecipeError for what is nested deeper than `strict_json` reads, and for integers that it does
    not read.
    """
    return json.dumps(_plain(value, MAX_DEPTH), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


@singledispatch
def _plain(value: object, levels: int) -> object:
    """A value as JSON has it, of at most so many levels."""
    return writable(str(value))


@_plain.register
def _(value: None, levels: int) -> object:
    return None


@_plain.register
def _(value: float, levels: int) -> object:
    return value if math.isfinite(value) else None


@_plain.register
def _(value: int, levels: int) -> object:
    if abs(value) >= LARGEST_INTEGER:
        raise RecipeError("an integer of a thousand digits or more is not read back; write it as text")
    return value


@_plain.register
def _(value: Tensor, levels: int) -> object:
    return _plain(value.tolist(), levels)


@_plain.register(Mapping)
def _(value: Mapping[object, object], levels: int) -> object:
    named = dict[str, object]()
    for key, inner in value.items():
        name = writable(str(key))
        if name in named:
            raise RecipeError(
                f"the name {name[:200]!r} stands twice, once as another type or with half a character; rename one"
            )
        named[name] = _plain(inner, _below(levels))
    return named


@_plain.register(list)
@_plain.register(tuple)
@_plain.register(range)
@_plain.register(set)
@_plain.register(frozenset)
def _(value: Iterable[object], levels: int) -> object:
    return [_plain(inner, _below(levels)) for inner in value]


def _below(levels: int) -> int:
    if levels == 0:
        raise RecipeError(f"what is nested deeper than {MAX_DEPTH} levels is not read back; flatten it")
    return levels - 1
