import json
import re
import subprocess
import sys

import pytest

from fmxnn.integrity import IntegrityError, verify_folder, write_folder

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
        expected = f"{tmp_path / 'm'} could not be written: [Errno 28] No space left on device; nothing that stood there was changed"
        assert str(caught.value) == expected
    assert (tmp_path / "m" / "a").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_place_where_nothing_can_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(IntegrityError, match=re.escape(f"{tmp_path / 'file' / 'm'} could not be written: ")):
        write_folder(tmp_path / "file" / "m", write({"a": "one"}))


def test_a_file_too_large_for_the_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / "m")], capture_output=True, text=True, check=True)
    assert re.fullmatch(
        rf"IntegrityError: {re.escape(str(tmp_path / 'm'))} could not be written: .*File too large.*; nothing that stood there was changed",
        done.stdout,
    ), done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: (f / "manifest.json").unlink(), "{f} has no manifest.json, so nothing says that its files are whole; save it again"),
        (lambda f: (f / "a").unlink(), "{f}/a is missing, and manifest.json lists it; fetch or save the folder again"),
        (
            lambda f: (f / "a").write_text("onf"),
            "{f}/a is not the file that was saved: its sha256 differs from manifest.json; fetch or save the folder again",
        ),
        (lambda f: (f / "manifest.json").write_text("[]"), "{f}/manifest.json lists no files; fetch or save the folder again"),
        (lambda f: (f / "manifest.json").write_text('{"sha256": {}}'), "{f}/manifest.json lists no files; fetch or save the folder again"),
        (
            lambda f: (f / "manifest.json").write_text(json.dumps({"sha256": {"../a": "0"}})),
            "{f}/manifest.json names '../a', which is no file of this folder; fetch or save the folder again",
        ),
        (
            lambda f: (f / "manifest.json").write_text("{"),
            "{f}/manifest.json cannot be read: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); fetch or save the folder again",
        ),
        (
            lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"),
            "{f}/manifest.json cannot be read: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte; fetch or save the folder again",
        ),
    ],
)
def test_a_spoilt_folder_says_how(tmp_path, spoil, sentence):
    folder = tmp_path / "m"
    write_folder(folder, write({"a": "one"}))
    spoil(folder)
    with pytest.raises(IntegrityError) as caught:
        verify_folder(folder)
    assert str(caught.value) == sentence.replace("{f}", str(folder))
