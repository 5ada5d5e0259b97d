"""Documents from wherever they are, and the contexts of tokens that a language model reads."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Source = str | Path | Iterable[str | Path | Mapping[str, Any]]
SEPARATOR = "<|endoftext|>"
_DOCUMENTS_AT_ONCE = 256


class Tokenizer(Protocol):
    """What is asked of a tokenizer; every transformers one has it."""

    bos_token_id: int | None
    eos_token_id: int | None
    all_special_ids: list[int]

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Mapping[str, list[list[int]]]:
        """The token ids of each text, under `input_ids`."""
        ...


@dataclass(frozen=True)
class Contexts:
    """`contexts context`: token ids, and which of them are trained on and measured.

    `ids` is int32, 4 bytes a token in memory; `keep` is false at position 0 and on BOS, EOS and padding,
    whose norms are unlike the others'.
    """

    ids: Tensor
    keep: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """How many tokens are kept."""
        return int(self.keep.sum())

    @cached_property
    def digest(self) -> str:
        """A sha256 of all token ids, of how they are cut into contexts and of which are kept."""
        found = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        for part in (self.ids.to(torch.int32), self.keep):
            for rows in part.cpu().split(1 << 14):
                found.update(rows.numpy().tobytes())
        return found.hexdigest()

    def split(self, tokens: int) -> "tuple[Contexts, Contexts]":
        """The first contexts that hold at least `tokens` kept tokens, and the rest. Raises ValueError where either would be empty."""
        at = int((self.keep.sum(1).cumsum(0) < tokens).sum()) + 1
        if not tokens > 0 or at >= len(self):
            raise ValueError(
                f"a split at {tokens:,} tokens needs more than that, and the text gives {self.tokens:,}; give more text or split earlier"
            )
        return Contexts(self.ids[:at], self.keep[:at]), Contexts(self.ids[at:], self.keep[at:])


def documents(source: Source) -> Iterator[str]:
    """The documents of a text file, a JSONL file of {"text"}, several files, a `datasets` dataset, or any iterable of strings.

    A file is a Path, or a str that stands alone; a .txt file is split at `<|endoftext|>`. Raises
    FileNotFoundError for a missing file and ValueError, with file and line, for a broken one.
    """
    if isinstance(source, (str, Path)):
        yield from _file(Path(source))
        return
    for entry in source:
        if isinstance(entry, Path):
            yield from _file(entry)
        elif isinstance(entry, str):
            yield entry
        elif isinstance(entry.get("text"), str):
            yield entry["text"]
        else:
            raise ValueError(f'a dataset needs a column "text" of strings, got the columns {", ".join(entry)}')


def contexts(source: Source, tokenizer: Any, *, context: int, tokens: int | None = None) -> Contexts:
    """`contexts context`: documents joined by EOS and cut into windows, each behind one BOS (EOS where the tokenizer has no BOS).

    Stops at the first `tokens` kept tokens; the last short window is dropped. Raises ValueError where the
    text does not fill one context.
    """
    reader = cast(Tokenizer, tokenizer)
    first = _first_token(reader, context)
    end = first if reader.eos_token_id is None else reader.eos_token_id
    special = torch.tensor(reader.all_special_ids, dtype=torch.int32)
    stream, read, kept = documents(source), list[Tensor](), 0
    while (tokens is None or kept < tokens + context) and (some := list(islice(stream, _DOCUMENTS_AT_ONCE))):
        for ids in reader(some, add_special_tokens=False, verbose=False)["input_ids"]:
            read.append(torch.tensor([*ids, end], dtype=torch.int32))
            kept += int((~torch.isin(read[-1], special)).sum())
    count = sum(map(len, read))
    rows = count // (context - 1)
    if not rows:
        raise ValueError(f"the text gives {count} tokens, and one context needs {context - 1}; give more text or a shorter context")
    body = torch.cat(read)[: rows * (context - 1)].view(rows, context - 1)
    ids = torch.cat([torch.full((rows, 1), first, dtype=torch.int32), body], dim=1)
    keep = ~torch.isin(ids, special)
    keep[:, 0] = False
    enough = rows if tokens is None else int((keep.sum(1).cumsum(0) < tokens).sum()) + 1
    return Contexts(ids[:enough], keep[:enough])


def separate_contexts(texts: Sequence[str], tokenizer: Any, *, context: int) -> tuple[Contexts, int]:
    """`-> contexts context`: every text alone behind one BOS (EOS where the tokenizer has no BOS), and how many were cut to the first `context` tokens.

    Rows are as long as the longest, padded at their ends. Raises ValueError, naming it, for a text without a token to keep.
    """
    reader, rows, cut = cast(Tokenizer, tokenizer), list[Tensor](), 0
    first, stream = _first_token(reader, context), iter(texts)
    while some := list(islice(stream, _DOCUMENTS_AT_ONCE)):
        for ids in reader(some, add_special_tokens=False, verbose=False)["input_ids"]:
            rows.append(torch.tensor([first, *ids[: context - 1]], dtype=torch.int32))
            cut += len(ids) > context - 1
    if not rows:
        raise ValueError("separate_contexts needs at least one text, got none")
    ids, lengths = pad_sequence(rows, batch_first=True, padding_value=first), torch.tensor([len(row) for row in rows])
    keep = ~torch.isin(ids, torch.tensor(reader.all_special_ids, dtype=torch.int32)) & (torch.arange(ids.shape[1]) < lengths.unsqueeze(1))
    keep[:, 0] = False
    if not keep.any(1).all():
        number = int(keep.any(1).long().argmin())
        raise ValueError(f"text {number} has no tokens besides BOS, EOS and padding: {texts[number][:40]!r}; take it out, and its label")
    return Contexts(ids, keep), cut


def _first_token(reader: Tokenizer, context: int) -> int:
    first = reader.eos_token_id if reader.bos_token_id is None else reader.bos_token_id
    if first is None:
        raise ValueError("contexts needs a tokenizer with a BOS or an EOS token to put before each context; set tokenizer.eos_token")
    if context < 2:
        raise ValueError(f"a context holds a first token and at least one more, got context={context}")
    return first


def _file(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no text file {str(path)!r}; give the path of a file, or texts as a list of strings")
    if path.suffix != ".jsonl":
        text = path.read_text(encoding="utf-8", errors="replace")
        yield from (part for part in text.split(SEPARATOR) if part.strip())
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            yield _record(path, number, line)


def _record(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: no JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):  # pyright: ignore[reportUnknownMemberType]
        raise ValueError(f'{path}, line {number}: a record needs a "text" that is a string')
    return cast(str, record["text"])
