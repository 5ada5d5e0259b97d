"""Places in a language model where activations are read and written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Layer = int | str
"""A layer by its number, counted from zero, or a place by its name."""
PATHS = ("transformer.h", "gpt_neox.layers", "model.layers", "model.language_model.layers")
"""Where GPT2, GPT-NeoX and Pythia, Gemma2 and Llama, and their multimodal kin keep their blocks."""


@dataclass(frozen=True)
class Place:
    """`contexts context d_model`: what a module of a model reads ("in") or gives ("out").

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
    side: Literal["in", "out"]

    def hook(self, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Calls `see` with what stands here at every forward; what it gives, unless None, takes the place of that.

        The handle removes the hook, and is a context manager.
        """

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            new = see(output if isinstance(output, Tensor) else output[0])  # a tuple before transformers 5
            return new if new is None or isinstance(output, Tensor) else (new, *output[1:])

        def before(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            key = None if args else "hidden_states"
            new = see(named[key] if key else args[0])
            if new is None:
                return None
            return (args, named | {key: new}) if key else ((new, *args[1:]), named)

        if self.side == "out":
            return self.module.register_forward_hook(after)
        return self.module.register_forward_pre_hook(before, with_kwargs=True)


def residual_blocks(model: nn.Module, path: str | None = None) -> nn.ModuleList:
    """The blocks of a transformer, at `path` or where a known family keeps them.

    Raises ValueError, saying where it looked.
    """
    tried = PATHS if path is None else (path,)
    for dotted in tried:
        try:
            found = attrgetter(dotted)(model)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return found
    raise ValueError(
        f"{type(model).__name__} has no list of blocks at {', '.join(tried)}; give its place: path='transformer.h'"
    )


def find_places(
    model: nn.Module, layers: Sequence[Layer], *, at: str = "block_out", path: str | None = None
) -> tuple[Place, ...]:
    """The places `at` of `layers`, in their order; see `harvest`.

    Raises ValueError for a layer that the model lacks or that is given twice, and for a place that it lacks.
    """
    blocks = residual_blocks(model, path)
    missing = [layer for layer in layers if layer not in range(len(blocks))]
    if missing or not layers:
        wrong = ", ".join(map(str, missing)) or "none"
        raise ValueError(f"{type(model).__name__} has the layers 0 to {len(blocks) - 1}, got {wrong}")
    if len(set(layers)) < len(layers):
        raise ValueError(f"each layer is read once, got {', '.join(map(str, layers))}")
    return tuple(_place(blocks[int(layer)], at, layer) for layer in layers)


def _place(block: nn.Module, at: str, layer: Layer) -> Place:
    kind, _, side = at.rpartition("_")
    for name in {"block": ("",), "mlp": ("mlp",), "attn": ("attn", "self_attn", "attention")}.get(kind, ()):
        module = attrgetter(name)(block) if hasattr(block, name) else None if name else block
        if isinstance(module, nn.Module) and side in ("in", "out"):
            return Place(f"{at} of layer {layer}", module, side)
    raise ValueError(f"{type(block).__name__} has no place {at!r}")
