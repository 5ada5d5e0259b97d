import os
import subprocess
import sys

import pytest

import fmxnn as fx
from fmxnn.core import extras
from fmxnn.reports import command_line


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        command_line.main(["--version"])
    assert capsys.readouterr().out == f"fmxnn {fx.__version__}\n"


@pytest.mark.parametrize("command", ["inspect", "train", "evaluate"])
def test_the_help_names_every_command_and_each_has_its_own(command, capsys):
    for words in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit, match="^0$"):
            command_line.main(words)
        assert command in capsys.readouterr().out


def test_a_missing_extra_is_one_sentence(monkeypatch, capsys):
    def missing(module):
        raise ModuleNotFoundError("No module named 'tyro'", name="tyro")

    monkeypatch.setattr(extras, "import_module", missing)
    assert command_line.main(["train", "--k", "3"]) == 1
    said = "error: train needs tyro, which is not installed; pip install 'fmxnn[train]'\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("words", "given", "again"),
    [(["train", "--k", "3"], None, True), (["train"], "active", False), (["inspect", "missing"], None, False)],
)
def test_a_run_begins_again_where_its_threads_would_wait_with_a_busy_core(monkeypatch, words, given, again):
    begun = []
    monkeypatch.setattr(os, "execv", lambda program, argv: begun.append([program, *argv]))
    monkeypatch.setattr(command_line, "main", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["fmxnn", *words])
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert command_line.run() == 0
    assert begun == ([[sys.executable, sys.executable, "-m", "fmxnn", *words]] if again else [])
    assert os.environ.get("OMP_WAIT_POLICY") == ("passive" if again else given)


def test_the_module_and_the_script_are_one_command():
    found = subprocess.run([sys.executable, "-m", "fmxnn", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout == f"fmxnn {fx.__version__}\n"
