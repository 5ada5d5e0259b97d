"""One layer of a weight, as a map of its own."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fmxnn.core.errors import ShapeError
from fmxnn.core.excerpt import excerpt
from fmxnn.core.sizes import whole

_BLOCK = 1024


class Layered(Protocol):
    """What a weight must have so that one of its layers can be taken: the contract of every weight."""

    layers: int
    d_model: int
    latents: int

    def to_latents(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`"""
        ...

    def to_layers(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`"""
        ...

    def atoms(self, index: slice | Tensor) -> Tensor:
        """`to_dense()[..., index]`"""
        ...


class LayerMap:
    """`d_model latents`: the matrix of one layer. It holds no parameters; gradients reach those of the weight.

    `weight.at(layer)` makes it. It is cheap to make, so it need not be kept.

    ```python
    weight = fx.TensorRingWeight(layers=12, d_model=8, latents=32)
    last = weight.at(-1)
    z = last.to_latents(torch.randn(4, 8))  # tokens latents
    x = last.to_layers(z)  # tokens d_model
    ```
    """

    def __init__(self, weight: Layered, layer: int):
        self.weight, self.layer = weight, layer
        self.d_model, self.latents = weight.d_model, weight.latents

    def __repr__(self) -> str:
        return f"{type(self.weight).__name__}(...).at({self.layer}): d_model={self.d_model}, latents={self.latents}"

    def to_latents(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`... d_model -> ... latents`: reads this layer, and adds a bias if one is given. Raises ShapeError."""
        check_last(x, "reads", "d_model", self.d_model)
        others = (0, 0, self.layer, self.weight.layers - 1 - self.layer)
        return with_bias(self.weight.to_latents(functional.pad(x.unsqueeze(-2), others)), bias)

    def to_layers(self, z: Tensor) -> Tensor:
        """`... latents -> ... d_model`: writes this layer; codes dense or torch.sparse_csr. Raises ShapeError."""
        check_last(z, "writes codes of", "latents", self.latents)
        return self.weight.to_layers(z).select(-2, self.layer)

    def rows(self, index: Tensor) -> Tensor:
        """`... -> ... d_model`: what these latents write, as an embedding looks up tokens. Raises IndexError."""
        return self.weight.atoms(_inside(index, self.latents))[self.layer].movedim(0, -1)

    def to_dense(self) -> Tensor:
        """`-> d_model latents`: `weight.to_dense()[layer]`, without the other layers held whole."""
        starts = range(0, self.latents, _BLOCK)
        return torch.cat([self.weight.atoms(slice(i, i + _BLOCK))[self.layer] for i in starts], dim=-1)


def with_bias(z: Tensor, bias: Tensor | None) -> Tensor:
    """The sum, in the dtype that was read."""
    return z if bias is None else z + bias.to(z.dtype)


def layer_number(layer: int, layers: int) -> int:
    """The place of a layer, counted from the end where it is negative. Raises IndexError for one outside."""
    number = whole(layer)
    if number is None:
        raise TypeError(f"at takes the number of one layer, got {excerpt(layer)}; stack what several give: torch.stack")
    if not -layers <= number < layers:
        raise IndexError(f"at takes a layer in range({layers}), or from -{layers} counted from the end, got {number}")
    return number % layers


def check_last(x: Tensor, does: str, word: str, size: int) -> None:
    """Raises ShapeError unless the last axis of `x` has this size."""
    if x.shape[-1:] != (size,):
        raise ShapeError(
            f"one layer of a weight {does} (..., {word}={size}), got {tuple(x.shape)}; check the last axis"
        )


def _inside(index: Tensor, latents: int) -> Tensor:
    """Negative numbers as one that is outside, so that they raise IndexError as in torch.nn.Embedding."""
    return index.masked_fill(index < 0, latents)
