"""Documents from wherever they are, and the contexts of tokens that a language model reads."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import singledispatch
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fmxnn.activations.growing import GrowingContexts, Parts
from fmxnn.activations.pieces import Part, Piece, Separable, Tokenizer, parts, tokenised
from fmxnn.activations.textfiles import json_records, separated, sound
from fmxnn.activations.tokens import Contexts
from fmxnn.activations.vocabularies import check_tokenizer
from fmxnn.core.excerpt import cut
from fmxnn.core.kinds import is_object

Source = str | Path | Iterable[str | Path | Mapping[str, Any]]
SEPARATOR = "<|endoftext|>"
_FILES = (".txt", ".jsonl", ".json")
_LONGEST_NAME = 255  # characters of a string that may have been meant as the name of a file


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


def contexts(
    source: Source, tokenizer: Any, *, context: int, tokens: int | None = None, column: str = "text"
) -> Contexts:
    """`contexts context`: documents joined by EOS and cut into windows, each behind one BOS (or EOS).

    Reads no further than the first `tokens` kept tokens, and in pieces, so that a document or file may be of any
    length. The last short window is dropped. Of a long text only the start is read here: what follows is read while
    the contexts are used, beside them where the tokenizer is a fast one. `column` is where the text of a record is.

    Raises ValueError where the text does not fill one context. What is wrong in a later part is raised by what reads
    that part.
    """
    first = first_token(cast(Tokenizer, tokenizer), context)
    if tokens is not None and tokens < 1:
        raise ValueError(f"contexts reads at least one token, got tokens={tokens}; leave it out to read all")
    reader = Separable(tokenizer)
    read = tokenised(_parts(source, column), reader)
    made = _windows(read, cast(Tokenizer, tokenizer), _Sizes(first, context, tokens))
    begun = tuple(islice(made, 2))  # the second shows whether there is more
    if len(begun) == 1:
        return begun[0]
    is_fast = getattr(tokenizer, "is_fast", False) is True
    if is_fast:
        reader.separate()
    return GrowingContexts(Parts(made, begun=begun, behind=is_fast))


class _Sizes(NamedTuple):
    """The first token of each context, the tokens of a context, and how many kept tokens are read."""

    first: int
    context: int
    tokens: int | None


def _windows(read: Iterable[Sequence[Piece]], tokenizer: Tokenizer, sizes: _Sizes) -> Iterator[Contexts]:
    """The contexts of the pieces that are tokenised at once, as soon as they are full."""
    end = sizes.first if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    special, width = torch.tensor(tokenizer.all_special_ids, dtype=torch.int32), sizes.context - 1
    rest, kept, made = torch.empty(0, dtype=torch.int32), 0, 0
    for some in read:
        joined = [token for ids, last in some for token in (*ids, *([end] if last else ()))]
        rest = torch.cat([rest, torch.tensor(joined, dtype=torch.int32)])
        rows = len(rest) // width
        ids = torch.nn.functional.pad(rest[: rows * width].view(rows, width), (1, 0), value=sizes.first)
        rest, keep = rest[rows * width :], ~torch.isin(ids, special)
        keep[:, 0] = False
        enough = rows + 1
        if sizes.tokens is not None:
            enough = int((kept + keep.sum(1).cumsum(0) < sizes.tokens).sum()) + 1
        if rows:
            yield Contexts(ids[:enough], keep[:enough])
        if enough <= rows:
            return
        kept, made = kept + int(keep.sum()), made + rows
    if not made:
        raise ValueError(
            f"the text gives {len(rest)} tokens, and one context needs {width}; give more text or a shorter context"
        )


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

    Raises TypeError for what is no tokenizer. Raises ValueError for a tokenizer with neither, and for a context that
    holds no more than that.
    """
    check_tokenizer("contexts", reader)
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
    return ValueError(f"{expected}, got {kind} with the {entries} {names}; give one of them, such as data[{one!r}]")


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
