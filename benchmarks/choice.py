"""What the cost model chooses, against the dense path and against the better of both, over sizes: `python
benchmarks/choice.py --help`.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable
from operator import truediv
from statistics import median

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
from common import add_common, finish, prepared, print_table
from contest import Shape, alternate, make_crosscoder

from fmxnn import Crosscoder
from fmxnn.training.losses import reconstruction_loss

SIZES = [
    Shape(tokens, layers, d_model, latents, k)
    for tokens, (layers, d_model), (latents, k) in itertools.product(
        (16, 256, 1024), ((1, 64), (8, 128)), ((256, 8), (256, 64), (2048, 16), (2048, 256))
    )
]
LEAST_MS = 30.0
"""One measurement repeats a call until it takes as long, since a small one is shorter than the clock's noise."""


def main() -> None:
    """Times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser)
    arguments = prepared(parser)
    shapes = (
        [Shape(arguments.tokens, arguments.layers, arguments.d_model, arguments.latents, arguments.k)]
        if small(arguments)
        else SIZES
    )
    rows = [
        row for shape in shapes for weight in ("dense", "TR 1/8") for row in compared(shape, weight, arguments.rounds)
    ]
    apart = {
        name: [row["auto / dense"] for row in rows if (row["taken"] == "dense") == (name == "dense")]
        for name in ("dense", "sparse")
    }
    columns = ["name", "mode", "taken", "auto", "dense", "sparse", "auto / dense", "auto / best"]
    print_table("the cost model's choice, ms", columns, [[row[column] for column in columns] for row in rows])
    finish(
        arguments,
        "choice",
        {
            "rows": rows,
            "slowest sparse choice against dense": max(apart["sparse"], default=None),
            "equal paths differ by": [min(apart["dense"], default=None), max(apart["dense"], default=None)],
            "worst against the better": max(row["auto / best"] for row in rows),
        },
    )


def small(arguments: argparse.Namespace) -> bool:
    """Whether sizes were given, as a trial of the code does."""
    return any(getattr(arguments, name) != size for name, size in Shape().numbers().items())


def compared(shape: Shape, weight: str, rounds: int) -> list[dict[str, object]]:
    """Training step and inference of one size: each backend's median, and the median over rounds of the choice's time
    as a share of theirs.
    """
    crosscoder, x = make_crosscoder(shape, weight), shape.activations()
    crosscoder(x)  # sets the threshold
    found = []
    for mode, run in (("training", step), ("inference", infer)):
        crosscoder.train(mode == "training")
        crosscoder.backend = "auto"
        taken = crosscoder.plan(shape.tokens).taken
        calls = {
            backend: repeated(lambda backend=backend, run=run: run(crosscoder, x, backend))
            for backend in ("auto", "dense", "sparse")
        }
        times = alternate({name: call for name, (call, _) in calls.items()}, rounds, collect=False)
        each = {name: [ms / count for ms in times[name]] for name, (_, count) in calls.items()}
        ms = {name: median(found) for name, found in each.items()}
        better = min(("dense", "sparse"), key=ms.__getitem__)
        ratios = {
            f"auto / {name}": round(median(map(truediv, each["auto"], each[other])), 3)
            for name, other in (("dense", "dense"), ("best", better))
        }
        name = (
            f"{weight}, {shape.tokens} tokens, {shape.layers} x {shape.d_model}, {shape.latents} latents, k {shape.k}"
        )
        found.append(
            {"name": name, "mode": mode, "taken": taken.backend + (" + bf16" if taken.propose else ""), **ms, **ratios}
        )
    return found


def step(crosscoder: Crosscoder, x: torch.Tensor, backend: str) -> None:
    """Forward and backward."""
    crosscoder.backend = backend
    crosscoder.zero_grad(set_to_none=True)
    reconstruction_loss(x, crosscoder(x)).backward()


@torch.no_grad()
def infer(crosscoder: Crosscoder, x: torch.Tensor, backend: str) -> None:
    """Forward alone."""
    crosscoder.backend = backend
    crosscoder(x)


def repeated(call: Callable[[], None]) -> tuple[Callable[[], None], int]:
    """The call, as often in a row as it takes to be measured, and how often that is."""
    call()
    start = time.perf_counter()
    call()
    count = max(1, round(LEAST_MS / (1e3 * (time.perf_counter() - start))))

    def many() -> None:
        for _ in range(count):
            call()

    return many, count


if __name__ == "__main__":
    main()
