"""Saves that are killed, that find the disk full, and that are read while they replace one another."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from attempts import attempt, tries
from killed_saves import STARTS, begin, module, others, same

import fmxnn as fx
from fmxnn.core.files.integrity import IntegrityError


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_save_leaves_the_old_or_the_new_and_a_load_meanwhile_gives_one_of_them(tmp_path):
    script, count = Path(__file__).with_name("killed_saves.py"), tries(ci=40, thorough=1_000)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path, str(count)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert sum(killed for _, _, killed, _ in result["kills"]) > len(result["kills"]) // 2
    for start, nth, _, wrong in result["kills"]:
        with attempt(f"a save killed, where there was {start}", case=(nth, wrong)):
            assert not wrong, (start, nth)
    loads, wrong = result["loads"], result["replaced"]["wrong"]
    with attempt("loads while two processes save", case=wrong[:1]) as row:
        row.tried, row.survived = row.tried + loads - 1, row.survived + loads - 1 - len(wrong[1:])
        assert result["replaced"] == {"wrong": [], "seen": [0, 1], "codes": [0, 0], "left": []}


CALLS = ("open", "rename", "replace", "mkdir", "fsync", "unlink", "rmdir", "chmod")


def full(monkeypatch, nth):
    """The n-th call that writes finds the disk full. Gives the calls seen."""
    seen = []

    def counted(name, call):
        def instead(*args, **kwargs):
            seen.append(name)
            if len(seen) == nth + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **kwargs)

        return instead

    for name in CALLS:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    monkeypatch.setattr(Path, "write_text", counted("write", Path.write_text))
    monkeypatch.setattr(fx.saving.hub, "save_file", counted("save", fx.saving.hub.save_file))
    return seen


@pytest.mark.parametrize("start", STARTS)
def test_a_disk_that_is_full_at_any_call_leaves_the_old_or_the_new(tmp_path, start, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _handle: None)  # counted, and not waited for
    new, last, nth, more = module(2), module(4), 0, True
    while more:
        parent = tmp_path / str(nth)
        parent.mkdir()
        folder, old = begin(parent, start)
        mine, before = others(folder), {path for path in parent.rglob("*") if old is None}
        with attempt(f"a full disk, where there was {start}", case=nth):
            failed = False
            with monkeypatch.context() as patch:
                seen = full(patch, nth)
                try:
                    fx.save_pretrained(new, folder)
                except IntegrityError as error:
                    failed = True
                    assert "No space left" in str(error)
                more = len(seen) > nth
            assert others(folder) == mine
            saved = (
                any(
                    path.name == "manifest.json" and ".fmxnn-" not in str(path.parent.name)
                    for path in parent.rglob("*")
                )
                or not failed
            )
            if old is not None or saved or (folder / ".fmxnn-new").exists():
                assert any(same(fx.from_pretrained(folder), each) for each in (new, *([old] if old else [])))
            elif old is None:
                assert before <= set(parent.rglob("*"))
            fx.save_pretrained(last, folder)
            assert same(fx.from_pretrained(folder), last)
            assert not [path for path in parent.rglob("*") if path.name.startswith(".")]
        nth += 1
    assert nth > 15
