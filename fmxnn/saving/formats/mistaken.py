"""What lies at a file's place where it is not the file: nothing, a web page, or a pointer to it."""

from pathlib import Path

from fmxnn.core.files.integrity import IntegrityError

_HEAD = 512
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")
_POINTER = b"version https://git-lfs.github.com/spec/"


def check_kind(path: Path) -> None:
    """Raises IntegrityError for a file that is empty, a web page or a Git LFS pointer.

    The error says which it is and what helps.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD).removeprefix(b"\xef\xbb\xbf").strip()
    if not head and path.stat().st_size <= _HEAD:
        raise IntegrityError(f"{path} cannot be read: it is empty; fetch it again")
    if head.lower().startswith(_PAGES):
        raise IntegrityError(
            f"{path} cannot be read: it is a web page; fetch the file itself, not the page that shows it"
        )
    if head.startswith(_POINTER):
        raise IntegrityError(f"{path} cannot be read: it is a Git LFS pointer to the file; fetch that: git lfs pull")
