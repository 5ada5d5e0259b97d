"""Rows of a weight's table: which are nearest to atoms that are asked for, and where they are stored."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from fmxnn.weights.parted import Part, parts_of
from fmxnn.weights.ragged import RaggedPart
from fmxnn.weights.weight import Rowed, Weight


def is_rowed(weight: Weight) -> bool:
    """Whether it has a table, and says where its rows are stored."""
    inner = weight.weight if isinstance(weight, RaggedPart) else weight  # whose rows are the inner's
    return isinstance(inner, Rowed) and inner.table is not None


def parts_with(weight: Weight, latents: Tensor) -> Iterator[tuple[Part, Tensor, Tensor]]:
    """Each part that has some of these, which those are (True), and their numbers in the part."""
    first = 0
    for part in parts_of(weight):
        mine = (latents >= first) & (latents < first + part.weight.latents)
        if mine.any():
            yield part, mine, latents[mine] - first
        first += part.weight.latents


def nearest_rows(weight: Weight, atoms: Tensor) -> Tensor:
    """`drawn layers d_model -> drawn bonds`: rows whose atoms are nearest to these by least squares, of those the shortest."""
    rowed = cast("Rowed", weight)
    if rowed.small_flops == 0:  # no small factors: the bonds are layers and d_model themselves
        return rowed.to_bonds(atoms)
    bonds = cast("Tensor", rowed.table).shape[1]
    small = rowed.from_bonds(torch.eye(bonds, dtype=atoms.dtype, device=atoms.device)).flatten(1)
    noise = (
        max(small.shape) * torch.finfo(atoms.dtype).eps
    )  # in float64 a map of lower rank would look full, and its rows explode
    left, right = small.T.double().cpu(), atoms.flatten(1).T.double().cpu()
    found = torch.linalg.lstsq(left, right, rcond=noise, driver="gelsd").solution
    return found.T.to(atoms)


@torch.no_grad()
def write_rows(weight: Weight, latents: Tensor, rows: Tensor) -> None:
    """`drawn, drawn bonds`: gives these latents these rows of the table."""
    parameter, index = cast("Rowed", weight).stored_at(latents)
    parameter[index] = rows.view(index[0].shape)
