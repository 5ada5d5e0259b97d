"""What the config of a language model says of it; a module without a config says nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fmxnn.activations.places import Layer, check_layers, check_numbers, check_once, check_places


def model_name(model: nn.Module) -> str:
    """A Hub name, at its revision, and of a folder its last part, since a report is for others; else the class."""
    revision = getattr(model, "opened_at", None)  # what `open_model` was asked for
    return (_name(getattr(model, "config", None)) or type(model).__name__) + (f"@{revision}" if revision else "")


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
    if known is None:
        return
    wrong = [token for token in (int(ids.max()), int(ids.min())) if token not in range(known)]
    if wrong:
        raise ValueError(
            f"{type(model).__name__} knows the token ids 0 to {known - 1}, got {wrong[0]}; "
            "use the model's own tokenizer"
        )


def check_layers_of(config: Any, layers: Sequence[Layer], *places: str | None) -> tuple[Layer, ...]:
    """The entries of `layers`, looked at before the weights of a model are loaded; a config may be None.

    - `places`: where they are read, `at` and `to`; None is passed over

    Raises ValueError for a number or place that the model lacks, and TypeError where `layers` is no list of numbers and
    names.
    """
    read, given = check_layers(layers), [place for place in places if place is not None]
    check_places(given, read)
    check_once(read)
    count = _of_text(config, "num_hidden_layers")
    if isinstance(count, int) and not any("{}" in place for place in given):
        check_numbers(_name(config) or type(config).__name__, count, read)
    return read


def check_unfolded(model: nn.Module) -> None:
    """Raises ValueError for a model whose weights TransformerLens folded, on loading or in compatibility mode.

    Its activations are no longer the model's own: a dictionary of those would be wrong there, and the reverse.
    """
    config = getattr(model, "cfg", None)
    loaded = getattr(config, "init_weights", True) is False  # a model made by hand may have such norms of its own
    folded = loaded and getattr(config, "normalization_type", None) in ("LNPre", "RMSPre")
    if folded or getattr(model, "_weights_processed", False) is True:
        raise ValueError(
            f"{type(model).__name__} holds weights that TransformerLens folded, so its activations are not the model's "
            "own; use enable_compatibility_mode(no_processing=True), or HookedTransformer.from_pretrained_no_processing"
        )


def _name(config: Any) -> str | None:
    name = getattr(config, "name_or_path", None)
    return (Path(name).name if Path(name).exists() else str(name)) if name else None


def _said(model: nn.Module, key: str) -> Any:
    return _of_text(getattr(model, "config", None), key)


def _of_text(config: Any, key: str) -> Any:
    """A multimodal model says in a config of its own what its language model is."""
    return (
        getattr(config, key, None) if hasattr(config, key) else getattr(getattr(config, "text_config", None), key, None)
    )
