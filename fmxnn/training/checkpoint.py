"""Checkpoints that a crash, a full disk, a flipped byte or a second run cannot spoil."""

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmxnn.core.errors import CheckpointError, NonFiniteError, RecipeError
from fmxnn.core.files.integrity import IntegrityError, verify_folder, write_folder
from fmxnn.core.files.locks import locked
from fmxnn.core.files.manifest import list_files, verify
from fmxnn.core.recipe import describe
from fmxnn.core.sharding import is_sharded
from fmxnn.core.version import __version__
from fmxnn.training.optimizers import take_settings
from fmxnn.training.resuming import differences, phrased
from fmxnn.training.rotation import clear_left, list_checkpoints, read_about, rotate, set_aside
from fmxnn.training.trainer import Trainer


class _Saved(NamedTuple):
    about: dict[str, Any]
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]


def save_checkpoint(folder: str | Path, trainer: Trainer, arguments: Mapping[str, Any]) -> Path:
    """Writes `folder/step-00001000` whole or not at all, and keeps the newest three whole ones of this run.

    It holds what is trained, the optimiser, the counters, the recipe, the objective and the run's `arguments`
    (plain JSON values; add `stream.identity()` so that the text is checked too), with a manifest of sha256.
    Nothing but whole checkpoints of this run is ever deleted. What else stands at this step's name is renamed to
    `step-00001000.aside-1`. Of several processes with the same weights let one save.

    Raises NonFiniteError for a weight, moment or threshold that is not finite, CheckpointError for what cannot be
    noted and for weights of which each process has a part, IntegrityError where the disk is full, and LockedError
    where another process saves here at this moment; the checkpoints before stay.
    """
    saved, folder = _state_of(trainer, arguments), Path(folder)
    target = folder / f"step-{trainer.steps:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        clear_left(folder)
        set_aside(target, trainer.run)
        write_folder(target, lambda made: _write(made, saved))
        rotate(folder, target, trainer.run)
    return target


def _state_of(trainer: Trainer, arguments: Mapping[str, Any]) -> _Saved:
    """All that a checkpoint holds, if it can be read again and goes on well."""
    step, weights = trainer.steps, _once(trainer.crosscoder.state_dict())
    try:
        tensors, numbers = trainer.state()
        about = {
            **numbers,
            "module": describe(trainer.crosscoder),
            "arguments": dict(arguments),
            "versions": _versions(),
        }
        json.dumps(about, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"step {step} cannot be saved: {error}; arguments and settings are plain JSON values"
        ) from error
    if wrong := _not_finite({**weights, **tensors}):
        raise NonFiniteError(f"{wrong} at step {step}; nothing was saved, and the checkpoints before are as they were")
    return _Saved(about, weights, {key: value.contiguous() for key, value in tensors.items()})


def _write(target: Path, saved: _Saved) -> None:
    save_file(saved.weights, target / "crosscoder.safetensors")
    save_file(saved.tensors, target / "trainer.safetensors")
    (target / "trainer.json").write_text(json.dumps(saved.about, indent=1, allow_nan=False))
    try:
        read_about(target)
    except RecipeError as error:
        raise CheckpointError(
            f"step {saved.about['steps']} cannot be saved, since it could not be read again: {error}"
        ) from error


def load_checkpoint(
    folder: str | Path,
    trainer: Trainer,
    arguments: Mapping[str, Any],
    *,
    settings: Literal["same", "saved", "new"] = "same",
) -> list[str]:
    """Puts the newest whole checkpoint into `trainer`. Gives what there is to tell, a sentence each.

    The crosscoder, the objective, the optimiser with its groups in order, and the run's arguments must be those that
    it was saved with. So must the optimiser's settings, such as the learning rate; `settings` says which to take where
    they differ. Checkpoints that were passed over and other versions of libraries are only told of. Raises
    CheckpointError, with the trainer as it was, where there is no checkpoint or where one differs.
    """
    if settings not in ("same", "saved", "new"):
        raise ValueError(f"load_checkpoint takes settings='same', 'saved' or 'new', got {settings!r}")
    said: list[str] = []
    for path in reversed(list_checkpoints(Path(folder))):
        try:
            saved = _read(path)
        except (OSError, SafetensorError, RecipeError) as error:
            said.append(f"passed over {path.name}: {error}")
            continue
        _refuse(path, "arguments", differences(saved.about["arguments"], _json(arguments)))
        before = trainer.steps
        trainer.follow_schedule(saved.about["steps"])
        try:
            return said + _restore(path, saved, trainer, settings) + _harmless(path, saved.about)
        except CheckpointError:
            trainer.follow_schedule(before)
            raise
    found = "; ".join(said) or "it holds no step-* folder"
    raise CheckpointError(f"no checkpoint in {folder} can be resumed: {found}; start without resume")


def _restore(path: Path, saved: _Saved, trainer: Trainer, settings: str) -> list[str]:
    about, (_, numbers), state = saved.about, trainer.state(), trainer.crosscoder.state_dict()
    _refuse(path, "crosscoder", differences(about["module"], describe(trainer.crosscoder)))
    _refuse(path, "tensors", differences(_shapes(saved.weights), _shapes(_once(state))))
    for what in ("objective", "optimizer"):
        _refuse(path, what, differences(about[what], _json(numbers[what])))
    changed = differences(about["settings"], _json(numbers["settings"]), "group")
    if settings == "same":
        _refuse(
            path,
            "settings of the optimiser",
            changed,
            "resume with the same, or take one of them with settings='saved' or 'new'",
        )
    try:
        trainer.restore(saved.tensors, about)
    except ValueError as error:
        raise CheckpointError(
            f"{path / 'trainer.safetensors'} does not fit this run: {error}; start in a new folder"
        ) from error
    trainer.crosscoder.load_state_dict({key: saved.weights.get(key, value) for key, value in state.items()})
    if settings == "saved":
        take_settings(trainer.optimizer, about["settings"])
    return [f"took the {settings} settings of the optimiser: {phrased(changed)}"] if changed else []


def _read(path: Path) -> _Saved:
    verify_folder(path)
    about = read_about(path)
    if path.name != f"step-{about['steps']:08d}":
        raise IntegrityError(f"it holds step {about['steps']}; give it its name again")
    saved = _Saved(about, load_file(path / "crosscoder.safetensors"), load_file(path / "trainer.safetensors"))
    if wrong := _not_finite({**saved.weights, **saved.tensors}):
        raise IntegrityError(wrong)
    return saved


def _json(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=dict))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the arguments of a run are plain JSON values: {error}") from error


def _harmless(path: Path, about: Mapping[str, Any]) -> list[str]:
    """What is no reason to stop: other versions of libraries, and checkpoints of another run beside this one's."""
    said = [
        f"saved with other versions, so that last bits may differ: {phrased(found)}"
        for found in [differences(about["versions"], _versions())]
        if found
    ]
    for other in list_checkpoints(path.parent):
        with suppress(OSError, LookupError, RecipeError):
            verify([list_files(other)["trainer.json"]])  # a flipped letter is no other run
            if read_about(other)["run"] != about["run"]:
                said.append(f"{other.name} is of another run than {path.name}, which was taken")
    return said


@cache
def _versions() -> dict[str, str | None]:
    try:
        harvested = version("transformers")
    except PackageNotFoundError:
        harvested = None
    return {"fmxnn": __version__, "torch": str(torch.__version__), "transformers": harvested}


def _refuse(
    path: Path, what: str, changed: list[str], way_out: str = "resume with the same, or start in a new folder"
) -> None:
    if changed:
        raise CheckpointError(f"{path} was saved with other {what}: {phrased(changed)}; {way_out}")


def _once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if sharded := [key for key, value in tensors.items() if is_sharded(value)]:
        raise CheckpointError(
            f"{sharded[0][:200]} is sharded, and a checkpoint holds whole tensors; save it with "
            "torch.distributed.checkpoint, or train with DistributedDataParallel and let one process save"
        )
    seen: set[int] = set()
    whole = {key: value.contiguous() for key, value in tensors.items()}
    return {
        key: value for key, value in whole.items() if value.data_ptr() not in seen and not seen.add(value.data_ptr())
    }


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: f"{value.dtype} {tuple(value.shape)}" for key, value in tensors.items()}


def _not_finite(tensors: Mapping[str, Tensor]) -> str:
    wrong = [key for key, value in tensors.items() if not bool(value.isfinite().all())]
    return f"{', '.join(wrong[:3])} {'holds' if len(wrong) == 1 else 'hold'} NaN or infinity" if wrong else ""
