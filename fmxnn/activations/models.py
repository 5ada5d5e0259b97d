"""A language model's activations, by its name: the only part that needs transformers (`pip install 'fmxnn[harvest]'`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fmxnn.activations.batches import Shuffle
from fmxnn.activations.layer_reader import LayerReader, check_context, check_vocabulary
from fmxnn.activations.stream import Activations
from fmxnn.activations.text import Contexts, Source, contexts


def harvest(
    model: str | Path | nn.Module,
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
    """`tokens layers d_model`: the residual stream after `layers` (from zero) of a causal language model, streamed.

    `model` is a folder, a Hub name, or a model with its `tokenizer`; `text` is what `fmxnn.activations.text.documents` reads, or contexts made already.
    BOS, EOS and padding are dropped, and every context begins with a BOS (or EOS) of its own.
    The text is read up to `tokens` kept tokens, and no further.
    `path` names the list of blocks where the family is not known. The model is put into eval mode.

    Raises ValueError for a layer that the model lacks, a context longer than it reads, ids outside its vocabulary,
    too little text, a size below one, or a GPU where there is none.
    """
    shuffle = Shuffle(batch, block, seed=seed, epochs=epochs)
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for and torch sees no GPU; use device='cpu'")
    if not isinstance(model, nn.Module):
        tokenizer = AutoTokenizer.from_pretrained(model) if tokenizer is None else tokenizer
        model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
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
