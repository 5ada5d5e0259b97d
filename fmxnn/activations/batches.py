"""Batches of activations, wherever they come from."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from fmxnn.activations.own_batches import sides_of
from fmxnn.core.errors import ShapeError
from fmxnn.core.sizes import whole

GROUP = 2**14
"""Contexts among which blocks are mixed in the first epoch, so that a long text need not be read to its end before."""
Rows = tuple[Tensor, ...]
"""Of some tokens: the sides, and last the context and the position of each."""


@dataclass(frozen=True)
class Shuffle:
    """How a stream of tokens is mixed and cut into batches.

    - `batch`: tokens of a batch
    - `block`: contexts that are read together; tokens are mixed within two neighbouring blocks
    - `at_once`: contexts that the language model runs at once
    - `seed`: the same seed gives the same batches in the same order
    - `epochs`: how often the text is read

    ```python
    from fmxnn.activations import Shuffle

    shuffle = Shuffle(batch=1024, block=128, seed=3)
    ```
    """

    batch: int = 4096
    block: int = 256
    at_once: int = 32
    seed: int = 0
    epochs: int = 1

    def __post_init__(self):
        for name in ("batch", "block", "at_once", "epochs"):
            _check_count("a stream", name, getattr(self, name))


class Mixing(TypedDict, total=False):
    """How a stream mixes its tokens, where it is not as `Shuffle` has it.

    ```python
    from fmxnn.activations.batches import Mixing

    Mixing(batch=8192, seed=3, epochs=2)
    ```
    """

    batch: int
    block: int
    seed: int
    epochs: int


def bunches(keep: Tensor, tokens: int) -> Iterator[tuple[Tensor, int]]:
    """`contexts context -> `: the contexts that run together, and after how many tokens each of them is cut.

    A context ends with its last kept token. Contexts of like length run together, the longest first, as many as have
    `tokens` tokens with the padding between them. Contexts without a kept token are left out. Where little would be
    saved, contexts stay whole and in their order.
    """
    contexts, context = keep.shape
    lengths = (keep * torch.arange(1, context + 1, device=keep.device)).amax(1)
    if 8 * int(lengths.sum()) >= 7 * keep.numel():
        yield from ((rows, context) for rows in torch.arange(contexts).split(max(1, tokens // context)))
        return
    order, start = lengths.argsort(descending=True, stable=True), 0
    while start < len(order) and (longest := int(lengths[order[start]])):
        rows = order[start : start + max(1, tokens // longest)]
        yield rows[lengths[rows] > 0], longest
        start += len(rows)


def rebatch(batches: Iterable[Tensor], batch: int) -> Iterator[Tensor]:
    """`tokens layers d_model`: cuts your own activations, of any row counts, into batches of exactly `batch` rows.

    A last short batch is dropped. Raises ShapeError, naming the batch, where one is not (tokens, layers, d_model) or
    differs from the first. Raises ValueError for batch < 1, and TypeError for a batch with more than x.
    """
    _check_count("rebatch", "batch", batch)
    waiting, count = list[Tensor](), 0
    for number, x in enumerate(batches):
        if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"rebatch cuts activations x, got {type(x).__name__} as batch {number}; give x alone, as in "
                "rebatch((x for x, *_ in batches), 4096)"
            )
        expected = tuple(waiting[0].shape[1:]) if waiting else None
        if x.ndim != 3 or (expected is not None and tuple(x.shape[1:]) != expected):
            wanted = (
                "(tokens, layers, d_model)"
                if expected is None
                else f"(tokens, layers={expected[0]}, d_model={expected[1]})"
            )
            raise ShapeError(
                f"batch {number} of the activations is {tuple(x.shape)}, expected {wanted}; stack one activation per "
                "layer: torch.stack(hidden, dim=-2)"
            )
        waiting.append(x)
        count += len(x)
        if count >= batch:
            pool = torch.cat(waiting)
            whole = count // batch * batch
            yield from pool[:whole].split(batch)
            waiting, count = [pool[whole:]], count - whole


def activation_scale(batches: Iterable[Any]) -> float:
    """`tokens layers d_model -> `: the factor that brings the mean norm, over tokens and layers, to sqrt(d_model).

    Of pairs (x, y), and of batches with tokens (x, ids, positions), it is that of x.

    Raises ValueError for no batch, for zeros alone, and for a batch with NaN or infinity, which it names.
    """
    total, count, d_model = 0.0, 0, 0
    for number, batch in enumerate(batches):
        x = sides_of(batch)[0]
        norms = x.double().norm(dim=-1)
        if not norms.isfinite().all():
            raise ValueError(
                "activation_scale needs finite activations, got NaN or infinity in "
                f"{int((~norms.isfinite()).sum()):,} of {norms.numel():,} "
                f"of batch {number}; harvest in float32 or bfloat16, or leave those tokens out"
            )
        total, count, d_model = total + float(norms.sum()), count + norms.numel(), x.shape[-1]
    if not total > 0:
        raise ValueError(
            f"activation_scale needs activations that are not all zero, got {count} of them with a summed norm of "
            f"{total}"
        )
    return d_model**0.5 * count / total


def mixed_rows(halves: Sequence[tuple[Rows | None, Tensor]], order: Tensor) -> Rows:
    """The rows at the places of each half, one half after the other, in this order."""
    there = [(rows, places) for rows, places in halves if rows is not None]
    if len(there) == 1:
        ((rows, places),) = there
        return tuple(column[places[order].to(column.device)] for column in rows)
    (before, last), (now, first) = there
    late = order >= len(last)
    moves = [
        (before, last[order[~late]], (~late).nonzero().squeeze(1)),
        (now, first[order[late] - len(last)], late.nonzero().squeeze(1)),
    ]
    mixed = tuple(column.new_empty(len(order), *column.shape[1:]) for column in now)
    for rows, places, to in moves:
        for column, into in zip(rows, mixed, strict=True):
            into[to.to(column.device)] = column[places.to(column.device)]
    return mixed


def _check_count(who: str, name: str, value: object) -> None:
    if (whole(value) or 0) < 1:
        raise ValueError(f"{who} needs {name} >= 1, a whole number, got {name}={value!r}")
