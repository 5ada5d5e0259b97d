"""Conversations from wherever they are: JSON files, `datasets` datasets, and lists."""

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import singledispatch
from pathlib import Path
from typing import Any

from fmxnn.activations.chat.roles import SPOKEN
from fmxnn.activations.text import no_file, refuse_mapping
from fmxnn.activations.textfiles import json_records, sound
from fmxnn.core.excerpt import cut
from fmxnn.core.kinds import is_list, is_object

Messages = list[dict[str, str]]
Source = str | Path | Iterable[Any]
COLUMNS = ("messages", "conversation", "conversations")
"""Where the messages of a record are looked for."""


def read_conversations(source: Source, column: str | None = None) -> Iterator[tuple[str, Messages]]:
    """The messages of each conversation, behind where it stands, such as "conversation 3 (chat.jsonl, line 4)".

    A source is a JSONL file, a JSON file of one list, a dataset, or a list; an entry is a list of messages, or a record
    with them in `column` (by default the first of `COLUMNS`). Of a message its role and content are read.

    Raises FileNotFoundError for a missing file. Raises ValueError for a broken file, for a record without the column,
    and for what is no list of messages.
    """
    for number, (place, entry) in enumerate(_entries(source)):
        where = f"conversation {number}{place}"
        yield where, _messages(_conversation(entry, column, where), where)


@singledispatch
def _entries(source: Iterable[Any]) -> Iterator[tuple[str, object]]:
    """Each entry behind its file and line; a source is an iterable, unless a kind of its own stands below."""
    return (("", entry) for entry in source)


@_entries.register(str)
@_entries.register(Path)
def _(source: str | Path) -> Iterator[tuple[str, object]]:
    if not os.path.isfile(source):
        raise no_file(source, "chat", "conversations as a list of lists of messages")
    return ((f" ({where})", record) for where, record in json_records(Path(source)))


@_entries.register(Mapping)
def _(source: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    raise refuse_mapping(source, "a chat is a path or an iterable of conversations")


def _conversation(entry: object, column: str | None, where: str) -> object:
    """The list of messages that an entry is, or that stands in its column."""
    if not is_object(entry):
        return entry
    name = column or next((each for each in COLUMNS if each in entry), COLUMNS[0])
    if name not in entry:
        columns = cut(", ".join(map(str, entry)))
        if {"role", "content"} <= set(entry):
            raise ValueError(f"{where} is a single message; give a list of conversations, [[message, message]]")
        raise ValueError(f'{where}: a record needs a column "{name}", got the columns {columns}; name it by column=')
    return entry[name]


def _messages(entry: object, where: str) -> Messages:
    if not is_list(entry):
        raise ValueError(
            f'{where} is a list of messages {{"role", "content"}}, got {type(entry).__name__}; name another column by '
            "column="
        )
    if not entry:
        raise ValueError(f"{where} has no messages; take it out")
    return [_message(message, f"message {number} of {where}") for number, message in enumerate(entry)]


def _message(entry: object, where: str) -> dict[str, str]:
    role, content = (entry.get("role"), entry.get("content")) if is_object(entry) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        got = f"the entries {cut(', '.join(map(str, entry)))}" if is_object(entry) else type(entry).__name__
        raise ValueError(f'{where} needs a "role" and a "content" that are strings, got {got}; rewrite the message so')
    if role not in SPOKEN:
        raise ValueError(
            f"{where} has the role {cut(role)!r}, and the roles of messages are {', '.join(SPOKEN)}; rename it"
        )
    return {"role": role, "content": sound(content, where)}
