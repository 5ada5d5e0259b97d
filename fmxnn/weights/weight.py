"""The contract of a weight: what it must give, and what it may give."""

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor, nn

from fmxnn.core.errors import ShapeError
from fmxnn.sparse.codes import Codes
from fmxnn.sparse.tables import Tables
from fmxnn.weights.layer_map import LayerMap, layer_number

Index = int | slice | list[int] | Tensor


BLOCK = 1024


class Weight(nn.Module, ABC):
    """`layers d_model latents`: what a cross-layer weight does, whatever it is made of.

    A weight of your own gives `layers`, `d_model`, `latents`, `to_latents` and `to_layers`; atoms, dense form
    and norms follow from `to_layers`. `fmxnn.weights.laws.check_weight` tries the laws on it.
    """

    layers: int
    d_model: int
    latents: int

    @abstractmethod
    def to_latents(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`: reads all layers."""

    @abstractmethod
    def to_layers(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`: writes all layers, the adjoint of reading; codes dense or torch.sparse_csr."""

    def atoms(self, index: Index) -> Tensor:
        """`to_dense()[..., index]`: what these latents write at every layer, without the rest of the dense form."""
        like = next(self.parameters())
        one_hot = torch.eye(self.latents, dtype=like.dtype, device=like.device)[index]
        return rearrange(self.to_layers(one_hot), "... layers d_model -> layers d_model ...")

    def to_dense(self) -> Tensor:
        """`-> layers d_model latents`: the weight as one tensor."""
        return self.atoms(slice(None))

    def at(self, layer: int) -> LayerMap:
        """`d_model latents`: one layer as a map of its own, which shares the parameters. Raises IndexError outside."""
        return LayerMap(self, layer_number(layer, self.layers))

    def norms(self) -> Tensor:
        """`-> layers latents`: the length of each latent's atom at each layer, block by block, without the dense form."""
        blocks = [slice(start, min(start + BLOCK, self.latents)) for start in range(0, self.latents, BLOCK)]
        return torch.cat([self.atoms(block).norm(dim=1) for block in blocks], dim=-1)


def check_latents(weight: Weight, z: Tensor | Codes) -> None:
    """`... latents -> `: raises ShapeError for other latents than the weight's."""
    if z.shape[-1:] != (weight.latents,):
        raise ShapeError(f"the weight writes codes of (..., latents={weight.latents}), got {tuple(z.shape)}")


def check_layers(who: str, weight: Weight, x: Tensor) -> None:
    """`... layers d_model -> `: raises ShapeError for other layers or d_model than the weight's."""
    if x.shape[-2:] != (weight.layers, weight.d_model):
        raise ShapeError(
            f"the {who} reads (..., layers={weight.layers}, d_model={weight.d_model}), got {tuple(x.shape)}; "
            "stack one activation per layer: torch.stack(hidden, dim=-2)"
        )


@runtime_checkable
class Tabled(Protocol):
    """A weight whose cost lies at a table of one row a latent; any class with these three takes the sparse path."""

    @property
    def table(self) -> Tensor | Tables | None:
        """`latents bonds`"""
        ...

    def to_bonds(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... bonds`"""
        ...

    def from_bonds(self, h: Tensor) -> Tensor:
        """`... bonds -> ... layers d_model`"""
        ...


@runtime_checkable
class Rowed(Tabled, Protocol):
    """A weight whose table's rows can be written; any class with these is."""

    small_flops: float

    def stored_at(self, latents: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`table[latents]` as a parameter and an index into it."""
        ...


@runtime_checkable
class Startable(Protocol):
    """A weight that can be drawn and scaled; `normal_` and `scale_` are all that a start asks of a weight of your own."""

    def normal_(self, std: float) -> Weight:
        """Draws it so that every entry of the dense form has standard deviation `std`."""
        ...

    def scale_(self, factor: float) -> Weight:
        """Multiplies the dense form by `factor` > 0."""
        ...


@runtime_checkable
class LayerScalable(Protocol):
    """A weight of your own, or a decoder, that `fold` can take in."""

    def scale_layers_(self, factors: Tensor) -> object:
        """`layers -> `: multiplies what a weight holds of each layer, or a decoder writes to it (its bias left alone), by that layer's factor, in place."""
        ...
