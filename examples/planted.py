"""Train crosscoders on planted features, whose truth is known, and count how many of them each finds.

python examples/planted.py seconds minutes --variants tr-wide-isometric-aux dense-tied-aux --seeds 0 1 2 --out
runs/planted python examples/paper_report.py runs/planted --page docs/planted.md

The default variants are the best found on text and its baseline. Every job, a variant with a seed, leaves a JSON file
in `out/PRESET/results`; started again, the program does what is missing, from the checkpoint of a job that was stopped.
Variants are those of reproduce_paper.py: paper_presets.py.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count, product
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
import tyro
from paper_data import Data, Plan
from paper_presets import Job, Preset, named
from paper_report import report
from reproduce_paper import train
from torch import Tensor
from tqdm import tqdm

from fmxnn.activations import activation_scale
from fmxnn.metrics import planted
from fmxnn.metrics.planted.recovery import Recovery, recovery
from fmxnn.training import fold_scale


@dataclass
class Arguments:
    """Which truths, and what is trained on them."""

    presets: tyro.conf.Positional[tuple[Literal["seconds", "minutes", "gpu"], ...]] = ("seconds",)
    variants: tuple[str, ...] = ("tr-wide-isometric-aux", "dense-tied-aux")
    """dense, tr, tr-wide or cp, then paper, tied or isometric; more after it: dense-tied-p0.05-share0.5-aux-lr2."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the truth and of the start."""
    learning_rate: float = 3e-3
    steps: int | None = None
    """None takes the preset's."""
    out: Path = Path("runs/planted")
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def make_plan(arguments: Arguments, name: str) -> Plan:
    """Checks that the preset's folder in `out` holds nothing else."""
    truth, out = planted.PRESETS[name], arguments.out / name
    sizes = truth.training
    tokens = (arguments.steps or sizes.steps) * sizes.tokens
    preset = Preset(
        *(f"planted features, {name}", tuple(range(truth.layers)), tokens, ()),
        **dict(
            latents=sizes.latents,
            k=sizes.k,
            batch=sizes.tokens,
            learning_rate=arguments.learning_rate,
            dead_after=tokens // 20,
        ),
    )
    fixed = json.dumps({"preset": name, "tokens": tokens, "learning_rate": arguments.learning_rate})
    if any(out.glob("results/*.json")) and (out / "preset.json").read_text() != fixed:
        raise ValueError(f"{out} holds results of other steps or another learning rate; choose another --out")
    (out / "results").mkdir(parents=True, exist_ok=True)
    (out / "preset.json").write_text(fixed)
    return Plan(preset, out, (), (), (), arguments.device, float("inf"))


def run(plan: Plan, name: str, job: Job) -> Recovery:
    """One job, from start to its JSON file."""
    truth, tokens = planted.PRESETS[name].truth(seed=job.seed).to(plan.device), plan.preset.batch
    scale = activation_scale(truth.batch(number, tokens)[0] for number in range(4))

    def batches(first: int) -> Iterator[Tensor]:
        return (truth.batch(number, tokens)[0] * scale for number in count(first))

    began = time.perf_counter()
    ((crosscoder, _),) = train(plan, job, Data(scale, truth.d_model, batches, lambda: iter(())))
    seconds = time.perf_counter() - began
    found = recovery(fold_scale(crosscoder, scale), truth)
    result: dict[str, Any] = {"variant": asdict(job.variant), "seed": job.seed, "by_kind": found.by_kind()}
    result["recovery"] = {**found.numbers(), "silent": found.silent / plan.preset.latents, "training_seconds": seconds}
    plan.keep(job, result | {"oracle": recovery(truth.crosscoder(), truth).numbers()})
    return found


def main(argv: list[str] | None = None) -> int:
    """Runs the command line, one job after the other; a mistake of the caller's is one sentence, not a traceback."""
    arguments = tyro.cli(Arguments, args=argv)
    try:
        variants = [named(name) for name in arguments.variants]
        if any(variant.weight == "sae" for variant in variants):
            raise ValueError("planted.py trains one crosscoder on all layers, got an SAE per layer; leave it out")
        plans = {name: make_plan(arguments, name) for name in arguments.presets}
        jobs = [(name, Job(variant, seed)) for name, seed, variant in product(plans, arguments.seeds, variants)]
        for name, job in tqdm([(name, job) for name, job in jobs if not plans[name].result(job)], unit="job"):
            found = run(plans[name], name, job)
            tqdm.write(f"{name}, {job.variant.name}, seed {job.seed}\n\n{found.table()}")
        tqdm.write(report(arguments.out))
        tqdm.write((arguments.out / "report.md").read_text())
    except (ValueError, ArithmeticError, OSError) as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
