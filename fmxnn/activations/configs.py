"""What the config of a language model says of it; a module without a config says nothing."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn


def model_name(model: nn.Module) -> str:
    """A Hub name as it is, and of a folder its last part, since a report is for others; else the name of the class."""
    name = _said(model, "name_or_path") or type(model).__name__
    return Path(name).name if Path(name).exists() else str(name)


def longest_context(model: nn.Module) -> int | None:
    """How many tokens the model reads at once; None where it does not say."""
    return _said(model, "max_position_embeddings")


def check_context(model: nn.Module, context: int) -> None:
    """Raises ValueError for a context longer than the model reads."""
    most = longest_context(model)
    if most is not None and context > most:
        raise ValueError(
            f"{type(model).__name__} reads at most {most} tokens at once, got context={context}; take context <= {most}"
        )


def check_vocabulary(model: nn.Module, ids: Tensor) -> None:
    """`contexts context -> `: raises ValueError for token ids that the model does not know."""
    known = _said(model, "vocab_size")
    if known is not None and int(ids.max()) >= known:
        raise ValueError(
            f"{type(model).__name__} knows the token ids 0 to {known - 1}, got {int(ids.max())}; "
            "use the model's own tokenizer"
        )


def _said(model: nn.Module, key: str) -> Any:
    return getattr(getattr(model, "config", None), key, None)
