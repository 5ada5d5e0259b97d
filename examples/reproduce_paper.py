"""Train and measure what the fmxcoders paper trains and measures: one preset for each of its models, and `tiny`, which a laptop runs.

    python examples/reproduce_paper.py tiny --text train.txt --heldout heldout.txt --probes probes --workers 4 --minutes 60 --out runs/paper

Every job, a variant with a seed, leaves a JSON file in `out/results`; started again, it does what is missing. Tables and figures: paper_report.py.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import tyro
from numpy.lib.format import open_memmap
from paper_measures import Dictionaries, measured, probed, spliced
from paper_presets import PRESETS, Job, Preset, jobs, make_crosscoders
from paper_report import report
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import fmxnn as fx
from fmxnn.harvest import Activations, activation_scale, harvest
from fmxnn.metrics.probes import load_probes
from fmxnn.seeds import seed_of
from fmxnn.text import Contexts, contexts
from fmxnn.training import AuxiliaryLoss, Trainer, fold_scale, list_checkpoints, load_checkpoint, overlapped, save_checkpoint

SPLICED, CHECKPOINT_EVERY = 2048, 2000  # tokens, steps


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


@dataclass(frozen=True)
class Plan:
    """What every job must know."""

    preset: Preset
    out: Path
    text: tuple[str, ...]
    heldout: tuple[str, ...]
    probes: tuple[Path, ...]
    device: str
    deadline: float


@dataclass(frozen=True)
class Data:
    """Batches of `tokens layers d_model` times `scale`: to train on, from any batch on, and held-out ones."""

    scale: float
    d_model: int
    train: Callable[[int], Iterator[Tensor]]
    heldout: Callable[[], Iterator[Tensor]]


def read_text(plan: Plan) -> tuple[Contexts, Contexts]:
    """Contexts to train on and held-out ones. Raises ValueError where there are too few."""
    preset, tokenizer = plan.preset, AutoTokenizer.from_pretrained(plan.preset.model)

    def read(names: tuple[str, ...], tokens: int) -> Contexts:
        hub = len(names) == 1 and not Path(names[0]).exists() and "." not in Path(names[0]).name
        source = datasets.load_dataset(names[0], split="train", streaming=True) if hub else [Path(name) for name in names]
        return contexts(source, tokenizer, context=preset.context, tokens=tokens)

    wanted = preset.steps * preset.batch
    if plan.heldout:
        train, heldout = read(plan.text, wanted), read(plan.heldout, preset.heldout)
    else:
        heldout, train = read(plan.text, wanted + preset.heldout + preset.context).split(preset.heldout)
    if train.tokens < wanted:
        raise ValueError(f"the text gives {train.tokens:,} tokens, and {preset.steps:,} batches need {wanted:,}; give more text")
    return train, heldout


def open_streams(plan: Plan, seed: int) -> tuple[Activations, Activations, float]:
    """Activations harvested while they are read, and what scales them."""
    preset, (train, heldout) = plan.preset, read_text(plan)
    dtype = torch.bfloat16 if plan.device.startswith("cuda") else torch.float32
    options = dict(layers=preset.layers, batch=preset.batch, device=plan.device, dtype=dtype)
    stream = harvest(preset.model, train, seed=seed, **options)
    scale = activation_scale(islice(stream, 8)) if preset.scaled else 1.0
    return stream, harvest(stream.model, heldout, **options), scale


def store(plan: Plan) -> None:
    """Harvests once what all jobs share, in float16, to `out/train.npy` and `heldout.npy`; each is there whole or not at all."""
    if (plan.out / "stored.json").exists():
        return
    train, heldout, scale = open_streams(plan, seed=0)
    for name, stream, count in (("train", train, plan.preset.steps), ("heldout", heldout, len(heldout))):
        part = plan.out / f"{name}.part"
        rows = open_memmap(part, "w+", np.float16, (count, plan.preset.batch, len(plan.preset.layers), stream.d_model))
        for number, x in enumerate(tqdm(islice(stream, count), total=count, desc=f"harvesting {name}", unit="batch")):
            rows[number] = (x * scale).half().cpu().numpy()
        if not all(np.isfinite(batch).all() for batch in rows):
            raise ValueError("the activations do not fit into float16; train on scaled ones")
        rows.flush()
        part.rename(plan.out / f"{name}.npy")
    (plan.out / "stored.json").write_text(json.dumps({"scale": scale, "d_model": train.d_model}))


def open_data(plan: Plan, seed: int) -> Data:
    """What a job with this seed reads: stored batches in an order of its own, or a stream shuffled with it."""
    if not plan.preset.stored:
        train, heldout, scale = open_streams(plan, seed)
        return Data(scale, train.d_model, lambda first: (x * scale for x in train.starting_at(first)), lambda: (x * scale for x in heldout))
    rows, test = (np.load(plan.out / f"{name}.npy", mmap_mode="r") for name in ("train", "heldout"))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed_of(seed, "order"))).tolist()
    return Data(
        **json.loads((plan.out / "stored.json").read_text()),
        train=lambda first: (torch.from_numpy(rows[number].astype(np.float32)) for number in order[first:]),
        heldout=lambda: (torch.from_numpy(batch.astype(np.float32)) for batch in test),
    )


def train(plan: Plan, job: Job, data: Data) -> Dictionaries:
    """The job's dictionaries, trained; a streamed preset keeps checkpoints and goes on from them."""
    preset, made = plan.preset, make_crosscoders(plan.preset, job, data.d_model)
    trainers: list[Trainer] = []
    for crosscoder, _ in made:
        parameters = crosscoder.to(plan.device).parameters()
        optimizer = torch.optim.Adam(parameters, lr=preset.learning_rate * job.variant.faster, betas=(0.9, 0.999), fused=True)
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


def probe_and_splice(plan: Plan, dictionaries: Dictionaries) -> dict[str, object]:
    """What needs the language model, and dictionaries in its own units."""
    preset, tokenizer = plan.preset, AutoTokenizer.from_pretrained(plan.preset.model)
    model = AutoModelForCausalLM.from_pretrained(preset.model, dtype=torch.float32).to(plan.device)
    _, heldout = read_text(replace(plan, preset=replace(preset, tokens=preset.batch, heldout=SPLICED)))
    found = probed(dictionaries, model, tokenizer, plan.probes, preset.layers, preset.context)
    return found | spliced(dictionaries, model, heldout, preset.layers)


def run(plan: Plan, job: Job) -> str:
    """One job, from start to its JSON file; gives a line about it."""
    target, began = plan.out / "results" / f"{job.slug}.json", time.time()
    if began > plan.deadline:
        return f"not started, for lack of time: {job.slug}"
    if plan.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32; torch's default is 10 times slower on a GPU
    data = open_data(plan, job.seed)
    dictionaries = train(plan, job, data)
    weight = dictionaries[0][0].encoder.weight
    result: dict[str, Any] = {"variant": asdict(job.variant), "seed": job.seed, "training_seconds": time.time() - began}
    result["parameters"] = sum(p.numel() for crosscoder, _ in dictionaries for p in crosscoder.parameters())
    result["ranks"] = getattr(weight, "ranks", getattr(weight, "rank", None))
    result |= measured(dictionaries, data.heldout)
    for number, (crosscoder, place) in enumerate(dictionaries):
        about = {"base_model": plan.preset.model, "layers": list(plan.preset.layers[place]), "variant": job.variant.name}
        fx.save_pretrained(fold_scale(crosscoder, data.scale), plan.out / "dictionaries" / job.slug / str(number), about=about)
    if job.variant.full and job.seed == plan.preset.seeds[0]:
        result |= probe_and_splice(plan, dictionaries)
    result["seconds"] = time.time() - began
    part = target.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.rename(target)
    return f"{time.strftime('%H:%M:%S')} {job.slug}: mse {result['numbers']['mse']:.4f} after {result['seconds']:.0f} s"


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
    about = {**asdict(preset), "variants": None, "preset": arguments.preset, "text": text, "heldout text": arguments.heldout}
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
        waiting = [job for job in jobs(plan.preset) if not (plan.out / "results" / f"{job.slug}.json").exists()]
        if arguments.workers == 1:
            for line in tqdm(map(partial(run, plan), waiting), total=len(waiting)):
                tqdm.write(line)
        else:
            with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
                for line in tqdm(pool.map(partial(run, plan), waiting), total=len(waiting)):
                    tqdm.write(line)
        tqdm.write(report(plan.out))
    except (ValueError, ArithmeticError, OSError) as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
