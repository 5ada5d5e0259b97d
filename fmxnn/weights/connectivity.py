"""Which layers a latent reads and writes: connectivity as a weight, stored block by block."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fmxnn.core.errors import ShapeError
from fmxnn.core.shortcuts import why_replaced
from fmxnn.core.sizes import places_of, sizes_of, whole
from fmxnn.weights.combined import ConcatWeight
from fmxnn.weights.factorized import BY_FACTORS, FactorizedWeight
from fmxnn.weights.parted import PartedWeight, parts_of
from fmxnn.weights.weight import Part, Weight

MakeWeight = Callable[[int, int, int], Weight]
"""A weight from `layers, d_model, latents`: the class, or a function where it takes more, such as a rank."""


class PlacedWeight(PartedWeight):
    """`layers d_model latents`: a weight of a few layers at its places in a stack; it reads and writes no others.

    - `weight`: of any kind.
    - `layers`: how many layers the stack has.
    - `at`: the place of the weight's first layer, the others following, or the place of each.
    - `d_model`: the stack's, where the weight's own is smaller and reads and writes the first coordinates.

    Nothing is stored for what is absent. Side by side in a ConcatWeight such weights make every block-sparse
    connectivity. Raises ValueError or ShapeError for places or sizes that do not fit.

    ```python
    weight = fx.PlacedWeight(fx.DenseWeight(2, 8, 20), layers=4, at=[0, 3])
    assert not weight.to_dense()[1:3].any()
    ```
    """

    kept_as: ClassVar[dict[str, str]] = {"at": "placed_at"}  # `at` is a method of every weight

    def __init__(self, weight: Weight, *, layers: int, at: int | Sequence[int], d_model: int | None = None):
        super().__init__()
        first = whole(at)
        places = places_of(at) if first is None else tuple(range(first, first + weight.layers))
        (self.layers,) = sizes_of("PlacedWeight", layers=layers)
        if places is None or not _ascend(places, self.layers) or len(places) != weight.layers:
            raise ValueError(
                f"PlacedWeight needs {weight.layers} places for a weight of layers={weight.layers}, ascending and in "
                f"range({self.layers}), got at={_shown(at if first is None else first)}"
            )
        self.placed_at = places if first is None else first
        (self.d_model,) = sizes_of("PlacedWeight", d_model=weight.d_model if d_model is None else d_model)
        if self.d_model < weight.d_model:
            raise ShapeError(
                f"PlacedWeight reads the first {weight.d_model} coordinates of each layer, got d_model={d_model}; "
                "take the largest of all layers"
            )
        self.weight, self.latents = weight, weight.latents
        self._places = places

    @override
    def extra_repr(self) -> str:
        """The stack and the places."""
        return f"layers={self.layers}, at={self.placed_at}, d_model={self.d_model}"

    @override
    def parts(self) -> tuple[Part, ...]:
        """The weight's parts, moved to their places."""
        return tuple(
            Part(part.weight, tuple(self._places[layer] for layer in part.at)) for part in parts_of(self.weight)
        )

    @override
    def made_of(self) -> tuple[Part, ...]:
        """The weight at its places."""
        return (Part(self.weight, self._places),)


class RestrictedWeight(PartedWeight):
    """`layers d_model latents`: a factorised weight whose groups of latents keep only some layers each.

    - `weight`: a weight with factors.
    - `at`: for each of as many equal groups of latents, the layers that it keeps.

    All groups share the small factors and differ in their rows of the table. It equals the weight times a mask of
    zeros and ones, and computes no zeros. Raises ValueError or TypeError for groups or weights that do not fit.

    ```python
    ring = fx.TensorRingWeight(4, 8, 20, ranks=(2, 4, 4))
    causal = fx.RestrictedWeight(ring, at=[range(i, 4) for i in range(4)])  # one ring, weakly causal
    assert not causal.to_dense()[0, :, 5:].any()
    ```
    """

    kept_as: ClassVar[dict[str, str]] = {"at": "groups"}  # `at` is a method of every weight

    def __init__(self, weight: FactorizedWeight, *, at: Sequence[Sequence[int]]):
        super().__init__()
        if not isinstance(weight, FactorizedWeight):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"RestrictedWeight needs a factorised weight, got {type(weight).__name__}; "
                "place its parts: PlacedWeight"
            )
        if why := why_replaced(weight, FactorizedWeight, BY_FACTORS):
            raise TypeError(
                f"RestrictedWeight takes slices of a weight's factors, and {why}; place its parts: PlacedWeight"
            )
        self.weight = weight
        self.layers, self.d_model, self.latents = weight.layers, weight.d_model, weight.latents
        self.groups = tuple(self._group(group) for group in at)
        if not self.groups or self.latents % len(self.groups):
            raise ValueError(
                f"RestrictedWeight makes equal groups, got latents={self.latents} for {len(self.groups)} groups; "
                "take a multiple"
            )
        share = self.latents // len(self.groups)
        self._views = tuple(Restriction(weight, first * share, share, group) for first, group in enumerate(self.groups))

    def _group(self, given: Sequence[int]) -> tuple[int, ...]:
        group = places_of(given)
        if not group or not _ascend(group, self.layers):
            raise ValueError(
                f"RestrictedWeight needs layers in range({self.layers}) for each group, ascending, got {_shown(given)}"
            )
        return group

    @override
    def extra_repr(self) -> str:
        """The layers of each group."""
        return "at=" + ", ".join(
            f"{group[0]}-{group[-1]}" if _is_run(group) else str(list(group)) for group in self.groups
        )

    @override
    def parts(self) -> tuple[Part, ...]:
        """The groups of latents."""
        return tuple(Part(view, group) for view, group in zip(self._views, self.groups, strict=True))

    @override
    def made_of(self) -> tuple[Part, ...]:
        """The weight, with all layers."""
        return (Part(self.weight, tuple(range(self.layers))),)


class Restriction(FactorizedWeight):
    """Neighbouring latents of a weight at some of its layers; holds no parameters and slices those of the weight.

    ```python
    first = fx.RestrictedWeight(fx.DenseWeight(3, 4, 6), at=[[0], [1, 2]]).parts()[0].weight
    assert first.to_dense().shape == (1, 4, 3)
    ```
    """

    def __init__(self, weight: FactorizedWeight, first: int, latents: int, at: tuple[int, ...]):
        with torch.device("meta"):
            sizes = weight.sizes | {"layers": len(at), "latents": latents}
            super().__init__(weight.pattern, reads=weight.reads, **sizes)
        del self._modules["factors"]
        self._source = (weight, first, at)  # in a tuple, so that it is no submodule

    @property
    def factors(  # pyright: ignore[reportIncompatibleVariableOverride]  # read as the parameters of any weight are
        self,
    ) -> list[Tensor]:
        """The weight's, without other latents and layers."""
        weight, first, at = self._source
        sliced: list[Tensor] = []  # torch.compile reads no list[Tensor]()
        for term, factor in zip(weight.terms, weight.factors, strict=True):
            if "latents" in term:
                factor = factor.narrow(term.index("latents"), first, self.latents)
            if "layers" in term:
                axis, run = term.index("layers"), _is_run(at)
                factor = (
                    factor.narrow(axis, at[0], len(at))
                    if run
                    else factor.index_select(axis, torch.tensor(at, device=factor.device))
                )
            sliced.append(factor)
        return sliced

    @property
    @override
    def dtype(self) -> torch.dtype:
        """The weight's, without a slice."""
        return self._source[0].dtype

    @override
    def stored_at(self, latents: Tensor, layers: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Where the weight has them: a slice of layers that are no run is a copy, and writing to it would be lost."""
        weight, first, at = self._source
        kept = torch.tensor(at, device=latents.device)
        return weight.stored_at(latents + first, kept if layers is None else kept[layers])


def sae_stack_weight(weight: MakeWeight, *, layers: int, d_model: int, latents: int) -> ConcatWeight:
    """`layers d_model latents`: an equal share of the latents for each layer, which reads and writes it alone.

    A sparse autoencoder on each layer, as one weight. Raises ValueError for latents that cannot be shared equally.
    """
    axes = sizes_of("sae_stack_weight", layers=layers, d_model=d_model, latents=latents)
    return _blocks("sae_stack_weight", weight, [range(layer, layer + 1) for layer in range(axes[0])], axes)


def windowed_weight(weight: MakeWeight, *, layers: int, d_model: int, latents: int, window: int) -> ConcatWeight:
    """`layers d_model latents`: an equal share of the latents for each run of `window` neighbouring layers.

    The weight of a convolutional crosscoder. Raises ValueError for a window that does not fit, and for latents that
    cannot be shared equally.
    """
    axes = sizes_of("windowed_weight", layers=layers, d_model=d_model, latents=latents)
    wide = whole(window)
    if wide is None or not 1 <= wide <= axes[0]:
        raise ValueError(f"windowed_weight needs a window of 1 to layers={axes[0]}, got window={window!r:.200}")
    return _blocks("windowed_weight", weight, [range(first, first + wide) for first in range(axes[0] - wide + 1)], axes)


def causal_weight(weight: MakeWeight, *, layers: int, d_model: int, latents: int) -> ConcatWeight:
    """`layers d_model latents`: an equal share of the latents for each layer, which writes it and all later ones.

    The decoder of a weakly causal crosscoder and of a cross-layer transcoder, whose encoder is a `sae_stack_weight`.
    (Gemma Scope 2; circuit-tracer) Raises ValueError for latents that cannot be shared equally.
    """
    axes = sizes_of("causal_weight", layers=layers, d_model=d_model, latents=latents)
    return _blocks("causal_weight", weight, [range(first, axes[0]) for first in range(axes[0])], axes)


def _ascend(places: tuple[int, ...], layers: int) -> bool:
    """Whether these are layers of a stack, each once and in order."""
    return sorted(set(places)) == list(places) and bool(places) and 0 <= places[0] <= places[-1] < layers


def _shown(at: object) -> str:
    places = places_of(at)
    return f"{at!r:.200}" if places is None else f"{list(places)!s:.200}"


def _is_run(at: tuple[int, ...]) -> bool:
    return at[-1] - at[0] == len(at) - 1


def _blocks(who: str, weight: MakeWeight, runs: list[range], axes: tuple[int, ...]) -> ConcatWeight:
    layers, d_model, latents = axes
    if latents % len(runs):
        raise ValueError(
            f"{who} gives each of its {len(runs)} parts an equal share of the latents, got latents={latents}; "
            f"take a multiple of {len(runs)}"
        )
    return ConcatWeight(
        *(PlacedWeight(weight(len(run), d_model, latents // len(runs)), layers=layers, at=run.start) for run in runs)
    )
