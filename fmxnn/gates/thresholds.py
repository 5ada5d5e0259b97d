"""Where the threshold of a gate lies such that a wanted number of latents is kept."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fmxnn.core.sharding import has_processes
from fmxnn.gates.gate import Ranking


class Calibrated(nn.Module):
    """A base of gates whose thresholds can be set from pre-activations; a subclass says by `ranked` what it ranks.

    ```python
    gate = fx.BatchTopK(1)
    gate.calibrate(torch.tensor([[3.0, 1.0], [2.0, 0.5]]))
    gate.threshold  # 1.5, half way between what is kept and what is not
    ```
    """

    def calibrate(self, pre: Tensor) -> None:
        """`... latents -> `: sets each threshold so that these tokens keep k latents each on average.

        Raises ValueError for no tokens and for NaN, and TypeError for a gate without such a threshold.
        """
        set_thresholds(self, [pre], pre.numel() // pre.shape[getattr(self, "dim", -1)])


def ranked(gate: nn.Module, pre: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """`... latents -> `: what `Ranking.ranked` gives; nothing from a gate that has no such threshold."""
    return gate.ranked(pre) if isinstance(gate, Ranking) else iter(())


@torch.no_grad()
def set_thresholds(gate: nn.Module, blocks: Iterable[Tensor], tokens: int) -> list[nn.Module]:
    """`... latents`: sets each threshold so that all `tokens` of the blocks keep k latents each on average.

    It is exact, and holds one block and `tokens` times k values. A threshold that several places share is set
    for all of them together. Gives the modules that were set. Raises ValueError for no tokens and for NaN, and
    TypeError for a gate without such a threshold; none is moved then.
    """
    found: dict[nn.Module, tuple[Tensor, int]] = {}
    for pre in blocks:
        together: dict[nn.Module, list[Tensor]] = {}
        for part, values in ranked(gate, pre):
            together.setdefault(part, []).append(values.flatten())
        for part, each in together.items():
            values, count = torch.cat(each), tokens * len(each) * cast("int", part.k) + 1
            if not len(values) or values.isnan().any():
                raise ValueError(
                    "calibrate needs pre-activations without NaN of at least one token, "
                    f"got {tuple(pre.shape)}; the threshold stays"
                )
            found[part] = _largest(found[part][0] if part in found else values[:0], values, count), count
    if not found:
        raise TypeError(
            "calibrate sets the threshold of BatchTopK, alone or within Scored, Decoupled or SplitGate, "
            f"and {type(gate).__name__} has none to set; leave it out"
        )
    for part, (values, count) in found.items():
        threshold = cast("Tensor", part.threshold)
        threshold.copy_(_between(*values[-2:].to(threshold.dtype)) if len(values) == count else threshold.new_zeros(()))
    return list(found)


def warn_unset(gate: nn.Module) -> None:
    """Warns, once for a gate, if its threshold was never set; a graph in compilation is not asked."""
    state = cast("Any", gate)
    if torch.compiler.is_compiling() or state.asked:
        return
    unset = False
    with suppress(RuntimeError):  # on the meta device, as a FakeTensor and under vmap there is no number to ask for
        unset, state.asked = bool(state.threshold < 0), True
    if unset:
        warnings.warn(
            f"the threshold of {gate!r} was never set, so eval mode keeps every positive pre-activation, which may be "
            "half of all latents; train it, or set it from data: fmxnn.training.calibrate(crosscoder, batches)",
            stacklevel=2,
        )


def warn_local(gate: nn.Module) -> None:
    """Warns, once for a gate, if it trains on one of several ranks and nobody has said whose tokens are one batch.

    DDP and FSDP2 leave no sign on the modules inside them; that several ranks have met is the sign.
    """
    state = cast("Any", gate)
    if state.asked_ranks or state.group is not None or torch.compiler.is_compiling():
        return
    if has_processes() and (ranks := dist.get_world_size()) > 1:
        state.asked_ranks = True
        warnings.warn(
            f"{gate!r} chooses among the tokens of its own rank, and there are {ranks} ranks, so codes and threshold "
            "differ from those of one process; set gate.group = 'world' to choose over all ranks, or 'local' if that "
            "is meant",
            stacklevel=2,
        )


def _between(kept: Tensor, left: Tensor) -> Tensor:
    """Half way, so that a product rounded otherwise crosses no threshold; at the lower where no number is between."""
    half = left + (kept - left) / 2
    return torch.where(half < kept, half, left)


def _largest(held: Tensor, values: Tensor, count: int) -> Tensor:
    """The `count` largest positive of both, fewer where fewer are positive, in falling order."""
    low = held[-1] if len(held) == count else held.new_zeros(())
    pool = torch.cat([held, values[values > low]])
    return pool.topk(min(count, len(pool))).values
