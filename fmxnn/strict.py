"""JSON read strictly, and written so that it can be."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from fmxnn.recipe import MAX_DEPTH, RecipeError


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
    """Any nest of mappings, sequences, tensors and plain values as JSON: numbers that are not finite as null, other objects as their str."""
    return json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple, range, set, frozenset)):
        return [_plain(inner) for inner in cast("list[object]", value)]
    return str(value)
