"""Folders that are whole or absent, and that know when a byte has changed."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError

MANIFEST = "manifest.json"


class IntegrityError(OSError):
    """A file that is missing, cut, changed or could not be written."""


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Makes the folder `target` in one step: `fill` writes the files into a temporary folder beside it.

    A manifest of sha256 is added, files and folders are synced to disk, and the folder is renamed into
    place; a folder that stands there is replaced. Raises IntegrityError, with `target` as it was, where the disk is
    full or not writable.
    """
    made: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        fill(made)
        files = {path.name: _sha256(path) for path in sorted(made.iterdir())}
        (made / MANIFEST).write_text(json.dumps({"sha256": files}, indent=1) + "\n")
        for path in (*made.iterdir(), made):
            _sync(path)
        made.chmod(0o755)
        _replace(made, target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        reason = str(error).split("\n")[0]
        raise IntegrityError(f"{target} could not be written: {reason}; nothing that stood there was changed") from error
    finally:
        if made is not None and made.exists():
            shutil.rmtree(made)


def verify_folder(folder: Path) -> dict[str, str]:
    """The sha256 of each file by name. Raises IntegrityError, naming the first file that is missing or not as it was written."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise IntegrityError(f"{folder} has no {MANIFEST}, so nothing says that its files are whole; save it again")
    files = _read_manifest(manifest)
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{path} is missing, and {MANIFEST} lists it; fetch or save the folder again")
        if _sha256(path) != expected:
            raise IntegrityError(
                f"{path} is not the file that was saved: its sha256 differs from {MANIFEST}; fetch or save the folder again"
            )
    return files


def _read_manifest(manifest: Path) -> dict[str, str]:
    try:
        tree = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{manifest} cannot be read: {error}; fetch or save the folder again") from error
    files = cast("dict[str, Any]", tree).get("sha256") if isinstance(tree, dict) else None
    if not isinstance(files, dict) or not files:
        raise IntegrityError(f"{manifest} lists no files; fetch or save the folder again")
    for name, digest in cast("dict[str, object]", files).items():
        if not isinstance(digest, str) or Path(name).name != name or name in (".", ".."):
            raise IntegrityError(f"{manifest} names {name!r}, which is no file of this folder; fetch or save the folder again")
    return cast("dict[str, str]", files)


def _replace(made: Path, target: Path) -> None:
    if not target.exists():
        made.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    target.rename(aside / target.name)
    try:
        made.rename(target)
    except OSError:
        (aside / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(aside)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
