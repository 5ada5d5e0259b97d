"""Weights made of weights."""

from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.contraction import ShapeError
from fmxnn.parts import Part, PartedWeight, parts_of
from fmxnn.weights import FactorizedWeight, Weight


class SumWeight(Weight):
    """`layers d_model latents`: the sum of weights of the same sizes, say a shared ring and a dense correction."""

    def __init__(self, *weights: Weight):
        super().__init__()
        self.layers, self.d_model = _shared_layers("SumWeight", weights)
        self.latents = weights[0].latents
        if any(weight.latents != self.latents for weight in weights):
            raise ShapeError(
                f"SumWeight adds weights of the same latents, got {[weight.latents for weight in weights]}; ConcatWeight joins them"
            )
        self.weights = nn.ModuleList(weights)

    @override
    def to_latents(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`"""
        return torch.stack([weight.to_latents(x) for weight in _parts(self.weights)]).sum(0)

    @override
    def to_layers(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`"""
        return torch.stack([weight.to_layers(z) for weight in _parts(self.weights)]).sum(0)

    def normal_(self, std: float) -> "SumWeight":
        """Draws every part so that each entry of the sum has standard deviation `std`."""
        for weight in _parts(self.weights):
            weight.normal_(std / len(self.weights) ** 0.5)
        return self

    def scale_(self, factor: float) -> "SumWeight":
        """Multiplies the sum by `factor` > 0."""
        for weight in _parts(self.weights):
            weight.scale_(factor)
        return self


class ConcatWeight(PartedWeight):
    """`layers d_model latents`: weights of the same layers and d_model side by side, say shared latents next to private ones."""

    def __init__(self, *weights: Weight):
        super().__init__()
        self.layers, self.d_model = _shared_layers("ConcatWeight", weights)
        self.latents = sum(weight.latents for weight in weights)
        self.weights = nn.ModuleList(weights)

    @override
    def parts(self) -> tuple[Part, ...]:
        """The parts of every weight in turn."""
        return tuple(part for weight in _parts(self.weights) for part in parts_of(weight))

    @override
    def inner(self) -> tuple[Part, ...]:
        """The weights, each with all layers."""
        return tuple(Part(weight, tuple(range(self.layers))) for weight in _parts(self.weights))


def _parts(weights: nn.ModuleList) -> list[FactorizedWeight]:
    return cast("list[FactorizedWeight]", list(weights))


def _shared_layers(who: str, weights: tuple[Weight, ...]) -> tuple[int, int]:
    if not weights:
        raise ValueError(f"{who} needs at least one weight, got none")
    sizes = {(weight.layers, weight.d_model) for weight in weights}
    if len(sizes) > 1:
        raise ShapeError(
            f"{who} joins weights of the same layers and d_model, got {[(weight.layers, weight.d_model) for weight in weights]}"
        )
    return sizes.pop()
