"""Runs every Python block of README.md and docs/ as a test, in a temporary folder where `examples/` can be read."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parent


def _enter(namespace: dict[str, object]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fmxnn-docs-"))
    (folder / "examples").symlink_to(ROOT / "examples")
    namespace["_folder"], namespace["_before"] = folder, Path.cwd()
    os.chdir(folder)
    torch.manual_seed(0)


def _leave(namespace: dict[str, object]) -> None:
    os.chdir(str(namespace["_before"]))
    shutil.rmtree(str(namespace["_folder"]))
    namespace.clear()  # the README's dictionaries take gigabytes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The blocks of one document go to one worker, in order; they share their names."""
    for item in items:
        if item.path.suffix == ".md":
            item.add_marker(pytest.mark.xdist_group(item.path.name))


pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"], setup=_enter, teardown=_leave).pytest()
