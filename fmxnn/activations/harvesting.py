"""Activations of language models in one call; needs transformers (`pip install 'fmxnn[harvest]'`)."""

from collections.abc import Sequence
from typing import Any, TypedDict, Unpack, overload

import torch
from torch import nn

from fmxnn.activations.batches import Shuffle
from fmxnn.activations.configs import check_context, check_vocabulary
from fmxnn.activations.layer_reader import LayerReader
from fmxnn.activations.models import Model, open_model
from fmxnn.activations.places import Layer
from fmxnn.activations.source import ModelSource
from fmxnn.activations.stream import ActivationPairs, Activations
from fmxnn.activations.text import Contexts, contexts
from fmxnn.activations.text import Source as Text


class Options(TypedDict, total=False):
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
    batch: int
    block: int
    seed: int
    epochs: int
    device: str | torch.device | None
    dtype: torch.dtype
    path: str | None


@overload
def harvest(
    model: Model, text: Text | Contexts, *, layers: Sequence[Layer], to: None = None, **options: Unpack[Options]
) -> Activations: ...
@overload
def harvest(
    model: Model, text: Text | Contexts, *, layers: Sequence[Layer], to: str, **options: Unpack[Options]
) -> ActivationPairs: ...
def harvest(
    model: Model,
    text: Text | Contexts,
    *,
    layers: Sequence[Layer],
    to: str | None = None,
    at: str = "block_out",
    tokenizer: Any = None,
    context: int = 128,
    tokens: int | None = None,
    batch: int = 4096,
    block: int = 256,
    seed: int = 0,
    epochs: int = 1,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    path: str | None = None,
) -> Activations | ActivationPairs:
    """`tokens layers d_model`: activations of a causal language model, read while you iterate.

    - `model`: a folder, a Hub name, or a module with its `tokenizer`; it is put into eval mode
    - `text`: what `fmxnn.activations.text.documents` reads, or contexts made already
    - `layers`: the blocks that are read, counted from zero
    - `at`: where in each: "block_out" (the residual stream after it), "block_in", "attn_out", "mlp_in" or "mlp_out"
    - `to`: where targets are read; batches are pairs (x, y) then, of the same tokens and from one forward
    - `context`: tokens that the model reads at once; `tokens`: how many kept tokens of the text are read, None for all
    - `batch`, `block`, `seed`, `epochs`: how tokens are mixed and cut into batches; see `Shuffle`
    - `path`: where the blocks of an unknown family are, such as `path="transformer.h"`

    Each context begins with BOS (EOS where there is no BOS). BOS, EOS and padding are never part of a batch.

    Raises ValueError for a layer that the model lacks, a context longer than it reads, ids outside its vocabulary,
    too little text, a size below one, or a GPU where there is none.
    """
    shuffle = Shuffle(batch, block, seed=seed, epochs=epochs)
    check_device(device)
    opened, tokenizer = open_model(model, tokenizer, dtype=dtype)
    if device is not None:
        nn.Module.to(opened, device)  # transformers wraps its own `to` in an untyped decorator
    places = (at,) if to is None else (at, to)
    readers = [LayerReader(opened.eval(), layers, at=place, path=path) for place in places]
    read = _read(opened, text, tokenizer, context=context, tokens=tokens)
    source = ModelSource(readers, read, at_once=shuffle.at_once)
    return (Activations if to is None else ActivationPairs)(source, shuffle, dtype=dtype)


def check_device(device: str | torch.device | None) -> None:
    """Raises ValueError for a GPU where there is none."""
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for and torch sees no GPU; use device='cpu'")


def _read(model: nn.Module, text: Text | Contexts, tokenizer: Any, *, context: int, tokens: int | None) -> Contexts:
    """`-> contexts context`: what the model can read of a text, or of contexts made already."""
    if not isinstance(text, Contexts):
        if tokenizer is None:
            raise ValueError("harvest needs the tokenizer of a model that is given as a module; pass tokenizer=...")
        check_context(model, context)
        text = contexts(text, tokenizer, context=context, tokens=tokens)
    check_context(model, text.context)
    check_vocabulary(model, text.known.ids)
    return text
