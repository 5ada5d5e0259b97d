"""Folders of the Hugging Face Hub: asked for again where that can help, and not waited for longer than is said."""

import glob
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from multiprocessing import TimeoutError as NotReady
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Event
from typing import TypedDict

from huggingface_hub import close_session, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from fmxnn.core.errors import RecipeError
from fmxnn.core.files.integrity import MANIFEST, IntegrityError, verify_folder
from fmxnn.core.waiting import LONGEST_WAIT, seconds_asked
from fmxnn.saving.formats import FormatError

FETCHED = ("*.json", "*.yaml", "*.safetensors", "*.pt", "README.md")
PASSING = (408, 429, 500, 502, 503, 504)
TRIES, FIRST_WAIT = 4, 1.0


class HubOptions(TypedDict, total=False):
    """What `from_pretrained` hands on to huggingface_hub, and `timeout`, the seconds that all of it may take."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool
    endpoint: str | None
    timeout: float | None


def fetch(name: str | Path, subfolder: str, hub: HubOptions) -> tuple[Path, str]:
    """The local folder, fetched where there is none, and what to call it.

    Raises IntegrityError for a name that nothing can have, TimeoutError after `timeout` seconds, and what
    huggingface_hub raises.
    """
    seconds = hub.get("timeout")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"from_pretrained needs timeout > 0 seconds, or None for no limit, got timeout={seconds}")
    if Path(name).is_dir():
        return Path(name), str(name)
    if Path(name).is_file():
        raise IntegrityError(f"{name} is a file; give the folder that it is in: {str(Path(name).parent)!r}")
    inside = f"{glob.escape(subfolder.strip('/'))}/" if subfolder else ""
    passed = {option: value for option, value in hub.items() if option != "timeout"}
    wanted = dict(allow_patterns=[inside + end for end in FETCHED], ignore_patterns=[f"{inside}*/*"])
    try:
        root = Path(_within(seconds, str(name), partial(snapshot_download, str(name), **wanted, **passed)))
    except HFValidationError as error:
        raise IntegrityError(
            f"there is no folder {str(name)!r}, and no Hub repository can have that name; give a folder or 'owner/name'"
        ) from error
    return root, f"{name}@{root.name}"


@contextmanager
def fetched_again(name: str | Path, folder: Path) -> Generator[None]:
    """Adds to an error inside how to fetch the folder again, where it came from the Hub and is damaged.

    Without that the damaged files would stay in the cache.
    """
    try:
        yield
    except (IntegrityError, RecipeError, FormatError) as error:
        if Path(name).is_dir() or not ("fetch" in str(error) or _changed(folder)):
            raise
        raise type(error)(
            f"{error}; from_pretrained({str(name)!r}, ..., force_download=True) fetches it again"
        ) from error


def _changed(folder: Path) -> bool:
    """Whether a folder's manifest says so."""
    try:
        if (folder / MANIFEST).is_file():
            verify_folder(folder)
    except IntegrityError:
        return True
    return False


def _within(seconds: float | None, name: str, ask: Callable[[], str]) -> str:
    """What `ask` gives, in a thread that is left behind after so many seconds; the connections under it are then
    closed.
    """
    over = Event()
    if seconds is None:
        return _patiently(ask, over)
    with ThreadPool(1) as pool:
        asked = pool.apply_async(_patiently, (ask, over))
        try:
            return asked.get(seconds)
        except NotReady:
            raise TimeoutError(
                f"{name} was not fetched within timeout={seconds} seconds; give it longer, or look at the connection: "
                "whole files are kept"
            ) from None
        finally:
            over.set()
            for _ in range(10):
                if not asked.ready():
                    # a read of one byte a second never times out; huggingface_hub opens another session where needed
                    close_session()
                    asked.wait(0.5)


def _patiently(ask: Callable[[], str], over: Event) -> str:
    """What `ask` gives, tried again after doubled waits, or the one that the Hub asks for."""
    for tried in range(1, TRIES):
        try:
            return ask()
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            wait = _wait(error, FIRST_WAIT * 2 ** (tried - 1))
            if wait is None or over.wait(wait):
                raise
    return ask()


def _wait(error: HfHubHTTPError | LocalEntryNotFoundError, usual: float) -> float | None:
    """How long to wait before another try; None where it would not help, or huggingface_hub tried as often itself."""
    answer = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    if not isinstance(answer, HfHubHTTPError):
        return None
    response, request = answer.response, answer.response.request
    if response.status_code not in PASSING or request.method == "HEAD":
        return None
    if response.status_code in (408, 429) and "/api/" not in str(request.url):
        return None
    asked = seconds_asked(response.headers.get("Retry-After"))
    if asked is None:
        return usual
    return asked if asked <= LONGEST_WAIT else None
