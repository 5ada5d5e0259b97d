"""What converting keeps, on tiny-lm: the tables of docs/conversion.md. `python examples/conversion.py`, or one table:
fits, factorised, saes, cost.
"""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
from torch import Tensor

import fmxnn as fx
from fmxnn.activations import activation_scale, harvest
from fmxnn.metrics import measure_reconstruction
from fmxnn.training import Trainer

TINY = str(Path(__file__).parent / "tiny-lm")
LAYERS, D_MODEL, LATENTS, K = 8, 128, 1024, 16
SAE_LATENTS = 512
Make = Callable[[int, int, int], fx.FactorizedWeight]


def main() -> None:
    """Prints the tables asked for."""
    asked = sys.argv[1:] or ["fits", "factorised", "saes", "cost"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if asked != ["cost"]:
        held, train = activations()
        if "saes" in asked:
            saes(held, train)
        if {"fits", "factorised"} & set(asked):
            dense = trained(isometric(fx.DenseWeight), train, 600)
            print(f"dense: explained variance {variance(dense, held):.3f}")
            if "fits" in asked:
                fits(dense)
            if "factorised" in asked:
                factorised(dense, held, train)
    if "cost" in asked:
        cost()


def activations() -> tuple[Tensor, Tensor]:
    """`batches tokens layers d_model`: 20 batches that no training sees, and 200 to train on."""
    stream = harvest(TINY, topics.values(), layers=range(2, 10), batch=512)
    x = torch.stack(list(islice(stream, 220)))
    x *= activation_scale(x[:8])
    return x[:20], x[20:]


def isometric(make: Callable[[int, int, int], fx.Weight]) -> fx.Crosscoder:
    """A crosscoder of eight layers with an isometric start, always the same."""
    torch.manual_seed(0)
    sizes = LAYERS, D_MODEL, LATENTS
    return fx.isometric_start(
        fx.Crosscoder(fx.CrossLayerEncoder(make(*sizes), fx.BatchTopK(K)), fx.CrossLayerDecoder(make(*sizes)))
    )


def tied(layers: int, latents: int) -> fx.Crosscoder:
    """A dense crosscoder with a tied start."""
    sizes = layers, D_MODEL, latents
    return fx.tied_start(
        fx.Crosscoder(
            fx.CrossLayerEncoder(fx.DenseWeight(*sizes), fx.BatchTopK(K)), fx.CrossLayerDecoder(fx.DenseWeight(*sizes))
        )
    )


def trained(crosscoder: fx.Crosscoder, batches: Tensor, steps: int) -> fx.Crosscoder:
    """The same crosscoder after some steps, from the first batch on."""
    trainer = Trainer(crosscoder.train(), torch.optim.Adam(crosscoder.parameters(), lr=1e-3, fused=True))
    for step in range(steps):
        trainer.step(batches[step % len(batches)])
    return crosscoder


def variance(crosscoder: fx.Crosscoder, held: Iterable[Tensor]) -> float:
    """Explained variance, the mean over layers."""
    return measure_reconstruction(crosscoder.eval(), held).mean("ev")


def calibrated(crosscoder: fx.Crosscoder, x: Tensor) -> fx.Crosscoder:
    """The same crosscoder, its threshold set to keep K latents of these tokens on average."""
    with torch.no_grad():
        crosscoder.encoder.sparsifier.calibrate(crosscoder.encoder.pre_activations(x.flatten(0, 1)))
    return crosscoder


def fits(dense: fx.Crosscoder) -> None:
    """The error of each weight fitted to the decoder's."""
    for share in (1 / 8, 1 / 4):
        for name, make in {
            "ring, default ranks": ring(fx.tensor_ring_ranks, share),
            "ring, wide ranks": ring(fx.wide_tensor_ring_ranks, share),
            "CP": cp(share),
            "Tucker": lambda *sizes, share=share: fx.EinsumWeight(
                "latents r, p q r, d_model q, layers p",
                **dict(
                    zip(("layers", "d_model", "latents"), sizes, strict=True),
                    p=LAYERS,
                    q=D_MODEL,
                    r=int(share * LATENTS),
                ),
            ),
        }.items():
            began = time.perf_counter()
            torch.manual_seed(0)
            fit = fx.fit_weight(dense.decoder.weight, make(LAYERS, D_MODEL, LATENTS))
            print(
                f"{name} at {share}: {fit.parameters:,} parameters, relative error {fit.error:.3f}, "
                f"{time.perf_counter() - began:.0f} s"
            )


def ring(ranks: Callable[..., tuple[int, int, int]], share: float) -> Make:
    """A tensor ring with a share of the dense parameters."""
    return lambda *sizes: fx.TensorRingWeight(*sizes, ranks=ranks(*sizes, share=share))


def cp(share: float) -> Make:
    """A CP weight with a share of the dense parameters."""
    return lambda *sizes: fx.CPWeight(*sizes, rank=fx.cp_rank(*sizes, share=share))


def factorised(dense: fx.Crosscoder, held: Tensor, train: Tensor) -> None:
    """Explained variance of `factorize` at a quarter of the parameters, and of a fresh start of as many steps."""
    for name, make in (("wide ring", ring(fx.wide_tensor_ring_ranks, 1 / 4)), ("CP", cp(1 / 4))):
        torch.manual_seed(0)
        made, fresh = fx.factorize(dense, make), isometric(make)
        error = fx.relative_error(dense.encoder.weight, made.encoder.weight)
        row = [variance(made, held), variance(calibrated(made, train[:4]), held)]
        for steps in (100, 200):
            row.append(variance(trained(made, train, steps), held))
            trained(fresh, train, steps)
        print(
            f"{name}: error of the encoder {error:.2f}, explained variance",
            *(f"{value:.3f}" for value in (*row, variance(fresh, held))),
        )


def saes(held: Tensor, train: Tensor) -> None:
    """Explained variance and L0 of a crosscoder joined from one SAE a layer, and of a fresh tied start."""
    made = []
    for layer in range(LAYERS):
        torch.manual_seed(layer)
        made.append(trained(tied(1, SAE_LATENTS), train[:, :, layer : layer + 1], 200))
    joined = calibrated(fx.from_saes(made, fx.BatchTopK(K)), train[:2])
    torch.manual_seed(0)
    fresh = tied(LAYERS, SAE_LATENTS)
    print(f"joined: explained variance {variance(joined, held):.3f}")
    for steps in (20, 80):
        for name, crosscoder in (("joined", joined), ("fresh", fresh)):
            report = measure_reconstruction(trained(crosscoder, train, steps).eval(), held)
            print(f"{name} after {steps} more steps: explained variance {report.mean('ev'):.3f}, L0 {report.l0:.0f}")


def cost() -> None:
    """Seconds of one sweep at the sizes of GPT2, and the peak of memory (Linux)."""
    sizes = 8, 768, 16_384
    torch.manual_seed(0)
    target = fx.DenseWeight(*sizes)
    for name, make in (("ring", ring(fx.tensor_ring_ranks, 1 / 8)), ("CP", cp(1 / 8))):
        weight = make(*sizes)
        began = time.perf_counter()
        fx.fit_weight(target, weight, sweeps=1, tries=0)
        seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{name}: one sweep {seconds:.0f} s, peak of the process so far {peak * 1024 / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
