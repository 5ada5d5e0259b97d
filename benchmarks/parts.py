"""The parts of a step alone, against what they stand for: BatchTopK, decode, functional coherence, import,
from_pretrained.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
from common import add_common, finish, prepared, print_table, shape_of, summary
from contest import Shape, alternate, make_crosscoder
from torch import Tensor

import fmxnn
from fmxnn.metrics import functional_coherence
from fmxnn.sparse import sum_rows, to_codes, to_csr
from fmxnn.sparse.pre_activations import Given
from fmxnn.sparse.selection import largest

SAVED = Shape(layers=8, d_model=128, latents=2048, k=16)
"""The dictionary that examples/tiny-lm is given."""
IMPORT = "import time, torch; start = time.perf_counter(); import fmxnn; print(1e3 * (time.perf_counter() - start))"

Calls = dict[str, Callable[[], object]]


def choose(pre: Tensor, count: int) -> Tensor:
    """`tokens latents -> entries`: the choice that is timed, as sorted flat indices, and the one place to change it."""
    return largest(Given(pre), count).keys


def main() -> None:
    """Times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser)
    arguments = prepared(parser)
    shape, rounds = shape_of(arguments), arguments.rounds
    found: dict[str, object] = {"shape": shape.numbers()}
    for name, calls in {
        "BatchTopK": selection(shape, found),
        "decode": decoding(shape),
        "functional coherence": coherence(shape, found),
    }.items():
        found[name] = summary(alternate(calls, rounds))
    found["import"] = summary({"fmxnn over torch": [import_time() for _ in range(min(rounds, 5))]})
    with tempfile.TemporaryDirectory(prefix="fmxnn-bench-") as folder:
        found["from_pretrained"] = summary(alternate(loading(Path(folder)), rounds))
    found["threads"] = same_codes(shape)
    for name in ("BatchTopK", "decode", "functional coherence", "import", "from_pretrained"):
        rows = [[who, t["median"], t["low"], t["high"]] for who, t in found[name].items()]
        print_table(f"{name}, ms", ["", "median", "lower quartile", "upper quartile"], rows)
    print_table("checks", ["", ""], [[name, found[name]] for name in ("same set", "coherence differs by", "threads")])
    finish(arguments, "parts", found)


@torch.no_grad()
def selection(shape: Shape, found: dict[str, object]) -> Calls:
    """BatchTopK on the pre-activations of random activations, and whether it keeps torch.topk's set."""
    crosscoder = make_crosscoder(shape, "dense")
    pre, count = crosscoder.encoder.pre_activations(shape.activations()), shape.tokens * shape.k
    sparsifier = fmxnn.BatchTopK(shape.k).train()
    kept = choose(pre, count)
    found["same set"] = torch.equal(kept, pre.flatten().topk(count).indices.sort().values)
    return {
        "torch.topk, flattened": lambda: pre.flatten().topk(count, sorted=False),
        "relu, torch.topk, scatter": lambda: scattered(pre, count),
        "fmxnn, sorted entries": lambda: choose(pre, count),
        "fmxnn.BatchTopK, dense codes": torch.no_grad()(lambda: sparsifier(pre)),
        "fmxnn.sparse.codes.keep_largest": lambda: fmxnn.sparse.codes.keep_largest(pre, count),
    }


def scattered(pre: Tensor, count: int) -> Tensor:
    """The usual BatchTopK."""
    flat = pre.relu().flatten()
    top = flat.topk(count, sorted=False)
    return torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(pre)


@torch.no_grad()
def decoding(shape: Shape) -> Calls:
    """The decoder's table alone: `tokens latents, latents bonds -> tokens bonds`."""
    crosscoder = make_crosscoder(shape, "dense")
    dense = crosscoder.encoder(shape.activations())
    csr, table = to_csr(dense), crosscoder.decoder.weight.table.detach()
    codes = to_codes(csr)
    return {
        "dense product": lambda: dense @ table,
        "torch CSR product": lambda: csr @ table,
        "fmxnn sum_rows, CSR": lambda: sum_rows(csr, table),
        "fmxnn sum_rows, Codes": lambda: sum_rows(codes, table),
    }


@torch.no_grad()
def coherence(shape: Shape, found: dict[str, object]) -> Calls:
    """Functional coherence of one batch, against layers + 1 encodes."""
    crosscoder, x = make_crosscoder(shape, "dense"), shape.activations()
    crosscoder(x)  # sets the threshold
    crosscoder.eval()
    ours = functional_coherence(crosscoder, [x]).values
    plain = literal_coherence(crosscoder, x)
    both = ~(ours.isnan() | plain.isnan())
    found["coherence differs by"] = (
        float((ours[both] - plain[both]).abs().max()) if both.any() else "no latent has a value"
    )
    return {
        "layers + 1 encodes": lambda: literal_coherence(crosscoder, x),
        "fmxnn.metrics.functional_coherence": lambda: functional_coherence(crosscoder, [x]),
    }


@torch.no_grad()
def literal_coherence(crosscoder: fmxnn.Crosscoder, x: Tensor, min_active: int = 10) -> Tensor:
    """`-> latents`: the definition, an encode for each layer that is zeroed, averaged over active tokens."""
    z = crosscoder.encoder(x)
    active = z > 0
    change = []
    for layer in range(x.shape[1]):
        masked = x.clone()
        masked[:, layer] = 0
        moved = (z - crosscoder.encoder(masked)).abs()
        change.append((moved / z.where(active, 1.0) * active).sum(0).double())
    share = torch.stack(change) / active.sum(0)
    return torch.where(active.sum(0) >= min_active, share.sum(0) / share.amax(0), torch.nan)


def import_time() -> float:
    """Milliseconds that `import fmxnn` takes after `import torch`, in a fresh process."""
    return float(
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", IMPORT], capture_output=True, text=True, check=True
        ).stdout
    )


def loading(folder: Path) -> Calls:
    """from_pretrained, checks and digests included, of a dictionary of examples/tiny-lm's size."""
    calls: Calls = {}
    for name in ("dense", "TR"):
        fmxnn.save_pretrained(make_crosscoder(SAVED, name), folder / name)
        calls[f"{name} {SAVED.layers} x {SAVED.d_model} x {SAVED.latents}"] = lambda name=name: fmxnn.from_pretrained(
            folder / name
        )
    return calls


@torch.no_grad()
def same_codes(shape: Shape) -> str:
    """Whether one thread and four choose the same codes."""
    threads, codes = torch.get_num_threads(), []
    for count in (1, 4):
        torch.set_num_threads(count)
        codes.append(make_crosscoder(shape, "TR").encode(shape.activations(), layout=torch.sparse_csr))
    torch.set_num_threads(threads)
    one, four = codes
    same_set = torch.equal(one.col_indices(), four.col_indices()) and torch.equal(
        one.crow_indices(), four.crow_indices()
    )
    if not same_set:
        return "codes differ between 1 and 4 threads"
    return "codes identical" if torch.equal(one.values(), four.values()) else "the same set, values differ by rounding"


if __name__ == "__main__":
    main()
