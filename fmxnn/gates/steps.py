"""When the threshold of a gate moves: at every training forward, or once an optimiser step."""

# pyright: reportPrivateUsage=false
# torch has no public name for whether a backward pass runs.

from collections.abc import Generator
from contextlib import contextmanager
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fmxnn.sparse.across_ranks import Ranks


class _Clock:
    """Optimiser steps of this process. Plain numbers, since a compiled graph knows no ContextVar."""

    steps = 0
    watching = False
    inside = 0
    """How many `one_step` are open."""


_CLOCK = _Clock()
_SERIALS = count()
_MOVES: WeakValueDictionary[int, "Moves"] = WeakValueDictionary()
"""By number, since a graph holds numbers and no objects."""


@contextmanager
def one_step() -> Generator[None]:
    """Within it, all training forwards between two optimiser steps move a threshold once, as one batch would.

    The threshold moves by `decay` from where it stood before the step, towards the mean of what the micro-batches
    kept last. The mean and not the smallest, because each micro-batch is a batch of its own in which k a token are
    kept: the smallest of many would let eval mode keep more than k. With one micro-batch a step the numbers are
    those of no context at all. An optimiser step is any of torch's `Optimizer.step()` in this process, and the
    context holds for the whole process.

    ```python
    gate = fx.BatchTopK(2, decay=0.5)
    for pre in torch.tensor([[[4.0, 2.0, 1.0]], [[6.0, 4.0, 1.0]]]):  # two micro-batches
        with one_step():
            gate(pre)
    gate.threshold  # 3, the mean of 2 and 4
    ```
    """
    _CLOCK.inside += 1
    try:
        yield
    finally:
        _CLOCK.inside -= 1


class Moves:
    """What one threshold has been moved by since the last optimiser step; a copy counts on its own."""

    def __init__(self) -> None:
        self.step = -1
        self.first: tuple[Tensor, Tensor, Tensor] | None = None
        """Of a step's only move so far: the threshold before it, the smallest value kept, and the threshold after."""
        self.past: list[Tensor] = []
        """Of several moves, two of `4`: the threshold before the step, the sum and the number of the smallest values
        since, and the threshold that they gave. The first is from before the last forward, so that a threshold that is
        put back takes its sums back with it."""
        self._enroll()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or one from another process, gets a number of its own."""
        self.__dict__.update(state)
        self._enroll()

    def _enroll(self) -> None:
        self.serial = next(_SERIALS)
        _MOVES[self.serial] = self

    def follow(self, threshold: Tensor, smallest: Tensor, decay: float, group: str) -> None:
        """Moves the threshold in place, in a graph too; a forward that a backward pass repeats moves nothing."""
        if torch.compiler.is_compiling() or group:
            _follow(threshold, smallest, decay, self.serial, group, _CLOCK.inside > 0)
        elif torch._C._current_graph_task_id() == -1:
            self.move(threshold, smallest, decay, once=_CLOCK.inside > 0)

    def move(self, threshold: Tensor, smallest: Tensor, decay: float, *, once: bool) -> None:
        """Moves the threshold in place; `once` counts all moves between two optimiser steps as one."""
        if once and self.step == _CLOCK.steps:
            self._move_again(threshold, smallest, decay)
            return
        before = threshold.clone() if once else threshold
        threshold.copy_(torch.where(smallest.isfinite(), _moved(threshold, smallest, decay), threshold))
        if once:
            _watch_steps()
            self.step, self.past = _CLOCK.steps, []
            self.first = before, smallest.clone(), threshold.clone()

    def _move_again(self, threshold: Tensor, smallest: Tensor, decay: float) -> None:
        """Moves it from where it stood before the step, towards the mean of all smallest values since."""
        state, finite = self._state(threshold), smallest.isfinite()
        before, total, number, _ = state
        total, number = torch.where(finite, total + smallest, total), number + finite
        moved = torch.where(number > 0, _moved(before, total / number, decay), before)
        self.past = [state, torch.stack([before, total, number, moved])]
        threshold.copy_(moved)

    def _state(self, threshold: Tensor) -> Tensor:
        """What goes before this forward: a threshold that something else has set since starts anew."""
        zero = torch.zeros_like(threshold)
        if self.first is not None:
            before, smallest, after = self.first
            finite, none = smallest.isfinite(), torch.zeros_like(before)
            total, number = torch.where(finite, smallest, 0.0), finite.to(before.dtype)
            self.past = [torch.stack([before, none, none, before]), torch.stack([before, total, number, after])]
            self.first = None
        state, here = torch.stack([threshold, zero, zero, threshold]), (threshold.device, threshold.dtype)
        for past in self.past:
            if (past.device, past.dtype) == here:
                state = torch.where(past[3] == threshold, past, state)
        return state


def _watch_steps() -> None:
    if not _CLOCK.watching:
        register_optimizer_step_post_hook(_count_step)
        _CLOCK.watching = True


def _moved(threshold: Tensor, smallest: Tensor, decay: float) -> Tensor:
    return torch.where(threshold < 0, smallest, decay * threshold + (1 - decay) * smallest)


def _count_step(*_: object) -> None:
    _CLOCK.steps += 1


@torch.library.custom_op("fmxnn::follow", mutates_args=("threshold",))
def _follow(threshold: Tensor, smallest: Tensor, decay: float, serial: int, group: str, once: bool) -> None:
    if torch._C._current_graph_task_id() == -1:
        least = Ranks(group).least(smallest) if group else smallest
        _MOVES[serial].move(threshold, least, decay, once=once)


@_follow.register_fake
def _(threshold: Tensor, smallest: Tensor, decay: float, serial: int, group: str, once: bool) -> None:
    return None
