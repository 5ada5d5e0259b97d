"""A language model by its name; needs transformers (`pip install 'fmxnn[harvest]'`)."""

from collections.abc import Generator
from contextlib import contextmanager
from os.path import exists, isdir  # unlike Path's, they take a name that is too long for a path
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fmxnn.core.excerpt import cut, excerpt

Model = str | Path | nn.Module
"""A causal language model: a folder, a Hub name (at a revision behind "@"), or the module itself."""
_CONFIGS = ("config.json", "adapter_config.json")  # an adapter's folder names the model that it changes


def open_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a folder or Hub name.

    Raises FileNotFoundError for a folder that is not there.
    """
    name, revision = at_revision(model)
    _check_there(name)
    with _looked_up(name):
        return AutoTokenizer.from_pretrained(name, **revision)


def as_tokenizer(given: Any) -> Any:
    """A tokenizer as it is, and that of a folder or Hub name opened; None stays None."""
    return open_tokenizer(given) if isinstance(given, str | Path) else given


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


def open_config(model: Model) -> Any:
    """The config of a folder or Hub name, read without the weights; None for a module, and for an adapter's folder.

    Raises FileNotFoundError for a folder that is not there or holds no model.
    """
    if isinstance(model, nn.Module):
        return None
    name, revision = at_revision(model)
    _check_holds_a_model(name)
    if isdir(name) and not (Path(name) / "config.json").exists():
        return None
    with _looked_up(name):
        return AutoConfig.from_pretrained(name, **revision)


def open_model(
    model: Model, tokenizer: Any = None, *, dtype: torch.dtype | Literal["auto"] = "auto"
) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer; what is given already stays as it is.

    `dtype` is that of a model which is opened, "auto" the one that it was saved in.
    The tokenizer may be given by a folder or Hub name. That of a model that is given as a module is the one given, or
    None.

    Raises FileNotFoundError for a folder that is not there or holds no model.
    """
    tokenizer = as_tokenizer(tokenizer)
    if isinstance(model, nn.Module):
        return model, tokenizer
    name, revision = at_revision(model)
    _check_holds_a_model(name)
    tokenizer = open_tokenizer(model) if tokenizer is None else tokenizer
    with _looked_up(name):
        opened = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **revision)
    if revision:
        cast("Any", opened).opened_at = revision["revision"]  # `model_name` says it
    return opened, tokenizer


@contextmanager
def _looked_up(name: str | Path) -> Generator[None]:
    """Says in one sentence that the Hub does not give a model; what a folder lacks is said by transformers."""
    try:
        yield
    except OSError as error:
        if isdir(name):
            raise
        raise FileNotFoundError(
            f"there is no folder {excerpt(str(name))} here, and the Hub does not give a model of that name "
            f"({cut(str(error).split(chr(10))[0])}); mend the name, or give the folder of a saved model"
        ) from error


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
