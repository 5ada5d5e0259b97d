"""Who wrote each token of a chat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

import torch
from torch import Tensor


class Role(IntEnum):
    """Who wrote a token, as `chat.roles` holds it in int8.

    - `PADDING`: fills a short conversation up
    - `BOS`: the first token that the tokenizer asks for
    - `TEMPLATE`: what the chat template writes, its control tokens among it
    - `SYSTEM`, `USER`, `ASSISTANT`, `TOOL`: the contents of messages

    ```python
    from fmxnn.activations.chat import Role

    Role.of("assistant") is Role.ASSISTANT  # True
    ```
    """

    PADDING = 0
    BOS = 1
    TEMPLATE = 2
    SYSTEM = 3
    USER = 4
    ASSISTANT = 5
    TOOL = 6

    @classmethod
    def of(cls, name: "Role | str") -> "Role":
        """The role of a name in small letters. Raises ValueError, with all names, for another."""
        known = {role.name.lower(): role for role in cls}
        found = known.get(name) if isinstance(name, str) else name
        if not isinstance(found, cls):
            raise ValueError(f"a role is one of {', '.join(known)}, got {str(name)[:200]!r}; name one of them")
        return found


SPOKEN: Mapping[str, Role] = MappingProxyType(
    {role.name.lower(): role for role in (Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL)}
)
"""The roles that a message can have."""


@dataclass(frozen=True)
class Span:
    """Characters of a rendered conversation, from `start` to before `stop`, that one message wrote.

    ```python
    from fmxnn.activations.chat.roles import Role, Span

    Span(6, 11, Role.USER)  # "hello" in "User: hello"
    ```
    """

    start: int
    stop: int
    role: Role


def token_roles(spans: Sequence[Span], characters: Tensor, controls: Mapping[int, Role]) -> tuple[Tensor, Tensor]:
    """`tokens 2 -> tokens, tokens`: the role of each token, and its position in its answer, -1 elsewhere.

    `characters` has, for each token, its first character and the one after its last. A token has the role of the first
    character in it that a message wrote, and TEMPLATE where there is none. A token without a character has the role of
    the one before it. `controls` are the tokens, by number, that are control tokens, and their roles. They have no
    position in an answer.
    """
    length = max([int(characters.max()) if len(characters) else 0, *(span.stop for span in spans)])
    owner = torch.full((length + 1,), -1)
    for number, span in enumerate(spans):
        owner[span.start : span.stop] = number
    written = torch.where(owner >= 0, torch.arange(length + 1), length)
    following = written.flip(0).cummin(0).values.flip(0)  # the first written character from here on
    start, stop = characters.unbind(1)
    empty = start == stop
    start = torch.where(empty, (start - 1).clamp(min=0), start)
    first = following[start]
    owned = torch.where(first < torch.where(empty, start + 1, stop), owner[first], -1)
    kinds = torch.tensor([*(span.role for span in spans), Role.TEMPLATE], dtype=torch.int8)
    roles = kinds[owned]
    for token, role in controls.items():
        roles[token] = role
    return roles, _answer_positions(owned, roles == Role.ASSISTANT)


def _answer_positions(owned: Tensor, answers: Tensor) -> Tensor:
    """`tokens, tokens -> tokens`: counts the tokens of each answer from zero."""
    positions = torch.full(owned.shape, -1, dtype=torch.int16)
    (at,) = answers.nonzero(as_tuple=True)
    _, counts = owned[at].unique_consecutive(return_counts=True)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    positions[at] = (torch.arange(len(at)) - first).clamp(max=torch.iinfo(torch.int16).max).to(torch.int16)
    return positions
