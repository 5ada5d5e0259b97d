"""fit_weight beside tensorly's decompositions of the same trained decoder, in alternation: `python
benchmarks/environment.py`, then `.venv-bench/bin/python benchmarks/fits.py`. See
docs/decisions/0011-fits-of-our-own.md.
"""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import tensorly
import torch
from tabulate import tabulate
from tensorly.decomposition import parafac, tensor_ring, tensor_ring_als
from torch import Tensor

import fmxnn as fx

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import conversion

ROUNDS, SWEEPS = 3, 30
Fit = Callable[[], float]


def main() -> None:
    """Prints error and time of every contender, at an eighth and at a quarter of the dense parameters."""
    torch.set_num_threads(1)
    tensorly.set_backend("pytorch")
    warnings.simplefilter("ignore")  # tensorly says that it pads its start where a rank exceeds an axis
    _, batches = conversion.activations()
    weight = conversion.trained(conversion.isometric(fx.DenseWeight), batches, 600).decoder.weight
    print(
        f"torch {torch.__version__}, tensorly {tensorly.__version__}, {torch.get_num_threads()} thread, {ROUNDS} rounds"
    )
    rows = [[share, *row] for share in (1 / 8, 1 / 4) for row in compared(contenders(weight, share))]
    print(tabulate(rows, ["share", "", "relative error", "s", "fastest", "slowest"], floatfmt=".3f"))


def compared(fits: dict[str, Fit]) -> list[list[object]]:
    """Name, error and seconds of each, the rounds in alternation."""
    times: dict[str, list[float]] = {name: [] for name in fits}
    errors: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, fit in fits.items():
            torch.manual_seed(0)
            began = perf_counter()
            errors[name] = fit()
            times[name].append(perf_counter() - began)
    return [[name, errors[name], median(taken), min(taken), max(taken)] for name, taken in times.items()]


def contenders(weight: fx.FactorizedWeight, share: float) -> dict[str, Fit]:
    """What makes each fit and gives its relative error."""
    sizes = weight.layers, weight.d_model, weight.latents
    target = weight.to_dense().detach().permute(2, 1, 0).contiguous()  # latents d_model layers
    rank = fx.cp_rank(*sizes, share=share)
    r1, r2, r3 = fx.wide_tensor_ring_ranks(*sizes, share=share)
    ring = [r3, r2, r1, r3]

    def error(found: Tensor) -> float:
        return float((found - target).norm() / target.norm())

    def cp(init: str) -> float:
        return error(
            tensorly.cp_to_tensor(parafac(target, rank, n_iter_max=SWEEPS, init=init, tol=1e-4, random_state=0))
        )

    def als() -> float:
        return error(tensorly.tr_to_tensor(tensor_ring_als(target, ring, n_iter_max=SWEEPS, tol=1e-4, random_state=0)))

    return {
        f"CP {rank}: fit_weight": lambda: fx.fit_weight(weight, fx.CPWeight(*sizes, rank=rank), sweeps=SWEEPS).error,
        f"CP {rank}: parafac, svd": lambda: cp("svd"),
        f"CP {rank}: parafac, random": lambda: cp("random"),
        f"ring {r1, r2, r3}: fit_weight": lambda: (
            fx.fit_weight(weight, fx.TensorRingWeight(*sizes, ranks=(r1, r2, r3)), sweeps=SWEEPS).error
        ),
        f"ring {r1, r2, r3}: tensor_ring_als": als,
        f"ring {r1, r2, r3}: tensor_ring": lambda: error(tensorly.tr_to_tensor(tensor_ring(target, ring))),
    }


if __name__ == "__main__":
    main()
