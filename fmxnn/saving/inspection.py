"""What a dictionary is, in words, from its recipe and the shapes of its tensors."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from fmxnn.coders.encoder import CrossLayerEncoder
from fmxnn.core.recipe import describe
from fmxnn.saving.card import python
from fmxnn.weights.weight import Weight


def summary(module: nn.Module) -> str:
    """The Python that builds it, its sizes, its gate, and what is said of it; a module on the meta device will do."""
    about = cast("Mapping[str, Any]", getattr(module, "about", {}))
    lines = [python(describe(module)), ""]
    named = {
        "read from": getattr(module, "pretrained_from", ""),
        "format": "fmxnn",
        **dict(_facts(module)),
        "folded": "nothing",
        **about,
    }
    width = max(map(len, named))
    return "\n".join([*lines, *(f"{key:<{width}}  {value}" for key, value in named.items() if value not in ("", None))])


def _facts(module: nn.Module) -> Iterator[tuple[str, str]]:
    numbers: dict[torch.dtype, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        numbers[tensor.dtype] = numbers.get(tensor.dtype, 0) + tensor.numel()
    yield "parameters", f"{sum(parameter.numel() for parameter in module.parameters()):,}"
    yield "memory", f"{sum(dtype.itemsize * count for dtype, count in numbers.items()) / 1e6:,.1f} MB"
    yield (
        "dtypes",
        ", ".join(f"{str(dtype).removeprefix('torch.')} ({count:,} numbers)" for dtype, count in numbers.items()),
    )
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, Weight) and ".sparsifier." not in name:
            yield name or "weight", f"layers={part.layers}, d_model={part.d_model}, latents={part.latents}"
        if isinstance(part, CrossLayerEncoder):
            yield "gate", re.sub(r"(?<=\() | (?=\))|,(?= \))", "", " ".join(python(describe(part.sparsifier)).split()))
