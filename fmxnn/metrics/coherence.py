"""How many layers a latent lives on: by its decoder norms, and by what its code depends on."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from fmxnn.bags import dots
from fmxnn.coders import Crosscoder, CrossLayerEncoder
from fmxnn.contraction import ShapeError
from fmxnn.masking import LayerMask
from fmxnn.planning import FAST_BF16
from fmxnn.sparse import Codes, choose, to_dense_codes
from fmxnn.sparsifiers import BatchTopK, JumpReLU
from fmxnn.weights import Weight

Estimator = Literal["active", "ratio", "paper"]
Selection = Literal["threshold", "batch"]
PAPER_EPS = 1e-8


@dataclass(frozen=True)
class Coherence:
    """The effective number of layers of each latent, from 1 (one layer) to `layers` (all alike).

    `values` has axis `latents` and is nan where a latent was excluded; `per_layer` (`layers latents`) is what
    it was made of; `variant` says which definition; `excluded` counts the nan. Means and quantiles are over the rest.
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


def norm_coherence(weight: Weight) -> Coherence:
    """`-> latents`: sum over layers of a decoder atom's norms, over the largest of them. (fmxcoders, equation 4)

    From `weight.norms()`, which needs no dense tensor. An atom of zeros has no value.
    """
    with torch.no_grad():
        norms = weight.norms().double()
    return Coherence("norm", _layers_in(norms), norms)


@torch.no_grad()
def functional_coherence(
    crosscoder: Crosscoder,
    batches: Iterable[Tensor],
    *,
    estimator: Estimator = "active",
    selection: Selection = "threshold",
    min_active: int = 10,
) -> Coherence:
    """`-> latents`: how many layers a latent's code depends on. S[l] = how much of it goes when layer l is zeroed at the encoder's input; c_f = sum S / max S.

    (fmxcoders, equation 5.) `active` averages |z - z(M_l x)| / z over tokens with z > 0; `ratio` is the sum of
    |z - z(M_l x)| over the sum of z on those; `paper` averages over all tokens with eps 1e-8 in the
    denominator, as printed, and is ruled by tokens that switch on when a layer goes. `selection` is how the
    masked codes are chosen: each token by the threshold, or exact BatchTopK over each of `batches`. Latents active on fewer than
    `min_active` tokens have no value. The encoder's weight is materialised once; an encoder or mask of your own, or a
    weight without to_dense, is run layers + 1 times instead. Raises ValueError for an unknown variant or a
    sparsifier without a batch selection, ShapeError for other layers or d_model.
    """
    select, training = _selector(crosscoder, estimator, selection), crosscoder.training
    weight, like = crosscoder.encoder.weight, crosscoder.encoder.bias
    change = torch.zeros(weight.layers, weight.latents, dtype=torch.float64, device=like.device)
    total, active, tokens = change[0].clone(), change[0].clone(), 0
    limit = _limit(crosscoder) if estimator != "paper" and selection == "threshold" else None
    try:
        changes = _way(crosscoder.eval().encoder, select, limit, estimator)
        for batch in batches:
            x = batch.to(like.device, like.dtype)
            x = x.flatten(0, -3) if x.ndim > 2 else x.unsqueeze(0)
            if not len(x):
                continue
            moved, kept, fired = changes(x)
            change, total, active, tokens = change + moved, total + kept, active + fired, tokens + len(x)
    finally:
        crosscoder.train(training)
    if not tokens:
        raise ValueError("functional_coherence has seen no tokens; give it batches of (tokens, layers, d_model)")
    share = change / {"active": active, "ratio": total, "paper": torch.full_like(active, tokens)}[estimator]
    values = torch.where(active >= max(min_active, 1), _layers_in(share), torch.nan)
    return Coherence(f"functional, {estimator}, {selection} selection, at least {min_active} active tokens", values, share, active.long())


def _selector(crosscoder: Crosscoder, estimator: str, selection: str) -> Callable[[Tensor], Tensor]:
    """`tokens latents -> tokens latents`: codes from pre-activations under this selection."""
    for name, value, allowed in (("estimator", estimator, get_args(Estimator)), ("selection", selection, get_args(Selection))):
        if value not in allowed:
            raise ValueError(f"functional_coherence knows {name} {', '.join(allowed)}, got {value!r}")
    sparsifier = crosscoder.encoder.sparsifier
    if selection == "threshold":
        return lambda pre: to_dense_codes(sparsifier(pre))
    if not isinstance(sparsifier, BatchTopK):
        raise ValueError(f"selection='batch' needs a BatchTopK sparsifier, got {type(sparsifier).__name__}; use selection='threshold'")
    return sparsifier.select


def _limit(crosscoder: Crosscoder) -> Tensor | None:
    """What an entry must exceed to be kept, where nothing else decides it."""
    sparsifier, bias = crosscoder.encoder.sparsifier, crosscoder.encoder.bias
    if type(sparsifier) is BatchTopK or type(sparsifier) is JumpReLU:  # no subclass: it may choose otherwise
        return sparsifier.threshold
    return bias.new_zeros(()) if type(sparsifier) is nn.ReLU else None


Changes = tuple[Tensor, Tensor, Tensor]


def _way(
    encoder: CrossLayerEncoder, select: Callable[[Tensor], Tensor], limit: Tensor | None, estimator: Estimator
) -> Callable[[Tensor], Changes]:
    """The cheapest way that is right for this encoder, its weight materialised."""
    if type(encoder) is not CrossLayerEncoder or type(encoder.mask) is not LayerMask or not hasattr(encoder.weight, "to_dense"):
        return lambda x: _encoded_changes(x, encoder, select, estimator)
    table = _by_latents(encoder.weight)

    def changes(x: Tensor) -> Changes:
        if x.shape[1:] != table.shape[1:]:
            layers, d_model = table.shape[1:]
            raise ShapeError(f"functional_coherence reads (..., layers={layers}, d_model={d_model}), got {tuple(x.shape)}")
        if limit is None:
            return _changes(x, table, encoder.bias, select, estimator)
        return _active_changes(x, table, encoder.bias, limit, estimator)

    return changes


def _active_changes(x: Tensor, table: Tensor, bias: Tensor, limit: Tensor, estimator: Estimator) -> Changes:
    """`tokens layers d_model, latents layers d_model -> layers latents, latents, latents`: what each layer's zeroing takes, the codes' sum, their count.

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


def _changes(x: Tensor, table: Tensor, bias: Tensor, select: Callable[[Tensor], Tensor], estimator: Estimator) -> Changes:
    """The same for any choice: one product of width d_model for each layer gives all pre-activations anew."""
    pre = torch.addmm(bias, x.flatten(1), table.flatten(1).T)
    z = select(pre).double()
    change: list[Tensor] = []
    for layer in range(x.shape[1]):  # the product once more, not kept from above: that would hold layers x tokens x latents
        masked = torch.addmm(pre, x[:, layer], table[:, layer].T, alpha=-1)
        change.append(_weighed((z - select(masked)).abs(), z, estimator))
    return torch.stack(change), z.sum(0), (z > 0).sum(0).double()


def _encoded_changes(x: Tensor, encoder: CrossLayerEncoder, select: Callable[[Tensor], Tensor], estimator: Estimator) -> Changes:
    """The same for an encoder of which nothing is known: layers + 1 runs."""
    z = select(encoder.pre_activations(x)).double()
    change: list[Tensor] = []
    for layer in range(x.shape[1]):
        masked = x.clone()
        masked[:, layer] = 0
        change.append(_weighed((z - select(encoder.pre_activations(masked))).abs(), z, estimator))
    return torch.stack(change), z.sum(0), (z > 0).sum(0).double()


def _by_latents(weight: Weight) -> Tensor:
    """`-> latents layers d_model`: the dense form, whose rows are read whole by the encode and layer by layer after it."""
    return rearrange(weight.to_dense(), "layers d_model latents -> latents layers d_model").contiguous()


def _by_latent(values: Tensor, z: Codes) -> Tensor:
    return torch.segment_reduce(values[z.order], "sum", offsets=z.firsts, unsafe=True, initial=0)


def _weighed(moved: Tensor, z: Tensor, estimator: Estimator) -> Tensor:
    if estimator == "paper":
        return (moved / (z + PAPER_EPS)).sum(0)
    on = z > 0
    return (moved * on if estimator == "ratio" else moved / z.where(on, 1.0) * on).sum(0)


def _layers_in(per_layer: Tensor) -> Tensor:
    return per_layer.sum(0) / per_layer.amax(0)
