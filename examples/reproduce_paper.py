"""Train and measure what the fmxcoders paper trains and measures: one preset for each of its models, and `tiny`, which
a laptop runs.

python examples/reproduce_paper.py tiny --text train.txt --heldout heldout.txt --probes probes --workers 4 --minutes 60
--out runs/paper

Every job, a variant with a seed, leaves a JSON file in `out/results` and its dictionaries in `out/dictionaries`;
started again, the program does what is missing, and measures what was trained before without training again. Tables and
figures: paper_report.py.
"""

import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
import tyro
from paper_data import Data, Plan, open_data, read_text, store
from paper_measures import Dictionaries, measured, probed, spliced
from paper_presets import PRESETS, Job, jobs, make_crosscoders
from paper_report import report
from tqdm import tqdm

import fmxnn as fx
from fmxnn.activations.models import open_model
from fmxnn.metrics.probing import load_probes
from fmxnn.training import (
    AuxiliaryLoss,
    Trainer,
    fold_scale,
    list_checkpoints,
    load_checkpoint,
    overlapped,
    save_checkpoint,
)

SPLICED, CHECKPOINT_EVERY, STARTED_ON = 2048, 2000, 16  # tokens, steps, batches


@dataclass
class Arguments:
    """What to reproduce, from what, and in how long."""

    preset: tyro.conf.Positional[str]
    """gpt2-small, pythia-410m, pythia-1.4b, gemma2-2b (these want a GPU), tiny or tiny-search."""
    out: Path
    text: tuple[str, ...] = ()
    """Text or JSONL files, or the Hub name of one dataset with a "text" column; without any, the preset's dataset."""
    heldout: tuple[str, ...] = ()
    """The same, never trained on; without any, the start of the text."""
    probes: tuple[Path, ...] = ()
    """Folders with train.jsonl and test.jsonl of {"text", "label"}, or folders of such folders."""
    model: str | None = None
    """A folder or Hub name in place of the preset's."""
    workers: int = 1
    """Processes of one thread each; 1 stays in this process."""
    minutes: float = float("inf")
    """No job starts after this long."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def train(plan: Plan, job: Job, data: Data) -> Dictionaries:
    """The job's dictionaries, trained; a streamed preset keeps checkpoints and goes on from them."""
    preset = plan.preset
    made = make_crosscoders(preset, job, data.d_model, lambda: torch.cat(list(islice(data.train(0), STARTED_ON))))
    trainers: list[Trainer] = []
    for crosscoder, _ in made:
        parameters = crosscoder.to(plan.device).parameters()
        optimizer = torch.optim.Adam(
            parameters, lr=preset.learning_rate * job.variant.faster, betas=(0.9, 0.999), fused=True
        )
        auxiliary = AuxiliaryLoss(k=data.d_model // 2, after=preset.dead_after) if job.variant.auxiliary else None
        dtype = torch.bfloat16 if plan.device.startswith("cuda") else torch.float32
        trainers.append(Trainer(crosscoder, optimizer, seed=job.seed, auxiliary=auxiliary, dtype=dtype))
    folders = [plan.out / "checkpoints" / job.slug / str(number) for number in range(len(made))]
    for folder, trainer in zip(folders, trainers, strict=True):
        if list_checkpoints(folder):
            load_checkpoint(folder, trainer, {"job": job.slug})
    first = min(trainer.steps for trainer in trainers)
    for number, x in enumerate(islice(overlapped(data.train(first), plan.device), preset.steps - first), first + 1):
        for folder, trainer, (_, place) in zip(folders, trainers, made, strict=True):
            if trainer.steps < number:
                trainer.step(x[:, place])
                if not preset.stored and number % CHECKPOINT_EVERY == 0:
                    save_checkpoint(folder, trainer, {"job": job.slug})
    return made


def train_and_measure(plan: Plan, job: Job) -> dict[str, Any]:
    """Trains a job and saves its dictionaries in the model's own units; gives what needs no language model."""
    began, data = time.time(), open_data(plan, job.seed)
    dictionaries = train(plan, job, data)
    weight = dictionaries[0][0].encoder.weight
    result: dict[str, Any] = {"variant": asdict(job.variant), "seed": job.seed, "training_seconds": time.time() - began}
    result["parameters"] = sum(p.numel() for crosscoder, _ in dictionaries for p in crosscoder.parameters())
    result["ranks"] = getattr(weight, "ranks", getattr(weight, "rank", None))
    result |= measured(dictionaries, data.heldout)
    for number, (crosscoder, place) in enumerate(dictionaries):
        about = {
            "base_model": plan.preset.model,
            "layers": list(plan.preset.layers[place]),
            "variant": job.variant.name,
        }
        fx.save_pretrained(fold_scale(crosscoder, data.scale), plan.dictionaries(job) / str(number), about=about)
    return result | {"seconds": time.time() - began}


def load(plan: Plan, job: Job) -> Dictionaries:
    """The job's dictionaries as they were saved."""
    found: Dictionaries = []
    for number in range(len(list(plan.dictionaries(job).iterdir()))):
        crosscoder, start = fx.from_pretrained(plan.dictionaries(job) / str(number)), found[-1][1].stop if found else 0
        found.append((crosscoder.to(plan.device), slice(start, start + crosscoder.encoder.weight.layers)))
    return found


def probe_and_splice(plan: Plan, job: Job, parts: set[str]) -> dict[str, Any]:
    """Those of `probes` and `splice` that are among the parts: what needs the language model, and the dictionaries that
    were saved.
    """
    preset, dictionaries = plan.preset, load(plan, job)
    model, tokenizer = open_model(preset.model, dtype=torch.float32)
    model = model.to(plan.device)
    found: dict[str, Any] = {}
    if "probes" in parts:
        found |= probed(dictionaries, model, tokenizer, plan.probes, preset.layers, preset.context)
    if "splice" in parts:
        _, heldout = read_text(replace(plan, preset=replace(preset, tokens=preset.batch, heldout=SPLICED)))
        found |= spliced(dictionaries, model, heldout, preset.layers)
    return found


def missing(plan: Plan, job: Job) -> set[str]:
    """The parts that the job's JSON file should have and has not."""
    wanted = {"numbers"} | ({"splice"} | ({"probes"} if plan.probes else set()) if job.variant.full else set())
    return wanted - plan.result(job).keys()


def run(plan: Plan, job: Job) -> str:
    """What is missing of one job, written to its JSON file; gives a line about it. Trains where nothing was saved."""
    began = time.time()
    if began > plan.deadline:
        return f"not started, for lack of time: {job.slug}"
    if plan.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32; torch's default is 10 times slower on a GPU
    result = plan.result(job)
    if not result or not plan.dictionaries(job).exists():
        result = train_and_measure(plan, job)
        plan.keep(job, result)
    if parts := missing(plan, job):
        before = time.time()
        result |= probe_and_splice(plan, job, parts)
        plan.keep(job, result | {"seconds": result["seconds"] + time.time() - before})
    return (
        f"{time.strftime('%H:%M:%S')} {job.slug}: mse {result['numbers']['mse']:.4f} after {time.time() - began:.0f} s"
    )


def make_plan(arguments: Arguments) -> Plan:
    """Checks what was asked for, and that `out` holds nothing else."""
    if arguments.preset not in PRESETS:
        raise ValueError(f"reproduce_paper knows the presets {', '.join(PRESETS)}, got {arguments.preset!r}")
    if arguments.workers < 1:
        raise ValueError(f"reproduce_paper needs workers >= 1, got workers={arguments.workers}")
    preset, out = PRESETS[arguments.preset], arguments.out
    preset = replace(preset, model=arguments.model or preset.model)
    text, probes = arguments.text or (preset.text,), tuple(path.resolve() for path in arguments.probes)
    for folder in probes:
        load_probes(folder)
    about = {
        **asdict(preset),
        "variants": None,
        "preset": arguments.preset,
        "text": text,
        "heldout text": arguments.heldout,
    }
    fixed = json.dumps(about, indent=1)
    used = any(out.glob("results/*.json")) or any(out.glob("stored.json"))
    if used and (out / "preset.json").read_text() != fixed:
        raise ValueError(f"{out} holds results of another preset, text or model; choose another --out")
    (out / "results").mkdir(parents=True, exist_ok=True)
    (out / "preset.json").write_text(fixed)
    return Plan(preset, out, text, arguments.heldout, probes, arguments.device, time.time() + 60 * arguments.minutes)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; a mistake of the caller's is one sentence, not a traceback."""
    arguments = tyro.cli(Arguments, args=argv)
    try:
        plan = make_plan(arguments)
        if plan.preset.stored:
            store(plan)
        waiting = [job for job in jobs(plan.preset) if missing(plan, job)]
        if arguments.workers == 1:
            for line in tqdm(map(partial(run, plan), waiting), total=len(waiting)):
                tqdm.write(line)
        else:
            with ProcessPoolExecutor(
                arguments.workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
            ) as pool:
                for line in tqdm(pool.map(partial(run, plan), waiting), total=len(waiting)):
                    tqdm.write(line)
        tqdm.write(report(plan.out))
    except (ValueError, ArithmeticError, OSError) as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
