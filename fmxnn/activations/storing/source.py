"""Activations that were stored, as a source: rows of shards, each checked once."""

from collections.abc import Mapping
from copy import copy
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fmxnn.activations.places import Layer
from fmxnn.activations.source import Sides
from fmxnn.activations.storing.layout import (
    ABOUT,
    FLOATS,
    NAMES,
    SKIP,
    TEXT,
    layout_of,
    offsets,
    read_about,
    shard_name,
    unpack,
)
from fmxnn.activations.text import Contexts
from fmxnn.core.errors import FormatError, IntegrityError
from fmxnn.core.excerpt import cut, excerpt
from fmxnn.core.files.manifest import MANIFEST, Listed, list_files, permitted, sha256
from fmxnn.core.progress import Progress, silently

Verify = Literal["first", "all", "never"]
Damaged = Literal["raise", "skip"]


class StoreSource:
    """`tokens layers d_model`, one or two sides: what `store` wrote, read from its shards.

    - `folder`: what `store` wrote
    - `dtype`: of the activations; that of the stream that was stored unless given
    - `verify`: when the sha256 of a shard is compared: "first" (once, before it is first read), "all" (now) or "never"
    - `damaged`: "skip" compares all shards now, and leaves the tokens of damaged ones out
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        verify: Verify = "first",
        damaged: Damaged = "raise",
    ):
        for name, value, known in (("verify", verify, Verify), ("damaged", damaged, Damaged)):
            if value not in known.__args__:
                raise ValueError(
                    f"a store takes {name}={' or '.join(map(repr, known.__args__))}, got {name}={excerpt(value)}"
                )
        self.folder, self.verify = Path(folder), verify
        self.span: tuple[int, int] | None = None
        """The contexts that a part has, the first and the one after the last; None of a whole store."""
        self.files, self._checked = _listed(self.folder), set[str]()
        self._check(ABOUT)
        self.about = read_about(self.folder)
        self.layout = layout_of(self.about)
        self.dtype = FLOATS[self.about["given"]] if dtype is None else dtype
        self._places = dict[int, dict[str, int]]()
        missing = [name for name in (TEXT, *map(shard_name, range(self.layout.shards))) if name not in self.files]
        if missing:
            raise IntegrityError(f"{self.folder / MANIFEST} lists no {missing[0]}; {SKIP}")
        self.damaged = tuple(self._damaged()) if damaged == "skip" else ()
        if verify == "all" and damaged == "raise":
            self.check_files()

    @property
    def name(self) -> str:
        """The language model, as a report names it."""
        return self.about["model"]

    @property
    def contexts(self) -> Contexts:
        """The tokens that were read, which are kept, and their roles; tokens of damaged shards are not kept."""
        return self._contexts

    @cached_property
    def _contexts(self) -> Contexts:
        text, keep = self._text, self._text.keep
        if self.damaged:
            keep, places = keep.clone(), keep.flatten().nonzero().squeeze(1)
            for shard in self.damaged:
                keep.view(-1)[places[slice(*self.layout.span(shard))]] = False
        return Contexts(text.ids, keep, text.roles)

    @cached_property
    def _text(self) -> Contexts:
        if self.verify != "never":
            self._check(TEXT)
        try:
            found = load_file(self.files[TEXT].path)
        except SafetensorError as error:
            raise IntegrityError(f"{self.files[TEXT].path} cannot be read: {cut(str(error))}; {SKIP}") from error
        return Contexts(found["ids"], found["keep"], found.get("roles"))

    @cached_property
    def before(self) -> Tensor:
        """`contexts+1`: how many stored rows lie before each context."""
        found = torch.cat([torch.zeros(1, dtype=torch.long), self._text.keep.sum(1).cumsum(0)])
        if int(found[-1]) != self.layout.rows:
            raise IntegrityError(
                f"{self.files[TEXT].path} keeps {int(found[-1]):,} tokens, and {ABOUT} tells of {self.layout.rows:,}; "
                "store them again in another folder"
            )
        return found

    def part(self, contexts: Contexts, start: int) -> "StoreSource":
        """Some of its contexts, from number `start` on, as a source of its own; files are checked once for both."""
        some, first = copy(self), start + (0 if self.span is None else self.span[0])
        some.span, some._contexts, some.rows = (first, first + len(contexts)), contexts, contexts.tokens
        some.before = self.before[start : start + len(contexts) + 1]
        return some

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of x, in the order of the axis."""
        return tuple(self.about["layers"])

    @property
    def d_model(self) -> int:
        """The width of x."""
        return self.layout.sides[0][1]

    @property
    def device(self) -> torch.device:
        """Batches are made in the memory of the processor."""
        return torch.device("cpu")

    @cached_property
    def rows(self) -> int:
        """How many tokens can be read."""
        return self.layout.rows - self.left_out

    def file_of(self, shard: int) -> str:
        """The name of a shard's file."""
        return self.files[shard_name(shard)].path.name

    @property
    def left_out(self) -> int:
        """How many tokens lie in damaged shards."""
        spans = map(self.layout.span, self.damaged)
        return sum(stop - start for start, stop in spans)

    def identity(self) -> dict[str, Any]:
        """That of the source that was stored; what was rounded or left out is said, and which contexts a part has."""
        given, stored = FLOATS[self.about["given"]], self.about["dtype"]
        rounded = stored == "int8" or torch.promote_types(given, FLOATS[stored]) != FLOATS[stored]
        whole = {
            **self.about["source"],
            **({"text": self.contexts.digest} if self.damaged else {}),
            **({"stored": stored} if rounded else {}),
        }
        return whole if self.span is None else {**whole, "contexts": list(self.span)}

    def read(self, start: int, stop: int) -> Sides:
        """`tokens layers d_model`, each: the kept tokens of the contexts from `start` to before `stop`, in order."""
        first, last = int(self.before[start]), int(self.before[stop])
        raw = self.room(sum(stop - start for _, start, stop in self._segments(first, last)))
        self.read_into(first, last, raw)
        return tuple(unpack(raw[name], raw.get(f"{name}_scale"), self.dtype) for name in NAMES if name in raw)

    def room(self, rows: int) -> dict[str, Tensor]:
        """`tokens layers d_model`: memory for so many rows as they are stored."""
        kinds = self.layout.shapes(0).items()
        return {name: torch.empty(rows, *shape[1:], dtype=dtype) for name, (dtype, shape) in kinds}

    def read_into(self, first: int, last: int, room: Mapping[str, Tensor]) -> None:
        """Fills the rows of `room` with the stored rows from `first` to before `last`, without damaged shards."""
        done = 0
        for shard, start, stop in self._segments(first, last):
            name = shard_name(shard)
            if self.verify == "first":
                self._check(name)
            path, before = self.files[name].path, start - self.layout.span(shard)[0]
            with permitted(), path.open("rb", buffering=0) as file:
                for key, offset in self._places_in(shard).items():
                    rows = room[key][done : done + stop - start]
                    size = rows[0].numel() * rows.element_size()
                    _fill(path, file, rows, offset + before * size)
            done += stop - start

    def check_files(self, progress: Progress = silently) -> None:
        """Compares the sha256 of every file, and raises IntegrityError, naming the first that is not as written."""
        names = list(self.files)
        for name in progress(names, desc="verify", total=len(names)):
            self._check(name)

    def _segments(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """The shards that hold some rows, and which of them; damaged shards are passed over."""
        found, size = list[tuple[int, int, int]](), self.layout.rows_a_shard
        for shard in range(first // size, -(-last // size)):
            start, stop = self.layout.span(shard)
            if shard not in self.damaged and max(first, start) < min(last, stop):
                found.append((shard, max(first, start), min(last, stop)))
        return found

    def _places_in(self, shard: int) -> dict[str, int]:
        if shard not in self._places:
            self._places[shard] = offsets(self.files[shard_name(shard)].path, self.layout.shapes(shard))
        return self._places[shard]

    def _damaged(self) -> list[int]:
        found = list[int]()
        for shard in range(self.layout.shards):
            try:
                self._check(shard_name(shard))
                self._places_in(shard)
            except IntegrityError:
                found.append(shard)
        return found

    def _check(self, name: str) -> None:
        if name in self._checked:
            return
        path, expected = self.files[name]
        if not path.is_file():
            raise IntegrityError(f"{path} is missing, and {MANIFEST} lists it; {SKIP}")
        with permitted():
            if sha256(path) != expected:
                raise IntegrityError(f"{path} is damaged: its sha256 is not that of {MANIFEST}; {SKIP}")
        self._checked.add(name)


def _listed(folder: Path) -> dict[str, Listed]:
    """The files of a finished store."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {excerpt(str(folder))}; write one with store(stream, folder)")
    about = read_about(folder)
    if not (folder / MANIFEST).is_file():
        layout = layout_of(about)
        there = sum((folder / shard_name(shard)).is_file() for shard in range(layout.shards))
        raise IntegrityError(
            f"{folder} is not finished: it holds {there} of {layout.shards} shards and no {MANIFEST}; call "
            "store(stream, folder) again with the same stream, and it goes on"
        )
    files = list_files(folder)
    if ABOUT not in files:
        raise FormatError(f"{folder / MANIFEST} lists no {ABOUT}, so it is of no store; give a folder of `store`")
    return files


def _fill(path: Path, file: FileIO, rows: Tensor, offset: int) -> None:
    """Reads bytes of an open file straight into a tensor."""
    view, done = memoryview(cast("Any", rows.view(torch.uint8).numpy())).cast("B"), 0
    file.seek(offset)
    while done < len(view):
        read = file.readinto(view[done:])
        if not read:
            raise IntegrityError(f"{path} is cut: it ends at byte {offset + done:,}; {SKIP}")
        done += read
