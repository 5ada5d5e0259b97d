"""Weights made of weights."""

from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.contraction import ShapeError
from fmxnn.sparse import to_dense_codes
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


class ConcatWeight(Weight):
    """`layers d_model latents`: weights of the same layers and d_model side by side, say shared latents next to private ones."""

    def __init__(self, *weights: Weight):
        super().__init__()
        self.layers, self.d_model = _shared_layers("ConcatWeight", weights)
        self.latents = sum(weight.latents for weight in weights)
        self.weights = nn.ModuleList(weights)

    @override
    def to_latents(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`"""
        return torch.cat([weight.to_latents(x) for weight in _parts(self.weights)], dim=-1)

    @override
    def to_layers(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`"""
        if z.shape[-1:] != (self.latents,):
            raise ShapeError(f"the weight writes codes of (..., latents={self.latents}), got {tuple(z.shape)}")
        parts = _parts(self.weights)
        codes = to_dense_codes(z).split([weight.latents for weight in parts], dim=-1)
        return torch.stack([weight.to_layers(code) for weight, code in zip(parts, codes, strict=True)]).sum(0)

    def normal_(self, std: float) -> "ConcatWeight":
        """Draws every part so that each entry has standard deviation `std`."""
        for weight in _parts(self.weights):
            weight.normal_(std)
        return self

    def scale_(self, factor: float) -> "ConcatWeight":
        """Multiplies every part by `factor` > 0."""
        for weight in _parts(self.weights):
            weight.scale_(factor)
        return self


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
