"""`make bench-gpu`: the paper's four model shapes on one GPU, then a whole run with a random GPT2-Small-shaped model.

Every step runs under bf16 autocast with fused Adam. Roofline: a copy's bandwidth and a bf16 product's rate measured in
the same run; see `floor_seconds` for what a step cannot avoid. Without a GPU: `python benchmarks/gpu.py --device cpu
--tiny` tries the code.
"""

import argparse
import datetime
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
from gpu_training import end_to_end
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fmxnn as fx
from fmxnn.training import Trainer
from fmxnn.training.losses import reconstruction_loss

RESULTS = Path(__file__).resolve().parent / "results"
LAYERS, LATENTS, K, BATCH = 8, 16_384, 64, 4096
WIDTHS = {"GPT2-Small": 768, "Pythia-410M": 1024, "Pythia-1.4B": 2048, "Gemma2-2B": 2304}
SHARES = {"dense": 1.0, "TR": 1.0, "CP": 1.0, "TR 1/2": 1 / 2, "TR 1/4": 1 / 4, "TR 1/8": 1 / 8}
GOALS = {
    ("GPT2-Small", "TR"): "550k tokens/s and 60 % of the roofline",
    ("Gemma2-2B", "TR"): "135k tokens/s and 60 % of the roofline",
    ("Pythia-410M", "TR 1/8"): "2.5M tokens/s",
}


def main() -> int:
    """Measures, prints and writes; one sentence where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that try the code and measure nothing")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--models", nargs="+", default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--seconds", type=float, default=180.0, help="length of the whole run; 0 leaves it out")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            f"bench-gpu needs a CUDA GPU and torch {torch.__version__} sees none; --device cpu --tiny tries its code "
            "on a processor"
        )
        return 1
    torch.set_float32_matmul_precision("high")
    rates = roofline(arguments.device, tiny=arguments.tiny)
    print(
        f"copy {rates['copy bytes/s'] / 1e12:.3g} TB/s, bf16 product {rates['bf16 FLOP/s'] / 1e12:.4g} TFLOP/s",
        flush=True,
    )
    found = {"machine": machine(arguments.device), "rates": rates, "steps": steps(arguments, rates)}
    if arguments.seconds:
        found["end to end"] = end_to_end(arguments.device, arguments.seconds, tiny=arguments.tiny)
        print("end to end: " + ", ".join(f"{name} {value:.4g}" for name, value in found["end to end"].items()))
    if not arguments.tiny:
        RESULTS.mkdir(exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "-", str(found["machine"]["device"]).lower()).strip("-")
        (RESULTS / f"gpu-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def steps(arguments: argparse.Namespace, rates: dict[str, float]) -> list[dict[str, object]]:
    """Every model shape with every weight; Pythia-410M at shares too."""
    found = []
    print(f"{'':<26} {'tokens/s':>10} {'roofline':>9} {'peak GB':>8} {'all-dense':>10} {'times':>6}  goal")
    for model in arguments.models:
        for name in SHARES if model == "Pythia-410M" else ("dense", "TR", "CP"):
            one = {
                "model": model,
                "weight": name,
                **contest(arguments, sizes(arguments.tiny, WIDTHS[model]), name, rates),
            }
            found.append(one)
            print(
                f"{model + ' ' + name:<26} {one['tokens/s']:>10,.0f} {one['share of roofline']:>9.1%} "
                f"{one['peak GB']:>8.2f} "
                f"{one['all-dense tokens/s']:>10,.0f} {one['times all-dense']:>6.2f}  {GOALS.get((model, name), '')}",
                flush=True,
            )
    return found


def sizes(tiny: bool, d_model: int) -> tuple[int, int, int, int, int]:
    """Tokens, layers, d_model, latents, K."""
    return (64, LAYERS, d_model // 32, 256, 4) if tiny else (BATCH, LAYERS, d_model, LATENTS, K)


def contest(
    arguments: argparse.Namespace, size: tuple[int, int, int, int, int], name: str, rates: dict[str, float]
) -> dict[str, float]:
    """fmxnn's Trainer and the all-dense reference in alternation; peak memory of each alone."""
    tokens, layers, d_model, _, _ = size
    batches = [torch.randn(tokens, layers, d_model, device=arguments.device, dtype=torch.bfloat16) for _ in range(4)]
    rounds = 2 if arguments.tiny else arguments.rounds
    crosscoder = make_crosscoder(size, name).to(arguments.device)
    floor, plan = floor_seconds(crosscoder, tokens, rates), crosscoder.plan(tokens).taken
    ours = fused_step(crosscoder)
    peaks = [peak_bytes(ours, batches[0], arguments.device)]
    held = allocated(arguments.device)
    plain = all_dense_step(make_crosscoder(size, name).to(arguments.device))
    peaks.append(peak_bytes(plain, batches[0], arguments.device) - held)
    times: list[list[float]] = [[], []]
    for turn in range(rounds):
        for kept, step in zip(times, (ours, plain), strict=True):
            kept.append(seconds(lambda step=step, x=batches[turn % 4]: step(x), arguments.device))
    mine, reference = (sorted(kept)[len(kept) // 2] for kept in times)
    return {
        "tokens/s": tokens / mine,
        "ms": 1e3 * mine,
        "share of roofline": floor / mine,
        "roofline tokens/s": tokens / floor,
        "all-dense tokens/s": tokens / reference,
        "times all-dense": reference / mine,
        "peak GB": peaks[0] / 1e9,
        "all-dense peak GB": peaks[1] / 1e9,
        "backend": plan.backend,
    }


def make_crosscoder(size: tuple[int, int, int, int, int], name: str) -> fx.Crosscoder:
    """dense, CP, or TR at a share, with the paper's ranks."""
    _, *axes, k = size
    torch.manual_seed(0)

    def weight() -> fx.Weight:
        if name == "dense":
            return fx.DenseWeight(*axes)
        return (
            fx.CPWeight(*axes)
            if name == "CP"
            else fx.TensorRingWeight(*axes, ranks=fx.tensor_ring_ranks(*axes, share=SHARES[name]))
        )

    return fx.Crosscoder(fx.CrossLayerEncoder(weight(), fx.BatchTopK(k)), fx.CrossLayerDecoder(weight())).train()


def fused_step(crosscoder: fx.Crosscoder) -> Callable[[Tensor], object]:
    """fmxnn's own trainer."""
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=3e-4, fused=True)
    return Trainer(crosscoder, optimizer, dtype=torch.bfloat16).step


def all_dense_step(crosscoder: fx.Crosscoder) -> Callable[[Tensor], object]:
    """The usual step: dense codes by torch.topk, both tables by dense products, clipping, fused Adam."""
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=3e-4, fused=True)
    encoder, k = crosscoder.encoder, crosscoder.encoder.sparsifier.k

    def step(x: Tensor) -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            flat = encoder.pre_activations(x).relu().flatten()
            top = flat.topk(len(x) * k, sorted=False)
            z = torch.zeros_like(flat).scatter(0, top.indices, top.values).view(len(x), -1)
            loss = reconstruction_loss(x.float(), crosscoder.decoder(z).float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(crosscoder.parameters(), 1.0)
        optimizer.step()

    return step


def floor_seconds(crosscoder: fx.Crosscoder, tokens: int, rates: dict[str, float]) -> float:
    """What no step goes below: its dense products at the measured rate, then its bytes at a copy's bandwidth.

    Products: the encoder's table forward; small maps forward and twice backward. Bytes of a parameter: Adam reads four
    and writes three floats, its gradient is written and its norm read, a bf16 copy is written and read twice.
    Activations: x and x_hat, read and written once in bf16. Gathered rows of the tables are taken to come from the
    cache, so the floor is low rather than high.
    """
    encoder, decoder = crosscoder.encoder.weight, crosscoder.decoder.weight
    products = 2.0 * tokens * encoder.table.numel()
    for weight in (encoder, decoder):
        if len(weight.factors) > 1:
            products += 3 * small_map_flops(weight, tokens)
    parameters = sum(p.numel() for p in crosscoder.parameters())
    moved = parameters * (4 * 9 + 2 * 3) + tokens * encoder.layers * encoder.d_model * 2 * 4
    return products / rates["bf16 FLOP/s"] + moved / rates["copy bytes/s"]


def small_map_flops(weight: fx.Weight, tokens: int) -> float:
    """FLOP of the map between layers and bonds, counted as it runs."""
    x = torch.zeros(tokens, weight.layers, weight.d_model, device="meta")
    with torch.device("meta"):
        twin = fx.EinsumWeight(weight.pattern, **weight.sizes)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        twin.to_bonds(x)
    return float(counter.get_total_flops())


def roofline(device: str, *, tiny: bool) -> dict[str, float]:
    """A copy's bytes a second, read and written, and a bf16 product's FLOP a second: the best of ten."""
    size = 2**20 if tiny else 2**30
    source, side = torch.empty(size, dtype=torch.uint8, device=device), 128 if tiny else 8192
    target, square = torch.empty_like(source), torch.randn(side, side, device=device, dtype=torch.bfloat16)
    copied = min(seconds(lambda: target.copy_(source), device) for _ in range(10))
    multiplied = min(seconds(lambda: square @ square, device) for _ in range(10))
    return {"copy bytes/s": 2 * size / copied, "bf16 FLOP/s": 2 * side**3 / multiplied}


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall time until the device is done."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Waits for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_bytes(step: Callable[[Tensor], object], x: Tensor, device: str) -> int:
    """Peak of allocated memory in the third step, all that is held at the time included; 0 on a processor."""
    step(x)
    step(x)
    if not device.startswith("cuda"):
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    step(x)
    return torch.cuda.max_memory_allocated(device)


def allocated(device: str) -> int:
    """Bytes held on a GPU; 0 on a processor."""
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else 0


def machine(device: str) -> dict[str, str]:
    """Where and with what."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor()
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    sys.exit(main())
