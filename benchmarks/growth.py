"""How time and memory grow with latents (encode) and with layers (training step), each in a process of its own."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
from common import (
    MB,
    add_common,
    finish,
    peak,
    prepared,
    print_table,
    reset_peak,
    shape_of,
    size_flags,
    subprocess_json,
)
from contest import Shape, contender, contracted, make_crosscoder, ours

WHOLE = ("dense", "TR")
LARGE, LARGEST_REFERENCE = 2**16, 2**16
"""From LARGE on only TR at an eighth is built; dense codes are the reference up to LARGEST_REFERENCE latents."""


def main() -> None:
    """Both growths, or one point where `--point` names it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser)
    parser.add_argument(
        "--exponents", type=int, nargs="+", default=list(range(12, 19)), help="powers of two of latents"
    )
    parser.add_argument("--layer-counts", type=int, nargs="+", default=[2, 4, 8, 16, 26])
    parser.add_argument("--point", choices=["latents", "layers"])
    parser.add_argument("--name", default="TR 1/8")
    parser.add_argument("--reference", action="store_true", help="dense codes")
    arguments = prepared(parser)
    shape = shape_of(arguments)
    if arguments.point:
        measure = encode_point if arguments.point == "latents" else step_point
        print(json.dumps(measure(shape, arguments.name, arguments.reference, min(arguments.rounds, 5))))
        return
    found = {"latents": over_latents(arguments, shape), "layers": over_layers(arguments, shape)}
    for axis, what in (("latents", "encode under no_grad"), ("layers", "training step")):
        rows = [[p[axis], p["name"], p.get("ms", p.get("failed")), p.get("peak MB")] for p in found[axis]]
        print_table(f"{what}, over {axis}", [axis, "", "ms", "peak MB beyond the modules"], rows)
    finish(arguments, "growth", {"shape": shape.numbers(), **found})


def over_latents(arguments: argparse.Namespace, shape: Shape) -> list[dict[str, object]]:
    """Encode at every size; dense and TR of equal parameters where they fit."""
    points = []
    for latents in (2**exponent for exponent in arguments.exponents):
        names = ("TR 1/8",) if latents >= LARGE else (*WHOLE, "TR 1/8")
        points += [point(arguments, replace(shape, latents=latents), "latents", name) for name in names]
        if latents <= LARGEST_REFERENCE:
            points.append(point(arguments, replace(shape, latents=latents), "latents", "TR 1/8", reference=True))
    return points


def over_layers(arguments: argparse.Namespace, shape: Shape) -> list[dict[str, object]]:
    """A training step at every number of layers."""
    points = []
    for layers in arguments.layer_counts:
        sized = replace(shape, layers=layers)
        points += [point(arguments, sized, "layers", name) for name in ("dense", "TR", "CP", "TR 1/8")]
        points.append(point(arguments, sized, "layers", "dense", reference=True))
    return points


def point(
    arguments: argparse.Namespace, shape: Shape, axis: str, name: str, *, reference: bool = False
) -> dict[str, object]:
    """One process."""
    sized = argparse.Namespace(**vars(arguments) | shape.numbers())
    flags = [f"--point={axis}", f"--name={name}", *(["--reference"] if reference else [])]
    label = f"{name}, dense codes" if reference else name
    return {axis: getattr(shape, axis), "name": label, **subprocess_json("growth.py", *flags, *size_flags(sized))}


@torch.no_grad()
def encode_point(shape: Shape, name: str, reference: bool, rounds: int) -> dict[str, float]:
    """K codes a token as CSR, chosen over the batch; the reference makes dense codes."""
    small = Shape(tokens=64, layers=shape.layers, d_model=16, latents=1024, k=4)
    encode(small, name, reference)()
    call = encode(shape, name, reference)
    return timed(call, rounds)


def encode(shape: Shape, name: str, reference: bool) -> Callable[[], object]:
    """The call that is measured."""
    crosscoder, x = make_crosscoder(shape, name), shape.activations()
    crosscoder.backend = "dense" if reference else "auto"
    layout = torch.strided if reference else torch.sparse_csr
    return torch.no_grad()(lambda: crosscoder.encode(x, layout=layout))


def step_point(shape: Shape, name: str, reference: bool, rounds: int) -> dict[str, float]:
    """Forward and backward; the peak is beyond parameters and gradients."""
    make = contracted if reference else ours
    small = Shape(tokens=64, layers=shape.layers, d_model=16, latents=256, k=4)
    contender(make(small.activations(), small, name)).step()
    field = contender(make(shape.activations(), shape, name))
    before = reset_peak()
    field.step()
    beyond = peak() - before - field.gradient_bytes()
    times = []
    for _ in range(rounds):
        field.clear()
        start = time.perf_counter()
        field.step()
        times.append(1e3 * (time.perf_counter() - start))
    return {"ms": round(statistics.median(times), 2), "peak MB": round(beyond / 1e6, 1)}


def timed(call: Callable[[], object], rounds: int) -> dict[str, float]:
    """The peak of the first call, the median time of the later ones."""
    before = reset_peak()
    call()
    beyond, times = peak() - before, []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return {
        "ms": round(statistics.median(times), 2),
        "peak MB": round(beyond / 1e6, 1),
        "peak MiB": round(beyond / MB, 1),
    }


if __name__ == "__main__":
    main()
