"""What every job of reproduce_paper.py reads: text, and activations of it, streamed or stored once for all jobs."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from paper_presets import Job, Preset
from torch import Tensor
from tqdm import tqdm

from fmxnn.activations import Activations, Contexts, activation_scale, contexts, harvest
from fmxnn.activations.models import open_tokenizer
from fmxnn.core.seeds import seed_of
from fmxnn.reports.train import open_text


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

    def dictionaries(self, job: Job) -> Path:
        """The folder of a job's dictionaries, a folder each."""
        return self.out / "dictionaries" / job.slug

    def result(self, job: Job) -> dict[str, Any]:
        """What was measured of a job so far."""
        path = self.out / "results" / f"{job.slug}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def keep(self, job: Job, result: dict[str, Any]) -> None:
        """Puts a job's JSON file in place of the one before, whole or not at all."""
        part = self.out / "results" / f"{job.slug}.part"
        part.write_text(json.dumps(result))
        part.rename(part.with_suffix(".json"))


@dataclass(frozen=True)
class Data:
    """Batches of `tokens layers d_model` times `scale`: to train on, from any batch on, and held-out ones."""

    scale: float
    d_model: int
    train: Callable[[int], Iterator[Tensor]]
    heldout: Callable[[], Iterator[Tensor]]


def read_text(plan: Plan) -> tuple[Contexts, Contexts]:
    """Contexts to train on and held-out ones. Raises ValueError where there are too few."""
    preset, tokenizer = plan.preset, open_tokenizer(plan.preset.model)

    def read(names: tuple[str, ...], tokens: int) -> Contexts:
        return contexts(open_text(names), tokenizer, context=preset.context, tokens=tokens)

    wanted = preset.steps * preset.batch
    if plan.heldout:
        train, heldout = read(plan.text, wanted), read(plan.heldout, preset.heldout)
    else:
        heldout, train = read(plan.text, wanted + preset.heldout + preset.context).split(preset.heldout)
    if train.tokens < wanted:
        raise ValueError(
            f"the text gives {train.tokens:,} tokens, and {preset.steps:,} batches need {wanted:,}; give more text"
        )
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
    """Harvests once what all jobs share, in float16, to `out/train.npy` and `heldout.npy`; each is there whole or not
    at all.
    """
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
        return Data(
            scale,
            train.d_model,
            lambda first: (x * scale for x in train.starting_at(first)),
            lambda: (x * scale for x in heldout),
        )
    rows, test = (np.load(plan.out / f"{name}.npy", mmap_mode="r") for name in ("train", "heldout"))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed_of(seed, "order"))).tolist()
    return Data(
        **json.loads((plan.out / "stored.json").read_text()),
        train=lambda first: (torch.from_numpy(rows[number].astype(np.float32)) for number in order[first:]),
        heldout=lambda: (torch.from_numpy(batch.astype(np.float32)) for batch in test),
    )
