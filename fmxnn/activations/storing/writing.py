"""Activations written to disk while they are harvested; a call that was killed is made again and goes on."""

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fmxnn.activations.storing.layout import (
    ABOUT,
    DTYPES,
    JOURNAL,
    SHARD,
    TEXT,
    Layout,
    layout_of,
    read_about,
    row_bytes,
    shard_name,
)
from fmxnn.activations.storing.reading import ActivationStore
from fmxnn.activations.storing.rows import StreamRows
from fmxnn.activations.stream import Stream
from fmxnn.core.errors import IntegrityError
from fmxnn.core.excerpt import cut, excerpt
from fmxnn.core.files.integrity import sync, writable
from fmxnn.core.files.locks import LOCK, locked
from fmxnn.core.files.manifest import MANIFEST, sha256
from fmxnn.core.files.strict_json import to_json
from fmxnn.core.kinds import is_object
from fmxnn.core.progress import Progress, silently
from fmxnn.core.sizes import whole

_PART = ".fmxnn-part"
_STAYS = "what is whole there stays, and the same call goes on from it"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)\n")


def store(
    stream: Stream[Any],
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    shard_bytes: int = SHARD,
    progress: Progress = silently,
) -> ActivationStore:
    """Writes all activations of a stream into a folder, and opens it: the same batches, without the model.

    - `dtype`: "bfloat16", "float16", "float32" or "int8" (with a scale for each token and layer); the stream's own
      unless given
    - `shard_bytes`: how large each file of activations is, 128 MiB unless given
    - `progress`: `tqdm` shows how far it is

    Rows lie in the order of the text, each kept token once, whatever the stream's seed and epochs. Was a call killed,
    or was the disk full, make the same call again: it keeps the shards that are whole and writes the others, and the
    folder ends with the same bytes. Where the store is finished already, nothing is written. Other files in the folder
    stay as they are.

    Raises ValueError for an unknown dtype, and for a folder that holds a store of something else, which it names.
    Raises IntegrityError where the disk is full, and for another's file of the name of one of ours. Raises LockedError
    where another process writes there. Raises ValueError for NaN, infinity, and values beyond float16.
    """
    if (whole(shard_bytes) or 0) < 1:
        raise ValueError(f"store needs shard_bytes >= 1, a whole number, got shard_bytes={excerpt(shard_bytes)}")
    place, about = Path(folder), _about(stream, _stored_as(dtype, stream), shard_bytes)
    if place.exists() and not place.is_dir():
        raise IntegrityError(f"{place} is a file, and a store is a folder; choose another name")
    if not _is_finished(place, about):
        with ExitStack() as held:
            with writable(place, _STAYS):
                place.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(place))
            _Writer(place, stream, about).write(progress)
    return ActivationStore(place)


def _about(stream: Stream[Any], dtype: str, shard_bytes: int) -> dict[str, Any]:
    """What must be the same for a call to go on, as JSON has it."""
    source = stream.source
    config = getattr(getattr(source, "model", None), "config", None)
    given = {
        "version": 1,
        "model": source.name,
        "revision": getattr(config, "_commit_hash", None),
        "source": source.identity(),
        "layers": list(source.layers),
        "dtype": dtype,
        "rows": stream.rows,
        "shuffle": asdict(stream.shuffle),
        "shard_bytes": shard_bytes,
    }
    return json.loads(to_json(given))


def _stored_as(dtype: str | torch.dtype | None, stream: Stream[Any]) -> str:
    if dtype is None:
        dtype = stream.dtype or stream.source.read(0, 1)[0].dtype
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(
            f"a store holds {', '.join(map(repr, DTYPES))}, got dtype={excerpt(name)}; give one of them as dtype="
        )
    return name


def _is_finished(place: Path, about: Mapping[str, Any]) -> bool:
    """Whether the store is whole and nothing is left to clear away. Raises ValueError where it holds something else."""
    if not (place / ABOUT).is_file():
        return False
    _compare(place, read_about(place), about)
    return (place / MANIFEST).is_file() and not any((place / left).exists() for left in (JOURNAL, LOCK))


def _compare(place: Path, saved: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Raises ValueError, saying what differs."""
    was, now = _flat(saved), _flat(about)
    differing = [
        f"{name} was {excerpt(was.get(name), 80)} and is {excerpt(now.get(name), 80)}"
        for name in now
        if name != "source.layers" and was.get(name) != now[name]  # they are named as `layers`
    ]
    if differing:
        raise ValueError(
            f"{place} holds a store of something else: {'; '.join(differing[:5])}; store into another folder, or read "
            f"what is there with ActivationStore({str(place)!r})"
        )


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared by name, such as `source.text`."""
    return {
        f"{name}.{inner}" if inner else name: each
        for name, value in about.items()
        for inner, each in (value.items() if is_object(value) else [("", value)])
    }


class _Writer:
    """What stands in the folder, and what is written there."""

    def __init__(self, place: Path, stream: Stream[Any], about: dict[str, Any]):
        self.place, self.about, self.rows = place, about, StreamRows(stream)
        self.contexts = stream.contexts

    def write(self, progress: Progress) -> None:
        """All that is missing; the manifest last."""
        if (self.place / ABOUT).is_file():
            saved = read_about(self.place)
            _compare(self.place, saved, self.about)
        else:
            self._refuse_others()
            saved = self._begin()
        layout = layout_of(saved)
        done = self._kept()
        if not (self.place / MANIFEST).is_file():
            if TEXT not in done:
                done[TEXT] = self._note(TEXT, self._save(TEXT, self._text()))
            missing = [shard for shard in range(layout.shards) if shard_name(shard) not in done]
            for shard in progress(missing, desc="store", total=len(missing)):
                name = shard_name(shard)
                done[name] = self._note(name, self._save(name, self._shard(layout, shard)))
            names = [ABOUT, TEXT, *map(shard_name, range(layout.shards))]
            done[ABOUT] = sha256(self.place / ABOUT)
            self._put(MANIFEST, partial(_write_json, value={"sha256": {name: done[name] for name in names}}))
        with writable(self.place, _STAYS):
            (self.place / JOURNAL).unlink(missing_ok=True)

    def _begin(self) -> dict[str, Any]:
        """Notes what the store is of, once a first block has shown its sides."""
        sides = tuple((x.shape[-2], x.shape[-1]) for x in self.rows.block(0))
        a_shard = max(1, self.about["shard_bytes"] // row_bytes(sides, self.about["dtype"]))
        saved = {
            **self.about,
            "given": self.rows.dtype,
            "sides": [list(side) for side in sides],
            "rows_a_shard": a_shard,
        }
        self._put(ABOUT, partial(_write_json, value=saved))
        return saved

    def _refuse_others(self) -> None:
        ours = re.compile(r"shard-\d{5,}\.safetensors")
        barred = [
            path.name
            for path in sorted(self.place.iterdir())
            if path.name in (ABOUT, TEXT, JOURNAL, MANIFEST) or ours.fullmatch(path.name)
        ]
        if barred:
            raise IntegrityError(
                f"{self.place} holds {cut(', '.join(barred))}, which no store wrote, and it stays; move it away, or "
                "store into another folder"
            )

    def _kept(self) -> dict[str, str]:
        """The files that the journal knows and that are as it says; the journal is cut to them."""
        journal = self.place / JOURNAL
        lines = journal.read_text(errors="replace").splitlines(keepends=True) if journal.is_file() else []
        found = {match[2]: match[1] for line in lines if (match := _LINE.fullmatch(line))}
        finished = (self.place / MANIFEST).is_file()
        kept = {
            name: sha
            for name, sha in found.items()
            if finished or ((self.place / name).is_file() and sha256(self.place / name) == sha)
        }
        if not finished:
            self._put(JOURNAL, partial(_write_lines, lines=kept))
        return kept

    def _note(self, name: str, sha: str) -> str:
        with writable(self.place, _STAYS), (self.place / JOURNAL).open("a") as journal:
            journal.write(f"{sha}  {name}\n")
            journal.flush()
            os.fsync(journal.fileno())
        return sha

    def _text(self) -> dict[str, Tensor]:
        text = self.contexts
        roles = {} if text.roles is None else {"roles": text.roles.to("cpu", torch.int8).contiguous()}
        return {
            "ids": text.ids.to("cpu", torch.int32).contiguous(),
            "keep": text.keep.to("cpu").contiguous(),
            **roles,
        }

    def _shard(self, layout: Layout, shard: int) -> dict[str, Tensor]:
        start, stop = layout.span(shard)
        return self.rows.packed(start, stop, layout)

    def _save(self, name: str, tensors: dict[str, Tensor]) -> str:
        return self._put(name, partial(_write_tensors, tensors=tensors))

    def _put(self, name: str, fill: Callable[[Path], None]) -> str:
        """The sha256 of a file that `fill` writes: beside its place, then on disk, then renamed into it."""
        path = self.place / f".{name}{_PART}"
        with writable(self.place, _STAYS):
            try:
                fill(path)
                path.chmod(self.place.stat().st_mode & 0o666)  # safetensors keeps its files from others
                sync(path)
                found = sha256(path)
                path.rename(self.place / name)
                sync(self.place)
            finally:
                path.unlink(missing_ok=True)
        return found


def _write_json(path: Path, value: object) -> None:
    path.write_text(to_json(value))


def _write_lines(path: Path, lines: Mapping[str, str]) -> None:
    path.write_text("".join(f"{sha}  {name}\n" for name, sha in lines.items()))


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path)
