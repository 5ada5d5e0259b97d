"""Places in a model where activations are read and written."""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from operator import index
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fmxnn.activations.families import FAMILIES, family_of, find_beside, find_blocks, submodule, uncompiled

Layer = int | str
"""A layer by its number, counted from zero, or a place by its name."""
Side = Literal["in", "out"]
IN_BLOCKS = ("block_out", "block_in", "attn_out", "mlp_in", "mlp_out")
"""Places that every layer has."""
BESIDE_BLOCKS = ("embed", "final_norm")
"""Places that a model has once."""


@dataclass(frozen=True)
class Place:
    """`contexts context d_model`: what a module of a model reads ("in") or gives ("out").

    Of several tensors it is the first, as of an attention that gives its weights too.

    ```python
    from fmxnn.activations.places import Place

    seen, linear = [], nn.Linear(2, 3)
    with Place("its input", linear, "in").hook(seen.append):
        linear(torch.ones(1, 4, 2))
    seen[0].shape  # 1, 4, 2
    ```
    """

    name: str
    module: nn.Module
    side: Side

    def hook(self, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Calls `see` with what stands here at every forward; what it returns, unless None, takes the place of that.

        The handle removes the hook, and is a context manager. A forward raises TypeError where no tensor stands here.
        """

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            key = self._key(output)
            new = see(_entries(output)[key])
            return None if new is None else _replaced(output, key, new)

        def before(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if not args:  # transformers calls attention by name, and not always in the same order
                named = {"hidden_states": named["hidden_states"], **named} if "hidden_states" in named else named
            given = args or named
            key = self._key(given)
            new = see(_entries(given)[key])
            if new is None:
                return None
            changed = _replaced(given, key, new)
            return (changed, named) if args else ((), changed)

        if self.side == "out":
            return self.module.register_forward_hook(after)
        return self.module.register_forward_pre_hook(before, with_kwargs=True)

    def _key(self, given: Any) -> Any:
        for key, value in _entries(given).items():
            if isinstance(value, Tensor):
                return key
        raise TypeError(f"{self.name} is no tensor but {type(given).__name__}; read a module that takes or gives one")


def _entries(given: Any) -> dict[Any, Any]:
    """What a module was called with or gave, by key; under None if it is one thing."""
    if isinstance(given, Mapping):
        return dict(cast("Mapping[Any, Any]", given))
    return dict(enumerate(cast("Sequence[Any]", given))) if isinstance(given, tuple | list) else {None: given}


def _replaced(given: Any, key: Any, new: Tensor) -> Any:
    if key is None:
        return new
    if isinstance(given, tuple):
        return (*given[:key], new, *given[key + 1 :])
    changed = copy(given)
    changed[key] = new
    return changed


def residual_blocks(model: nn.Module, path: str | None = None) -> nn.ModuleList:
    """The blocks of a transformer, at `path` or where a known family keeps them.

    Raises ValueError, saying where it looked.
    """
    return find_blocks(model, path)[1]


def check_layers(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The entries of `layers` as plain integers and strings.

    Raises TypeError for anything but a sequence of whole numbers and names, and ValueError for none.
    """
    if isinstance(layers, str) or not hasattr(layers, "__iter__"):
        raise TypeError(f"layers is a list, got {layers!r:.200}; write layers=[{layers!r:.200}]")
    found = tuple(_entry(layer) for layer in layers)
    if not found:
        raise ValueError("layers names at least one layer, got none; write layers=[0]")
    return found


def _entry(layer: Any) -> Layer:
    if isinstance(layer, str):
        return layer
    try:
        if not isinstance(layer, bool):
            return index(layer)
    except TypeError:
        pass
    raise TypeError(
        f"an entry of layers is a whole number or the name of a place, got {layer!r:.200}; write layers=[0]"
    )


def check_places(places: Sequence[str], layers: Sequence[Layer]) -> None:
    """Raises ValueError for a place `at` that no numbered layer has, whatever the model."""
    if all(isinstance(layer, str) for layer in layers):
        return
    for at in places:
        if at in BESIDE_BLOCKS:
            raise ValueError(f"{at!r} belongs to no layer; write layers=[{at!r}] in place of at={at!r}")
        if at not in IN_BLOCKS and "{}" not in at:
            raise ValueError(
                f"at and to are one of {', '.join(IN_BLOCKS)}, or a path in which {{}} stands for the layer, such as "
                f"'transformer.h.{{}}.mlp.act:out', got {at!r:.200}; write one of these"
            )
        if -1 in layers and at != "block_out":
            raise ValueError(f"layer -1 is what the first block reads and has no {at:.200}; leave it out of layers")


def check_once(layers: Sequence[Layer]) -> None:
    """Raises ValueError for an entry that stands twice."""
    for number, layer in enumerate(layers):
        if layer in layers[:number]:
            raise _read_twice(layer, layer)


def _read_twice(one: Layer, other: Layer) -> ValueError:
    return ValueError(f"each place is read once, and {one!r} and {other!r} in layers are one place; leave one out")


def check_numbers(who: str, count: int, layers: Sequence[Layer]) -> None:
    """Raises ValueError for the number of a layer that a model of `count` blocks lacks."""
    numbers = (_in_block(layer)[1] if isinstance(layer, str) else layer for layer in layers)
    wrong = [str(number) for number in numbers if number not in range(-1, count)]
    if wrong:
        raise ValueError(f"{who} has the layers 0 to {count - 1}, got {', '.join(wrong)}; name layers among these")


def _in_block(name: str) -> tuple[str, int]:
    """`mlp_out.3` as its place and its layer; any other name with -1."""
    found = re.fullmatch(rf"({'|'.join(IN_BLOCKS)})\.(\d+)", name)
    return (found[1], int(found[2])) if found else (name, -1)


def find_places(
    model: nn.Module, layers: Sequence[Layer], *, at: str = "block_out", path: str | None = None
) -> tuple[Place, ...]:
    """The places of `layers`, in their order; see `harvest`.

    Raises ValueError for a layer or place that the model lacks or that is given twice, and TypeError where `layers` is
    no list of whole numbers and names.
    """
    layers = check_layers(layers)
    check_places([at], layers)
    places = tuple(
        _named(model, layer, path) if isinstance(layer, str) else _numbered(model, layer, at, path, layers)
        for layer in layers
    )
    for number, place in enumerate(places):
        for layer, other in zip(layers[:number], places[:number], strict=True):
            if other.module is place.module and other.side == place.side:
                raise _read_twice(layer, layers[number])
    return places


def _numbered(model: nn.Module, layer: int, at: str, path: str | None, layers: Sequence[Layer]) -> Place:
    if "{}" in at:
        return _module(model, at.replace("{}", str(layer)))
    dotted, blocks = find_blocks(model, path)
    check_numbers(type(model).__name__, len(blocks), layers)
    if layer == -1:
        return Place("block_in.0", uncompiled(blocks[0]), "in")
    return _of_block(f"{dotted}.{layer}", uncompiled(blocks[layer]), at, layer)


def _of_block(dotted: str, block: nn.Module, at: str, layer: int) -> Place:
    kind, _, side = at.rpartition("_")
    name = f"{at}.{layer}"
    if kind == "block":
        return Place(name, block, cast("Side", side))
    family = family_of(block)
    if family is None:
        parts = ", ".join(part for part, _ in block.named_children()) or "none"
        known = "; ".join(each.parts for each in FAMILIES)
        raise ValueError(
            f"{type(block).__name__} is a block whose {at} is not known: it has the parts {parts:.200}, and known are "
            f"{known}; name a module in it, as in at='{dotted.removesuffix(str(layer))}{{}}.mlp:{side}'"
        )
    part = {"attn_out": family.attn_out, "mlp_in": "mlp", "mlp_out": family.mlp_out}[at]
    return Place(name, block.get_submodule(part), cast("Side", side))


def _named(model: nn.Module, name: str, path: str | None) -> Place:
    """A place beside the blocks, one of a block (`mlp_out.3`), or a module by its path."""
    if name in BESIDE_BLOCKS:
        return Place(name, find_beside(model, name, path), "out")
    at, layer = _in_block(name)
    if layer >= 0:
        return _numbered(model, layer, at, path, [layer])
    return _module(model, name)


def _module(model: nn.Module, name: str) -> Place:
    dotted, _, side = name.partition(":")
    if side not in ("", "in", "out"):
        raise ValueError(f"a place ends with :in or :out, got {name!r:.200}; write '{dotted:.200}:out'")
    module = submodule(model, dotted) if dotted else None
    if module is not None:
        return Place(name, module, side or "out")
    parents = dotted.split(".")
    while parents and submodule(model, ".".join(parents)) is None:
        parents.pop()
    above = ".".join(parents)
    holds = ", ".join(part for part, _ in model.get_submodule(above).named_children()) or "nothing"
    named = ", ".join([*BESIDE_BLOCKS, *(f"{each}.0" for each in IN_BLOCKS)])
    raise ValueError(
        f"{type(model).__name__} has no place {name!r:.200}: it is none of {named}, and as a path it ends at "
        f"{above or 'the model'!r}, which holds {holds:.200}; name one that it holds"
    )
