"""The classes that a saved recipe may name: the modules that the rooms export, and two of torch's."""

from inspect import isabstract
from types import ModuleType
from typing import cast

from torch import nn

from fmxnn import coders, core, gates, training, weights

OF_TORCH: tuple[type[nn.Module], ...] = (nn.ReLU, nn.Identity)
_ROOMS = (core, weights, gates, coders, training)


def _exported(room: ModuleType) -> list[type[nn.Module]]:
    """The modules in the `__all__` of a room that can be built: an abstract class is a contract and no part."""
    found = [getattr(room, name) for name in cast("list[str]", room.__all__)]
    classes = [each for each in found if isinstance(each, type) and issubclass(each, nn.Module)]
    return [each for each in classes if not isabstract(each)]


KNOWN: tuple[type[nn.Module], ...] = (*(each for room in _ROOMS for each in _exported(room)), *OF_TORCH)
"""What `from_pretrained` builds without being told; a class of the user's own is passed in `classes`."""


def shown(name: str) -> str:
    """How Python calls the class of a recipe after `import fmxnn as fx`.

    A class of the user's own stands by its name alone.
    """
    if name in {each.__name__ for each in OF_TORCH}:
        return f"torch.nn.{name}"
    return f"fx.{name}" if name in {each.__name__ for each in KNOWN} else name
