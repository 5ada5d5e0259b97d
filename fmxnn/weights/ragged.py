"""Layers of different d_model on one axis: the shorter ones end in zeros that no weight reads or writes."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from fmxnn.core.errors import ShapeError
from fmxnn.core.sizes import places_of
from fmxnn.sparse.tables import Tables
from fmxnn.weights.parted import PartedWeight, parts_of
from fmxnn.weights.weight import Index, Part, Rowed, Tabled, Weight, table_of


def pad_layers(activations: Sequence[Tensor]) -> Tensor:
    """`-> ... layers d_model`: one tensor of `... d_model` for each layer, filled up with zeros to the longest.

    Raises ValueError for no tensors and ShapeError for other batch axes.
    """
    if not activations:
        raise ValueError("pad_layers stacks one tensor of (..., d_model) for each layer, got none; give one a layer")
    batches = [tuple(x.shape[:-1]) for x in activations]
    if len(set(batches)) > 1:
        raise ShapeError(
            f"pad_layers stacks the same tokens of every layer, got batch axes {batches}; give all layers the same ones"
        )
    return _filled(activations, max(x.shape[-1] for x in activations))


def _filled(rows: Sequence[Tensor], d_model: int) -> Tensor:
    return torch.stack([functional.pad(row, (0, d_model - row.shape[-1])) for row in rows], dim=-2)


def unpad_layers(x: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """`... layers d_model -> `: each layer's own first coordinates, `widths` of them, as one tensor a layer.

    Raises ShapeError for widths that do not fit.
    """
    if x.shape[-2:-1] != (len(widths),) or not all(1 <= width <= x.shape[-1] for width in widths):
        raise ShapeError(
            f"unpad_layers takes (..., layers={len(widths)}, d_model>={max(widths, default=1)}), got {tuple(x.shape)}"
        )
    return [row[..., :width] for row, width in zip(x.unbind(-2), widths, strict=True)]


class RaggedWeight(PartedWeight):
    """`layers d_model latents`: any weight, of which layer l keeps the first `widths[l]` coordinates.

    - `weight`: of any kind, with the d_model of the widest layer.
    - `widths`: the d_model of each layer.

    The activations are those of `pad_layers`. Whatever stands in the padding, NaN included, changes no output and no
    gradient. Raises ValueError for widths that do not fit.

    ```python
    weight = fx.RaggedWeight(fx.DenseWeight(2, 8, 20), widths=[5, 8])
    x = fx.pad_layers([torch.randn(10, 5), torch.randn(10, 8)])
    assert weight.to_latents(x).shape == (10, 20)
    ```
    """

    def __init__(self, weight: Weight, *, widths: Sequence[int]):
        super().__init__()
        self.weight = weight
        self.layers, self.d_model, self.latents = weight.layers, weight.d_model, weight.latents
        found = places_of(widths) or (0,)
        if len(found) != self.layers or not 1 <= min(found) <= max(found) == self.d_model:
            raise ValueError(
                f"RaggedWeight needs one width for each of layers={self.layers}, the largest d_model={self.d_model}, "
                f"got {widths!r:.200}"
            )
        self.widths = found
        self._views = tuple(
            Part(RaggedPart(part.weight, tuple(self.widths[layer] for layer in part.at)), part.at)
            for part in parts_of(weight)
        )

    @override
    def extra_repr(self) -> str:
        """The width of each layer, as the constructor takes them."""
        return f"widths={self.widths}"

    @override
    def parts(self) -> tuple[Part, ...]:
        """The weight's parts, each without its padding."""
        return self._views

    @override
    def made_of(self) -> tuple[Part, ...]:
        """The weight, with all layers."""
        return (Part(self.weight, tuple(range(self.layers))),)


class RaggedPart(Weight):
    """`layers d_model latents`: one part of a ragged weight, zero beyond its widths; its parameters are the part's.

    ```python
    part = fx.RaggedWeight(fx.DenseWeight(2, 4, 6), widths=[3, 4]).parts()[0].weight
    assert not part.to_dense()[0, 3].any()
    ```
    """

    def __init__(self, weight: Weight, widths: tuple[int, ...]):
        super().__init__()
        self.weight, self.widths = weight, tuple(min(width, weight.d_model) for width in widths)
        self.layers, self.d_model, self.latents = weight.layers, weight.d_model, weight.latents

    @property
    @override
    def relies_on(self) -> tuple[Weight, ...]:
        """The weight whose table is its own."""
        return (self.weight,)

    @property
    @override
    def obstacle(self) -> str:
        """None but that of its weight, which is asked before it."""
        return ""

    @property
    def table(self) -> Tensor | Tables | None:
        """`latents bonds`: the weight's, where it has one."""
        return table_of(self.weight)

    def to_bonds(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... bonds`"""
        return cast("Tabled", self.weight).to_bonds(self._kept(x))

    def from_bonds(self, h: Tensor) -> Tensor:
        """`... bonds -> ... layers d_model`"""
        return self._kept(cast("Tabled", self.weight).from_bonds(h))

    def stored_at(self, latents: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`table[latents]` as a parameter and an index into it: where the weight has them."""
        return cast("Rowed", self.weight).stored_at(latents)

    @override
    def to_latents(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`. Raises ShapeError for other layers or d_model."""
        return self.weight.to_latents(self._kept(x))

    @override
    def to_layers(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`; codes dense or torch.sparse_csr. Raises ShapeError for other latents."""
        return self._kept(self.weight.to_layers(z))

    @override
    def atoms(self, index: Index) -> Tensor:
        """`to_dense()[..., index]`, zero in the padding."""
        atoms = self.weight.atoms(index)
        return self._kept(atoms.movedim((0, 1), (-2, -1))).movedim((-2, -1), (0, 1))

    def _kept(self, x: Tensor) -> Tensor:
        return _filled(unpad_layers(x, self.widths), self.d_model)
