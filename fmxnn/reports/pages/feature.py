"""What is known of a latent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

from typing_extensions import override

from fmxnn.metrics.excerpts import FiredToken
from fmxnn.metrics.logits import TokenWeight
from fmxnn.reports.pages.intervals import Interval


@dataclass(frozen=True)
class Feature:
    """One latent: how often and how strongly it fires, where it reads and writes, and its top tokens in context.

    - `density`: share of tokens on which its code is not 0; `largest`: its largest activation; both 0 where it never
      fires
    - `bins`: how many tokens with a positive activation fall into each bin of width `bin_width` from 0 on
    - `norms`: its atom's norm at each layer the decoder writes; `norm_coherence`: the effective number of those layers
    - `dependence`: the share of its code that goes when a layer the encoder reads is zeroed, nan where it never fires;
      `functional_coherence`: the effective number of those layers, nan where it fires on too few tokens
    - `nearest`: other latents and the cosine of the two atoms, all layers in one
    - `top`: distinct tokens by their positive activations, strongest first
    - `intervals`: some examples from every interval of its positive activations, strongest first
    - `promoted`, `demoted`: the tokens whose logits its atom raises and lowers most; empty where that was not asked

    ```python
    from fmxnn.reports.pages import Feature

    fires = dict(density=0.01, largest=2.0, bin_width=1.0, bins=(3, 4), top=())
    lives = dict(norms=(1.0, 1.0), dependence=(0.5, 0.5), norm_coherence=2.0, functional_coherence=2.0)
    Feature(latent=7, **fires, **lives, nearest=((3, 0.9),))
    ```
    """

    latent: int
    density: float
    largest: float
    bin_width: float
    bins: tuple[int, ...]
    norms: tuple[float, ...]
    dependence: tuple[float, ...]
    norm_coherence: float
    functional_coherence: float
    nearest: tuple[tuple[int, float], ...]
    top: tuple[FiredToken, ...]
    intervals: tuple[Interval, ...] = ()
    promoted: tuple[TokenWeight, ...] = ()
    demoted: tuple[TokenWeight, ...] = ()


class LazyFeatures(Sequence[Feature]):
    """Features of `latents`, each made by `make` from its place among them whenever it is asked for.

    The text of many latents takes far more memory than the numbers it is made of.

    ```python
    from fmxnn.reports.pages.feature import LazyFeatures

    LazyFeatures((3, 7), make=lambda place: None).latents  # (3, 7)
    ```
    """

    def __init__(self, latents: Sequence[int], make: Callable[[int], Feature]):
        self.latents, self._make = tuple(latents), make

    @override
    def __len__(self) -> int:
        return len(self.latents)

    @overload
    def __getitem__(self, index: int) -> Feature: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Feature]: ...
    @override
    def __getitem__(self, index: int | slice) -> Feature | Sequence[Feature]:
        place = range(len(self))[index]
        return self._make(place) if isinstance(place, int) else tuple(map(self._make, place))

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    @override
    def __hash__(self) -> int:
        return hash(self.latents)
