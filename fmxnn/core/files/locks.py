"""One writer in a folder at a time; who comes second is told who is first."""

import errno
import os
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from fmxnn.core.errors import LockedError

if sys.platform != "win32":
    import fcntl

LOCK = ".fmxnn.lock"
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


@contextmanager
def locked(folder: Path) -> Generator[bool, None, None]:
    """Keeps other writers out of `folder` for the length of a `with` block, and gives whether it could.

    Some file systems have no locks. The lock is a file in the folder, or beside a folder that is not there yet; it is
    gone after the block. A killed process leaves that file but not the lock, which the system drops with the process.
    Two threads keep each other out as two processes do, and so do two calls in one thread.

    Raises LockedError with the process and the host that hold the folder. Raises OSError where the file cannot be made.
    """
    if sys.platform == "win32":
        yield False
        return
    handle, path, alone = _take(folder)
    try:
        yield alone
    finally:
        for left in (
            path,
            _beside(folder),
        ):  # a first save that was killed after its folder was there leaves the second
            with suppress(OSError):  # a file that stays is no lock
                left.unlink()
        os.close(handle)


def _take(folder: Path) -> tuple[int, Path, bool]:
    while True:
        path = _path(folder)
        handle = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
        )  # a link could lead to any file of the user's
        taken = False
        try:
            alone = _lock(handle, folder)
            taken = not alone or _is_at(handle, path, folder)  # else who held it before us took its file away with it
            if taken and alone:
                with suppress(OSError):  # a full disk: the lock holds all the same
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
            if taken:
                return handle, path, alone
        finally:
            if not taken:
                os.close(handle)


def _path(folder: Path) -> Path:
    return folder / LOCK if folder.is_dir() else _beside(folder)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{LOCK}")


def _lock(handle: int, folder: Path) -> bool:
    """Takes the lock, on systems that have fcntl; false where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # pyright: ignore[reportPossiblyUnboundVariable]
    except BlockingIOError as error:
        process, _, host = os.pread(handle, 300, 0).decode(errors="replace").partition(" ")
        who = f"process {process} on {host}" if host else "another process"
        raise LockedError(
            f"{folder} is being written by {who}; wait until it is done, or choose another folder"
        ) from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _is_at(handle: int, path: Path, folder: Path) -> bool:
    try:
        return path == _path(folder) and os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
