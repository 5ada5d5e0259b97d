"""Layers of different d_model on one axis: the shorter ones end in zeros that no weight reads or writes."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from fmxnn.contraction import ShapeError
from fmxnn.parts import Tabled
from fmxnn.weights import FactorizedWeight, Index, Weight


def pad_layers(activations: Sequence[Tensor]) -> Tensor:
    """`-> ... layers d_model`: one tensor of `... d_model` for each layer, the shorter filled up with zeros to the longest."""
    if not activations:
        raise ValueError("pad_layers stacks one tensor of (..., d_model) for each layer, got none")
    batches = [tuple(x.shape[:-1]) for x in activations]
    if len(set(batches)) > 1:
        raise ShapeError(f"pad_layers stacks the same tokens of every layer, got batch axes {batches}; give all layers the same ones")
    d_model = max(x.shape[-1] for x in activations)
    return torch.stack([functional.pad(x, (0, d_model - x.shape[-1])) for x in activations], dim=-2)


def unpad_layers(x: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """`... layers d_model -> `: each layer's own first coordinates, `widths` of them, as one tensor a layer. Raises ShapeError for others."""
    if x.shape[-2:-1] != (len(widths),) or not all(1 <= width <= x.shape[-1] for width in widths):
        raise ShapeError(f"unpad_layers takes (..., layers={len(widths)}, d_model>={max(widths, default=1)}), got {tuple(x.shape)}")
    return [row[..., :width] for row, width in zip(x.unbind(-2), widths, strict=True)]


class RaggedWeight(Weight):
    """`layers d_model latents`: any weight, kept to the first `widths[l]` coordinates of layer l; what lies beyond is neither read nor written.

    The activations are those of `pad_layers`; whatever stands in the padding, NaN included, changes no output and no gradient. A
    weight that needs several tables inside goes by dense codes. Raises ValueError for widths that do not fit.
    """

    def __init__(self, weight: Weight, *, widths: Sequence[int]):
        super().__init__()
        self.weight, self.widths = weight, tuple(widths)
        self.layers, self.d_model, self.latents = weight.layers, weight.d_model, weight.latents
        if len(self.widths) != self.layers or not 1 <= min(self.widths) <= max(self.widths) == self.d_model:
            raise ValueError(
                f"RaggedWeight needs one width for each of layers={self.layers}, the largest d_model={self.d_model}, got {list(self.widths)}"
            )
        self.small_flops = float(getattr(weight, "small_flops", 0.0))

    @override
    def extra_repr(self) -> str:
        """The widths."""
        return f"widths={self.widths}"

    @property
    def table(self) -> Tensor | None:
        """`latents bonds`: the weight's, where it has one."""
        table = self.weight.table if isinstance(self.weight, Tabled) else None
        return table if isinstance(table, Tensor) else None

    def to_bonds(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... bonds`"""
        return cast("Tabled", self.weight).to_bonds(self._kept(x))

    def from_bonds(self, h: Tensor) -> Tensor:
        """`... bonds -> ... layers d_model`"""
        return self._kept(cast("Tabled", self.weight).from_bonds(h))

    @override
    def to_latents(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`. Raises ShapeError for other layers or d_model."""
        if x.shape[-2:] != (self.layers, self.d_model):
            raise ShapeError(
                f"the weight reads (..., layers={self.layers}, d_model={self.d_model}), got {tuple(x.shape)}; "
                "stack one activation per layer: pad_layers(hidden)"
            )
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

    def normal_(self, std: float) -> "RaggedWeight":
        """Draws the weight so that each entry outside the padding has standard deviation `std`."""
        cast("FactorizedWeight", self.weight).normal_(std)
        return self

    def scale_(self, factor: float) -> "RaggedWeight":
        """Multiplies the dense form by `factor` > 0."""
        cast("FactorizedWeight", self.weight).scale_(factor)
        return self

    def _kept(self, x: Tensor) -> Tensor:
        return pad_layers(unpad_layers(x, self.widths))
