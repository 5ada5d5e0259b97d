"""A batch of activations of one's own: what is read, what is rebuilt, and which tokens they are of."""

from collections.abc import Iterable
from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor

from fmxnn.core.errors import ShapeError

Sides = tuple[Tensor, ...]
"""What is read of some tokens, `tokens layers d_model` each: x alone, or x and the targets y."""
TAKEN = "a batch is x, (x, ids, positions) or ((x, y), ids, positions), all of them tensors"


class Rows(NamedTuple):
    """`tokens layers d_model`, each: the sides of a batch; `ids` and `positions` are `tokens`, None where not given.

    ```python
    from fmxnn.activations.own_batches import rows_of

    x = torch.randn(2, 3, 4, 8)  # 2 contexts of 3 tokens, 4 layers, d_model 8
    rows_of((x, torch.arange(6).view(2, 3))).positions  # 0, 1, 2, 0, 1, 2
    ```
    """

    sides: Sides
    ids: Tensor | None = None
    positions: Tensor | None = None

    @property
    def kind(self) -> str:
        """What all batches of a stream have in common, in words."""
        sizes = " and ".join(f"(layers={side.shape[-2]}, d_model={side.shape[-1]})" for side in self.sides)
        return f"{sizes} {'without' if self.ids is None else 'with'} token ids"


def sides_of(batch: object) -> Sides:
    """`... layers d_model`, each: x, or x and y, of a batch with or without tokens.

    Raises TypeError for what is no batch.
    """
    parts = tensors_of(batch)
    floating = [part.is_floating_point() for part in parts]
    count = sum(floating)
    if not 1 <= count <= 2 or not all(floating[:count]):
        raise TypeError(f"{TAKEN}, got {_shown(parts) or 'no tensor'}; x and y are in floating point, the rest is not")
    return tuple(parts[:count])


def rows_of(batch: object, number: int = 0) -> Rows:
    """`tokens layers d_model`: a batch with its axes of tokens in one; `number` is the batch's, for an error.

    Raises TypeError for what is no batch, ShapeError where ids or positions are of other tokens or positions are
    missing, and ValueError for a token id below 0.
    """
    sides = sides_of(batch)
    axes, more = sides[0].shape[:-2], tensors_of(batch)[len(sides) :]
    wanted = [side.shape[:-2] for side in sides] + [part.shape for part in more]
    if not axes or len(more) > 2 or any(shape != axes for shape in wanted):
        raise ShapeError(
            f"batch {number} of the activations is {_shown(tensors_of(batch))}, expected x of (tokens, layers, d_model)"
            f", and y, ids and positions of the same tokens; {TAKEN}, and a single one goes in as [batch]"
        )
    flat = tuple(side.flatten(0, -3) for side in sides)
    if not more:
        return Rows(flat)
    if len(more) == 1 and len(axes) == 1:
        raise ShapeError(
            f"batch {number} of the activations has token ids and no positions, which say where a context begins; "
            "give (x, ids, positions), or x of (contexts, context, layers, d_model)"
        )
    ids, positions = more if len(more) > 1 else (*more, torch.arange(axes[-1]).expand(axes))
    ids, positions = (part.detach().flatten().cpu().long() for part in (ids, positions))
    if len(ids) and int(ids.min()) < 0:
        raise ValueError(
            f"batch {number} of the activations has the token id {int(ids.min())}, and ids count from 0; "
            "leave tokens out that are none"
        )
    return Rows(flat, ids, positions)


@singledispatch
def tensors_of(batch: object) -> tuple[Tensor, ...]:
    """The tensors of a batch, one after the other. Raises TypeError for what is no tensor."""
    raise TypeError(
        f"{TAKEN}, got {type(batch).__name__}; make a tensor of it, such as torch.as_tensor(x), or harvest the text "
        "first"
    )


@tensors_of.register
def _(batch: Tensor) -> tuple[Tensor, ...]:
    return (batch,)


@tensors_of.register(tuple)
@tensors_of.register(list)
def _(batch: Iterable[object]) -> tuple[Tensor, ...]:
    return tuple(tensor for part in batch for tensor in tensors_of(part))


def _shown(parts: Iterable[Tensor]) -> str:
    return ", ".join(f"{tuple(part.shape)} of {part.dtype}" for part in parts)[:200]
