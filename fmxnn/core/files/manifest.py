"""What a folder's manifest says of its files, and whether they are still so."""

import hashlib
import os
import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from safetensors import SafetensorError

from fmxnn.core.errors import IntegrityError
from fmxnn.core.excerpt import excerpt
from fmxnn.core.files.strict_json import MANIFEST_LIMITS, entry, strict_json
from fmxnn.core.kinds import is_object

MANIFEST = "manifest.json"
NEW = ".fmxnn-new"
"""The folder inside, of a save that is whole and on its way into place."""
AGAIN = "fetch or save the folder again"
_ELSEWHERE = "fetch the folder again, or save into another"
_TRIES = 200
_DIGEST = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


_LIMITS = MANIFEST_LIMITS._replace(error=IntegrityError, way_out=_ELSEWHERE)


class Listed(NamedTuple):
    """A file of a manifest: where it lies now, and the sha256 that it was written with."""

    path: Path
    sha256: str


def list_files(folder: Path) -> dict[str, Listed]:
    """The files of the manifest by name; their content is not looked at.

    Raises IntegrityError for a manifest that is missing or broken.
    """
    manifest = in_force(folder)
    if manifest is None:
        raise IntegrityError(f"{folder} has no {MANIFEST}, so nothing says that its files are whole; save it again")
    fresh = folder / NEW
    return {
        name: Listed(fresh / name if (fresh / name).is_file() else folder / name, sha)
        for name, sha in read_manifest(manifest).items()
    }


def in_force(folder: Path) -> Path | None:
    """The manifest that holds: of a save that is whole and not yet in its place, or the folder's own."""
    return next((path for path in (folder / NEW / MANIFEST, folder / MANIFEST) if path.is_file()), None)


def read_manifest(manifest: Path) -> dict[str, str]:
    """The sha256 of each file by name.

    Raises IntegrityError for what is not such a list, and for names that are not files of the folder itself.
    """
    files = entry(strict_json(manifest, _LIMITS), "sha256")
    if not is_object(files) or not files:
        raise IntegrityError(f"{manifest} lists no files; {_ELSEWHERE}")
    for name, digest in files.items():
        if not _is_plain(name):
            raise IntegrityError(f"{manifest} names {excerpt(name)}, which is no file of this folder; {_ELSEWHERE}")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise IntegrityError(f"{manifest} gives {name} as sha256 {excerpt(digest)}, which is none; {_ELSEWHERE}")
    return dict(files)


def verify(files: Iterable[Listed]) -> None:
    """Raises IntegrityError, naming the first file that is missing or not as it was written."""
    for path, expected in files:
        if not path.is_file():
            raise IntegrityError(f"{path} is missing, and {MANIFEST} lists it; {AGAIN}")
        if sha256(path) != expected:
            raise IntegrityError(f"{path} is not the file that was saved: its sha256 differs from {MANIFEST}; {AGAIN}")


def steadily(folder: Path, read: Callable[[], _T]) -> _T:
    """What `read` makes of the files of one save: where another process replaced them meanwhile, it is called again."""
    for _ in range(_TRIES):
        manifest = in_force(folder)
        if manifest is None:
            return read()
        with (
            suppress(FileNotFoundError),
            manifest.open("rb") as opened,
        ):  # while it is open, no later manifest can have its inode
            moving = _names(
                folder / NEW
            )  # of this save, if its manifest is still in force below: files are only moved out
            try:
                result = read()
            except (OSError, ValueError, RuntimeError, SafetensorError):
                if _names(folder / NEW) == moving and _is_in_force(
                    opened, folder
                ):  # in this order: another save may come in between
                    raise
                continue
            if _is_in_force(opened, folder):
                return result
    raise IntegrityError(f"{folder} was replaced {_TRIES} times while it was read; load it when its writer is done")


@contextmanager
def permitted() -> Generator[None, None, None]:
    """Turns a file that may not be opened into an IntegrityError that names it and the way out."""
    try:
        yield
    except PermissionError as error:
        raise IntegrityError(
            f"{error.filename} may not be opened by you; change its rights (chmod), or ask its owner"
        ) from error


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_plain(name: str) -> bool:
    return 0 < len(name) <= 255 and name.isprintable() and Path(name).name == name and name not in ("..", MANIFEST)


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def _is_in_force(opened: BinaryIO, folder: Path) -> bool:
    now = in_force(folder)
    try:
        return now is not None and os.path.samestat(os.fstat(opened.fileno()), now.stat())
    except FileNotFoundError:
        return False
