"""Folders that hold the old save or the new one and never a part of each, and keep what others put there."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fmxnn.core.errors import IntegrityError, LockedError
from fmxnn.core.excerpt import cut
from fmxnn.core.files.locks import locked
from fmxnn.core.files.manifest import AGAIN, MANIFEST, NEW, list_files, permitted, read_manifest, sha256, verify

__all__ = ["MANIFEST", "IntegrityError", "verify_folder", "write_folder"]

_STAGED = ".fmxnn-"
_INSIDE, _BESIDE = re.compile(r"\.fmxnn-[0-9a-f]{8}"), re.compile(r"\.(.+)\.fmxnn-[0-9a-f]{8}")


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Saves the files that `fill` writes into a temporary folder as the folder `target`, with a manifest of sha256.

    Files of an earlier save, which its manifest lists, are replaced. Whatever else lies in the folder stays untouched.
    A process killed at any point leaves the old save or the new one, and the next save clears away the rest. Everything
    is synced to disk. Files and folders follow the umask.

    Raises LockedError where another process is writing there. Raises IntegrityError, with `target` as it was, where the
    disk is full or not writable, where another's file has a name that is to be written, and where `target` is a file.
    """
    place = Path(os.path.realpath(target))
    with writable(target, "nothing that stood there was changed"):
        if place.exists() and not place.is_dir():
            raise IntegrityError(f"{target} is a file, and no save replaces a file by a folder; choose another name")
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place.parent)
        with locked(place) as alone:
            if place.is_dir():
                _renew(place, fill, sweep=alone)
            else:
                _make(place, fill)


@contextmanager
def writable(place: Path, stays: str) -> Generator[None]:
    """Says of what cannot be written why, and what stays there, as an IntegrityError."""
    try:
        yield
    except (LockedError, IntegrityError):
        raise
    except (OSError, SafetensorError) as error:
        reason = str(error).split("\n")[0]
        raise IntegrityError(f"{place} could not be written: {cut(reason)}; {stays}") from error


@permitted()
def verify_folder(folder: Path, *, needs: Iterable[str] = ()) -> dict[str, str]:
    """The sha256 of each file by name, once all are known to be as they were written.

    A save that was killed on its way into place is put there first. Raises IntegrityError, naming the first file that
    is missing, changed or cannot be read, and for a manifest that lacks one of `needs`.
    """
    if (folder / NEW).is_dir():
        with locked(folder):
            _finish(folder)
    files = list_files(folder)
    for name in needs:
        if name not in files:
            raise IntegrityError(f"{folder / MANIFEST} lists no {name}, so nothing says that it is whole; {AGAIN}")
    verify(files.values())
    return {name: file.sha256 for name, file in files.items()}


def _make(place: Path, fill: Callable[[Path], None]) -> None:
    with _staged(place.with_name(f".{place.name}{_STAGED}{secrets.token_hex(4)}"), fill) as made:
        made.rename(place)
        sync(place.parent)


def _renew(place: Path, fill: Callable[[Path], None], *, sweep: bool) -> None:
    """The new files are written into a folder inside. It is renamed once it is whole: from there on they are saved, and
    then they are moved up.
    """
    _finish(place)
    for left in [path for path in place.iterdir() if sweep and _INSIDE.fullmatch(path.name)]:
        shutil.rmtree(left, ignore_errors=True)
    ours = {MANIFEST, *read_manifest(place / MANIFEST)} if (place / MANIFEST).is_file() else set[str]()
    with _staged(place / f"{_STAGED}{secrets.token_hex(4)}", fill) as made:
        there = [name for name in (path.name for path in made.iterdir()) if os.path.lexists(place / name)]
        barred = ", ".join(sorted(name for name in there if name not in ours or (place / name).is_dir()))
        if barred:
            raise IntegrityError(
                f"{place} holds {barred}, which no save wrote, and it stays; move it away, or save into another folder"
            )
        made.rename(place / NEW)
        sync(place)
    try:
        _finish(place)
    except OSError as error:
        raise IntegrityError(
            f"{place} is saved and loads, but files of the save before could not be replaced yet: {error}; the next "
            "save does it"
        ) from error


def _finish(place: Path) -> None:
    """Moves up what is saved and not yet in its place. The manifest goes last: until it is moved, all of this can be
    done again.
    """
    fresh, manifest = place / NEW, place / MANIFEST
    if not fresh.is_dir():
        return
    if (fresh / MANIFEST).is_file():
        names = read_manifest(fresh / MANIFEST).keys()
        old = read_manifest(manifest).keys() if manifest.is_file() else ()
        for name in [name for name in old if name not in names and not (place / name).is_dir()]:
            (place / name).unlink(missing_ok=True)
        for name in names:
            with suppress(FileNotFoundError):  # it was moved before the kill
                (fresh / name).replace(place / name)
        sync(place)
        (fresh / MANIFEST).replace(manifest)
    shutil.rmtree(fresh)
    sync(place)


@contextmanager
def _staged(made: Path, fill: Callable[[Path], None]) -> Generator[Path, None, None]:
    """A new folder, filled, listed and on disk; gone after the block, unless it was renamed."""
    made.mkdir()
    try:
        fill(made)
        files = {path.name: sha256(path) for path in sorted(made.iterdir())}
        (made / MANIFEST).write_text(json.dumps({"sha256": files}, indent=1) + "\n")
        for path in made.iterdir():
            path.chmod(made.stat().st_mode & 0o666)  # safetensors keeps its files from others; the folder has the umask
            sync(path)
        sync(made)
        yield made
    finally:
        if made.exists():
            shutil.rmtree(made)


def _sweep(parent: Path) -> None:
    """Removes the temporary folders that killed processes left in `parent`: those whose target nobody holds."""
    with suppress(OSError):  # a folder that may not be listed
        for left, found in [(path, found) for path in parent.iterdir() if (found := _BESIDE.fullmatch(path.name))]:
            with suppress(OSError), locked(parent / found[1]) as alone:
                if alone:
                    shutil.rmtree(left)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
