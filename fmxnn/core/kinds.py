"""What a plain tree holds, said so that type checkers know it too."""

from collections.abc import Mapping
from typing import Any

from typing_extensions import TypeIs


def is_object(value: object) -> TypeIs[Mapping[str, Any]]:
    """Whether a value has names and values, as a JSON object has."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeIs[list[Any]]:
    """Whether a value is a list, as a JSON array is."""
    return isinstance(value, list)
