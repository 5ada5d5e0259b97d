"""A language model by its name; needs transformers (`pip install 'fmxnn[harvest]'`)."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

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
