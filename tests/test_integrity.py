import errno
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fmxnn.core.errors import LockedError
from fmxnn.core.files.integrity import IntegrityError, verify_folder, write_folder
from fmxnn.core.files.locks import locked
from fmxnn.core.files.manifest import list_files

LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
import fmxnn as fx
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
weight = fx.DenseWeight(4, 32, 128)
module = fx.Crosscoder(fx.CrossLayerEncoder(weight, fx.TopK(2)), fx.CrossLayerDecoder(weight))
try:
    fx.save_pretrained(module, sys.argv[1])
except OSError as error:
    sys.stdout.write(f"{type(error).__name__}: {error}")
"""


def write(files):
    return lambda folder: [(folder / name).write_text(text) for name, text in files.items()]


def test_a_folder_is_written_with_the_checksums_of_its_files(tmp_path):
    write_folder(tmp_path / "deep" / "m", write({"a": "one", "b": "two"}))
    assert {path.name for path in (tmp_path / "deep" / "m").iterdir()} == {"a", "b", "manifest.json"}
    assert verify_folder(tmp_path / "deep" / "m").keys() == {"a", "b"}


def test_writing_again_replaces_every_file(tmp_path):
    write_folder(tmp_path / "m", write({"a": "one", "b": "two"}))
    write_folder(tmp_path / "m", write({"c": "three"}))
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"c", "manifest.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("a mistake of the caller's")])
def test_an_error_while_writing_leaves_what_was_there(tmp_path, error):
    write_folder(tmp_path / "m", write({"a": "one"}))

    def fail(folder):
        (folder / "a").write_text("half")
        raise error

    with pytest.raises((IntegrityError, KeyError)) as caught:
        write_folder(tmp_path / "m", fail)
    if isinstance(error, OSError):
        expected = (
            f"{tmp_path / 'm'} could not be written: [Errno 28] No space left on device; nothing that stood "
            "there was changed"
        )
        assert str(caught.value) == expected
    assert (tmp_path / "m" / "a").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_place_where_nothing_can_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(IntegrityError, match=re.escape(f"{tmp_path / 'file' / 'm'} could not be written: ")):
        write_folder(tmp_path / "file" / "m", write({"a": "one"}))


def test_a_file_too_large_for_the_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "m")], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(
        rf"IntegrityError: {re.escape(str(tmp_path / 'm'))} could not be written: .*File too large.*; nothing that "
        r"stood there was changed",
        done.stdout,
    ), done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def with_manifest(text):
    return lambda folder: (folder / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def listing(**files):
    return with_manifest(json.dumps({"sha256": files}))


DIGEST, LONG, AWAY = "0" * 64, "n" * 10_000, "fetch the folder again, or save into another$"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda f: (f / "manifest.json").unlink(),
            "{f} has no manifest.json, so nothing says that its files are whole; save it again$",
        ),
        (lambda f: (f / "a").unlink(), "{f}/a is missing, and manifest.json lists it; fetch or save the folder again$"),
        (
            lambda f: (f / "a").write_text("onf"),
            "{f}/a is not the file that was saved: its sha256 differs from manifest.json; fetch or save",
        ),
        (with_manifest("[]"), "{f}/manifest.json lists no files; " + AWAY),
        (with_manifest('{"sha256": {}}'), "{f}/manifest.json lists no files; " + AWAY),
        (with_manifest("{"), "{f}/manifest.json cannot be read: no JSON, .*; " + AWAY),
        (with_manifest(b"\xff\xfe"), "{f}/manifest.json cannot be read: no JSON, .*invalid start byte; " + AWAY),
        (
            with_manifest('{"sha256": {"a": "DIGEST", "a": "DIGEST"}}'.replace("DIGEST", DIGEST)),
            "{f}/manifest.json gives 'a' twice.*; " + AWAY,
        ),
        (with_manifest("[" * 100_000), "{f}/manifest.json is nested deeper.*; " + AWAY),
        (
            with_manifest("".join(['{"sha256": {"', LONG, '": 1, "', LONG, '": 2}}'])),
            "{f}/manifest.json gives .*nnn.* twice.*; " + AWAY,
        ),
        *(
            (listing(**{name: DIGEST}), f"{{f}}/manifest.json names .*, which is no file of this folder; {AWAY}")
            for name in ("../a", "/etc/passwd", "b/a", "..", ".", "", "a\0", "a\n", "manifest.json", LONG)
        ),
        (listing(**{"\ud800": DIGEST}), "{f}/manifest.json holds half a character.*; " + AWAY),
        *(
            (listing(a=digest), "{f}/manifest.json gives a as sha256 .*, which is none; " + AWAY)
            for digest in (None, 3, "", "A" * 64, LONG)
        ),
    ],
)
def test_a_spoilt_folder_says_how_in_a_short_sentence(tmp_path, spoil, words):
    folder = tmp_path / "m"
    write_folder(folder, write({"a": "one"}))
    spoil(folder)
    with pytest.raises(IntegrityError, match="^" + words.replace("{f}", re.escape(str(folder)))) as caught:
        verify_folder(folder)
    assert len(str(caught.value)) < 600


def test_a_manifest_that_leaves_out_what_is_read_is_partial(tmp_path):
    write_folder(tmp_path / "m", write({"a": "one", "b": "two"}))
    assert verify_folder(tmp_path / "m", needs=("a", "b")).keys() == {"a", "b"}
    with pytest.raises(
        IntegrityError,
        match=r"manifest.json lists no c, so nothing says that it is whole; fetch or save the folder again$",
    ):
        verify_folder(tmp_path / "m", needs=("a", "c"))


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_others_put_into_the_folder_stays(tmp_path):
    write_folder(tmp_path, write({"a": "one", "b": "two"}))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "a").write_text("a checkpoint")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    inode = (tmp_path / "notes.txt").stat().st_ino
    write_folder(tmp_path, write({"b": "three", "c": "four"}))
    assert {path.name for path in tmp_path.iterdir()} == {"b", "c", "manifest.json", "notes.txt", "step-1", "link"}
    assert ((tmp_path / "b").read_text(), (tmp_path / "step-1" / "a").read_text()) == ("three", "a checkpoint")
    assert (tmp_path / "notes.txt").stat().st_ino == inode
    assert verify_folder(tmp_path).keys() == {"b", "c"}


@pytest.mark.parametrize("listed", [True, False])
def test_a_file_that_no_save_wrote_is_named_and_never_replaced(tmp_path, listed):
    if listed:
        write_folder(tmp_path, write({"b": "two"}))
    (tmp_path / "a").write_text("mine")
    (tmp_path / "c").mkdir()
    before = tree(tmp_path)
    with pytest.raises(
        IntegrityError,
        match=r" holds a, c, which no save wrote, and it stays; move it away, or save into another folder$",
    ):
        write_folder(tmp_path, write({"a": "one", "b": "three", "c": "four"}))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("text", ["", '{"name": "a web page"}', '{"sha256": {"notes.txt": 1}}'])
def test_a_manifest_that_cannot_say_what_is_ours_lets_nothing_be_replaced(tmp_path, text):
    write_folder(tmp_path, write({"a": "one"}))
    (tmp_path / "manifest.json").write_text(text)
    before = tree(tmp_path)
    with pytest.raises(IntegrityError, match=r"manifest.json .*; fetch the folder again, or save into another$"):
        write_folder(tmp_path, write({"a": "two"}))
    assert tree(tmp_path) == before


def test_a_file_never_becomes_a_folder(tmp_path):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(
        IntegrityError, match=r"m is a file, and no save replaces a file by a folder; choose another name$"
    ):
        write_folder(tmp_path / "m", write({"a": "one"}))
    assert tree(tmp_path) == {"m": b"mine"}


@pytest.mark.parametrize("there", [True, False], ids=["a folder behind it", "nothing behind it"])
def test_a_link_to_a_folder_stays_a_link(tmp_path, there):
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "m").symlink_to("real")
    for text in ("one", "two"):
        write_folder(tmp_path / "m", write({"a": text}))
        assert (tmp_path / "m").is_symlink()
        assert (tmp_path / "real" / "a").read_text() == text
    assert {path.name for path in tmp_path.iterdir()} == {"m", "real"}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_and_folders_follow_the_umask(tmp_path, mask):
    def fill(folder):
        save_file({"a": torch.zeros(1)}, folder / "a.safetensors")  # gives its file to the owner alone

    before = os.umask(mask)
    try:
        for _ in range(2):
            write_folder(tmp_path / "m", fill)
            assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "m").iterdir()} == {0o666 & ~mask}
            assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o777 & ~mask
    finally:
        os.umask(before)


def test_the_second_of_two_writers_changes_nothing(tmp_path):
    folder = tmp_path / "m"

    def fill(inner):
        with pytest.raises(
            LockedError, match=f"^{re.escape(str(folder))} is being written by process {os.getpid()} on "
        ):
            write_folder(folder, write({"a": "second"}))
        (inner / "a").write_text("first")

    for _ in range(2):
        write_folder(folder, fill)
        assert tree(tmp_path) == {"m/a": b"first", "m/manifest.json": (folder / "manifest.json").read_bytes()}


def test_what_a_kill_left_is_cleared_and_what_is_being_written_stays(tmp_path):
    write_folder(tmp_path / "m", write({"a": "one"}))
    left = [".n.fmxnn-0123abcd", ".other.fmxnn-0123abcd", ".held.fmxnn-0123abcd", "m/.fmxnn-0123abcd"]
    kept = [".n.fmxnn-mine", ".cache", "m/.fmxnn-notes"]
    for name in left + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("1")
    with locked(tmp_path / "held"):
        write_folder(tmp_path / "n", write({"a": "two"}))
        write_folder(tmp_path / "m", write({"a": "two"}))
    assert [name for name in left + kept if (tmp_path / name).exists()] == [".held.fmxnn-0123abcd", *kept]
    write_folder(tmp_path / "n", write({"a": "three"}))
    assert not (tmp_path / ".held.fmxnn-0123abcd").exists()


@pytest.mark.parametrize("again", [True, False], ids=["saved again", "only verified"])
def test_files_of_the_save_before_that_cannot_be_replaced_are_told_of_and_then_are(tmp_path, monkeypatch, again):
    write_folder(tmp_path, write({"a": "one", "b": "one", "c": "one"}))
    replace = Path.replace

    def refuse(self, target):
        if target.name == "b":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(
        IntegrityError, match=r" is saved and loads, but files .*Operation not permitted; the next save does it$"
    ):
        write_folder(tmp_path, write({"a": "two", "b": "two"}))
    assert {file.path.read_text() for file in list_files(tmp_path).values()} == {"two"}
    monkeypatch.undo()
    if again:
        write_folder(tmp_path, write({"a": "two", "b": "two"}))
    assert verify_folder(tmp_path).keys() == {"a", "b"}
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.name != "manifest.json"} == {
        "a": "two",
        "b": "two",
    }


def test_a_file_that_may_not_be_read_is_named_with_the_way_out(tmp_path, monkeypatch):
    write_folder(tmp_path / "m", write({"a": "one"}))
    opened = Path.open

    def refuse(self, *args, **kwargs):
        if self.name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything, so rights alone would test nothing there
    with pytest.raises(
        IntegrityError, match=r"/m/a may not be opened by you; change its rights \(chmod\), or ask its owner$"
    ):
        verify_folder(tmp_path / "m")
