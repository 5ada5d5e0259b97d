"""Modules that need packages beyond the plain installation."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn


def from_extra(module: str, *, who: str, extra: str) -> ModuleType:
    """The module, imported when it is first asked for.

    Raises ImportError where a package is missing. The message names the package and the extra that brings it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{who} needs {error.name}, which is not installed; pip install 'fmxnn[{extra}]'") from error


def lazy(module: str, name: str, *, extra: str) -> Callable[..., Any]:
    """What `module` calls `name`; where its packages are missing, a function that raises ImportError when called.

    So a room can list the name in `__all__`, and `import *` works on a plain installation.
    """
    try:
        return getattr(from_extra(module, who=name, extra=extra), name)
    except ImportError as error:
        reason = str(error)

    def missing(*_given: object, **_named: object) -> NoReturn:
        raise ImportError(reason)

    missing.__name__ = missing.__qualname__ = name
    missing.__doc__ = f"{reason}."
    return missing
