"""Documents from wherever they are, and the contexts of tokens that a language model reads."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, singledispatch
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fmxnn.activations.pieces import Part, Tokenizer, parts, tokenised
from fmxnn.activations.textfiles import json_records, separated, sound
from fmxnn.core.excerpt import cut
from fmxnn.core.kinds import is_object

Source = str | Path | Iterable[str | Path | Mapping[str, Any]]
SEPARATOR = "<|endoftext|>"
_FILES = (".txt", ".jsonl", ".json")
_LONGEST_NAME = 255  # characters of a string that may have been meant as the name of a file


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

    def __getitem__(self, some: slice) -> Self:
        """Some of the contexts."""
        roles = None if self.roles is None else self.roles[some]
        return replace(self, ids=self.ids[some], keep=self.keep[some], roles=roles)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """How many tokens are kept."""
        return int(self.keep.sum())

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

        Raises ValueError where either would be empty.
        """
        at = int((self.keep.sum(1).cumsum(0) < tokens).sum()) + 1
        if not tokens > 0 or at >= len(self):
            raise ValueError(
                f"a split at {tokens:,} tokens needs more than that, and the text gives {self.tokens:,}; give more "
                "text or split earlier"
            )
        return self[:at], self[at:]


def documents(source: Source, column: str = "text") -> Iterator[str]:
    """The documents of text and JSON files, of a `datasets` dataset, or of any iterable of strings.

    A file is a Path, or a str that stands alone. A .jsonl file has a record {"text"} a line; its blank lines are left
    out. A .json file has such lines, or one list of records and strings. Any other file is split at `<|endoftext|>`.
    `column` is where the text of a record is.

    Raises FileNotFoundError for a missing file. Raises ValueError for a broken file, with file and line, for what is
    not a document, with its number, and for a first document that is the name of a file.
    """
    document = list[str]()
    for part, last in _parts(source, column):
        document.append(part)
        if last:
            yield "".join(document)
            document.clear()


def contexts(source: Source, tokenizer: Any, *, context: int, tokens: int | None = None) -> Contexts:
    """`contexts context`: documents joined by EOS and cut into windows, each behind one BOS (or EOS).

    Reads no further than the first `tokens` kept tokens, and in pieces, so that a document or file may be of any
    length. The last short window is dropped. Raises ValueError where the text does not fill one context.
    """
    reader = cast(Tokenizer, tokenizer)
    first = first_token(reader, context)
    if tokens is not None and tokens < 1:
        raise ValueError(f"contexts reads at least one token, got tokens={tokens}; leave it out to read all")
    end = first if reader.eos_token_id is None else reader.eos_token_id
    special = torch.tensor(reader.all_special_ids, dtype=torch.int32)
    read, kept = list[Tensor](), 0
    for some in tokenised(_parts(source), reader):
        read.append(
            torch.tensor([token for ids, last in some for token in (*ids, *([end] if last else ()))], dtype=torch.int32)
        )
        kept += int((~torch.isin(read[-1], special)).sum())
        if tokens is not None and kept >= tokens + context:
            break
    count = sum(map(len, read))
    rows = count // (context - 1)
    if not rows:
        raise ValueError(
            f"the text gives {count} tokens, and one context needs {context - 1}; give more text or a shorter context"
        )
    body = torch.cat(read)[: rows * (context - 1)].view(rows, context - 1)
    ids = torch.cat([torch.full((rows, 1), first, dtype=torch.int32), body], dim=1)
    keep = ~torch.isin(ids, special)
    keep[:, 0] = False
    enough = rows if tokens is None else int((keep.sum(1).cumsum(0) < tokens).sum()) + 1
    return Contexts(ids[:enough], keep[:enough])


def separate_contexts(texts: Sequence[str], tokenizer: Any, *, context: int) -> tuple[Contexts, int]:
    """`-> contexts context`: every text alone behind one BOS (EOS where there is no BOS), and how many were cut.

    A text is cut to the first `context` tokens. Rows are as long as the longest and padded at their ends. Raises
    ValueError, naming it, for a text without a token to keep.
    """
    reader, rows, cut = cast(Tokenizer, tokenizer), list[Tensor](), 0
    first, row = first_token(reader, context), list[int]()
    for some in tokenised(_parts(texts), reader):
        for ids, last in some:
            row = [*row, *ids[:context]][:context]
            if last:
                rows.append(torch.tensor([first, *row[: context - 1]], dtype=torch.int32))
                cut += len(row) > context - 1
                row = []
    if not rows:
        raise ValueError("separate_contexts needs at least one text, got none")
    ids, lengths = pad_sequence(rows, batch_first=True, padding_value=first), torch.tensor([len(row) for row in rows])
    keep = ~torch.isin(ids, torch.tensor(reader.all_special_ids, dtype=torch.int32)) & (
        torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    )
    keep[:, 0] = False
    if not keep.any(1).all():
        number = int(keep.any(1).long().argmin())
        raise ValueError(
            f"text {number} has no tokens besides BOS, EOS and padding: {texts[number][:40]!r}; take it out, and its "
            "label"
        )
    return Contexts(ids, keep), cut


def first_token(reader: Tokenizer, context: int) -> int:
    """The id that stands before each context: BOS, or EOS where there is no BOS.

    Raises ValueError for a tokenizer with neither, and for a context that holds no more than that.
    """
    first = reader.eos_token_id if reader.bos_token_id is None else reader.bos_token_id
    if first is None:
        raise ValueError(
            "contexts needs a tokenizer with a BOS or an EOS token to put before each context; set tokenizer.eos_token"
        )
    if context < 2:
        raise ValueError(f"a context holds a first token and at least one more, got context={context}")
    return first


@singledispatch
def _parts(source: Iterable[Any], column: str = "text") -> Iterator[Part]:
    """The parts of every document; a source is an iterable of documents, unless a kind of its own stands below."""
    for number, entry in enumerate(source):
        yield from _entry(entry, number, column)


@_parts.register(str)
@_parts.register(Path)
def _(source: str | Path, column: str = "text") -> Iterator[Part]:
    return _file(source, column)


@_parts.register(Mapping)
def _(source: Mapping[str, Any], column: str = "text") -> Iterator[Part]:
    raise refuse_mapping(source, "text is a path or an iterable of documents")


@singledispatch
def _entry(entry: object, number: int, column: str) -> Iterator[Part]:
    """The parts of the document that stands at this place."""
    raise ValueError(
        f'document {number} is a string, a path, or a record with a "{column}", got {type(entry).__name__}; give one '
        "of these"
    )


@_entry.register
def _(entry: str, number: int, column: str) -> Iterator[Part]:
    if number == 0 and _is_file_name(entry):
        raise ValueError(
            f"document 0 is the string {entry!r}, which names a file and would be read as the text; give "
            f"Path({entry!r}) to read the file"
        )
    return _sound_parts(entry, f"document {number}")


@_entry.register
def _(entry: Path, number: int, column: str) -> Iterator[Part]:
    return _file(entry, column)


@_entry.register(Mapping)
def _(entry: Mapping[str, object], number: int, column: str) -> Iterator[Part]:
    return _sound_parts(_text_in(entry, column, f"document {number}"), f"document {number}")


def no_file(path: str | Path, what: str, else_give: str) -> FileNotFoundError:
    """The error for a file that is not there; it says that a string alone is a path."""
    why = ", which is a folder" if os.path.isdir(path) else ""
    why += ", and a string that stands alone is a path" if isinstance(path, str) else ""
    return FileNotFoundError(
        f"there is no {what} file {repr(str(path)[:200])[:200]}{why}; give the path of a file, or {else_give}"
    )


def refuse_mapping(source: Mapping[str, Any], expected: str) -> ValueError:
    """The error for several named sources, such as the splits of a DatasetDict."""
    kind, names = type(source).__name__, cut(", ".join(map(str, source)), 100)
    entries = "splits" if kind.endswith("DatasetDict") else "entries"
    one = cut(str(next(iter(source), "...")), 40)
    return ValueError(f"{expected}, got a {kind} with the {entries} {names}; give one of them, such as [{one!r}]")


def _is_file_name(text: str) -> bool:
    """Whether a document is rather the name of a file: it is short, and a file, or one word that ends as files do."""
    if not 0 < len(text) <= _LONGEST_NAME or "\n" in text:
        return False
    return os.path.isfile(text) or (text.endswith(_FILES) and len(text.split()) == 1)


def _file(path: str | Path, column: str) -> Iterator[Part]:
    if not os.path.isfile(path):  # false for what can be no path, where Path.is_file raises
        raise no_file(path, "text", "texts as a list of strings")
    path = Path(path)
    if path.suffix not in (".jsonl", ".json"):
        yield from separated(path, SEPARATOR)
        return
    for where, record in json_records(path):
        yield from _sound_parts(record if isinstance(record, str) else _text_in(record, column, where), where)


def _text_in(record: object, column: str, where: str) -> str:
    text = text_of(record, column)
    if text is None:
        got = f"the columns {cut(', '.join(map(str, record)), 100)}" if is_object(record) else type(record).__name__
        raise ValueError(
            f'{where}: a record needs a column "{column}" that is a string, got {got}; name the one with the text by '
            "column="
        )
    return text


def text_of(record: object, column: str = "text") -> str | None:
    """The text of a record, None where it has none."""
    text = record.get(column) if is_object(record) else None
    return text if isinstance(text, str) else None


def _sound_parts(text: str, where: str) -> Iterator[Part]:
    return ((sound(part, where), last) for part, last in parts(text))
