"""The one way in which a scale goes into weights: one number, or a factor for each layer."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fmxnn.weights.factorized import FactorizedWeight
from fmxnn.weights.questions import scalable
from fmxnn.weights.table_rows import check_stored
from fmxnn.weights.weight import LayerScalable, Weight


@torch.no_grad()
def scale_(weights: Iterable[Weight], by: float | Tensor) -> None:
    """`layers -> `: multiplies weights in place, by one number or by a factor for each layer, each once.

    A number goes to each weight's `scale_`. Factors go to the `scale_layers_` of what a weight is made of, once in
    however many places it stands. Raises TypeError for a weight that cannot be scaled and ValueError for one that two
    places scale otherwise; nothing is changed then.
    """
    weights = list(weights)
    check_stored("a scale", *weights)
    if isinstance(by, Tensor):
        for part, factors in _by_layers(weights, by).items():
            part.scale_layers_(factors)
        return
    for weight in [scalable(weight) for weight in dict.fromkeys(weights)]:
        weight.scale_(by)


def _by_layers(weights: Iterable[Weight], factors: Tensor) -> dict[LayerScalable, Tensor]:
    """What is scaled when all these are, and by what: each part once, in however many places it stands."""
    found: dict[LayerScalable, Tensor] = {}
    for weight in weights:
        for part, by in _places(weight, factors):
            if not torch.equal(found.setdefault(part, by), by):
                raise ValueError(
                    "one weight stands at several layers, each of another scale; "
                    "give each place a weight of its own: copy.deepcopy(weight)"
                )
    factorized = [part for part in found if isinstance(part, FactorizedWeight)]
    held = [id(factor) for part in factorized for factor in part.factors]
    if any(held.count(id(part.factors[part.carrier("layers")])) > 1 for part in factorized):
        raise ValueError(
            "two places hold one factor, which would be scaled twice; share the weight itself, or copy the factor"
        )
    return found


def _places(weight: Weight, factors: Tensor) -> Iterator[tuple[LayerScalable, Tensor]]:
    if isinstance(weight, LayerScalable):
        yield weight, factors
        return
    is_weight = isinstance(weight, Weight)  # pyright: ignore[reportUnnecessaryIsInstance]  # or has the methods of one
    inner = weight.made_of() if is_weight else ()
    if not inner:
        raise TypeError(
            f"a normalisation is folded into each layer on its own, and {type(weight).__name__} cannot scale its "
            "layers; give it scale_layers_(factors), which multiplies each layer by its factor"
        )
    for part, at in inner:
        yield from _places(part, factors[list(at)])
