"""Stored activations: what each dtype costs, and how fast they are read. `python benchmarks/store.py`, or one part:
cost, rate.

`rate` reads every batch of a store, shuffled, beside a plain read of the same files, in alternation. Before each of
them the system is told to forget the files (posix_fadvise), so that they come from the disk. Set TMPDIR to choose the
disk.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
from tabulate import tabulate
from torch import Tensor

import fmxnn as fx
from fmxnn.activations import (
    Activations,
    ActivationStore,
    Contexts,
    Shuffle,
    activation_scale,
    contexts,
    harvest,
    store,
)
from fmxnn.activations.models import open_model
from fmxnn.activations.source import Sides
from fmxnn.metrics import Reconstruction, measure_reconstruction
from fmxnn.training import Trainer

TINY = str(Path(__file__).parents[1] / "examples" / "tiny-lm")
DTYPES = ("float32", "bfloat16", "float16", "int8")
STEPS, ROUNDS, GIB = 200, 7, 3


def main() -> None:
    """Prints the tables asked for."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for part in sys.argv[1:] or ["cost", "rate"]:
        with tempfile.TemporaryDirectory() as folder:
            {"cost": cost, "rate": rate}[part](Path(folder))


def cost(folder: Path) -> None:
    """Explained variance of a crosscoder trained on what each dtype holds, and measured on the float32 activations."""
    model, tokenizer = open_model(TINY, dtype=torch.float32)
    held, train = contexts(topics.values(), tokenizer, context=128).split(10_000)
    streams = {
        name: harvest(model, text, tokenizer=tokenizer, layers=range(2, 10), batch=512)
        for name, text in (("held", held), ("train", train))
    }
    whole = {name: store(stream, folder / name) for name, stream in streams.items()}
    scale = activation_scale(islice(whole["held"], 8))
    exact, rows = [scale * x for x in whole["held"]], []
    for dtype in DTYPES:
        stored = {name: store(stream, folder / f"{name}-{dtype}", dtype=dtype) for name, stream in whole.items()}
        rounded = [scale * x for x in stored["held"]]
        crosscoder = trained(stored["train"], scale)
        size = sum(path.stat().st_size for path in stored["train"].folder.glob("shard-*")) / stored["train"].rows
        rows.append([dtype, size, missed(exact, rounded), variance(crosscoder, exact), variance(crosscoder, rounded)])
    heads = ["stored as", "bytes a token", "variance lost by rounding", "trained on it", "and measured on it"]
    print(tabulate(rows, heads, floatfmt=(None, ",.0f", ".1e", ".4f", ".4f")))


def trained(stream: ActivationStore, scale: float) -> fx.Crosscoder:
    """A crosscoder of eight layers after `STEPS` steps, always from the same start."""
    torch.manual_seed(0)
    sizes = 8, 128, 1024
    encoder = fx.CrossLayerEncoder(fx.DenseWeight(*sizes), fx.BatchTopK(16))
    crosscoder = fx.isometric_start(fx.Crosscoder(encoder, fx.CrossLayerDecoder(fx.DenseWeight(*sizes))))
    trainer = Trainer(crosscoder.train(), torch.optim.Adam(crosscoder.parameters(), lr=1e-3, fused=True))
    for x in islice(ActivationStore(stream.folder, epochs=99), STEPS):
        trainer.step(scale * x)
    return crosscoder


def variance(crosscoder: fx.Crosscoder, batches: list[Tensor]) -> float:
    """Explained variance, the mean over layers."""
    return measure_reconstruction(crosscoder.eval(), batches).mean("ev")


def missed(exact: list[Tensor], rounded: list[Tensor]) -> float:
    """The share of the variance that rounding takes, the mean over layers."""
    measured = Reconstruction()
    for x, x_hat in zip(exact, rounded, strict=True):
        measured.update(x, x_hat)
    return 1 - measured.compute().mean("ev")


class Drawn:
    """Activations as large as those of GPT-2 small at eight layers, made quickly."""

    name, layers, d_model, device = "drawn", tuple(range(8)), 768, torch.device("cpu")

    def __init__(self, rows: int):
        ids = torch.zeros(rows // 127, 128, dtype=torch.int32)
        keep = torch.ones_like(ids, dtype=torch.bool)
        keep[:, 0] = False
        self.contexts, self.some = Contexts(ids, keep), torch.randn(127, 8, 768).bfloat16()

    def read(self, start: int, stop: int) -> Sides:
        """The same numbers for each context."""
        return (self.some.repeat(stop - start, 1, 1),)

    def identity(self) -> dict[str, object]:
        """Its text alone."""
        return {"text": self.contexts.digest}


def rate(folder: Path) -> None:
    """MiB a second of a plain read and of shuffled batches, and their ratio in each round."""
    source = Drawn(int(GIB * 2**30 / (8 * 768 * 2)))
    store(Activations(source, Shuffle(4096, 32)), folder / "cache", dtype="bfloat16")
    files = sorted((folder / "cache").glob("*.safetensors"))
    ways: dict[str, Callable[[], object]] = {
        "plain read": lambda: plain(files),
        "batches, not checked": lambda: exhaust(folder / "cache", verify="never"),
        "batches in float32, not checked": lambda: exhaust(folder / "cache", verify="never", dtype=torch.float32),
        "batches, each shard checked once": lambda: exhaust(folder / "cache"),
    }
    size = sum(path.stat().st_size for path in files) / 2**20
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            forget(files)
            began = time.perf_counter()
            way()
            rates[name].append(size / (time.perf_counter() - began))
    rows = [[name, *spread(found), *spread(ratios(found, rates["plain read"]))] for name, found in rates.items()]
    heads = ["", "MiB/s", "lowest", "highest", "to the plain read", "lowest", "highest"]
    print(f"\n{size:,.0f} MiB in {len(files)} files, {ROUNDS} rounds")
    print(tabulate(rows, heads, floatfmt=(None, ",.0f", ",.0f", ",.0f", ".2f", ".2f", ".2f")))


def ratios(some: list[float], others: list[float]) -> list[float]:
    """Round by round."""
    return [one / other for one, other in zip(some, others, strict=True)]


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, lowest and highest."""
    return median(values), min(values), max(values)


def plain(files: list[Path]) -> None:
    """Reads every byte into one buffer."""
    buffer = memoryview(bytearray(2**24))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def exhaust(folder: Path, **options: object) -> None:
    """Every batch, one at a time."""
    for _ in ActivationStore(folder, **options):
        pass


def forget(files: list[Path]) -> None:
    """Takes the files out of the system's memory."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


if __name__ == "__main__":
    main()
