"""How many layers a latent lives on: by its decoder norms, and by what its code depends on."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fmxnn.activations.own_batches import sides_of
from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.encoder import CrossLayerEncoder
from fmxnn.coders.inputs import blocks
from fmxnn.coders.planning import FAST_BF16
from fmxnn.core.modes import evaluating
from fmxnn.core.shortcuts import why_watched
from fmxnn.gates.jump_relu import JumpReLU
from fmxnn.gates.top_k import BatchTopK
from fmxnn.metrics.hiding import Select, Selection, by_latents, check_seen, hidden_codes, is_linear, selector
from fmxnn.sparse.codes import Codes, choose
from fmxnn.sparse.row_sums import dots
from fmxnn.weights.weight import Weight

Estimator = Literal["active", "ratio", "paper"]
PAPER_EPS = 1e-8


@dataclass(frozen=True)
class Coherence:
    """The effective number of layers of each latent, from 1 (one layer) to `layers` (all equally).

    - `values` (`latents`): nan where a latent was left out
    - `per_layer` (`layers latents`): what they were computed from
    - `variant`: which definition it is

    Means and quantiles are over the latents that have a value; `excluded` counts the others.

    ```python
    from fmxnn.metrics import norm_coherence

    coherence = norm_coherence(fx.TensorRingWeight(4, 8, 32))
    coherence.mean, coherence.quantiles(0.05, 0.95)
    ```
    """

    variant: str
    values: Tensor
    per_layer: Tensor
    active_tokens: Tensor | None = None

    @property
    def alive(self) -> int:
        """How many latents have a value."""
        return int((~self.values.isnan()).sum())

    @property
    def excluded(self) -> int:
        """How many latents have none: an atom of zeros, or fewer active tokens than asked."""
        return len(self.values) - self.alive

    @property
    def mean(self) -> float:
        """The mean over latents that have a value."""
        return float(self.values.nanmean())

    @property
    def median(self) -> float:
        """The median over latents that have a value."""
        return float(self.values.nanquantile(0.5))

    def quantiles(self, *shares: float) -> list[float]:
        """The quantiles over latents that have a value, such as `quantiles(0.05, 0.95)`."""
        return [float(self.values.nanquantile(share)) for share in shares]

    def numbers(self) -> dict[str, float]:
        """Every headline number by name, for a log line or a table."""
        low, high = self.quantiles(0.05, 0.95)
        return {
            "mean": self.mean,
            "median": self.median,
            "q05": low,
            "q95": high,
            "alive": self.alive,
            "excluded": self.excluded,
        }


def norm_coherence(weight: Weight) -> Coherence:
    """`-> latents`: sum over layers of a decoder atom's norms, over the largest of them. (fmxcoders, equation 4)

    From `weight.norms()`, which needs no dense tensor. An atom of zeros has no value.
    """
    with torch.no_grad():
        norms = weight.norms().double()
    return Coherence("norm", _layers_in(norms), norms)


class FunctionalCoherence:
    """`... layers d_model`: sums over a stream of activations what each latent loses when a layer is zeroed.

    See `functional_coherence`. The encoder is measured as it is when this is made, and run in eval mode.

    ```python
    from fmxnn.metrics.coherence import FunctionalCoherence

    dense = fx.DenseWeight(2, 3, 8)
    crosscoder = fx.Crosscoder(fx.CrossLayerEncoder(dense, fx.TopK(2)), fx.CrossLayerDecoder(dense))
    measured = FunctionalCoherence(crosscoder, min_active=1)
    measured.update(torch.randn(64, 2, 3))
    measured.compute().mean
    ```
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        *,
        estimator: Estimator = "active",
        selection: Selection = "threshold",
        min_active: int = 10,
    ):
        if estimator not in get_args(Estimator):
            raise ValueError(
                f"functional_coherence knows estimator {', '.join(get_args(Estimator))}, got {estimator!r}"
            )
        self.crosscoder, self.estimator, self.min_active = crosscoder, estimator, min_active
        self.selection: Selection = selection
        select, encoder = selector(crosscoder, selection, "functional_coherence"), crosscoder.encoder
        limit = _limit(crosscoder) if estimator != "paper" and selection == "threshold" else None
        self._whole = selection == "batch" or (
            limit is not None and is_linear(encoder)
        )  # without pre-activations nothing is to be cut
        with evaluating(crosscoder), torch.no_grad():
            self._changes = _way(encoder, select, limit, estimator)
        self._change = torch.zeros(
            encoder.weight.layers, encoder.weight.latents, dtype=torch.float64, device=encoder.bias.device
        )
        self._total = self._active = self._change.sum(0)
        self.tokens = 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """`... layers d_model`: adds a batch. Raises ShapeError for other layers or d_model."""
        with evaluating(self.crosscoder):
            for block in blocks(self.crosscoder, x, whole=self._whole):
                change, total, active = self._changes(block)
                self._change, self._total, self._active = (
                    self._change + change,
                    self._total + total,
                    self._active + active,
                )
                self.tokens += len(block)

    def compute(self) -> Coherence:
        """The coherence so far. Raises ValueError before the first token."""
        check_seen(self.tokens, "functional_coherence")
        whole = {"active": self._active, "ratio": self._total, "paper": torch.full_like(self._active, self.tokens)}
        share, least = self._change / whole[self.estimator], max(self.min_active, 1)
        values = torch.where(self._active >= least, _layers_in(share), torch.nan)
        variant = f"functional, {self.estimator}, {self.selection} selection, at least {self.min_active} active tokens"
        return Coherence(variant, values, share, self._active.long())


def functional_coherence(
    crosscoder: Crosscoder,
    batches: Iterable[Any],
    *,
    estimator: Estimator = "active",
    selection: Selection = "threshold",
    min_active: int = 10,
) -> Coherence:
    """`-> latents`: on how many layers a latent's activation depends. (fmxcoders, equation 5)

    S[l] is the share of it that goes when layer l is zeroed at the encoder's input, and the coherence is sum S / max S.
    The `estimator` says how shares are averaged over tokens:

    - `active`: the mean of |z - z(M_l x)| / |z| over tokens on which the latent fires (z is not 0)
    - `ratio`: the sum of |z - z(M_l x)| over the sum of |z|, on the same tokens
    - `paper`: as printed, the mean over all tokens with eps 1e-8 in the denominator; tokens that switch on when a layer
      goes rule it

    The `selection` says how masked codes are chosen: each token by the threshold, or exact BatchTopK over each of
    `batches`. Latents active on fewer than `min_active` tokens have no value. Of a batch (x, y) or (x, ids, positions)
    x is measured.

    The encoder's weight is made dense once. An encoder or mask of your own, or a weight without to_dense, is run layers
    + 1 times instead. Raises ValueError for an unknown estimator or selection, and for a gate without a batch
    selection. Raises ShapeError for other layers or d_model.
    """
    measured = FunctionalCoherence(crosscoder, estimator=estimator, selection=selection, min_active=min_active)
    for batch in batches:
        measured.update(sides_of(batch)[0])
    return measured.compute()


def _limit(crosscoder: Crosscoder) -> Tensor | None:
    """What an entry must exceed to be kept, where nothing else decides it."""
    sparsifier, bias = crosscoder.encoder.sparsifier, crosscoder.encoder.bias
    if why_watched([sparsifier]) or "forward" in vars(sparsifier):
        return None
    if type(sparsifier) is BatchTopK or type(sparsifier) is JumpReLU:  # no subclass: it may choose otherwise
        return sparsifier.threshold
    return bias.new_zeros(()) if type(sparsifier) is nn.ReLU else None


Changes = tuple[Tensor, Tensor, Tensor]


def _way(
    encoder: CrossLayerEncoder, select: Select | None, limit: Tensor | None, estimator: Estimator
) -> Callable[[Tensor], Changes]:
    """The cheapest way that is right for this encoder, its weight materialised."""
    if limit is None or not is_linear(encoder):
        codes = hidden_codes(encoder, select)
        return lambda x: _changes(codes(x), estimator)
    table = by_latents(encoder.weight)
    return lambda x: _active_changes(x, table, encoder.bias, limit, estimator)


def _active_changes(x: Tensor, table: Tensor, bias: Tensor, limit: Tensor, estimator: Estimator) -> Changes:
    """`tokens layers d_model, latents layers d_model -> layers latents, latents, latents`: what each layer's zeroing
    takes, the codes' sum, their count.

    By linearity pre(M_l x) = pre(x) - x_l . E_l, so only active entries are computed again.
    """
    latents, layers, _ = table.shape
    z = choose(x.flatten(1), table.flatten(1), bias, "above", limit, propose=x.device.type == "cpu" and FAST_BF16)
    floor = limit.clamp(min=0).expand(latents)[z.columns]
    change = x.new_zeros(layers, latents, dtype=torch.float64)
    for layer in range(layers):
        read = dots(x[:, layer].contiguous(), z.columns * layers + layer, z.starts, table.flatten(0, 1))
        left = z.values - read
        moved = (z.values - torch.where(left > floor, left, 0.0)).abs().double()
        change[layer] = _by_latent(moved / z.values if estimator == "active" else moved, z)
    return change, _by_latent(z.values.double(), z), z.firsts.diff().double()


def _changes(codes: Iterator[Tensor], estimator: Estimator) -> Changes:
    """The same from the codes, then those without each layer."""
    z = next(codes)
    if estimator == "paper":  # tokens that switch on count, too
        z = z.double()
        size = z.abs()
        change = torch.stack([((z - gone).abs() / (size + PAPER_EPS)).sum(0) for gone in codes])
        return change, size.sum(0), (size > 0).sum(0).double()
    tokens, latents = z.nonzero(as_tuple=True)  # in float64 these alone, of all tokens x latents
    active = z[tokens, latents].double()
    size = active.abs()
    moved = ((active - gone[tokens, latents]).abs() for gone in codes)
    shares = [each / size if estimator == "active" else each for each in moved]
    summed = [
        z.new_zeros(z.shape[1], dtype=torch.float64).index_add(0, latents, each)
        for each in (*shares, size, torch.ones_like(size))
    ]
    return torch.stack(summed[:-2]), summed[-2], summed[-1]


def _by_latent(values: Tensor, z: Codes) -> Tensor:
    return torch.segment_reduce(values[z.order], "sum", offsets=z.firsts, unsafe=True, initial=0)


def _layers_in(per_layer: Tensor) -> Tensor:
    return per_layer.sum(0) / per_layer.amax(0)
