"""The contexts of conversations, with who wrote each of their tokens."""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from fmxnn.activations.chat.roles import Role
from fmxnn.activations.text import Contexts


@dataclass(frozen=True, repr=False)
class Conversations(Contexts):
    """`contexts context`: one conversation a row, as `fmxnn.activations.conversations` makes them.

    - `keep` is false at position 0, on BOS and on padding; what the template writes is kept
    - `roles`, int8, holds a `Role` for each token
    - `rendered` has the whole string of each conversation, also of one that was cut
    - `answer_position`, int16: how many tokens of its answer stand before a token, control tokens left out; -1 outside
      of answers
    - `is_cut`, one bool a conversation: whether it has more tokens than fit

    ```python
    from fmxnn.activations import conversations

    talk = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Pip."}]
    chat = conversations([talk], "examples/tiny-lm-chat")
    answers = chat.only("assistant")
    first = chat.where((chat.answer_position >= 0) & (chat.answer_position < 2))  # two tokens of each answer
    ```
    """

    roles: Tensor = field()
    rendered: tuple[str, ...]
    answer_position: Tensor
    is_cut: Tensor

    def __getitem__(self, some: slice) -> Self:
        """Some of the conversations."""
        return replace(
            self,
            ids=self.ids[some],
            keep=self.keep[some],
            roles=self.roles[some],
            rendered=self.rendered[some],
            answer_position=self.answer_position[some],
            is_cut=self.is_cut[some],
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self):,} of up to {self.ids.shape[1]:,} tokens, {self.cut:,} of them cut; "
            f"{self.tokens:,} tokens kept)"
        )

    @property
    def cut(self) -> int:
        """How many conversations have more tokens than fit into a context."""
        return int(self.is_cut.sum())

    def only(self, *roles: Role | str) -> Self:
        """The same conversations, and of what is kept only the tokens of these roles.

        Raises ValueError for an unknown role, and where no token is left.
        """
        return self._kept(self._are(roles), f"only({', '.join(map(str, roles))})")

    def without(self, *roles: Role | str) -> Self:
        """The same conversations, and of what is kept only the tokens of other roles.

        Raises ValueError for an unknown role, and where no token is left.
        """
        return self._kept(~self._are(roles), f"without({', '.join(map(str, roles))})")

    def where(self, mask: Tensor) -> Self:
        """`contexts context`: the same conversations, and of what is kept only where the mask is true.

        Raises ValueError for a mask that is no bool or of another shape, and where no token is left.
        """
        if mask.dtype != torch.bool or mask.shape != self.keep.shape:
            raise ValueError(
                f"where needs a bool for each token, (contexts={len(self)}, context={self.ids.shape[1]}), got "
                f"{mask.dtype} of {tuple(mask.shape)}; compare chat.roles or chat.answer_position with a number"
            )
        return self._kept(mask, "where")

    def _are(self, roles: tuple[Role | str, ...]) -> Tensor:
        return torch.isin(self.roles, torch.tensor([Role.of(role) for role in roles], dtype=torch.int8))

    def _kept(self, mask: Tensor, who: str) -> Self:
        kept = self.keep & mask
        if not kept.any():
            there = [Role(role).name.lower() for role in self.roles[self.keep].unique().tolist()]
            raise ValueError(
                f"{who} leaves no token of these {len(self):,} conversations, which keep tokens of "
                f"{', '.join(there) or 'no role'}; choose among these"
            )
        return replace(self, keep=kept)
