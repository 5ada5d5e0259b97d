"""Which folders hold checkpoints, which of them are this run's, and which go when a new one is written."""

import os
import re
from contextlib import suppress
from functools import lru_cache
from itertools import count
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from typing import Any, cast

from fmxnn.core.errors import RecipeError
from fmxnn.core.files.integrity import MANIFEST, IntegrityError, verify_folder
from fmxnn.core.files.manifest import NEW
from fmxnn.core.files.strict_json import RUN_LIMITS, strict_json

KEPT = 3
_NOTED = {
    **{"run": str, "steps": int, "tokens": int, "seed": int, "module": dict, "arguments": dict},
    **{"objective": dict, "optimizer": dict, "settings": list, "versions": dict},
}
_NAME = re.compile("step-([0-9]{8,})")
_LEFT = re.compile(r"\.step-[0-9]{8,}\.fmxnn\.lock")


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders in `folder` that are called as checkpoints are, oldest first; what else is there is left out."""
    if not folder.exists():
        return []
    numbers = {
        path: int(found[1]) for path in folder.iterdir() if (found := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    return sorted(
        (path for path, number in numbers.items() if path.name == f"step-{number:08d}"), key=lambda path: numbers[path]
    )


def read_about(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run.

    Raises IntegrityError where something is missing, and RecipeError for what is no JSON.
    """
    about = strict_json(path / "trainer.json", RUN_LIMITS)
    noted = cast("dict[str, Any]", about) if isinstance(about, dict) else {}
    if wrong := [name for name, kind in _NOTED.items() if type(noted.get(name)) is not kind]:
        raise IntegrityError(
            f"{path / 'trainer.json'} does not say {', '.join(wrong)}; resume with the fmxnn that saved it"
        )
    return noted


def is_whole(path: Path, run: str) -> bool:
    """Whether a folder is a checkpoint of this run, with all its bytes and nothing of anyone else's."""
    try:
        if path.is_symlink():
            return False
        if (path / NEW).is_dir():
            verify_folder(path)  # puts a save into place that was killed on its way there
        if read_about(path)["run"] != run:
            return False
        files = [file for file in path.iterdir() if not file.name.startswith(".fmxnn")]  # which a killed save left
        seen = ((file.name, file.lstat()) for file in files)
        return _verified(path, tuple((name, at.st_size, at.st_mtime_ns, at.st_ctime_ns) for name, at in sorted(seen)))
    except (OSError, RecipeError):
        return False


@lru_cache(maxsize=64)
def _verified(path: Path, stamp: tuple[tuple[str, int, int, int], ...]) -> bool:
    """Read once while sizes and times of its files stay: it may hold gigabytes, and each save looks at three."""
    return {*verify_folder(path), MANIFEST} == {name for name, *_ in stamp}


def clear_left(folder: Path) -> None:
    """Removes the locks of killed saves, in a folder that is locked; what else they left goes with `write_folder`."""
    for path in folder.iterdir():
        if _LEFT.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()


def set_aside(target: Path, run: str) -> None:
    """Gives another name to what stands at `target`, unless it is this run's and whole."""
    if os.path.lexists(target) and not is_whole(target, run):
        free = next(n for n in count(1) if not os.path.lexists(f"{target}.aside-{n}"))
        target.rename(f"{target}.aside-{free}")


def rotate(folder: Path, target: Path, run: str) -> None:
    """Deletes this run's whole checkpoints but for `target`, which was just written, and the newest beside it."""
    others = [path for path in list_checkpoints(folder) if path != target and is_whole(path, run)]
    for old in others[: max(0, len(others) - KEPT + 1)]:
        left = folder / f".{old.name}.fmxnn-{token_hex(4)}"
        with suppress(OSError):  # the new one is saved, whatever becomes of the old
            old.rename(left)  # in one step, so that a kill leaves no half of it under its name
            rmtree(left, ignore_errors=True)
