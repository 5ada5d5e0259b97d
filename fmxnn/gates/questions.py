"""What the rest of the package asks of a gate: any module may be one, and most of the contract is optional."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fmxnn.core.shortcuts import why_overridden
from fmxnn.gates.gate import GATE, Chooser, Scoring, checked_k
from fmxnn.sparse.operators import is_without_data


def k_of(gate: nn.Module) -> int | None:
    """The gate's k; None where it keeps no set number."""
    return getattr(gate, "k", None)


def latents_of(gate: nn.Module) -> int | None:
    """The latents that the gate is made for; None where it takes any number."""
    return getattr(gate, "latents", None)


def axis_of(gate: nn.Module) -> int:
    """The axis along which the gate's latents lie; -1, the last, where it does not say."""
    return getattr(gate, "dim", -1)


def threshold_of(gate: nn.Module) -> Tensor | None:
    """The gate's threshold; None where it has none."""
    return getattr(gate, "threshold", None)


def select_of(gate: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The gate's `select`; None where it has none."""
    return getattr(gate, "select", None)


def scores_of(gate: nn.Module, like: Tensor) -> Tensor | None:
    """`-> latents`: the gate's scores, on the device of `like`; None where it chooses by the pre-activations alone."""
    return gate.scores(like) if isinstance(gate, Scoring) else None


def fixed_k(gate: nn.Module) -> nn.Module | None:
    """The part of a gate, or the gate, whose k cannot move in training; None where it can."""
    fixed = (part for part in gate.modules() if getattr(part, "k_is_fixed", False))
    return next(fixed, None if k_of(gate) is not None else gate)


def is_unset(gate: nn.Module) -> bool:
    """Whether the gate has a threshold for its k that training has not set yet."""
    threshold = threshold_of(gate)
    return threshold is not None and k_of(gate) is not None and bool((threshold < 0).any())


def why_dense(gate: nn.Module) -> str:
    """Why the gate's codes are found densely; nothing where they can be sparse.

    A subclass that overrides `forward` alone is not passed by.
    """
    return why_overridden(gate, GATE) or getattr(gate, "obstacle", "")


def why_one_table(gate: nn.Module) -> str:
    """Why the gate cannot choose at several tables, if it cannot: `choose` is handed one unless its class says more."""
    for part in gate.modules():
        told = getattr(part, "takes_tables", False) and not why_overridden(part, {"choose": ("takes_tables",)})
        if isinstance(part, Chooser) and not told:
            return f"{type(part).__name__}.choose takes one table, and the weight has several"
    return ""


def why_uncounted(gate: nn.Module, *, training: bool) -> str:
    """Why the number of codes a token is not known beforehand, if it is not."""
    if k_of(gate) is None:
        return f"{type(gate).__name__} keeps a number of codes that is not known beforehand"
    if training or (threshold := threshold_of(gate)) is None:
        return ""
    if torch.compiler.is_compiling() or is_without_data(threshold):
        return "a compiled graph holds no codes whose number varies"
    return "" if float(threshold) > 0 else "the threshold is not set"


def set_k(gate: nn.Module, k: int) -> None:
    """Sets the k of a gate inside another.

    Raises ValueError for anything but a whole number from 1, and TypeError where the gate has no k.
    """
    name = type(gate).__name__
    if k_of(gate) is None:
        raise TypeError(
            f"{name} keeps no set number of latents, so its k cannot be set, got k={k!r:.200}; use TopK or BatchTopK"
        )
    cast("Any", gate).k = checked_k(name, k)
