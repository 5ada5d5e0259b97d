"""What a resumed run must share with the run that it goes on from, and the optimiser's state as named tensors."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.core.excerpt import cut

_IMPLEMENTATION = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
_SHOWN = 5


class _Run(Protocol):
    """What a trainer holds that a checkpoint must."""

    crosscoder: Crosscoder
    optimizer: torch.optim.Optimizer
    auxiliary: Any
    penalty: Any
    schedules: list[Callable[[int], None]]
    silent: Tensor
    run: str
    seed: int
    steps: int
    tokens: int
    clip: float
    dtype: torch.dtype

    @property
    def device(self) -> torch.device: ...


def run_state(trainer: _Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `Trainer.state` gives."""
    tensors, about = optimizer_state(trainer.optimizer, trainer.crosscoder)
    auxiliary = None if trainer.auxiliary is None else asdict(trainer.auxiliary)
    objective = {"seed": trainer.seed, "dtype": str(trainer.dtype), "clip": str(trainer.clip), "auxiliary": auxiliary}
    objective |= {
        "penalty": name_of(trainer.penalty),
        "schedules": [name_of(schedule) for schedule in trainer.schedules],
    }
    counters = {"run": trainer.run, "steps": trainer.steps, "tokens": trainer.tokens, "seed": trainer.seed}
    return {"silent": trainer.silent, **tensors}, {**counters, "objective": objective, **about}


def restore_run(trainer: _Run, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """What `Trainer.restore` does."""
    silent = tensors.get("silent")
    if silent is None or (silent.shape, silent.dtype) != (trainer.silent.shape, trainer.silent.dtype):
        got = "none" if silent is None else f"{silent.dtype} {tuple(silent.shape)}"
        raise ValueError(f"'silent' counts tokens for each of {len(trainer.silent)} latents, got {got}")
    restore_optimizer(trainer.optimizer, {key: value for key, value in tensors.items() if key != "silent"})
    trainer.silent = silent.to(trainer.device)
    trainer.run, trainer.steps, trainer.tokens, trainer.seed = (
        numbers[key] for key in ("run", "steps", "tokens", "seed")
    )


def optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's tensors; its class with the parameters' names of each group, in order, and each group's settings.

    Which implementation runs (`fused`, `foreach` and their like) is left out, since it may follow the device. Raises
    ValueError for a parameter that is none of the module's, whose values no checkpoint would hold, and for state that is no
    tensor or number.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups, settings = list[list[str]](), list[dict[str, Any]]()
    for number, group in enumerate(optimizer.param_groups):
        other = next((parameter for parameter in group["params"] if id(parameter) not in names), None)
        if other is not None:
            raise ValueError(
                f"group {number} of the optimiser trains a parameter of {tuple(other.shape)} that is none of the crosscoder's, "
                "so a checkpoint would not hold it; make the optimiser of crosscoder.parameters()"
            )
        groups.append([names[id(parameter)] for parameter in group["params"]])
        settings.append({key: _plain(value) for key, value in group.items() if key not in _IMPLEMENTATION})
    name, tensors = type(optimizer).__qualname__, dict[str, Tensor]()
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if not isinstance(value, (Tensor, int, float)):
                raise ValueError(
                    f"a checkpoint holds tensors and numbers, and {name} keeps a {type(value).__name__} as {key!r}"
                )
            tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    return tensors, {"optimizer": {"class": name, "groups": groups}, "settings": settings}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Gives the optimiser the tensors of `optimizer_state`; its settings stay as they are.

    Raises ValueError, with the optimiser as it was, for a tensor that fits none of its parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        index, _, name = rest.partition(".")
        if kind != "optimizer" or not index.isdecimal() or int(index) >= len(parameters) or not name:
            raise ValueError(f"{key[:200]!r} is no state of an optimiser of {len(parameters)} parameters")
        like = parameters[int(index)]
        if type(optimizer).__module__.startswith("torch.optim.") and not _fits(
            value, like
        ):  # what others keep is theirs to check
            raise ValueError(f"{key[:200]!r} is {tuple(value.shape)}, and its parameter is {tuple(like.shape)}")
        entries.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def take_settings(optimizer: torch.optim.Optimizer, saved: Iterable[Mapping[str, Any]]) -> None:
    """Gives each group the settings that `optimizer_state` noted."""
    for group, kept in zip(optimizer.param_groups, saved, strict=True):
        for key, value in kept.items():
            now = group.get(key)
            if isinstance(now, Tensor):
                now.fill_(value)
            else:
                group[key] = tuple(cast("Iterable[object]", value)) if isinstance(value, list) else value


def check_settings(optimizer: torch.optim.Optimizer, clip: float) -> None:
    """Raises ValueError for a learning rate or another setting that would spoil the weights."""
    if not clip > 0:
        raise ValueError(f"the clipping norm is a number above 0, got clip={clip}; nothing was updated")
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            numbers = value if isinstance(value, (tuple, list)) and key not in _IMPLEMENTATION else (value,)
            for one in cast("Iterable[object]", numbers):
                single = one.item() if isinstance(one, Tensor) and one.numel() == 1 else one
                if isinstance(single, float) and (not math.isfinite(single) or (key == "lr" and single < 0)):
                    raise ValueError(
                        f"{key} of the optimiser's group {number} is {single}, expected a finite number{' from 0' if key == 'lr' else ''}; "
                        "nothing was updated: mend the schedule or whatever set it"
                    )


def name_of(function: Callable[..., object] | None) -> str | None:
    """What a penalty or a schedule is called: a function's name, an object's class; a lambda has none."""
    if function is None:
        return None
    name = str(getattr(function, "__qualname__", type(function).__qualname__))
    return "a lambda" if name.endswith("<lambda>") else name


def differences(saved: object, now: object, at: str = "") -> list[str]:
    """A phrase for each value that differs between two trees of plain JSON values."""
    if isinstance(saved, dict) and isinstance(now, dict):
        one, other = cast("dict[str, Any]", saved), cast("dict[str, Any]", now)
        pairs = [(key, one.get(key), other.get(key)) for key in sorted({*one, *other})]
    elif (
        isinstance(saved, list)
        and isinstance(now, list)
        and len(cast("list[Any]", saved)) == len(cast("list[Any]", now))
    ):
        pairs = [
            (str(i), *pair) for i, pair in enumerate(zip(cast("list[Any]", saved), cast("list[Any]", now), strict=True))
        ]
    else:
        return [] if saved == now else [f"{at[-200:]} was {cut(repr(saved))} and is {cut(repr(now))}"]
    return [phrase for key, mine, theirs in pairs for phrase in differences(mine, theirs, f"{at}.{key}" if at else key)]


def phrased(found: list[str]) -> str:
    """The first differences, and how many more there are."""
    return "; ".join(found[:_SHOWN]) + (f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [_plain(inner) for inner in cast("Iterable[object]", value)]
    return value


def _fits(value: Tensor, parameter: Tensor) -> bool:
    """Whether it is a number or has the parameter's axes, each whole or summed to 1 as in Adafactor."""
    if value.ndim == 0:
        return True
    return value.ndim == parameter.ndim and all(
        size in (1, whole) for size, whole in zip(value.shape, parameter.shape, strict=True)
    )
