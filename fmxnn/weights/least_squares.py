"""One factor of a weight at a time in the least squares, by Einstein sums over blocks of latents."""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from fmxnn.core.contraction import Contraction
from fmxnn.weights.factorized import FactorizedWeight
from fmxnn.weights.weight import Weight

_BLOCK = 1024
_RIDGE = 1e-13
_STEPS, _ROUNDING = 10, 1e-30
LARGEST = 8192
"""The most bonds of a factor whose Gram matrix is made: 512 MiB."""

Term = tuple[str, ...]
Solve = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From the product with the target and the old factor, the new one and what is left of its normal equations."""


class Update:
    """The least squares of one factor while the others stand still; holds no tensors.

    The other factors are never multiplied out. The Gram matrix of their product, and its product with the target, are
    Einstein sums of their own, planned here. An axis of layers, d_model or latents that the factor shares with others
    (`kept`) has a system for each entry; for one that it has alone (`free`), all entries share a system.

    ```python
    from fmxnn.weights.least_squares import Update

    weight, target = fx.CPWeight(2, 3, 5, rank=4).double(), fx.DenseWeight(2, 3, 5)
    with torch.no_grad():
        explained = [Update(weight, at=i)(weight, target) for i in range(3)]
    assert explained[0] <= explained[1] <= explained[2]
    ```
    """

    def __init__(self, weight: FactorizedWeight, at: int):
        terms, sizes, axes = weight.terms, weight.sizes, weight.axes
        self.at, self.term = at, terms[at]
        others = [term for i, term in enumerate(terms) if i != at]
        elsewhere = {word for term in others for word in term}
        bonds = [word for word in self.term if word not in axes]
        kept = [word for word in self.term if word in axes and word in elsewhere]
        free = [word for word in self.term if word in axes and word not in elsewhere]
        twins = [f"{word}_twin" for word in bonds]
        self.varies = "latents" in kept
        twinned = [tuple(word if word in axes else f"{word}_twin" for word in term) for term in others]
        self.gram = BlockSum([*others, *twinned], [kept, bonds, twins], sizes) if others else None
        self.right = BlockSum([axes, *others], [kept, free, bonds], sizes)
        self.words, self.grouped = (
            " ".join(self.term),
            " ".join(f"({' '.join(group)})" for group in (kept, free, bonds)),
        )
        own = tuple(word if word in axes else f"{word}_twin" for word in self.term)
        large = prod(sizes[word] for word in bonds) > LARGEST
        self.normal = BlockSum([own, *others, *twinned], [kept, free, bonds], sizes) if large else None

    def __call__(self, weight: FactorizedWeight, target: Weight) -> float:
        """Solves in place; gives ||target||^2 - ||target - weight||^2."""
        factor = weight.factors[self.at]
        if "latents" not in self.term:
            gram = right = factor.new_zeros(())
            for latents, wanted in blocks(target):
                rows = _rows(weight, latents, self.at)
                right = right + self.right(latents_first(weight, wanted), *rows)
                gram = gram if self.normal else gram + self._gram(rows, factor)
            solve = (
                _conjugate(self._normal(_rows(weight, slice(None), self.at), factor.shape))
                if self.normal
                else _cholesky(gram)
            )
            return self._replace(factor, right, solve)
        solve, explained = None, 0.0
        for latents, wanted in blocks(target):
            rows = _rows(weight, latents, self.at)
            part = factor.narrow(self.term.index("latents"), latents.start, latents.stop - latents.start)
            if self.normal:
                solve = _conjugate(self._normal(rows, part.shape))
            elif solve is None or self.varies:
                solve = _cholesky(self._gram(rows, factor))
            explained += self._replace(part, self.right(latents_first(weight, wanted), *rows), solve)
        return explained

    def _replace(self, factor: Tensor, right: Tensor, solve: Solve) -> float:
        new, left = solve(right, rearrange(factor, f"{self.words} -> {self.grouped}"))
        factor.copy_(self._named(new, factor.shape))
        return (new * (right + left)).sum().item()

    def _named(self, grouped: Tensor, shape: torch.Size) -> Tensor:
        return rearrange(grouped, f"{self.grouped} -> {self.words}", **dict(zip(self.term, shape, strict=True)))

    def _normal(self, rows: list[Tensor], shape: torch.Size) -> Callable[[Tensor], Tensor]:
        normal = cast("BlockSum", self.normal)
        return lambda grouped: normal(self._batched(self._named(grouped, shape)), *rows, *rows)

    def _batched(self, factor: Tensor) -> Tensor:
        return factor.movedim(self.term.index("latents"), 0) if "latents" in self.term else factor

    def _gram(self, rows: list[Tensor], like: Tensor) -> Tensor:
        return like.new_ones(1, 1, 1) if self.gram is None else self.gram(*rows, *rows)


class BlockSum:
    """An Einstein sum over a block of latents, whose output has its axes in groups.

    ```python
    from fmxnn.weights.least_squares import BlockSum

    sizes = {"layers": 2, "d_model": 3, "latents": 5, "r": 4}
    made = BlockSum([("latents", "r"), ("d_model", "r")], [["d_model"], ["latents"]], sizes)
    assert made(torch.randn(5, 4), torch.randn(3, 4)).shape == (3, 5)
    ```
    """

    def __init__(self, terms: Sequence[Term], groups: Sequence[Sequence[str]], sizes: dict[str, int]):
        output = _ahead([word for group in groups for word in group])
        pattern = ", ".join(_batched(term) for term in terms) + " -> " + _batched(output)
        both = sizes | {f"{word}_twin": size for word, size in sizes.items()}
        words = {word for term in terms for word in term if word != "latents"}
        self.sum = Contraction(pattern, **{word: both[word] for word in sorted(words)})
        self.grouping = f"{' '.join(output)} -> " + " ".join(f"({' '.join(group)})" for group in groups)

    def __call__(self, *operands: Tensor) -> Tensor:
        """The sum, an axis a group."""
        return rearrange(self.sum(*operands), self.grouping)


def blocks(weight: Weight) -> Iterator[tuple[slice, Tensor]]:
    """Latents and what they write, `layers d_model latents` in float64, a block at a time."""
    for start in range(0, weight.latents, _BLOCK):
        latents = slice(start, min(start + _BLOCK, weight.latents))
        yield latents, weight.atoms(latents).double()


def latents_first(weight: FactorizedWeight, wanted: Tensor) -> Tensor:
    """From `layers d_model latents` to `latents` and the axes that the weight reads."""
    return weight.named(wanted.movedim(-1, 0))


def _cholesky(gram: Tensor) -> Solve:
    """Solves exactly, held to the old factor by the least ridge that rounding allows: no step raises the error."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None] + torch.finfo(gram.dtype).tiny
    lower, failed = torch.linalg.cholesky_ex(gram + ridge * eye)
    while failed.any():
        ridge = 10 * ridge
        lower, failed = torch.linalg.cholesky_ex(gram + ridge * eye)

    def solve(right: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.cholesky_solve((right + ridge * old).mT, lower).mT
        return new, ridge * (new - old)

    return solve


def _conjugate(normal: Callable[[Tensor], Tensor]) -> Solve:
    """Solves by a few steps of conjugate gradients from the old factor.

    For more bonds than a Gram matrix can hold, as the core of a Tucker weight has.
    """

    def solve(right: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        new, left = old.clone(), right - normal(old)
        direction, square, least = left, left.square().sum(), _ROUNDING * right.square().sum()
        for _ in range(_STEPS):
            image = normal(direction)
            curvature = (direction * image).sum()
            if square <= least or curvature <= 0:
                break
            new, left = new + square / curvature * direction, left - square / curvature * image
            before, square = square, left.square().sum()
            direction = left + square / before * direction
        return new, left

    return solve


def _rows(weight: FactorizedWeight, latents: slice, at: int) -> list[Tensor]:
    """All factors but one, cut to these latents, which come first."""
    pairs = [
        (term, factor) for i, (term, factor) in enumerate(zip(weight.terms, weight.factors, strict=True)) if i != at
    ]
    return [
        factor.movedim(term.index("latents"), 0)[latents] if "latents" in term else factor for term, factor in pairs
    ]


def _ahead(words: Sequence[str]) -> list[str]:
    return sorted(words, key=lambda word: word != "latents")


def _batched(words: Sequence[str]) -> str:
    return " ".join("..." if word == "latents" else word for word in _ahead(words))
