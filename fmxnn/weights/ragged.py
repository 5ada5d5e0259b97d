"""Layers of different d_model on one axis: the shorter ones end in zeros that no weight reads or writes."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from fmxnn.core.errors import ShapeError
from fmxnn.weights.factorized import FactorizedWeight
from fmxnn.weights.parted import Part, PartedWeight, parts_of
from fmxnn.weights.weight import Index, Tabled, Weight


def pad_layers(activations: Sequence[Tensor]) -> Tensor:
    """`-> ... layers d_model`: one tensor of `... d_model` for each layer, the shorter filled up with zeros to the longest."""
    if not activations:
        raise ValueError("pad_layers stacks one tensor of (..., d_model) for each layer, got none")
    batches = [tuple(x.shape[:-1]) for x in activations]
    if len(set(batches)) > 1:
        raise ShapeError(
            f"pad_layers stacks the same tokens of every layer, got batch axes {batches}; give all layers the same ones"
        )
    return _filled(activations, max(x.shape[-1] for x in activations))


def _filled(rows: Sequence[Tensor], d_model: int) -> Tensor:
    return torch.stack([functional.pad(row, (0, d_model - row.shape[-1])) for row in rows], dim=-2)


def unpad_layers(x: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """`... layers d_model -> `: each layer's own first coordinates, `widths` of them, as one tensor a layer. Raises ShapeError for others."""
    if x.shape[-2:-1] != (len(widths),) or not all(1 <= width <= x.shape[-1] for width in widths):
        raise ShapeError(
            f"unpad_layers takes (..., layers={len(widths)}, d_model>={max(widths, default=1)}), got {tuple(x.shape)}"
        )
    return [row[..., :width] for row, width in zip(x.unbind(-2), widths, strict=True)]


class RaggedWeight(PartedWeight):
    """`layers d_model latents`: any weight, kept to the first `widths[l]` coordinates of layer l; what lies beyond is neither read nor written.

    The activations are those of `pad_layers`; whatever stands in the padding, NaN included, changes no output and no gradient.
    Raises ValueError for widths that do not fit.
    """

    def __init__(self, weight: Weight, *, widths: Sequence[int]):
        super().__init__()
        self.weight, self.widths = weight, tuple(widths)
        self.layers, self.d_model, self.latents = weight.layers, weight.d_model, weight.latents
        if len(self.widths) != self.layers or not 1 <= min(self.widths) <= max(self.widths) == self.d_model:
            raise ValueError(
                f"RaggedWeight needs one width for each of layers={self.layers}, the largest d_model={self.d_model}, got {list(self.widths)}"
            )
        self._views = tuple(
            Part(RaggedPart(part.weight, tuple(self.widths[layer] for layer in part.at)), part.at)
            for part in parts_of(weight)
        )

    @override
    def extra_repr(self) -> str:
        """The widths."""
        return f"widths={self.widths}"

    @override
    def parts(self) -> tuple[Part, ...]:
        """The weight's parts, each without its padding."""
        return self._views

    @override
    def inner(self) -> tuple[Part, ...]:
        """The weight, with all layers."""
        return (Part(self.weight, tuple(range(self.layers))),)


class RaggedPart(Weight):
    """`layers d_model latents`: one part of a ragged weight, zero beyond its widths; it has the part's parameters and none of its own."""

    def __init__(self, weight: Weight, widths: tuple[int, ...]):
        super().__init__()
        self.weight, self.widths = weight, tuple(min(width, weight.d_model) for width in widths)
        self.layers, self.d_model, self.latents = weight.layers, weight.d_model, weight.latents
        self.small_flops = float(getattr(weight, "small_flops", 0.0))

    @property
    def relies_on(self) -> tuple[Weight, ...]:
        """The weight whose table is its own."""
        return (self.weight,)

    @property
    def table(self) -> Tensor | None:
        """`latents bonds`: the weight's, where it has one."""
        return cast("Tensor | None", self.weight.table) if isinstance(self.weight, Tabled) else None

    def to_bonds(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... bonds`"""
        return cast("Tabled", self.weight).to_bonds(self._kept(x))

    def from_bonds(self, h: Tensor) -> Tensor:
        """`... bonds -> ... layers d_model`"""
        return self._kept(cast("Tabled", self.weight).from_bonds(h))

    def stored_at(self, latents: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`table[latents]` as a parameter and an index into it: where the weight has them."""
        return cast("FactorizedWeight", self.weight).stored_at(latents)

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
