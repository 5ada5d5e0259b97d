"""What is planted: where features live, how they move across layers, how often they fire, and what lies around."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import cos, sin

import torch
from torch import Generator, Tensor

NEVER = 1e-6


@dataclass(frozen=True)
class Span:
    """A kind of profile: `draw(layers, generator)` gives one feature's norm at each layer.

    It needs `least` layers to be what it says.

    ```python
    from fmxnn.metrics.planted import SPANS

    SPANS["local"].draw(6, torch.Generator().manual_seed(0))
    ```
    """

    least: int
    draw: Callable[[int, Generator], Tensor]


Motion = Callable[[Tensor, int, float, Generator], Tensor]
"""How directions move: `(on, d_model, turn, generator)` to unit vectors `features layers d_model`, for features on the
layers `on` (`features layers`).
"""


def unit(vectors: Tensor) -> Tensor:
    """`... d_model -> ... d_model`: the same directions at length 1."""
    return vectors / vectors.norm(dim=-1, keepdim=True)


def normal(*shape: int, generator: Generator) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _runs(layers: int, count: int, generator: Generator) -> list[int]:
    """`count` places to cut at, distinct and ascending, from 0 to `layers`."""
    return torch.randperm(layers + 1, generator=generator)[:count].sort().values.tolist()


def _between(low: int, high: int, generator: Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _run(layers: int, start: int, width: int) -> Tensor:
    place = torch.arange(layers)
    return ((place >= start) & (place < start + width)).double()


def _single(layers: int, generator: Generator) -> Tensor:
    return _run(layers, _between(0, layers - 1, generator), 1)


def _local(layers: int, generator: Generator) -> Tensor:
    width = _between(1, min(2, layers), generator)
    return _run(layers, _between(0, layers - width, generator), width)


def _band(layers: int, generator: Generator) -> Tensor:
    width = _between(3, layers - 1, generator)
    return _run(layers, _between(0, layers - width, generator), width)


def _global(layers: int, generator: Generator) -> Tensor:
    return torch.ones(layers).double()


def _gapped(layers: int, generator: Generator) -> Tensor:
    start, gap, resumed, stop = _runs(layers, 4, generator)
    return _run(layers, start, gap - start) + _run(layers, resumed, stop - resumed)


def _ramp(layers: int, generator: Generator) -> Tensor:
    rising = torch.arange(1, layers + 1).double() / layers
    return rising if _between(0, 1, generator) else rising.flip(0)


SPANS = {
    "single": Span(1, _single),
    "local": Span(1, _local),
    "band": Span(4, _band),
    "global": Span(1, _global),
    "gapped": Span(3, _gapped),
    "ramp": Span(2, _ramp),
}
"""`single`: one layer, a control. `local`: one layer or two neighbours. `band`: three or more neighbours, not all
layers. `global`: all layers. `gapped`: two runs with a gap between. `ramp`: all layers, the norm rising from 1/layers
to 1 or falling. Norms are 1 where not said.
"""


def _static(on: Tensor, d_model: int, turn: float, generator: Generator) -> Tensor:
    return unit(normal(len(on), 1, d_model, generator=generator)).repeat(1, on.shape[1], 1)


def _transport(on: Tensor, d_model: int, turn: float, generator: Generator) -> Tensor:
    """The exponential of a random skew matrix turns every vector by about `turn`, and keeps all inner products."""
    direction, directions = unit(normal(len(on), d_model, generator=generator)), list[Tensor]()
    for _ in range(on.shape[1]):
        directions.append(direction)
        free = normal(d_model, d_model, generator=generator) * turn / (2 * d_model) ** 0.5
        direction = direction @ torch.linalg.matrix_exp(free - free.T)
    return torch.stack(directions, 1)


def _drift(on: Tensor, d_model: int, turn: float, generator: Generator) -> Tensor:
    direction, directions = unit(normal(len(on), d_model, generator=generator)), list[Tensor]()
    for _ in range(on.shape[1]):
        directions.append(direction)
        direction = cos(turn) * direction + sin(turn) * _across(direction, generator)
    return torch.stack(directions, 1)


def _switch(on: Tensor, d_model: int, turn: float, generator: Generator) -> Tensor:
    """The layer of the switch is one of the feature's own, never its first; a feature of one layer has none."""
    count = on.sum(1)
    pick = torch.rand(len(on), generator=generator, dtype=torch.float64)
    rank = 1 + (pick * (count - 1).clamp(min=1)).long()
    switched = on.cumsum(1) > rank.unsqueeze(1)
    before = unit(normal(len(on), d_model, generator=generator))
    after = _across(before, generator)
    return torch.where(switched.unsqueeze(-1), after.unsqueeze(1), before.unsqueeze(1))


def _independent(on: Tensor, d_model: int, turn: float, generator: Generator) -> Tensor:
    return unit(normal(*on.shape, d_model, generator=generator))


def _across(direction: Tensor, generator: Generator) -> Tensor:
    """Random unit vectors orthogonal to these."""
    free = normal(*direction.shape, generator=generator)
    return unit(free - (free * direction).sum(-1, keepdim=True) * direction)


MOTIONS: dict[str, Motion] = {
    "static": _static,
    "transport": _transport,
    "drift": _drift,
    "switch": _switch,
    "independent": _independent,
}
"""`static`: one direction at all layers. `transport`: one rotation from each layer to the next, shared by all features.
`drift`: each feature turns on its own, by `turn` radians a layer. `switch`: an orthogonal direction from one of its
layers on. `independent`: a new direction at each layer, a control that has support only.
"""


@dataclass(frozen=True)
class Firing:
    """How often features fire: feature i on `most` / (i + 1)^`zipf` of the tokens.

    Groups of `group` neighbours fire together: a Gaussian copula with `correlation` between any two of a group and none
    between groups. It leaves every frequency as it is.

    ```python
    from fmxnn.metrics.planted import Firing

    Firing(most=0.3, zipf=0.8, correlation=0.3)
    ```
    """

    most: float = 0.5
    zipf: float = 1.0
    correlation: float = 0.0
    group: int = 4

    def __post_init__(self) -> None:
        if not NEVER <= self.most < 1:
            raise ValueError(
                f"Firing needs {NEVER:g} <= most < 1, the frequency of the most frequent feature, got most={self.most}"
            )
        if not 0 <= self.zipf < float("inf"):
            raise ValueError(
                f"Firing needs a finite zipf >= 0, the exponent by which frequencies fall, got zipf={self.zipf}"
            )
        if not 0 <= self.correlation < 1:
            raise ValueError(
                f"Firing needs 0 <= correlation < 1 between features of a group, got correlation={self.correlation}"
            )
        if self.group < 1:
            raise ValueError(f"Firing needs group >= 1, the features of a group, got group={self.group}")


@dataclass(frozen=True)
class Surroundings:
    """What lies around the features, in units of one feature's norm at layer 0.

    Norms grow by the factor `growth` from each layer to the next, also those of features. Every layer has an offset of
    norm `mean`. On the share `massive` of the tokens one direction a layer, of norm `massive_norm`, is added. Both are
    before that growth.

    ```python
    from fmxnn.metrics.planted import Surroundings

    Surroundings(growth=1.1, mean=3.0, massive=0.001)
    ```
    """

    growth: float = 1.0
    mean: float = 0.0
    massive: float = 0.0
    massive_norm: float = 100.0

    def __post_init__(self) -> None:
        if not 0 < self.growth < float("inf"):
            raise ValueError(
                f"Surroundings needs a finite growth > 0, a layer's norm over the one before, got growth={self.growth}"
            )
        for name in ("mean", "massive_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"Surroundings needs a finite {name} >= 0, a norm, got {name}={getattr(self, name)}")
        if not 0 <= self.massive <= 1:
            raise ValueError(
                f"Surroundings needs 0 <= massive <= 1, the share of massive tokens, got massive={self.massive}"
            )


@dataclass(frozen=True)
class Planting:
    """What is planted: each span with each motion, equally often; a name given twice comes twice as often.

    The names are in `SPANS` and `MOTIONS`. `turn` is the angle in radians by which drifting and transported directions
    turn from each layer to the next.

    ```python
    from fmxnn.metrics.planted import Firing, PlantedFeatures, Planting

    planting = Planting(spans=("local", "band"), motions=("static",), firing=Firing(most=0.3))
    PlantedFeatures(6, 16, 24, planting=planting)
    ```
    """

    spans: tuple[str, ...] = ("local", "band", "global", "gapped", "ramp")
    motions: tuple[str, ...] = ("static", "transport", "drift", "switch")
    turn: float = 0.4
    firing: Firing = field(default_factory=Firing)
    surroundings: Surroundings = field(default_factory=Surroundings)

    def __post_init__(self) -> None:
        for what, given, known in (("spans", self.spans, SPANS), ("motions", self.motions, MOTIONS)):
            wrong = [name for name in given if name not in known]
            if wrong or not given or isinstance(given, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ValueError(f"Planting takes a tuple of {what} from {', '.join(known)}, got {given!r}")
