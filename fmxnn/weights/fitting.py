"""Factorised weights fitted to any weight, by alternating least squares."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from math import isfinite, prod
from typing import NamedTuple

import torch
from einops import rearrange
from typing_extensions import override

from fmxnn.core.errors import ShapeError
from fmxnn.core.shortcuts import why_replaced
from fmxnn.weights.factorized import BY_FACTORS, FactorizedWeight
from fmxnn.weights.least_squares import LARGEST, BlockSum, Term, Update, blocks, latents_first
from fmxnn.weights.weight import Weight

_SMALL = 1e-4  # below it an error is no longer the difference of two norms


class Fit(NamedTuple):
    """A fitted weight, its relative error ||target - weight|| / ||target||, and the error after each sweep.

    The errors of the sweeps are those before rounding to the weight's dtype.

    ```python
    fit = fx.fit_weight(fx.DenseWeight(3, 8, 20), fx.CPWeight(3, 8, 20, rank=12))
    assert fit.weight.rank == 12 and fit.error < 1
    ```
    """

    weight: FactorizedWeight
    error: float
    errors: tuple[float, ...]

    @property
    def parameters(self) -> int:
        """How many numbers the weight holds."""
        return sum(factor.numel() for factor in self.weight.factors)

    @override
    def __str__(self) -> str:
        return f"{self.weight}: relative error {self.error:.4g} after {len(self.errors)} sweeps"


@torch.no_grad()
def fit_weight(
    target: Weight, weight: FactorizedWeight, *, sweeps: int = 30, tries: int = 1, tolerance: float = 1e-3
) -> Fit:
    """Fits `weight`, in place, to `target` in the least squares: any pattern to any weight.

    A sweep solves for each factor in turn, in float64 and in blocks of latents; the error never rises. The first of
    `tries` starts from truncated SVDs where the pattern allows it (Tucker, ring), the others and other patterns from
    Gaussian factors; the best is kept. With `tries=0` the factors are taken as they are. A try ends after `sweeps`, or
    when one lowers the error by less than `tolerance` of itself. (Kolda and Bader 2009, section 3.4; Zhao et al. 2016,
    TR-ALS) Raises TypeError for a weight without a pattern or with methods of its own, ShapeError for other sizes, and
    ValueError for a target that is zero or not finite.
    """
    if not isinstance(weight, FactorizedWeight):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"fit_weight fits the factors of a pattern, got {type(weight).__name__}; fit its parts one by one"
        )
    if why := why_replaced(weight, FactorizedWeight, BY_FACTORS):
        raise TypeError(f"fit_weight fits the factors of a pattern, and {why}; fit a weight of that pattern alone")
    if sweeps < 1 or tries < 0:
        raise ValueError(f"fit_weight needs sweeps >= 1 and tries >= 0, got sweeps={sweeps} and tries={tries}")
    if tries == 0 and not all(factor.isfinite().all() for factor in weight.factors):
        raise ValueError(
            "fit_weight with tries=0 goes on from the factors as they are, and they are not finite; draw them: tries=1"
        )
    square = _square(target, weight)
    fits: list[Fit] = []
    for number in range(max(tries, 1)):
        made = deepcopy(weight).double()
        if tries:
            made.normal_(1.0)
        if tries and number == 0:
            _cut(made, target)
        fits.append(_descend(made, target, square, sweeps, tolerance))
    best = min(fits, key=lambda fit: fit.error)
    for factor, fitted in zip(weight.factors, best.weight.factors, strict=True):
        factor.copy_(fitted)
    return Fit(weight, relative_error(target, weight), best.errors)  # of the weight in its own dtype


def error_by_rank(
    target: Weight, weights: Iterable[FactorizedWeight], *, sweeps: int = 30, tries: int = 1
) -> list[Fit]:
    """Fits each weight, say one kind at several ranks; gives the fits from the fewest parameters to the most."""
    return sorted(
        (fit_weight(target, weight, sweeps=sweeps, tries=tries) for weight in weights), key=lambda fit: fit.parameters
    )


@torch.no_grad()
def relative_error(target: Weight, weight: Weight) -> float:
    """||target - weight|| / ||target||, over all layers, coordinates and latents.

    In float64 and in blocks of latents. Raises as `fit_weight` does.
    """
    square = _square(target, weight)
    missed = (wanted - weight.atoms(latents).double() for latents, wanted in blocks(target))
    return (sum(part.square().sum().item() for part in missed) / square) ** 0.5


def _descend(weight: FactorizedWeight, target: Weight, square: float, sweeps: int, tolerance: float) -> Fit:
    order = sorted(range(len(weight.terms)), key=lambda i: "latents" not in weight.terms[i])  # the table first
    updates = [Update(weight, i) for i in order]
    errors: list[float] = []
    for _ in range(sweeps):
        explained = [update(weight, target) for update in updates][-1]
        error = max(1 - explained / square, 0.0) ** 0.5
        errors.append(error if error > _SMALL else relative_error(target, weight))
        if len(errors) > 1 and errors[-1] >= (1 - tolerance) * errors[-2]:
            break
    return Fit(weight, errors[-1], tuple(errors))


class _Cut(NamedTuple):
    """A factor that takes axes that are open and opens bonds of its own; `before` are the cuts made already."""

    at: int
    taken: list[str]
    opened: list[str]
    left: list[str]
    before: list[int]


def _cut(weight: FactorizedWeight, target: Weight) -> None:
    """Starts the factors without latents, one after the other, from what is left of the target.

    Each becomes the leading singular vectors of the unfolding (Tucker: sequentially truncated HOSVD; ring: TR-SVD), and
    random orthonormal ones where a factor is too wide to truncate or too tall for a Gram matrix. A pattern that is no
    chain of cuts stays as it is.
    """
    terms, sizes, factors = weight.terms, weight.sizes, weight.factors
    for cut in _cuts(weight):
        tall, wide = prod(sizes[w] for w in cut.taken), prod(sizes[w] for w in cut.opened)
        columns = torch.nn.init.orthogonal_(factors[cut.at].new_empty(tall, wide))
        if wide < tall <= LARGEST:
            gram = columns.new_zeros(tall, tall)
            unfold = BlockSum(
                [weight.axes, *(terms[i] for i in cut.before)], [cut.taken, ["latents", *cut.left]], sizes
            )
            for _, wanted in blocks(target):
                unfolded = unfold(latents_first(weight, wanted), *(factors[i] for i in cut.before))
                gram += unfolded @ unfolded.T
            columns = torch.linalg.eigh(gram).eigenvectors[:, -wide:]
        grouped = f"({' '.join(cut.taken)}) ({' '.join(cut.opened)}) -> {' '.join(terms[cut.at])}"
        factors[cut.at].copy_(rearrange(columns, grouped, **{w: sizes[w] for w in terms[cut.at]}))


def _cuts(weight: FactorizedWeight) -> list[_Cut]:
    """The order of cutting, the factor that loses least first; none where some bond or axis joins more than two."""
    whole = sum("latents" in term for term in weight.terms) == 1
    return (_chain(weight.terms, weight.sizes, list(weight.axes[:-1]), []) or []) if whole else []


def _chain(terms: Sequence[Term], sizes: dict[str, int], is_open: list[str], before: list[int]) -> list[_Cut] | None:
    """How the factors that are left can be cut, or None.

    A core that is cut before all its axes are open, say, leaves another factor nothing to open.
    """
    waiting = [i for i, term in enumerate(terms) if "latents" not in term and i not in before]
    found: list[tuple[float, _Cut]] = []
    for i in waiting:
        taken = [word for word in terms[i] if word in is_open]
        opened = [word for word in terms[i] if word not in is_open]
        others = {word for j, term in enumerate(terms) if j != i and j not in before for word in term}
        if taken and opened and not others.intersection(taken):
            loss = prod(sizes[word] for word in taken) / prod(sizes[word] for word in opened)
            found.append((loss, _Cut(i, taken, opened, [w for w in is_open if w not in taken], before)))
    for _, cut in sorted(found, key=lambda pair: pair[0]):
        rest = _chain(terms, sizes, [*cut.left, *cut.opened], [*before, cut.at])
        if rest is not None:
            return [cut, *rest]
    return None if waiting else []


def _square(target: Weight, weight: Weight) -> float:
    sizes = [(each.layers, each.d_model, each.latents) for each in (target, weight)]
    if sizes[0] != sizes[1]:
        raise ShapeError(
            "a weight is fitted to one of the same layers, d_model and latents, "
            f"got target={sizes[0]} and weight={sizes[1]}; make them equal"
        )
    square = sum(atoms.square().sum().item() for _, atoms in blocks(target))
    if not isfinite(square) or square == 0:
        raise ValueError(f"a weight is fitted to a finite one that is not zero, got one of length {square**0.5}")
    return square
