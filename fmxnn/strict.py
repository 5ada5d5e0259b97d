"""JSON read strictly, and written so that it can be."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from fmxnn.cells import writable
from fmxnn.recipe import MAX_DEPTH, RecipeError

LARGEST_INTEGER = 10**999


def strict_json(path: Path) -> object:
    """What a file holds: finite numbers, each key once, not deep. Raises RecipeError, naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
        depth = deepest = 0
        for bracket in re.findall(r"[\[{\]}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
            depth += 1 if bracket in "[{" else -1
            deepest = max(deepest, depth)
        if deepest > MAX_DEPTH + 1:  # the config itself is one level above its recipe
            raise RecipeError(f"{path} is nested {deepest} deep; a recipe has at most {MAX_DEPTH} levels")
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{path} is no JSON: {error}") from error


def _no_constant(word: str) -> float:
    raise RecipeError(f"a recipe holds finite numbers, got {word}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise RecipeError(f"a recipe gives each argument once, got {key!r} twice")
    return dict(pairs)


def to_json(value: object) -> str:
    """Any nest of mappings, sequences, tensors and plain values as JSON that can be read back and written in UTF-8.

    Numbers that are not finite become null, half a surrogate pair becomes the text of its escape, and other objects their str.
    Raises RecipeError for what is nested deeper than `strict_json` reads, and for integers that it does not read.
    """
    return json.dumps(_plain(value, MAX_DEPTH), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: object, levels: int) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return writable(value)
    if value is None or isinstance(value, (bool, int)):
        if value is not None and abs(value) >= LARGEST_INTEGER:
            raise RecipeError("an integer of a thousand digits or more is not read back; write it as text")
        return value
    if isinstance(value, Tensor):
        return _plain(value.tolist(), levels)
    if not isinstance(value, (Mapping, list, tuple, range, set, frozenset)):
        return writable(str(value))
    if levels == 0:
        raise RecipeError(f"what is nested deeper than {MAX_DEPTH} levels is not read back; flatten it")
    if isinstance(value, Mapping):
        named = dict[str, object]()
        for key, inner in cast("Mapping[object, object]", value).items():
            name = writable(str(key))
            if name in named:
                raise RecipeError(f"the name {name[:200]!r} stands twice, once as another type or with half a character; rename one")
            named[name] = _plain(inner, levels - 1)
        return named
    return [_plain(inner, levels - 1) for inner in cast("list[object]", value)]
