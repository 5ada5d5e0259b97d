"""A language model by its name; needs transformers (`pip install 'fmxnn[harvest]'`)."""

from os.path import exists, isdir  # unlike Path's, they take a name that is too long for a path
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

Model = str | Path | nn.Module
"""A causal language model: a folder, a Hub name, or the module itself."""
_CONFIGS = ("config.json", "adapter_config.json")  # an adapter's folder names the model that it changes


def open_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a folder or Hub name.

    Raises FileNotFoundError for a folder that is not there.
    """
    _check_there(model)
    return AutoTokenizer.from_pretrained(model)


def open_config(model: Model) -> Any:
    """The config of a folder or Hub name, read without the weights; None for a module, and for an adapter's folder.

    Raises FileNotFoundError for a folder that is not there or holds no model.
    """
    if isinstance(model, nn.Module):
        return None
    _check_holds_a_model(model)
    if isdir(model) and not (Path(model) / "config.json").exists():
        return None
    return AutoConfig.from_pretrained(model)


def open_model(
    model: Model, tokenizer: Any = None, *, dtype: torch.dtype | Literal["auto"] = "auto"
) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer; what is given already stays as it is.

    `dtype` is that of a model which is opened, "auto" the one that it was saved in.
    The tokenizer of a model that is given as a module is the one given, or None.

    Raises FileNotFoundError for a folder that is not there or holds no model.
    """
    if isinstance(model, nn.Module):
        return model, tokenizer
    _check_holds_a_model(model)
    tokenizer = open_tokenizer(model) if tokenizer is None else tokenizer
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype), tokenizer


def _check_holds_a_model(model: str | Path) -> None:
    _check_there(model)
    folder = Path(model)
    if isdir(folder) and not any((folder / name).exists() for name in _CONFIGS):
        raise FileNotFoundError(
            f"the folder {str(model)!r:.200} holds no config.json, so it is no saved model; give the folder that "
            "model.save_pretrained wrote, or a Hub name"
        )


def _check_there(model: str | Path) -> None:
    """A path that is not there is said at once: the Hub would be asked for it again and again."""
    folder = Path(model)
    if isdir(folder):
        return
    if exists(folder):
        raise FileNotFoundError(
            f"{str(model)!r:.200} is a file, and a model is a folder or a Hub name; give the folder that holds it"
        )
    if isinstance(model, Path) or not _may_be_on_the_hub(model):
        missing = next(above for above in (*reversed(folder.parents), folder) if not exists(above))
        raise FileNotFoundError(
            f"there is no folder {str(model)!r:.200}, {str(missing)!r:.200} is missing; give a folder that is there, "
            "or a Hub name such as 'gpt2' or 'EleutherAI/pythia-70m'"
        )


def _may_be_on_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
