"""Conversations as a language model reads them; needs transformers (`pip install 'fmxnn[harvest]'`)."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fmxnn.activations.chat.contexts import Conversations
from fmxnn.activations.chat.rendering import ChatTemplate, Rendered
from fmxnn.activations.chat.roles import Role, token_roles
from fmxnn.activations.chat.sources import Source, read_conversations
from fmxnn.activations.models import as_tokenizer
from fmxnn.core.progress import Progress, silently
from fmxnn.core.sizes import whole

_AT_ONCE = 256  # conversations that are tokenised at once


def conversations(
    source: Source,
    tokenizer: Any,
    *,
    column: str | None = None,
    context: int = 128,
    template: str | None = None,
    progress: Progress = silently,
) -> Conversations:
    """`-> contexts context`: each conversation rendered once by a chat template, with the role of every token.

    - `source`: a JSONL file, a JSON file of one list, a `datasets` dataset, or a list; an entry is a list of messages
      {"role", "content"} or a record that holds one
    - `tokenizer`: a fast one of transformers, or the folder or Hub name of one
    - `column`: where the messages of a record are; by default "messages", "conversation" or "conversations"
    - `context`: a longer conversation is cut to so many tokens, and counted in `chat.cut`
    - `template`: a Jinja string in place of the tokenizer's own template
    - `progress`: `tqdm` shows how far it is

    Role, content and nothing else is read of a message: "system", "user", "assistant" or "tool".

    Raises ValueError, with the number of the conversation, for what is no conversation, a template that fails or
    leaves out a content, and no conversation at all. Raises ValueError for a tokenizer without a template or offsets.
    """
    if (whole(context) or 0) < 2:
        raise ValueError(f"a context holds a first token and at least one more, got context={context}")
    tokenizer = as_tokenizer(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "conversations needs a tokenizer that says which characters each token stands for, and "
            f"{type(tokenizer).__name__} does not; give a fast one of transformers"
        )
    shape, reader = ChatTemplate(tokenizer, template), _Reader(tokenizer, context)
    total = None if isinstance(source, str | Path) else length_hint(source) or None
    read = progress(read_conversations(source, column), desc="conversations", total=total)
    rendered = (shape.render(messages, where) for where, messages in read)
    texts, rows = list[str](), list[_Row]()
    while some := list(islice(rendered, _AT_ONCE)):
        texts += [each.text for each in some]
        rows += reader.read(some)
    if not rows:
        raise ValueError("conversations needs at least one conversation, got none; give one with a message")
    return _joined(texts, rows, reader.padding)


def _joined(texts: list[str], rows: "list[_Row]", padding: int) -> Conversations:
    padded = partial(pad_sequence, batch_first=True)
    roles = padded([row.roles for row in rows], padding_value=int(Role.PADDING))
    keep = ~torch.isin(roles, torch.tensor([Role.PADDING, Role.BOS], dtype=torch.int8))
    keep[:, 0] = False
    return Conversations(
        padded([row.ids for row in rows], padding_value=padding),
        keep,
        roles,
        tuple(texts),
        padded([row.places for row in rows], padding_value=-1),
        torch.tensor([row.is_cut for row in rows]),
    )


class _Row(NamedTuple):
    ids: Tensor
    roles: Tensor
    places: Tensor
    is_cut: bool


class _Reader:
    """Makes tokens of rendered conversations."""

    def __init__(self, tokenizer: Any, context: int):
        self.tokenizer, self.context = tokenizer, context
        marked = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
        special = sorted({*tokenizer.all_special_ids, *marked})
        self.names = dict(zip(special, cast(list[str], tokenizer.convert_ids_to_tokens(special)), strict=True))
        self.special = torch.tensor(special, dtype=torch.int32)
        ends = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
        self.padding = next((token for token in ends if token is not None), 0)

    def read(self, rendered: list[Rendered]) -> Iterator[_Row]:
        read = self.tokenizer(
            [each.text for each in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for each, ids, ends in zip(rendered, read["input_ids"], read["offset_mapping"], strict=True):
            row = torch.tensor(ids[: self.context], dtype=torch.int32)
            characters = torch.tensor(ends[: self.context], dtype=torch.int64).view(-1, 2)
            roles, places = token_roles(each.spans, characters, self._controls(each.text, row, characters))
            yield _Row(row, roles, places, len(ids) > self.context)

    def _controls(self, text: str, ids: Tensor, characters: Tensor) -> dict[int, Role]:
        """The tokens, by number, that are control tokens by id and by the characters that they stand for."""
        found = dict[int, Role]()
        for number in torch.isin(ids, self.special).nonzero().flatten().tolist():
            token, (start, stop) = int(ids[number]), characters[number].tolist()
            if text[start:stop].strip() == self.names[token]:  # an unknown character may have the id of one
                found[number] = self._control(token, number)
        return found

    def _control(self, token: int, number: int) -> Role:
        """BOS where it is no EOS, or stands first."""
        is_bos = token == self.tokenizer.bos_token_id and (number == 0 or token != self.tokenizer.eos_token_id)
        return Role.BOS if is_bos else Role.TEMPLATE
