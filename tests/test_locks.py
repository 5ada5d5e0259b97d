import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fmxnn.core.errors import LockedError
from fmxnn.core.files.locks import LOCK, locked

HOLDING = """
import sys, time
from pathlib import Path
from fmxnn.core.files.locks import locked
with locked(Path(sys.argv[1])):
    sys.stdout.write("held")
    sys.stdout.flush()
    sys.stdin.read()
"""


def holder(folder):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.read(4) == b"held"
    return child


@pytest.mark.parametrize("there", [True, False], ids=["there", "not there yet"])
def test_a_second_writer_is_told_process_and_host_of_the_first(tmp_path, there):
    folder = tmp_path / "m"
    if there:
        folder.mkdir()
    child = holder(folder)
    with (
        pytest.raises(
            LockedError,
            match=f"^{re.escape(str(folder))} is being written by process {child.pid} on {socket.gethostname()}; wait",
        ),
        locked(folder),
    ):
        pass
    child.communicate()
    with locked(folder):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == (["m"] if there else [])


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    child = holder(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path) as alone:
        assert alone
    assert not (tmp_path / LOCK).exists()


def test_one_process_is_kept_out_by_itself_too_and_an_error_frees_the_folder(tmp_path):
    with pytest.raises(LockedError, match=str(os.getpid())), locked(tmp_path), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=re.escape(LOCK)), locked(tmp_path / "m"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_lock_whose_file_was_taken_away_is_taken_anew(tmp_path, monkeypatch):
    lock, taken = fcntl.flock, []

    def after_the_holder_left(handle, how):
        if not taken:  # what the holder does between our open and our lock
            taken.append((tmp_path / LOCK).unlink())
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", after_the_holder_left)
    with locked(tmp_path), pytest.raises(LockedError), locked(tmp_path):
        pass


def test_where_the_file_system_has_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    def none(_handle, _how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(Path(tmp_path)) as alone, locked(tmp_path) as also:
        assert not alone
        assert not also
    assert not list(tmp_path.iterdir())
