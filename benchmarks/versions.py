"""This version of fmxnn against an earlier one, in one process and in turns: `python benchmarks/versions.py REVISION`.

The earlier one is read from git and imported under the name `fmxnn_before`, so that both can be there at once.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import ModuleType

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
from common import add_common, finish, prepared, print_table
from contest import Shape, alternate

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "toy": Shape(16, 2, 16, 64, 4),
    "small": Shape(256, 4, 64, 1024, 16),
    "one layer": Shape(1024, 1, 256, 4096, 32),
    "full": Shape(),
}
LEAST_MS = 30.0
"""One measurement repeats a call until it takes as long, since a small one is shorter than the clock's noise."""


def main() -> None:
    """Times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="a commit, branch or tag of this repository")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    add_common(parser)
    arguments = prepared(parser)
    with tempfile.TemporaryDirectory(prefix="fmxnn-before-") as folder:
        versions = {"now": import_module("fmxnn"), "before": earlier(arguments.revision, Path(folder))}
        rows = [
            [f"{name}, {weight}", what, *compared(versions, SHAPES[name], weight, what, arguments.rounds)]
            for name in arguments.shapes
            for weight in ("dense", "ring", "CP")
            for what in CALLS
        ]
    print_table(f"now against {arguments.revision}", ["", "", "ms now", "now / before", "least", "most"], rows)
    finish(arguments, "versions", {"revision": arguments.revision, "rows": rows})


def earlier(revision: str, folder: Path) -> ModuleType:
    """The package of that revision, under another name."""
    git = ["git", "-C", str(ROOT), "archive", revision, "fmxnn"]
    archive = subprocess.run(git, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    for path in folder.rglob("*.py"):
        path.write_text(re.sub(r"\bfmxnn\b", "fmxnn_before", path.read_text()))
    (folder / "fmxnn").rename(folder / "fmxnn_before")
    sys.path.insert(0, str(folder))
    return import_module("fmxnn_before")


def made(fx: ModuleType, shape: Shape, weight: str) -> torch.nn.Module:
    """A crosscoder of that version, with the same parameters in both."""
    torch.manual_seed(0)
    kinds = {"dense": fx.DenseWeight, "ring": fx.TensorRingWeight, "CP": fx.CPWeight}
    encoder = fx.CrossLayerEncoder(kinds[weight](*shape.axes), fx.BatchTopK(shape.k), mask=fx.LayerMask(0.05))
    return fx.Crosscoder(encoder, fx.CrossLayerDecoder(kinds[weight](*shape.axes)))


def forward(fx: ModuleType, crosscoder: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """Codes and reconstruction in eval mode."""
    crosscoder(x)  # sets the threshold
    crosscoder.eval()

    def call() -> None:
        with torch.no_grad():
            crosscoder(x)

    return call


def encode(fx: ModuleType, crosscoder: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """Sparse codes in training mode."""
    return lambda: crosscoder.encode(x, layout=torch.sparse_csr)


def step(fx: ModuleType, crosscoder: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """One step of the trainer, with Adam."""
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=1e-4, fused=True)
    trainer = import_module(f"{fx.__name__}.training").Trainer(crosscoder, optimizer)
    return lambda: trainer.step(x)


CALLS = {"forward in eval": forward, "sparse encode": encode, "step of Trainer": step}


def compared(versions: dict[str, ModuleType], shape: Shape, weight: str, what: str, rounds: int) -> Iterator[float]:
    """Milliseconds now, and now / before: median, least and most of the rounds."""
    x = shape.activations()
    calls = {name: CALLS[what](fx, made(fx, shape, weight), x) for name, fx in versions.items()}
    once = alternate(calls, 1)["now"][0]
    repeats = max(1, round(LEAST_MS / once))

    def repeated(call: Callable[[], object]) -> Callable[[], None]:
        def many() -> None:
            for _ in range(repeats):
                call()

        return many

    times = alternate({name: repeated(call) for name, call in calls.items()}, rounds)
    ratios = sorted(now / before for now, before in zip(times["now"], times["before"], strict=True))
    yield from (sorted(times["now"])[rounds // 2] / repeats, ratios[rounds // 2], ratios[0], ratios[-1])


if __name__ == "__main__":
    main()
