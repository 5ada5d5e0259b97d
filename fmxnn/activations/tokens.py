"""The contexts of tokens that a language model reads."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contexts:
    """`contexts context`: token ids, and which of them are used for training and metrics.

    - `ids` is int32, 4 bytes a token in memory
    - `keep` is false at position 0 and on BOS, EOS and padding, because their norms are far larger
    - `roles`, int8, says who wrote each token of a chat; None for plain text

    ```python
    from fmxnn.activations import Contexts

    ids = torch.tensor([[0, 5, 6, 7]], dtype=torch.int32)  # 0 is BOS
    text = Contexts(ids, keep=ids != 0)
    text.tokens  # 3
    ```
    """

    ids: Tensor
    keep: Tensor
    roles: Tensor | None = None

    def __post_init__(self):
        if self.keep.dtype != torch.bool or self.keep.shape != self.ids.shape:
            raise ValueError(
                f"Contexts needs keep as a bool for each token id, {tuple(self.ids.shape)}, got {self.keep.dtype} of "
                f"{tuple(self.keep.shape)}; compare, as in ids != tokenizer.pad_token_id"
            )

    def __getitem__(self, some: slice) -> Self:
        """Some of the contexts."""
        roles = None if self.roles is None else self.roles[some]
        return replace(self, ids=self.ids[some], keep=self.keep[some], roles=roles)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def context(self) -> int:
        """Tokens of a context, the first one counted."""
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """How many tokens are kept."""
        return int(self.keep.sum())

    @property
    def known(self) -> "Contexts":
        """What was there when these contexts were made: all of them, unless a long text is still being read."""
        return self

    def up_to(self, most: int) -> int:
        """How many contexts there are, or `most` if that is less; it waits for no more of the text than that."""
        return min(most, len(self))

    def holds(self, tokens: int) -> bool:
        """Whether at least `tokens` tokens are kept; it waits for no more of the text than that."""
        return self.tokens >= tokens

    @cached_property
    def digest(self) -> str:
        """A sha256 of all token ids, of how they are cut into contexts, of which are kept and of their roles."""
        found = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        for part in (self.ids.to(torch.int32), self.keep, *([] if self.roles is None else [self.roles])):
            for rows in part.cpu().split(1 << 14):
                found.update(rows.numpy().tobytes())
        return found.hexdigest()

    def split(self, tokens: int) -> tuple[Self, Self]:
        """The first contexts that hold at least `tokens` kept tokens, and the rest.

        It waits for no more of the text than that. Raises ValueError where either would be empty.
        """
        at = self._filled_by(tokens) if tokens > 0 and self.holds(tokens) else 0
        if not 0 < at < self.up_to(at + 1):
            raise ValueError(
                f"a split at {tokens:,} tokens needs more than that, and the text gives {self.tokens:,}; give more "
                "text or split earlier"
            )
        return self[:at], self[at:]

    def _filled_by(self, tokens: int) -> int:
        """How many of the first contexts hold `tokens` kept tokens, which are there."""
        return int((self.keep.sum(1).cumsum(0) < tokens).sum()) + 1
