"""Rows of a weight's table: which are nearest to atoms that are asked for, and where they are stored."""

from collections.abc import Iterator
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fmxnn.core.shortcuts import why_overridden
from fmxnn.weights.parted import parts_of
from fmxnn.weights.weight import ROWS, Part, Rowed, Weight


def is_rowed(weight: Weight) -> TypeGuard[Rowed]:
    """Whether it has a table and says where its rows are stored; so must the weights whose table it shows."""
    if not isinstance(weight, Rowed) or weight.table is None or why_overridden(weight, ROWS):
        return False
    return all(is_rowed(inner) for inner in getattr(weight, "relies_on", ()))


def as_rowed(weight: Weight) -> Rowed | None:
    """The weight itself where its rows can be written, else None."""
    return weight if is_rowed(weight) else None


def parts_with(weight: Weight, latents: Tensor) -> Iterator[tuple[Part, Tensor, Tensor]]:
    """Each part that has some of these, which those are (True), and their numbers in the part."""
    first = 0
    for part in parts_of(weight):
        mine = (latents >= first) & (latents < first + part.weight.latents)
        if mine.any():
            yield part, mine, latents[mine] - first
        first += part.weight.latents


def check_stored(who: str, *weights: nn.Module) -> None:
    """Raises TypeError where a parametrization computes a tensor of these, so that what is written to it is lost."""
    for part in (part for weight in weights for part in weight.modules()):
        if is_parametrized(part):
            raise TypeError(
                f"{who} writes to the tensors of a weight, and those of {type(part).__name__} are computed by a "
                "parametrization; take it off first: torch.nn.utils.parametrize.remove_parametrizations"
            )


def nearest_rows(weight: Rowed, atoms: Tensor) -> Tensor:
    """`drawn layers d_model -> drawn bonds`: the rows whose atoms are nearest to these, by least squares.

    Of several, the shortest.
    """
    if weight.small_flops == 0:  # the bonds are layers and d_model themselves
        return weight.to_bonds(atoms)
    bonds = cast("Tensor", weight.table).shape[1]
    small = weight.from_bonds(torch.eye(bonds, dtype=atoms.dtype, device=atoms.device)).flatten(1)
    # in float64 a map of lower rank would look full, and its rows explode
    noise = max(small.shape) * torch.finfo(atoms.dtype).eps
    left, right = small.T.double().cpu(), atoms.flatten(1).T.double().cpu()
    found = torch.linalg.lstsq(left, right, rcond=noise, driver="gelsd").solution
    return found.T.to(atoms)


@torch.no_grad()
def write_rows(weight: Rowed, latents: Tensor, rows: Tensor) -> None:
    """`drawn, drawn bonds`: gives these latents these rows of the table."""
    parameter, index = weight.stored_at(latents)
    parameter[index] = rows.view(parameter[index].shape)
