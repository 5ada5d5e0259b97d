"""Modules that need packages beyond the plain installation."""

from importlib import import_module
from types import ModuleType


def from_extra(module: str, *, who: str, extra: str) -> ModuleType:
    """The module, imported when it is first asked for. Raises ImportError, naming the package that is missing and the extra that brings it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{who} needs {error.name}, which is not installed; pip install 'fmxnn[{extra}]'") from error
