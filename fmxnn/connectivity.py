"""Which layers a latent reads and writes: connectivity as a weight, stored block by block."""

from collections.abc import Callable, Sequence

from typing_extensions import override

from fmxnn.algebra import ConcatWeight
from fmxnn.contraction import ShapeError
from fmxnn.parts import Part, PartedWeight, parts_of
from fmxnn.weights import Weight

MakeWeight = Callable[[int, int, int], Weight]
"""A weight from `layers, d_model, latents`: the class, or a function where it takes more, such as a rank."""


class PlacedWeight(PartedWeight):
    """`layers d_model latents`: a weight of a few layers at its places in a stack of `layers`; at the others it reads nothing and writes zeros.

    `at` is the place of the weight's first layer, the others following, or the place of each. `d_model` is the stack's where the
    weight's own is smaller: it reads and writes the first coordinates. Nothing is stored for what is absent. Side by side in a
    ConcatWeight such weights make every block-sparse connectivity. Raises ValueError or ShapeError for places or sizes that do not fit.
    """

    def __init__(self, weight: Weight, *, layers: int, at: int | Sequence[int], d_model: int | None = None):
        super().__init__()
        self.at = at if isinstance(at, int) else tuple(at)
        places = tuple(range(at, at + weight.layers)) if isinstance(at, int) else tuple(at)
        if len(places) != weight.layers or sorted(set(places)) != list(places) or not 0 <= places[0] <= places[-1] < layers:
            raise ValueError(
                f"PlacedWeight needs {weight.layers} places for a weight of layers={weight.layers}, ascending and in range({layers}), "
                f"got at={at if isinstance(at, int) else list(at)}"
            )
        self.d_model = weight.d_model if d_model is None else d_model
        if self.d_model < weight.d_model:
            raise ShapeError(
                f"PlacedWeight reads the first {weight.d_model} coordinates of each layer, got d_model={d_model}; take the largest of all layers"
            )
        self.weight, self.layers, self.latents = weight, layers, weight.latents
        self._places = places

    @override
    def extra_repr(self) -> str:
        """The stack and the places."""
        return f"layers={self.layers}, at={self.at}, d_model={self.d_model}"

    @override
    def parts(self) -> tuple[Part, ...]:
        """The weight's parts, moved to their places."""
        return tuple(Part(part.weight, tuple(self._places[layer] for layer in part.at)) for part in parts_of(self.weight))

    @override
    def inner(self) -> tuple[Part, ...]:
        """The weight at its places."""
        return (Part(self.weight, self._places),)


def sae_stack_weight(weight: MakeWeight, *, layers: int, d_model: int, latents: int) -> ConcatWeight:
    """`layers d_model latents`: an equal share of the latents for each layer, which reads and writes that layer alone; per-layer SAEs in one."""
    return _blocks("sae_stack_weight", weight, [range(layer, layer + 1) for layer in range(layers)], (layers, d_model, latents))


def windowed_weight(weight: MakeWeight, *, layers: int, d_model: int, latents: int, window: int) -> ConcatWeight:
    """`layers d_model latents`: an equal share of the latents for each run of `window` neighbouring layers; a convolutional crosscoder."""
    if not 1 <= window <= layers:
        raise ValueError(f"windowed_weight needs a window of 1 to layers={layers}, got window={window}")
    runs = [range(first, first + window) for first in range(layers - window + 1)]
    return _blocks("windowed_weight", weight, runs, (layers, d_model, latents))


def causal_weight(weight: MakeWeight, *, layers: int, d_model: int, latents: int) -> ConcatWeight:
    """`layers d_model latents`: an equal share of the latents for each layer, which writes that layer and all later ones.

    The decoder of a weakly causal crosscoder and of a cross-layer transcoder, whose encoder is a `sae_stack_weight`. (Gemma Scope 2; circuit-tracer)
    """
    return _blocks("causal_weight", weight, [range(first, layers) for first in range(layers)], (layers, d_model, latents))


def _blocks(who: str, weight: MakeWeight, runs: list[range], axes: tuple[int, int, int]) -> ConcatWeight:
    layers, d_model, latents = axes
    if latents < 1 or latents % len(runs):
        raise ValueError(
            f"{who} gives each of its {len(runs)} parts an equal share of the latents, got latents={latents}; take a multiple of {len(runs)}"
        )
    return ConcatWeight(*(PlacedWeight(weight(len(run), d_model, latents // len(runs)), layers=layers, at=run.start) for run in runs))
