"""Checkpoints that a crash, a full disk or a flipped byte cannot spoil."""

import json
from collections.abc import Mapping
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fmxnn.integrity import IntegrityError, verify_folder, write_folder
from fmxnn.recipe import describe
from fmxnn.training.step import Trainer

KEPT = 3


class CheckpointError(ValueError):
    """A folder from which a run cannot go on."""


def save_checkpoint(folder: Path, trainer: Trainer, arguments: Mapping[str, Any]) -> Path:
    """Writes `folder/step-00001000` whole or not at all, and keeps the newest three.

    It holds the crosscoder's state, the optimiser, the counters, the recipe and the run's `arguments` (plain JSON values), with a
    manifest of sha256. Raises IntegrityError where the disk is full; the checkpoints before stay.
    """
    tensors, numbers = trainer.state()
    about = {"module": describe(trainer.crosscoder), "arguments": dict(arguments), **numbers}

    def fill(target: Path) -> None:
        kept = {key: value.contiguous() for key, value in trainer.crosscoder.state_dict().items()}
        save_file(_once(kept), target / "crosscoder.safetensors")
        save_file(_once({key: value.contiguous() for key, value in tensors.items()}), target / "trainer.safetensors")
        (target / "trainer.json").write_text(json.dumps(about, indent=1))

    target = folder / f"step-{trainer.steps:08d}"
    write_folder(target, fill)
    for old in list_checkpoints(folder)[:-KEPT]:
        rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.name[5:].isdigit())


def load_checkpoint(folder: Path, trainer: Trainer, arguments: Mapping[str, Any]) -> list[str]:
    """Puts the newest checkpoint whose files verify into `trainer`; gives a sentence for each that was passed over.

    Raises CheckpointError where there is none, or where the run's arguments or crosscoder are not those it was saved with.
    """
    passed: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_folder(path)
        except IntegrityError as error:
            passed.append(f"passed over {path.name}: {error}")
            continue
        about = json.loads((path / "trainer.json").read_text())
        _check_same("arguments", about["arguments"], json.loads(json.dumps(dict(arguments))), path)
        trainer.follow_schedule(about["steps"])
        _check_same("crosscoder", about["module"], describe(trainer.crosscoder), path)
        saved = load_file(path / "crosscoder.safetensors")
        trainer.crosscoder.load_state_dict({key: saved.get(key, value) for key, value in trainer.crosscoder.state_dict().items()})
        trainer.restore(load_file(path / "trainer.safetensors"), about)
        return passed
    found = "; ".join(passed) or "it holds no step-* folder"
    raise CheckpointError(f"no checkpoint in {folder} can be resumed: {found}; start without resume")


def _once(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    seen: set[int] = set()
    return {key: value for key, value in tensors.items() if value.data_ptr() not in seen and not seen.add(value.data_ptr())}


def _check_same(what: str, saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    changed = [f"{key} was {saved.get(key)!r} and is {now.get(key)!r}" for key in sorted({*saved, *now}) if saved.get(key) != now.get(key)]
    if changed:
        raise CheckpointError(f"{path} was saved with other {what}: {'; '.join(changed)}; resume with the same, or start in a new folder")
