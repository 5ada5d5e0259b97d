"""Runs every Python block of README.md, docs/ and the package's docstrings, in a folder where `examples/` can be read.

The blocks of one file share their names, so `make test` sends whole files to workers; in docstrings `torch` and
`fx` (fmxnn) are there already.
"""

import os
import shutil
import tempfile
from importlib import import_module
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
from sybil import Sybil
from sybil.document import PythonDocStringDocument
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
    namespace.clear()  # what a page made may be large


def _enter_code(namespace: dict[str, object]) -> None:
    _enter(namespace)
    namespace |= {"torch": torch, "nn": torch.nn, "fx": import_module("fmxnn")}


DOCUMENTS = Sybil(
    [PythonCodeBlockParser()], patterns=["*.md"], excludes=["saved_before/*/README.md"], setup=_enter, teardown=_leave
)
CODE = Sybil(
    [PythonCodeBlockParser()],
    patterns=["fmxnn/*.py", "fmxnn/*/*.py", "fmxnn/*/*/*.py"],  # `**` would stand for one folder
    document_types={".py": PythonDocStringDocument},
    setup=_enter_code,
    teardown=_leave,
)
pytest_collect_file = (DOCUMENTS + CODE).pytest()
