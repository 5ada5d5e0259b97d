"""A module as the nested constructor call that makes it."""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import singledispatch
from inspect import Parameter
from itertools import chain, islice
from numbers import Integral
from types import NoneType
from typing import Any, SupportsInt, cast

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fmxnn.core.errors import RecipeError
from fmxnn.core.excerpt import cut, excerpt
from fmxnn.core.kinds import is_list, is_object

Recipe = Mapping[str, Any]
MAX_DEPTH = 16
MAX_NODES = 4096
MAX_NAME = 200
MAX_BITS = 4096
_Step = tuple["_Step | None", object, object]
"""A value of a tree: the step to what holds it, its name there, itself. Its path is written out where an error needs
it.
"""


def describe(module: nn.Module) -> dict[str, Any]:
    """The nested constructor call that makes `module`, as plain JSON values: `{"TopK": {"k": 64}}`.

    It reads the constructor's signature, and the attribute with each argument's name, or with the name that the class
    gives for it in `kept_as`. A module that stands in two places is written once and then as `{"same": path}`.
    Arguments that the class lists in `added_later` are left out at their default, as in folders from before they were
    added. Raises RecipeError for an argument that was not kept or is not a JSON value.
    """
    return _describe(module, "", {})


def build(recipe: Recipe, classes: Iterable[type[nn.Module]]) -> nn.Module:
    """The module that `describe` wrote, made of `classes` alone: a name in a recipe never leads to an import.

    Raises RecipeError with the dotted path of the first thing that does not fit.
    """
    check_tree(recipe)
    known = {cls.__name__: cls for cls in classes}
    return _build(recipe, "", known, {})


def check_rebuilds(module: nn.Module) -> None:
    """Raises RecipeError where the recipe of `module` makes other tensors than it has.

    Such a module could be saved and not loaded. The error names the part.
    """
    for path, part in module.named_modules():
        if is_parametrized(part):
            name = next(iter(cast("nn.ModuleDict", part.parametrizations)))
            raise RecipeError(
                f"{name!r} of the module at {_at(path)} is parametrized, which no recipe can say; "
                f"first call torch.nn.utils.parametrize.remove_parametrizations(module.get_submodule({path!r}), "
                f"{name!r})"
            )
    with torch.device("meta"):
        made = build(describe(module), {type(part) for part in module.modules()})
    mine, theirs = ({key: tuple(tensor.shape) for key, tensor in each.state_dict().items()} for each in (module, made))
    other = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    if other:
        raise RecipeError(
            f"the constructors that made {type(module).__name__} make other tensors than it has, so it could not be "
            "loaded again: "
            f"{', '.join(other)[:200]}; undo what changed them since, such as weight_norm (remove_weight_norm) or "
            "pruning (prune.remove)"
        )


def check_tree(tree: object) -> None:
    """Raises RecipeError for a tree that is too deep or too large.

    So it does for a number that is huge or not finite, and for a name of more than 200 characters.
    """
    level: list[_Step] = [(None, "", tree)]
    depth = nodes = 0
    while level:
        depth, nodes = depth + 1, nodes + len(level)
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            raise RecipeError(
                f"a recipe has at most {MAX_DEPTH} levels and {MAX_NODES} values, got more at {_at(_path(level[0]))}"
            )
        for step in level:
            _, name, value = step
            if not isinstance(name, str) or len(name) > MAX_NAME:
                raise RecipeError(
                    f"a recipe's names are strings of at most {MAX_NAME} characters, got {excerpt(name, 80)}"
                )
            if fault := _fault(value):
                raise RecipeError(f"a recipe holds {fault} at {_at(_path(step))}")
        inner = chain.from_iterable(_children(step) for step in level)
        level = list(islice(inner, MAX_NODES + 1 - nodes))


def _describe(module: nn.Module, path: str, seen: dict[int, str]) -> dict[str, Any]:
    if id(module) in seen:
        return {"same": seen[id(module)]}
    seen[id(module)] = path
    arguments: dict[str, Any] = {}
    kept_as: Mapping[str, str] = getattr(type(module), "kept_as", {})
    for name, kind in _parameters(type(module)):
        attribute = kept_as.get(name, name)
        if not hasattr(module, attribute):
            raise RecipeError(
                f"{type(module).__name__} at {_at(path)} takes the argument {name!r} and has no attribute of that "
                f"name; keep it: self.{attribute} = {name}"
            )
        value = getattr(module, attribute)
        if (
            name in getattr(module, "added_later", ())
            and value == inspect.signature(type(module)).parameters[name].default
        ):
            continue
        if kind is Parameter.VAR_KEYWORD:
            arguments.update({key: _plain(inner, _join(path, key), seen) for key, inner in value.items()})
        else:
            arguments[name] = _plain(value, _join(path, name), seen)
    return {type(module).__name__: arguments}


@singledispatch
def _fault(value: object) -> str:
    """What keeps a value out of a recipe, if anything does."""
    return ""


@_fault.register
def _(value: float) -> str:
    return "" if math.isfinite(value) else f"finite numbers, got {value}"


@_fault.register
def _(value: int) -> str:
    bits = value.bit_length()
    return "" if bits <= MAX_BITS else f"whole numbers of at most {MAX_BITS} bits, got one of {bits:,}"


@singledispatch
def _plain(value: object, path: str, seen: dict[int, str]) -> Any:
    """An argument as a recipe holds it."""
    raise RecipeError(f"a recipe holds numbers, strings, lists and modules, got {type(value).__name__} at {_at(path)}")


@_plain.register(bool)
@_plain.register(int)
@_plain.register(str)
@_plain.register(NoneType)
def _(value: bool | int | str | None, path: str, seen: dict[int, str]) -> Any:
    return value


@_plain.register
def _(value: float, path: str, seen: dict[int, str]) -> Any:
    return value if math.isfinite(value) else _plain.dispatch(object)(value, path, seen)


@_plain.register(Integral)
def _(value: SupportsInt, path: str, seen: dict[int, str]) -> Any:
    return int(value)  # numpy's


@_plain.register(list)
@_plain.register(tuple)
@_plain.register(nn.ModuleList)
def _(value: Iterable[object], path: str, seen: dict[int, str]) -> Any:
    return [_plain(inner, _join(path, str(i)), seen) for i, inner in enumerate(value)]


@_plain.register
def _(value: nn.Module, path: str, seen: dict[int, str]) -> Any:
    return _describe(value, path, seen)


def _build(recipe: object, path: str, known: Mapping[str, type[nn.Module]], made: dict[str, nn.Module]) -> nn.Module:
    if not is_object(recipe) or len(recipe) != 1:
        raise RecipeError(f"a recipe names one class and its arguments, got {excerpt(recipe, 80)} at {_at(path)}")
    (name, arguments), *_ = recipe.items()
    if name == "same":
        return _shared(arguments, path, made)
    if name not in known:
        raise RecipeError(
            f"unknown class {excerpt(name, 80)} at {_at(path)}; if it is yours, pass it: "
            f"classes=[{name if str(name).isidentifier() else '...'}]"
        )
    if not is_object(arguments):
        raise RecipeError(f"{name} at {_at(path)} needs its arguments as an object, got {excerpt(arguments, 80)}")
    cls = known[name]
    plain = {key: _value(value, _join(path, key), known, made) for key, value in arguments.items()}
    spread = next((key for key, kind in _parameters(cls) if kind is Parameter.VAR_POSITIONAL), None)
    try:
        made[path] = cls(*cast("tuple[object, ...]", plain.pop(spread, ())), **plain) if spread else cls(**plain)
    except (TypeError, ValueError, IndexError, RuntimeError, ArithmeticError, MemoryError, AttributeError) as error:
        said = re.sub(
            r"\w+\.__init__\(\)", name, str(error).split("\n")[0]
        )  # an inherited constructor names its own class
        reason = cut(said, 400)
        raise RecipeError(f"{name} at {_at(path)} cannot be built: {reason}") from error
    return made[path]


def _shared(first: object, path: str, made: Mapping[str, nn.Module]) -> nn.Module:
    """The module that stands at the path `first` already."""
    if not isinstance(first, str) or first not in made:
        raise RecipeError(f"'same' at {_at(path)} points to {excerpt(first, 80)}, where no module stands before it")
    return made[first]


def _value(value: object, path: str, known: Mapping[str, type[nn.Module]], made: dict[str, nn.Module]) -> object:
    if is_object(value):
        return _build(value, path, known, made)
    if is_list(value):
        return tuple(_value(inner, _join(path, str(i)), known, made) for i, inner in enumerate(value))
    return value


def _parameters(cls: type[nn.Module]) -> list[tuple[str, Any]]:
    if cls is nn.Identity or cls.__init__ is nn.Module.__init__:
        return []  # it takes any arguments and keeps none, or has no constructor of its own
    signature = inspect.signature(cast("Callable[..., nn.Module]", cls))
    return [(name, parameter.kind) for name, parameter in signature.parameters.items()]


def _children(step: _Step) -> Iterator[_Step]:
    _, _, value = step
    if is_object(value):
        return ((step, name, inner) for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ((step, str(i), inner) for i, inner in enumerate(cast("Iterable[object]", value)))
    return iter(())


def _path(step: _Step) -> str:
    names: list[str] = []
    at: _Step | None = step
    while at is not None:
        at, name, _ = at
        names.append(str(name))
    return ".".join(reversed(names[:-1]))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _at(path: str) -> str:
    return repr(path[:200]) if path else "the top"
