"""A language model by its name, and its activations; needs transformers (`pip install 'fmxnn[harvest]'`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fmxnn.activations.batches import Shuffle
from fmxnn.activations.configs import check_context, check_vocabulary
from fmxnn.activations.layer_reader import LayerReader
from fmxnn.activations.stream import Activations
from fmxnn.activations.text import Contexts, Source, contexts

Model = str | Path | nn.Module
"""A causal language model: a folder, a Hub name, or the module itself."""


def open_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a folder or Hub name."""
    return AutoTokenizer.from_pretrained(model)


def open_model(
    model: Model, tokenizer: Any = None, *, dtype: torch.dtype | Literal["auto"] = "auto"
) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer; what is given already stays as it is.

    `dtype` is that of a model which is opened, "auto" the one that it was saved in.
    The tokenizer of a model that is given as a module is the one given, or None.
    """
    if isinstance(model, nn.Module):
        return model, tokenizer
    tokenizer = open_tokenizer(model) if tokenizer is None else tokenizer
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype), tokenizer


def harvest(
    model: Model,
    text: Source | Contexts,
    *,
    layers: Sequence[int],
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
) -> Activations:
    """`tokens layers d_model`: the residual stream of a causal language model, read while you iterate.

    - `model`: a folder, a Hub name, or a module with its `tokenizer`; it is put into eval mode
    - `text`: what `fmxnn.activations.text.documents` reads, or contexts made already
    - `layers`: the blocks after which the residual stream is read, counted from zero
    - `context`: tokens that the model reads at once; `tokens`: how many kept tokens of the text are read, None for all
    - `batch`, `block`, `seed`, `epochs`: how tokens are mixed and cut into batches; see `Shuffle`
    - `path`: where the blocks of an unknown family are, such as `path="transformer.h"`

    Each context begins with BOS (EOS where there is no BOS). BOS, EOS and padding are never part of a batch.

    Raises ValueError for a layer that the model lacks, a context longer than it reads, ids outside its vocabulary,
    too little text, a size below one, or a GPU where there is none.
    """
    shuffle = Shuffle(batch, block, seed=seed, epochs=epochs)
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for and torch sees no GPU; use device='cpu'")
    model, tokenizer = open_model(model, tokenizer, dtype=dtype)
    if device is not None:
        nn.Module.to(model, device)  # transformers wraps its own `to` in an untyped decorator
    reader = LayerReader(model.eval(), layers, path=path)
    if not isinstance(text, Contexts):
        if tokenizer is None:
            raise ValueError("harvest needs the tokenizer of a model that is given as a module; pass tokenizer=...")
        check_context(model, context)
        text = contexts(text, tokenizer, context=context, tokens=tokens)
    check_context(model, text.ids.shape[1])
    check_vocabulary(model, text.ids)
    return Activations(reader, text, shuffle, dtype=dtype)
