"""Whether tokenizers make the same tokens, and whether they tell the characters of each."""

import json
from typing import Any

from fmxnn.core.excerpt import excerpt


def check_tokenizer(who: str, tokenizer: object) -> None:
    """Raises TypeError for what is no tokenizer, such as the name of one."""
    if not callable(tokenizer):
        raise TypeError(
            f"{who} needs a tokenizer, got {excerpt(tokenizer)}; open one: tokenizer = "
            "fmxnn.activations.models.open_tokenizer(name)"
        )


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same ids of any text: by the rules and the vocabulary of the fast backend.

    Chat templates, and which tokens are called BOS or EOS, may differ.
    """
    return one is other or (_rules(one) is not None and _rules(one) == _rules(other))


def _rules(tokenizer: Any) -> tuple[Any, ...] | None:
    vocabulary = getattr(tokenizer, "get_vocab", None)
    if vocabulary is None:
        return None
    if not getattr(tokenizer, "is_fast", False):
        return type(tokenizer), vocabulary()
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    return tuple(said.get(part) for part in ("normalizer", "pre_tokenizer", "model", "added_tokens"))


def check_offsets(tokenizer: Any, name: str) -> None:
    """Raises ValueError for a tokenizer that cannot say which characters its tokens stand for."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"the models have different tokenizers, so tokens are paired by their characters, and "
            f"{type(tokenizer).__name__} of {name} does not tell them; give its fast tokenizer, or one tokenizer for "
            "all models"
        )
