"""The residual stream of a language model, read after chosen blocks."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

PATHS = ("transformer.h", "gpt_neox.layers", "model.layers", "model.language_model.layers")
"""Where GPT2, GPT-NeoX and Pythia, Gemma2 and Llama, and their multimodal kin keep their blocks."""


class _Read(Exception):  # no error: it ends the forward once everything asked for has been read
    pass


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


class LayerReader:
    """`contexts context -> contexts context layers d_model`: the residual stream after `layers`, in the order given.

    Layers are counted from zero. The forward stops after the last of them, so later blocks and the head are not run.
    Gradients are off. Raises ValueError for a layer that the model lacks or that is given twice.

    ```python
    from fmxnn.activations.layer_reader import LayerReader

    model = nn.Module()
    model.config = None
    model.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
    reader = LayerReader(model, layers=[0, 1], path="blocks")
    ```
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], *, path: str | None = None):
        self.model = model
        self.layers = tuple(layers)
        self.blocks = residual_blocks(model, path)
        missing = [layer for layer in self.layers if not 0 <= layer < len(self.blocks)]
        if missing or not self.layers:
            wrong = ", ".join(map(str, missing)) or "none"
            raise ValueError(f"{type(model).__name__} has the layers 0 to {len(self.blocks) - 1}, got {wrong}")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"each layer is read once, got {', '.join(map(str, self.layers))}")

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """`contexts context -> contexts context layers d_model`"""
        read: dict[int, Tensor] = {}
        last = max(self.layers)

        def keep(layer: int) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Tensor | tuple[Tensor, ...]) -> None:
                read[layer] = output if isinstance(output, Tensor) else output[0]  # a tuple before transformers 5
                if layer == last:
                    raise _Read

            return hook

        hooks = [self.blocks[layer].register_forward_hook(keep(layer)) for layer in self.layers]
        try:
            self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except _Read:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack([read[layer] for layer in self.layers], dim=-2)
