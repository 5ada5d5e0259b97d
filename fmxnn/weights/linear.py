"""torch.nn.Linear, its matrix being one layer of a weight."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.core.errors import ShapeError
from fmxnn.weights.factorized import DenseWeight, FactorizedWeight
from fmxnn.weights.fitting import fit_weight
from fmxnn.weights.weight import Startable, Weight

MakeFactorized = Callable[[int, int, int], FactorizedWeight]
"""A factorised weight from `layers, d_model, latents`: the class, or a function where it takes more, such as a rank."""


class FactorizedLinear(nn.Module):
    """`... in_features -> ... out_features`: nn.Linear, its matrix being one layer of a weight.

    Several of them may share a weight, so that the matrices of many layers are one tensor.
    `in_features` is the weight's d_model and `out_features` its latents.

    - `stack`: the weight, of any class; its layers are the matrices.
    - `layer`: which of them this module multiplies by.
    - `bias`: whether to add one, as in nn.Linear.

    `from_linear` and `from_linears` fit a weight to modules that are there. `weight` is the matrix itself, multiplied
    out when it is asked for. Raises IndexError for a layer that the weight does not have.

    ```python
    stack = fx.TensorRingWeight(2, 8, 32, ranks=(2, 4, 3))  # layers, in_features, out_features
    first, second = fx.FactorizedLinear(stack, 0), fx.FactorizedLinear(stack, 1)
    y = first(torch.randn(5, 8))  # 5 32
    ```
    """

    kept_as: ClassVar[dict[str, str]] = {"bias": "has_bias"}  # `bias` is the parameter, as in nn.Linear

    def __init__(self, stack: Weight, layer: int = 0, *, bias: bool = True):
        super().__init__()
        self.stack, self.layer = stack, stack.at(layer).layer
        self.in_features, self.out_features = stack.d_model, stack.latents
        like = next(stack.parameters())
        free = like.new_empty(self.out_features) if bias else None
        self.bias = None if free is None else nn.Parameter(free)
        self._draw_bias()

    @property
    def has_bias(self) -> bool:
        """Whether one is added."""
        return self.bias is not None

    @property
    def weight(self) -> Tensor:
        """`-> out_features in_features`: the matrix, as nn.Linear holds it; gradients reach the factors."""
        return self.stack.at(self.layer).to_dense().T

    @override
    def extra_repr(self) -> str:
        """The sizes, and the place in the weight."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.has_bias}"
        return f"{sizes}, layer={self.layer} of {self.stack.layers}"

    def reset_parameters(self) -> None:
        """Draws all layers of the weight, and this bias, as nn.Linear is drawn: variance 1 / (3 in_features)."""
        draw(self.stack, (3 * self.in_features) ** -0.5)
        self._draw_bias()

    def forward(self, x: Tensor) -> Tensor:
        """`... in_features -> ... out_features`. Raises ShapeError for other features, TypeError for another dtype."""
        if x.shape[-1:] != (self.in_features,):
            raise ShapeError(
                f"FactorizedLinear reads (..., in_features={self.in_features}), got {tuple(x.shape)}; "
                "check the last axis"
            )
        return self.stack.at(self.layer).to_latents(x, self.bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, make: MakeFactorized, *, sweeps: int = 30, tries: int = 1) -> Self:
        """A module that stands in for `linear`: `make(1, in_features, out_features)`, fitted to it by `fit_weight`.

        Raises as `from_linears` does.
        """
        return cls.from_linears([linear], make, sweeps=sweeps, tries=tries)[0]

    @classmethod
    def from_linears(
        cls, linears: Sequence[nn.Linear], make: MakeFactorized, *, sweeps: int = 30, tries: int = 1
    ) -> list[Self]:
        """A module for each of `linears`, over one weight: `make(layers, in_features, out_features)`, fitted to them.

        Biases are copied. `fit_weight` takes `sweeps` and `tries`. Raises TypeError for other modules, ShapeError for
        linears of different sizes.
        """
        linears = list(linears)
        for linear in linears:
            if not isinstance(linear, nn.Linear):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"from_linears takes torch.nn.Linear modules, got {type(linear).__name__}")
        stack = fitted([linear.weight for linear in linears], make, "from_linears", sweeps=sweeps, tries=tries)
        made: list[Self] = []
        for layer, linear in enumerate(linears):
            found = cls(stack, layer, bias=cast("Tensor | None", linear.bias) is not None)
            if found.bias is not None:
                found.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
            made.append(found.train(linear.training))
        return made

    @torch.no_grad()
    def _draw_bias(self) -> None:
        if self.bias is not None and not self.bias.is_meta:
            self.bias.uniform_(-(self.in_features**-0.5), self.in_features**-0.5)


def draw(stack: Weight, std: float) -> None:
    """Draws a weight with this standard deviation. Raises TypeError for one that cannot be drawn."""
    if not isinstance(stack, Startable):
        raise TypeError(
            f"reset_parameters needs a weight with normal_(std) and scale_(factor), got {type(stack).__name__}; "
            "add both, or draw it yourself"
        )
    stack.normal_(std)


@torch.no_grad()
def fitted(matrices: Sequence[Tensor], make: MakeFactorized, who: str, *, sweeps: int, tries: int) -> FactorizedWeight:
    """`latents d_model, ... -> `: one weight of all matrices. Raises ShapeError where their shapes differ."""
    shapes = [tuple(matrix.shape) for matrix in matrices]
    if len(set(shapes)) != 1:
        raise ShapeError(
            f"{who} makes one tensor of modules that have the same sizes, got weights of {str(shapes)[:200]}; "
            "call it once for each size"
        )
    (latents, d_model), like = shapes[0], matrices[0]
    dense = DenseWeight(len(matrices), d_model, latents).to(like.device, like.dtype)
    dense.factors[0].copy_(torch.stack(list(matrices), dim=1))
    fresh = make(len(matrices), d_model, latents).to(like.device, like.dtype)
    return fit_weight(dense, fresh, sweeps=sweeps, tries=tries).weight
