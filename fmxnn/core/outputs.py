"""What a module gave, checked before it is used: a method or hook of the user's own may give anything."""

from collections.abc import Sequence

from torch import Tensor, nn

from fmxnn.core.errors import ShapeError


def checked(given: object, shape: Sequence[int | str], giver: object, method: str = "forward") -> Tensor:
    """`given`, if it is a tensor of this shape; a word in the shape stands for a size not known, and fits nothing.

    Raises TypeError for anything but a tensor and ShapeError for another shape; the sentence names the class of `giver`
    and its `method`.
    """
    if isinstance(given, Tensor) and given.shape == shape:
        return given
    sizes = ", ".join(map(str, shape))
    wanted = f"{type(giver).__name__}.{method} must give a tensor of ({sizes})"
    if not isinstance(given, Tensor):
        raise TypeError(f"{wanted}, got {type(given).__name__}; return one from the method and from the hooks on it")
    raise ShapeError(f"{wanted}, got {tuple(given.shape)}; return that shape from the method and from the hooks on it")


def check_gives(who: str, what: str, module: object, names: str) -> None:
    """Raises TypeError, naming what is missing, for anything but a module that has all these attributes."""
    lacks = [name for name in names.split() if not hasattr(module, name)]
    if not isinstance(module, nn.Module) or lacks:
        missing = f"without {', '.join(lacks)}" if isinstance(module, nn.Module) else "which is no module"
        raise TypeError(f"{who} takes {what}, got {type(module).__name__} {missing}; see docs/your-own-parts.md")
