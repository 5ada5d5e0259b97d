"""The contract of a gate: what it must give, and what it may give beside; `questions.py` asks for it."""

from abc import ABC
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fmxnn.core.shortcuts import Shortcuts
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
    """A gate that is made for a certain number of latents.

    ```python
    fx.JumpReLU(512).latents  # 512
    ```
    """

    @property
    def latents(self) -> int:
        """How many; an encoder refuses a weight of another number."""
        ...


class HasK(Protocol):
    """A gate that keeps `k` latents a token, or on average; the planner and `anneal_k` ask for it.

    Where k cannot move in training the class says so: `k_is_fixed = True`.

    ```python
    fx.SplitGate(fx.TopK(2), fx.BatchTopK(4), runs=(8, 24)).k  # 6
    ```
    """

    @property
    def k(self) -> int:
        """How many are kept."""
        ...


class HasThreshold(Protocol):
    """A gate that in eval mode keeps only what exceeds a threshold: of one value, or of one for each latent.

    In units of the pre-activations, times `scores` where the gate has them. Below 0 it was never set.

    ```python
    gate = fx.BatchTopK(4)
    gate.threshold  # -1: never set
    gate.calibrate(torch.randn(100, 32))  # now 4 of 32 a token exceed it
    ```
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

    ```python
    read, table, bias = torch.randn(5, 8), torch.randn(32, 8), torch.zeros(32)
    z = fx.TopK(4).choose(read, table, bias)
    torch.testing.assert_close(fx.sparse.to_dense_codes(z), fx.TopK(4)(read @ table.T))
    ```
    """

    def choose(self, read: Tensor, table: Tensor, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`: the codes of `read @ table.T + bias`.

        They are those of `forward`, and positive. With `propose` it may compute in bf16 first and decide in float32.
        """
        ...


@runtime_checkable
class Selector(Protocol):
    """A gate whose choice in training can be had in any mode, without moving anything.

    ```python
    gate = fx.BatchTopK(4).eval()
    (gate.select(torch.randn(5, 32)) != 0).sum()  # 20
    ```
    """

    def select(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`: what `forward` gives in training."""
        ...


@runtime_checkable
class Ranking(Protocol):
    """A gate with thresholds that can be found in data; `calibrate` asks what each of them divides.

    ```python
    pre = torch.randn(5, 32)
    for part, values in fx.SplitGate(fx.TopK(2), fx.BatchTopK(4), runs=(8, 24)).ranked(pre):
        print(part, values.shape)  # BatchTopK(k=4) torch.Size([5, 24])
    ```
    """

    def ranked(self, pre: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """`... latents -> `: each module with a `k` and a `threshold`, and the values of which it keeps k a token."""
        ...


@runtime_checkable
class Scoring(Protocol):
    """A gate that chooses by `pre * scores`; the auxiliary loss for dead latents chooses by the same.

    ```python
    weight = fx.DenseWeight(2, 8, 32)
    fx.Scored(fx.TopK(4), fx.SumNorm(weight)).scores(torch.randn(5, 32)).shape  # (32,)
    ```
    """

    def scores(self, like: Tensor) -> Tensor:
        """`-> latents`: what a unit of each latent's code counts for now, on the device of `like`, without gradient."""
        ...


@runtime_checkable
class Freezable(Protocol):
    """A gate whose choice in eval mode is one threshold for each latent; `from_saes` asks for these.

    ```python
    fx.TrainedJumpReLU(32).frozen()  # JumpReLU(latents=32)
    ```
    """

    def frozen(self) -> nn.Module:
        """The same choice as a JumpReLU, which holds the thresholds of now."""
        ...


def checked_k(who: str, k: int) -> int:
    """`k` as an int from 1; any whole number will do, numpy's too. Raises ValueError, naming who asks."""
    found = whole(k)
    if found is None or found < 1:
        raise ValueError(f"{who} needs a whole k >= 1, got k={k!r:.200}")
    return found


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
