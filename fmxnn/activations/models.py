"""A language model by its name; needs transformers (`pip install 'fmxnn[harvest]'`)."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

Model = str | Path | nn.Module
"""A causal language model: a folder, a Hub name (at a revision behind "@"), or the module itself."""


def open_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a folder or Hub name."""
    name, revision = at_revision(model)
    return AutoTokenizer.from_pretrained(name, **revision)


def at_revision(model: str | Path) -> tuple[str | Path, dict[str, str]]:
    """A name without what stands behind its "@", and that as `from_pretrained` takes it.

    "org/model@step1000" is the model at a branch, tag or commit. A folder that is there is never cut.

    ```python
    from fmxnn.activations.models import at_revision

    at_revision("org/model@step1000")  # "org/model" and {"revision": "step1000"}
    ```
    """
    name, _, revision = str(model).partition("@")
    if not (name and revision) or isinstance(model, Path) or Path(model).exists():
        return model, {}
    return name, {"revision": revision}


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
    name, revision = at_revision(model)
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **revision), tokenizer
