"""One training step of fmxnn, its references and its peers, in alternation in one process: `python benchmarks/steps.py
--help`.
"""

import argparse
import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
from common import add_common, finish, prepared, print_table, shape_of, summary
from contest import SHARES, Contender, Shape, alternate, contender, make_crosscoder, makers

from fmxnn.training.losses import reconstruction_loss


def main() -> None:
    """Times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser)
    arguments = prepared(parser)
    shape = shape_of(arguments)
    found = {
        "shape": shape.numbers(),
        "ranks": ranks(shape),
        "step": timed(shape, arguments.rounds, optimizer=False),
        "step with fused Adam": timed(shape, arguments.rounds, optimizer=True),
        "gradients": gradients(),
    }
    for name in ("step", "step with fused Adam"):
        base = found[name]["SAELens BatchTopK"]["median"]
        rows = [[who, t["median"], t["low"], t["high"], f"{base / t['median']:.2f}"] for who, t in found[name].items()]
        print_table(f"{name}, ms, {shape}", ["", "median", "lower quartile", "upper quartile", "times SAELens"], rows)
    print_table(
        "gradients against dense autograd, float64",
        ["", "largest relative error"],
        [[*pair] for pair in found["gradients"].items()],
    )
    finish(arguments, "steps", found)


def timed(shape: Shape, rounds: int, *, optimizer: bool) -> dict[str, dict[str, float]]:
    """Median and quartiles of each contender, in milliseconds; references run without an optimiser only."""
    x = shape.activations()
    wanted = {
        name: make
        for name, make in makers(x, shape).items()
        if not optimizer or not name.startswith(("contracted", "all-dense"))
    }
    fields: dict[str, Contender] = {name: contender(make(), optimizer=optimizer) for name, make in wanted.items()}

    def clear() -> None:
        for field in fields.values():
            field.clear()

    return summary(alternate({name: field.step for name, field in fields.items()}, rounds, clear))


def ranks(shape: Shape) -> dict[str, dict[str, object]]:
    """Ranks and parameters of each of fmxnn's."""
    found = {}
    for name in SHARES:
        weight = make_crosscoder(shape, name).encoder.weight
        rank = getattr(weight, "ranks", getattr(weight, "rank", None))
        found[name] = {"ranks": rank, "parameters of one weight": sum(p.numel() for p in weight.parameters())}
    return found


def gradients() -> dict[str, float]:
    """The largest relative difference between the sparse backend's gradients and the dense one's, in float64."""
    shape, found = Shape(96, 4, 24, 512, 8), {}
    for name in SHARES:
        crosscoder, x = make_crosscoder(shape, name).double(), shape.activations().double()
        grads = {}
        for backend in ("dense", "sparse"):
            crosscoder.backend = backend
            crosscoder.zero_grad(set_to_none=True)
            reconstruction_loss(x, crosscoder(x)).backward()
            grads[backend] = [p.grad for p in crosscoder.parameters()]
        pairs = zip(grads["dense"], grads["sparse"], strict=True)
        found[name] = max(
            float((a - b).abs().max() / a.abs().max().clamp(min=torch.finfo(a.dtype).tiny)) for a, b in pairs
        )
    return found


if __name__ == "__main__":
    main()
