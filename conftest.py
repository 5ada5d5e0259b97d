"""Runs every Python block of README.md and docs/ as a test, in a temporary folder where `examples/` can be read.

The blocks of one document share their names, so `make test` sends whole files to workers.
"""

import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parent


def _enter(namespace: dict[str, object]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fmxnn-docs-"))
    (folder / "examples").symlink_to(ROOT / "examples")
    namespace["_folder"] = folder
    os.chdir(folder)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _leave(namespace: dict[str, object]) -> None:
    os.chdir(ROOT)
    shutil.rmtree(str(namespace["_folder"]))
    namespace.clear()  # the README's dictionaries take gigabytes


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()], patterns=["*.md"], setup=_enter, teardown=_leave
).pytest()
