"""Activations of language models in one call; needs transformers (`pip install 'fmxnn[harvest]'`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack, overload

import torch
from torch import nn

from fmxnn.activations.batches import Mixing, Shuffle
from fmxnn.activations.configs import check_context, check_vocabulary
from fmxnn.activations.layer_reader import Forward, call_language_model
from fmxnn.activations.members import Size, read_several
from fmxnn.activations.models import Model
from fmxnn.activations.places import Layer
from fmxnn.activations.reading import ModelReading
from fmxnn.activations.several import SeveralSource
from fmxnn.activations.source import ModelSource
from fmxnn.activations.stream import ActivationPairs, Activations
from fmxnn.activations.text import Contexts, contexts
from fmxnn.activations.text import Source as Text


class Options(Mixing, total=False):
    """What `harvest` takes beside the model, the text and `layers`.

    ```python
    from fmxnn.activations.harvesting import Options

    Options(context=32, batch=64, seed=3)
    ```
    """

    at: str
    tokenizer: Any
    context: int
    tokens: int | None
    column: str
    device: str | torch.device | None
    dtype: torch.dtype
    path: str | None
    call: Forward


@overload
def harvest(
    model: Model | Sequence[Model],
    text: Text | Contexts,
    *,
    layers: Sequence[Layer],
    to: None = None,
    **options: Unpack[Options],
) -> Activations: ...
@overload
def harvest(
    model: Model | Sequence[Model],
    text: Text | Contexts,
    *,
    layers: Sequence[Layer],
    to: str,
    **options: Unpack[Options],
) -> ActivationPairs: ...
@overload
def harvest(
    model: Model | Sequence[Model],
    text: Text | Contexts,
    *,
    layers: Sequence[Layer],
    to: str | None,
    **options: Unpack[Options],
) -> Activations | ActivationPairs: ...
def harvest(
    model: Model | Sequence[Model],
    text: Text | Contexts,
    *,
    layers: Sequence[Layer],
    to: str | None = None,
    at: str = "block_out",
    tokenizer: Any = None,
    context: int = 128,
    tokens: int | None = None,
    column: str = "text",
    batch: int = 4096,
    block: int = 256,
    seed: int = 0,
    epochs: int = 1,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    path: str | None = None,
    call: Forward = call_language_model,
) -> Activations | ActivationPairs:
    """`tokens layers d_model`: activations of causal language models, read while you iterate.

    - `model`: a folder, a Hub name, a module with its `tokenizer`, or a list of these: "Several models" in the docs
    - `text`: what `fmxnn.activations.text.documents` reads (`column`: where a record has it), or contexts made already
    - `layers`: blocks counted from zero, -1 for what the first reads, or places by name: "embed", "mlp_out.3"
    - `at`: where in each block: "block_out" (the residual stream), "block_in", "attn_out", "mlp_in", "mlp_out", a path
    - `to`: where targets are read; batches are pairs (x, y) then, of the same tokens and from one forward
    - `context`: tokens that the model reads at once; `tokens`: how many kept tokens of the text are read, None for all
    - `batch`, `block`, `seed`, `epochs`: how tokens are mixed and cut into batches; see `Shuffle`
    - `path`: where the blocks of an unknown family are; `call`: runs another model: `lambda model, ids: model(ids)`

    Each context begins with BOS (EOS where there is no BOS). BOS, EOS and padding are never part of a batch. Models
    are put into eval mode.

    Raises ValueError for a place that a model lacks, a context longer than it reads, ids outside its vocabulary, too
    little text, a size below one, or a GPU where there is none, and FileNotFoundError for a missing folder.
    """
    shuffle = Shuffle(batch, block, seed=seed, epochs=epochs)
    check_device(device)
    reading = ModelReading(layers, (at,) if to is None else (at, to), path, call, device, dtype)
    source = _source(model, text, tokenizer, reading, Size(context, tokens, shuffle.at_once, column))
    return (Activations if to is None else ActivationPairs)(source, shuffle, dtype=dtype)


def _source(
    model: Model | Sequence[Model], text: Text | Contexts, tokenizer: Any, reading: ModelReading, size: Size
) -> ModelSource | SeveralSource:
    if isinstance(model, list | tuple):
        return read_several(model, text, tokenizer, reading=reading, size=size)
    if not isinstance(model, str | Path | nn.Module):
        raise ValueError(
            f"harvest reads a language model (a folder, a Hub name or a module) or a list of them, got "
            f"{type(model).__name__}; give one of these"
        )
    readers, tokenizer = reading.known(model).open(model, tokenizer)
    read = _read(readers[0].model, text, tokenizer, size)
    return ModelSource(readers, read, at_once=size.at_once)


def check_device(device: str | torch.device | None) -> None:
    """Raises ValueError for a GPU where there is none."""
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for and torch sees no GPU; use device='cpu'")


def _read(model: nn.Module, text: Text | Contexts, tokenizer: Any, size: Size) -> Contexts:
    """`-> contexts context`: what the model can read of a text, or of contexts made already."""
    if not isinstance(text, Contexts):
        if tokenizer is None:
            raise ValueError("harvest needs the tokenizer of a model that is given as a module; pass tokenizer=...")
        check_context(model, size.context)
        text = contexts(text, tokenizer, context=size.context, tokens=size.tokens, column=size.column)
    check_context(model, text.context)
    check_vocabulary(model, text.known.ids)
    return text
