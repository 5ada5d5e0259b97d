"""Optimisers of matrices, for parameters of more than two axes."""

# pyright: reportUnknownMemberType=false
# torch leaves the parameters of an optimiser's methods untyped.

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from fmxnn.core.errors import ShapeError

Parameters = Iterable[Tensor] | Iterable[Mapping[str, Any]]


def matrix_optimizer(optimizer: type[Optimizer], parameters: Parameters, **options: Any) -> Optimizer:
    """An optimiser of matrices, such as torch.optim.Muon, for factors of two axes or more.

    While a step runs, each parameter is a matrix: its first axes against its last ones, cut where the smaller side is
    largest. It shares memory with the parameter, which is its old self after the step. `optimizer` is the class,
    `parameters` and `options` are what it takes. Raises ShapeError for a parameter of fewer than two axes.

    ```python
    ring = fx.TensorRingWeight(4, 8, 32)
    muon = fx.matrix_optimizer(torch.optim.Muon, ring.parameters(), lr=0.02)
    ring.to_latents(torch.randn(5, 4, 8)).square().mean().backward()
    muon.step()
    ```
    """
    name = f"{optimizer.__name__}OnMatrices"
    made = type(name, (_OnMatrices, optimizer), {"inner": optimizer})
    return cast("Callable[..., Optimizer]", made)(list(parameters), **options)


class _OnMatrices(Optimizer):
    """The class that stands before the optimiser's own: it shows matrices where that looks at parameters."""

    inner: type[Optimizer]

    def __init__(self, parameters: list[Tensor] | list[dict[str, Any]], **options: Any):
        groups = [given["params"] if isinstance(given, Mapping) else [given] for given in parameters]
        with _as_matrices(tensor for group in groups for tensor in _listed(group)):
            super().__init__(parameters, **options)

    @override
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], Any] | None = None
    ) -> Any:
        """One step; the closure sees the parameters as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step = self.inner.step
        if getattr(step, "hooked", False):  # by an optimiser of the same class: the hooks would run a second time
            step = cast("Any", step).__wrapped__
        with _as_matrices(tensor for group in self.param_groups for tensor in group["params"]):
            cast("Any", step)(self)
        return loss


@contextmanager
def _as_matrices(tensors: Iterable[Tensor]) -> Generator[None]:
    """Within it these parameters and their gradients are matrices."""
    changed: list[tuple[Tensor, Tensor, Tensor | None]] = []
    held = [(tensor, _matrix_shape(tensor)) for tensor in tensors]
    try:
        for tensor, shape in held:
            if tensor.ndim > 2:
                changed.append((tensor, tensor.data, tensor.grad))
                _show(tensor, tensor.data.reshape(shape), None if tensor.grad is None else tensor.grad.reshape(shape))
        yield
    finally:
        for tensor, before, grad in changed:
            if tensor.data_ptr() != before.data_ptr():  # it was not contiguous, and the matrix is a copy
                before.copy_(tensor.data.view_as(before))
            _show(tensor, before, grad)


def _show(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    tensor.grad = None  # torch lets no gradient of another shape stand
    tensor.data = data
    tensor.grad = grad


def _matrix_shape(tensor: Tensor) -> tuple[int, int]:
    """The two sides: the cut with the largest smaller side, the first of equals."""
    if tensor.ndim < 2:
        raise ShapeError(
            f"an optimiser of matrices takes parameters of two axes or more, got one of {tuple(tensor.shape)}; "
            "give biases to another optimiser, such as torch.optim.AdamW"
        )
    cuts = [(prod(tensor.shape[:i]), prod(tensor.shape[i:])) for i in range(1, tensor.ndim)]
    return max(cuts, key=min)


def _listed(group: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [group] if isinstance(group, Tensor) else list(group)
