"""Layers for other networks beside tensorly-torch's: forward and backward of each, in one run and in turns.

`pip install tensorly tensorly-torch` beside fmxnn, then `python benchmarks/drop_in.py`. The contenders of a row have
equally many parameters, up to rounding. tensorly-torch may sum its factors or multiply them out first; both are timed
and the faster one is taken. A ratio is its time over ours, of the same round: median and quartiles.
"""

import argparse
import importlib
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fmxnn as fx

PEER = "tltorch"
MISSING = "tensorly-torch is not installed, so there is nothing to compare with: pip install tensorly tensorly-torch"
Run = Callable[[], Tensor]
Row = tuple[str, dict[str, tuple[Run, int]]]
"""What is compared, and of each contender a forward that gives a loss, and its parameters."""


def main() -> int:
    """Prints a table; 1 where the peer is not installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tries the code and measures nothing")
    arguments = parser.parse_args()
    if importlib.util.find_spec(PEER) is None:
        print(MISSING, file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = [measured(name, contenders, arguments.rounds) for name, contenders in compared(quick=arguments.quick)]
    headers = ["", "parameters", "ours ms", "tensorly-torch ms", "way", "ratio", "quartiles", "nn.Linear ms"]
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.rounds} rounds")
    print(tabulate(rows, headers, floatfmt=".3g"))
    return 0


def compared(*, quick: bool) -> list[Row]:
    """The rows."""
    if quick:
        return [linear(8, 12, 6, rank=3), joint(2, 8, 12, 6, rank=3), embedding(30, 8, 6), crosscoder(2, 8, 24, 6)]
    return [
        linear(256, 1024, 4096, rank=64),
        linear(768, 3072, 1024, rank=128),
        linear(768, 3072, 16, rank=128),
        joint(12, 256, 1024, 4096, rank=256),
        joint(12, 768, 3072, 1024, rank=512),
        embedding(32_000, 512, 4096),
        crosscoder(8, 128, 2048, 256),
    ]


def linear(inputs: int, outputs: int, tokens: int, *, rank: int) -> Row:
    """One matrix of low rank."""
    x = torch.randn(tokens, inputs)
    ours = fx.FactorizedLinear(fx.CPWeight(1, inputs, outputs, rank=rank))
    contenders = {"ours": contender(ours, x), "nn.Linear": contender(nn.Linear(inputs, outputs), x)}
    for way in ("factorized", "reconstructed"):
        contenders[way] = contender(peer_linear((inputs,), (outputs,), rank, way), x)
    return f"{inputs} -> {outputs}, rank {rank}, {tokens} tokens", contenders


def joint(layers: int, inputs: int, outputs: int, tokens: int, *, rank: int) -> Row:
    """One layer of several that are one CP tensor."""
    x = torch.randn(tokens, inputs)
    ours = fx.FactorizedLinear(fx.CPWeight(layers, inputs, outputs, rank=rank), layers // 2)
    contenders = {"ours": contender(ours, x), "nn.Linear": contender(nn.Linear(inputs, outputs), x)}
    for way in ("factorized", "reconstructed"):
        whole = peer_linear((inputs,), (outputs,), rank, way, n_layers=layers)
        contenders[way] = contender(whole, x, layers // 2)
    return f"one of {layers} x {inputs} -> {outputs}, rank {rank}, {tokens} tokens", contenders


def embedding(tokens: int, width: int, batch: int) -> Row:
    """A table as a tensor-train matrix of theirs and as a CP of ours."""
    index = torch.randint(tokens, (batch,))
    peer = importlib.import_module(PEER).FactorizedEmbedding(tokens, width, factorization="blocktt", rank=16)
    rank = max(1, count(peer) // (tokens + width + 1))
    ours = fx.FactorizedEmbedding(fx.CPWeight(1, width, tokens, rank=rank))
    contenders = {"ours": contender(ours, index), "lookup": contender(peer, index)}
    return f"embedding {tokens} x {width}, {batch} tokens", contenders


def crosscoder(layers: int, d_model: int, latents: int, tokens: int) -> Row:
    """A crosscoder of CP weights with as many parameters as dense ones, and TopK of 32 a token."""
    x, k = torch.randn(tokens, layers, d_model), min(32, latents)
    axes = layers, d_model, latents
    ours = fx.Crosscoder(fx.CrossLayerEncoder(fx.CPWeight(*axes), fx.TopK(k)), fx.CrossLayerDecoder(fx.CPWeight(*axes)))
    contenders = {"ours": contender(ours, x)}
    for way in ("factorized", "reconstructed"):
        rank = fx.cp_rank(*axes)
        reader = peer_linear((layers, d_model), (latents,), rank, way)
        writer = peer_linear((latents,), (layers, d_model), rank, way)
        contenders[way] = contender(nn.Sequential(nn.Flatten(), reader, fx.TopK(k), writer), x)
    return f"CP crosscoder {layers} x {d_model} -> {latents}, {tokens} tokens", contenders


def peer_linear(inputs: tuple[int, ...], outputs: tuple[int, ...], rank: int, way: str, **more: Any) -> nn.Module:
    """tensorly-torch's FactorizedLinear of a CP tensor."""
    made = importlib.import_module(PEER).FactorizedLinear
    return made(inputs, outputs, factorization="cp", rank=rank, implementation=way, **more)


def contender(module: nn.Module, x: Tensor, *more: int) -> tuple[Run, int]:
    """A forward to a loss."""
    return lambda: module(x, *more).square().mean(), count(module)


def count(module: nn.Module) -> int:
    """How many parameters it has."""
    return sum(parameter.numel() for parameter in module.parameters())


def measured(name: str, contenders: dict[str, tuple[Run, int]], rounds: int) -> list[object]:
    """A row of the table; the first round warms up."""
    times: dict[str, list[float]] = {each: [] for each in contenders}
    for _ in range(rounds + 1):
        for each, (run, _) in contenders.items():
            began = time.perf_counter()
            run().backward()
            times[each].append(1e3 * (time.perf_counter() - began))
    times = {each: taken[1:] for each, taken in times.items()}
    peers = [each for each in contenders if each not in ("ours", "nn.Linear")]
    best = min(peers, key=lambda each: statistics.median(times[each]))
    ratios = [theirs / mine for theirs, mine in zip(times[best], times["ours"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
    sizes = f"{contenders['ours'][1]:,} / {contenders[best][1]:,}"
    medians = [statistics.median(times[each]) if each in times else None for each in ("ours", best, "nn.Linear")]
    return [name, sizes, medians[0], medians[1], best, middle, f"{low:.3g} to {high:.3g}", medians[2]]


if __name__ == "__main__":
    sys.exit(main())
