"""An optimiser that fits what is trained, its settings, and its state as named tensors."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast
from warnings import warn

import torch
from torch import Tensor, nn

_IMPLEMENTATION = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}


def check_optimizer(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError where one of the parameters that requires a gradient would not be trained.

    Warns of parameters in the optimiser that are none of these.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    mine = set(map(id, parameters.values()))
    if held.isdisjoint(mine):
        raise ValueError(
            f"the optimiser holds {len(held)} parameters and none of this crosscoder's, so nothing would be trained; "
            "make it of crosscoder.parameters(), after the crosscoder was loaded, copied or sharded"
        )
    left = [name for name, parameter in parameters.items() if parameter.requires_grad and id(parameter) not in held]
    if left:
        raise ValueError(
            f"the optimiser holds {len(parameters) - len(left)} of the crosscoder's {len(parameters)} parameters and "
            f"not {', '.join(left)[:200]}; "
            "add them, or freeze what shall stay as it is: parameter.requires_grad_(False)"
        )
    strange = len(held - mine)
    if strange:
        warn(
            f"{strange} of the optimiser's {len(held)} parameters are not this crosscoder's: their gradients are "
            "neither clipped nor looked at before an update; leave them out unless a penalty trains them",
            stacklevel=3,
        )


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's tensors; its class with the parameters' names of each group, and each group's settings.

    Which implementation runs (`fused`, `foreach` and their like) is left out, since it may follow the device. Raises
    ValueError for a parameter that is none of `parameters`, whose values no checkpoint would hold, and for state that
    is no tensor or number.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups, settings = list[list[str]](), list[dict[str, Any]]()
    for number, group in enumerate(optimizer.param_groups):
        other = next((parameter for parameter in group["params"] if id(parameter) not in names), None)
        if other is not None:
            raise ValueError(
                f"group {number} of the optimiser trains a parameter of {tuple(other.shape)} that is none of the "
                "crosscoder's, so a checkpoint would not hold it; make the optimiser of crosscoder.parameters()"
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
            wrong = [one for one in _numbers(key, value) if not math.isfinite(one) or (key == "lr" and one < 0)]
            if wrong:
                raise ValueError(
                    f"{key} of the optimiser's group {number} is {wrong[0]}, expected a finite "
                    f"number{' from 0' if key == 'lr' else ''}; nothing was updated: mend the schedule or whatever "
                    "set it"
                )


def _numbers(key: str, value: object) -> list[float]:
    """The floating-point numbers of a setting: itself, or of a pair such as the betas."""
    if key in _IMPLEMENTATION:
        return []
    several: Iterable[Any] = cast("Iterable[Any]", value) if isinstance(value, (tuple, list)) else [value]
    single = (one.item() if hasattr(one, "numel") and one.numel() == 1 else one for one in several)
    return [one for one in single if isinstance(one, float)]


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
