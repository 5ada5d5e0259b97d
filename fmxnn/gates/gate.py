"""The contract of a gate: what it must give, what it may give beside, and how the rest of the package asks for it."""

from abc import ABC
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from fmxnn.core.shortcuts import Shortcuts, why_overridden
from fmxnn.core.sizes import whole
from fmxnn.sparse import codes as sparse

GATE: Shortcuts = {"forward": ("choose",), "select": ("choose",), "__call__": ("choose",)}
"""Each slow method of a gate with the fast one that stands for it where codes are sparse."""


class Gate(Protocol):
    """`... latents -> ... latents`: keeps some pre-activations and sets the others to zero.

    Every module with this forward is a gate, `torch.nn.ReLU()` too. The protocols below say what a gate may give
    beside; `fmxnn.check_gate` tries the laws of all that it gives.

    ```python
    class Squared(nn.Module):
        def forward(self, pre):
            return pre.relu().square()

    fx.check_gate(Squared())
    ```
    """

    def __call__(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        ...


class HasLatents(Protocol):
    """A gate that is made for a certain number of latents."""

    @property
    def latents(self) -> int:
        """How many; an encoder refuses a weight of another number."""
        ...


class HasK(Protocol):
    """A gate that keeps `k` latents a token, or on average; the planner and `anneal_k` ask for it.

    Where k cannot move in training the class says so: `k_is_fixed = True`.
    """

    @property
    def k(self) -> int:
        """How many are kept."""
        ...


class HasThreshold(Protocol):
    """A gate that in eval mode keeps only what exceeds a threshold: of one value, or of one for each latent.

    In units of the pre-activations, times `scores` where the gate has them. Below 0 it was never set.
    """

    @property
    def threshold(self) -> Tensor:
        """A number, or `latents`."""
        ...


@runtime_checkable
class Chooser(Protocol):
    """A gate that finds its codes at a table, so that the pre-activations are never held whole.

    It may also give `obstacle`, a property that says why sparse codes cannot be had now ("" where they can), and
    `takes_tables = True`, in the class that has `choose`, where `table` may also be a `fmxnn.sparse.Tables`.
    """

    def choose(self, read: Tensor, table: Tensor, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`: the codes of `read @ table.T + bias`.

        They are those of `forward`, and positive. With `propose` it may compute in bf16 first and decide in float32.
        """
        ...


@runtime_checkable
class Selector(Protocol):
    """A gate whose choice in training can be had in any mode, without moving anything."""

    def select(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`: what `forward` gives in training."""
        ...


@runtime_checkable
class Ranking(Protocol):
    """A gate with thresholds that can be found in data; `calibrate` asks what each of them divides."""

    def ranked(self, pre: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """`... latents -> `: each module with a `k` and a `threshold`, and the values of which it keeps k a token."""
        ...


@runtime_checkable
class Scoring(Protocol):
    """A gate that chooses by `pre * scores`; the auxiliary loss for dead latents chooses by the same."""

    def scores(self, like: Tensor) -> Tensor:
        """`-> latents`: what a unit of each latent's code counts for now, on the device of `like`, without gradient."""
        ...


@runtime_checkable
class Freezable(Protocol):
    """A gate whose choice in eval mode is one threshold for each latent; `from_saes` asks for these."""

    def frozen(self) -> nn.Module:
        """The same choice as a JumpReLU, which holds the thresholds of now."""
        ...


def k_of(gate: nn.Module) -> int | None:
    """The gate's k; None where it keeps no set number."""
    return getattr(gate, "k", None)


def latents_of(gate: nn.Module) -> int | None:
    """The latents that the gate is made for; None where it takes any number."""
    return getattr(gate, "latents", None)


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
    if torch.compiler.is_compiling():
        return "a compiled graph holds no codes whose number varies"
    return "" if float(threshold) > 0 else "the threshold is not set"


def checked_k(who: str, k: int) -> int:
    """`k` as an int from 1; any whole number will do, numpy's too. Raises ValueError, naming who asks."""
    found = whole(k)
    if found is None or found < 1:
        raise ValueError(f"{who} needs a whole k >= 1, got k={k!r:.200}")
    return found


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


def fitting_k(gate: HasK, latents: int) -> int:
    """Its k, which may have moved since it was checked. Raises ValueError for more than there are latents."""
    if gate.k > latents:
        raise ValueError(f"{type(gate).__name__} cannot keep k={gate.k} of latents={latents}; set k <= {latents}")
    return gate.k


class Counted(nn.Module):
    """A gate with a `k` that is checked whenever it is set, for gates of your own.

    Raises ValueError when k is set to anything but a whole number from 1.

    ```python
    class First(fx.gates.Counted):
        def forward(self, pre):
            return pre.relu() * (torch.arange(pre.shape[-1]) < self.k)

    First(2)(torch.tensor([1.0, 2.0, 3.0]))  # 1, 2, 0
    ```
    """

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    @property
    def k(self) -> int:
        """How many are kept."""
        return self._k

    @k.setter
    def k(self, k: int) -> None:
        """Checks it at once, so that a mistake is found where it is made."""
        self._k = checked_k(type(self).__name__, k)


class Thresholded(nn.Module, ABC):
    """A module whose buffers, its thresholds, stay float32 or wider however it is cast.

    ```python
    gate = fx.JumpReLU(4).bfloat16()
    gate.threshold.dtype  # torch.float32
    ```
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Thresholded":
        def widely(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        super()._apply(widely, recurse)
        return self


def above(pre: Tensor, threshold: Tensor) -> Tensor:
    """`... latents -> ... latents`: what exceeds the threshold, decided in the wider dtype of the two.

    NaN stays, so that it is seen.
    """
    # A number without axes would be rounded to the dtype of `pre`.
    return torch.where(pre <= threshold.reshape(-1), 0.0, pre)
