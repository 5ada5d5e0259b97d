"""How many layers a latent lives on: by its decoder norms, and by what its code depends on."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fmxnn.coders import Crosscoder
from fmxnn.sparse import to_dense_codes
from fmxnn.sparsifiers import BatchTopK
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
    `min_active` tokens have no value. Raises ValueError for an unknown variant or a sparsifier without a batch selection.
    """
    encode, training = _encoder(crosscoder, estimator, selection), crosscoder.training
    encoder = crosscoder.encoder
    crosscoder.eval()
    layers, latents, like = encoder.weight.layers, encoder.weight.latents, encoder.bias
    change = torch.zeros(layers, latents, dtype=torch.float64, device=like.device)
    total, active, tokens = change[0].clone(), change[0].clone(), 0
    try:
        for batch in batches:
            x = batch.to(like.device, like.dtype)
            x = x.flatten(0, -3) if x.ndim > 2 else x.unsqueeze(0)
            z = encode(x)
            for layer in range(layers):
                masked = x.clone()
                masked[:, layer] = 0
                moved = (z - encode(masked)).abs()
                change[layer] += _weighed(moved, z, estimator)
            total, active, tokens = total + z.sum(0), active + (z > 0).sum(0), tokens + len(x)
    finally:
        crosscoder.train(training)
    if not tokens:
        raise ValueError("functional_coherence has seen no tokens; give it batches of (tokens, layers, d_model)")
    share = change / {"active": active, "ratio": total, "paper": torch.full_like(active, tokens)}[estimator]
    values = torch.where(active >= max(min_active, 1), _layers_in(share), torch.nan)
    return Coherence(f"functional, {estimator}, {selection} selection, at least {min_active} active tokens", values, share, active.long())


def _encoder(crosscoder: Crosscoder, estimator: str, selection: str) -> Callable[[Tensor], Tensor]:
    """`tokens layers d_model -> tokens latents`: float64 codes under this selection."""
    for name, value, allowed in (("estimator", estimator, get_args(Estimator)), ("selection", selection, get_args(Selection))):
        if value not in allowed:
            raise ValueError(f"functional_coherence knows {name} {', '.join(allowed)}, got {value!r}")
    encoder, sparsifier = crosscoder.encoder, crosscoder.encoder.sparsifier
    if selection == "threshold":
        return lambda x: to_dense_codes(encoder(x)).double()
    if not isinstance(sparsifier, BatchTopK):
        raise ValueError(f"selection='batch' needs a BatchTopK sparsifier, got {type(sparsifier).__name__}; use selection='threshold'")
    return lambda x: sparsifier.select(encoder.pre_activations(x)).double()


def _weighed(moved: Tensor, z: Tensor, estimator: Estimator) -> Tensor:
    if estimator == "paper":
        return (moved / (z + PAPER_EPS)).sum(0)
    on = z > 0
    return (moved * on if estimator == "ratio" else moved / z.where(on, 1.0) * on).sum(0)


def _layers_in(per_layer: Tensor) -> Tensor:
    return per_layer.sum(0) / per_layer.amax(0)
