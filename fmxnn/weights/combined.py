"""Weights made of weights: their sum, and side by side."""

from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.core.errors import ShapeError
from fmxnn.weights.parted import PartedWeight, parts_of
from fmxnn.weights.questions import startable
from fmxnn.weights.weight import Index, Part, Tabled, Weight, table_of


class SumWeight(Weight):
    """`layers d_model latents`: the sum of weights of the same sizes, say a shared ring and a dense correction.

    - `weights`: at least one, of any kinds.

    Raises ShapeError for weights of different sizes.

    ```python
    weight = fx.SumWeight(fx.TensorRingWeight(3, 8, 20, ranks=(2, 4, 4)), fx.DenseWeight(3, 8, 20))
    parts = [part.to_dense() for part in weight.weights]
    torch.testing.assert_close(weight.to_dense(), parts[0] + parts[1])
    ```
    """

    def __init__(self, *weights: Weight):
        super().__init__()
        self.layers, self.d_model = _shared_layers("SumWeight", weights)
        self.latents = weights[0].latents
        if any(weight.latents != self.latents for weight in weights):
            latents = [weight.latents for weight in weights]
            raise ShapeError(f"SumWeight adds weights of the same latents, got {latents}; ConcatWeight joins them")
        self.weights = nn.ModuleList(weights)

    @property
    @override
    def relies_on(self) -> tuple[Weight, ...]:
        """The weights that are added."""
        return tuple(_held(self.weights))

    @property
    @override
    def obstacle(self) -> str:
        """None where each weight has one table."""
        return "" if self._tables() else f"{type(self).__name__} has no table"

    @override
    def made_of(self) -> tuple[Part, ...]:
        """The weights that are added, each with all layers."""
        return tuple(Part(weight, tuple(range(self.layers))) for weight in _held(self.weights))

    @property
    def table(self) -> Tensor | None:
        """`latents bonds`: the tables of all weights side by side; None where a weight has none, or several."""
        tables = self._tables()
        return torch.cat(tables, dim=1) if tables else None

    def to_bonds(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... bonds`: what each weight's table reads, side by side."""
        return torch.cat([cast("Tabled", weight).to_bonds(x) for weight in self.weights], dim=-1)

    def from_bonds(self, h: Tensor) -> Tensor:
        """`... bonds -> ... layers d_model`: what each weight writes from its bonds, added up."""
        split = h.split([table.shape[1] for table in self._tables()], dim=-1)
        return torch.stack(
            [cast("Tabled", weight).from_bonds(own) for weight, own in zip(self.weights, split, strict=True)]
        ).sum(0)

    @override
    def to_latents(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`"""
        return torch.stack([weight.to_latents(x) for weight in _held(self.weights)]).sum(0)

    @override
    def to_layers(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`"""
        return torch.stack([weight.to_layers(z) for weight in _held(self.weights)]).sum(0)

    @override
    def atoms(self, index: Index) -> Tensor:
        """`to_dense()[..., index]`: the sum of each weight's."""
        return torch.stack([weight.atoms(index) for weight in _held(self.weights)]).sum(0)

    def normal_(self, std: float) -> "SumWeight":
        """Draws every weight so that each entry of the sum has standard deviation `std`.

        Raises TypeError where a weight cannot be drawn; nothing is drawn then.
        """
        for weight in [startable(weight) for weight in self.weights]:
            weight.normal_(std / len(self.weights) ** 0.5)
        return self

    def scale_(self, factor: float) -> "SumWeight":
        """Multiplies the sum by `factor` > 0, each weight once in however many places. Raises as `normal_` does."""
        for weight in dict.fromkeys(startable(weight) for weight in self.weights):
            weight.scale_(factor)
        return self

    def _tables(self) -> list[Tensor]:
        """Of every weight; none where one of them has none, or several."""
        tables = [table_of(weight) for weight in self.weights]
        return cast("list[Tensor]", tables) if all(isinstance(table, Tensor) for table in tables) else []


class ConcatWeight(PartedWeight):
    """`layers d_model latents`: weights of the same layers and d_model side by side, say shared and private latents.

    - `weights`: at least one, of any kinds; the latents of the first come first.

    Raises ShapeError for weights of different layers or d_model.

    ```python
    weight = fx.ConcatWeight(fx.DenseWeight(3, 8, 20), fx.CPWeight(3, 8, 100))
    assert weight.latents == 120
    ```
    """

    def __init__(self, *weights: Weight):
        super().__init__()
        self.layers, self.d_model = _shared_layers("ConcatWeight", weights)
        self.latents = sum(weight.latents for weight in weights)
        self.weights = nn.ModuleList(weights)

    @override
    def parts(self) -> tuple[Part, ...]:
        """The parts of every weight in turn."""
        return tuple(part for weight in _held(self.weights) for part in parts_of(weight))

    @override
    def made_of(self) -> tuple[Part, ...]:
        """The weights, each with all layers."""
        return tuple(Part(weight, tuple(range(self.layers))) for weight in _held(self.weights))


def _held(weights: nn.ModuleList) -> list[Weight]:
    return cast("list[Weight]", list(weights))


def _shared_layers(who: str, weights: tuple[Weight, ...]) -> tuple[int, int]:
    if not weights:
        raise ValueError(f"{who} needs at least one weight, got none")
    other = next((each for each in weights if not hasattr(each, "layers")), None)
    if other is not None:
        raise TypeError(f"{who} takes weights one by one, got a {type(other).__name__}; write {who}(first, second)")
    sizes = [(weight.layers, weight.d_model) for weight in weights]
    if len(set(sizes)) > 1:
        raise ShapeError(f"{who} joins weights of the same layers and d_model, got {sizes}; make them equal")
    return sizes[0]
