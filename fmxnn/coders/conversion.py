"""Crosscoders made of trained dictionaries, to train on: a factorised one of a dense one, one of single-layer SAEs."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from fmxnn.coders.crosscoder import Crosscoder, own_code
from fmxnn.coders.decoder import CrossLayerDecoder
from fmxnn.coders.encoder import CrossLayerEncoder
from fmxnn.coders.folding import fold
from fmxnn.coders.normalisation import Normalised
from fmxnn.core.errors import ShapeError
from fmxnn.gates.freezing import frozen
from fmxnn.gates.gate import HasThreshold
from fmxnn.gates.jump_relu import JumpReLU
from fmxnn.weights.factorized import DenseWeight, FactorizedWeight
from fmxnn.weights.fitting import fit_weight

_BLOCK = 1024


def factorize(
    crosscoder: Crosscoder,
    make_weight: Callable[[int, int, int], FactorizedWeight],
    *,
    sweeps: int = 30,
    tries: int = 1,
) -> Crosscoder:
    """A copy of `crosscoder` whose weights are factorised, each fitted to the old one.

    `make_weight(layers, d_model, latents)` makes the weight to fit, once for a tied crosscoder. Biases, gate,
    thresholds and mask are copied. The fit moves pre-activations a little, so train some steps or `calibrate` the
    threshold afterwards; `relative_error` says how good a fit is. Raises as `fit_weight` does.
    """
    made: dict[int, object] = {}
    for weight in dict.fromkeys((crosscoder.encoder.weight, crosscoder.decoder.weight)):
        like = next(weight.parameters())
        fresh = make_weight(weight.layers, weight.d_model, weight.latents).to(like.device, like.dtype)
        made[id(weight)] = fit_weight(weight, fresh, sweeps=sweeps, tries=tries).weight
    # Wherever an old weight stands, in a gate that scores by its norms say, the new one does.
    return deepcopy(crosscoder, made)


@torch.no_grad()
def from_saes(
    saes: Sequence[Crosscoder | Normalised], sparsifier: nn.Module | None = None, *, latents: int | None = None
) -> Crosscoder:
    """A dense crosscoder made of SAEs of neighbouring layers, in which latents with similar directions become one.

    Each SAE is a crosscoder of layers=1; a Normalised is folded first. Latents of neighbouring SAEs are paired
    greedily by the cosine of their atoms. The closest pairs are joined into chains until `latents` are left (None: as
    many as the widest SAE has). At each of its layers a chain writes the direction of the SAE's latent; its
    pre-activation is the mean of theirs, each times its atom's length. That is exact for a latent that was joined to
    none and where the SAEs of a chain agree on every token. The rest is an initialisation to train from.

    The SAEs should read activations of similar size (`unfold` brings them there), or their mean means little.
    `sparsifier=None` keeps ReLU, and takes over thresholds as those of a JumpReLU.
    Raises ShapeError for SAEs that do not fit together, and ValueError for `latents` that cannot be reached and for
    a gate that chooses by more than thresholds.
    """
    saes = [fold(sae) if isinstance(sae, Normalised) else sae for sae in saes]
    d_model = _check_saes(saes)
    atoms = [sae.decoder.weight.atoms(slice(None))[0].T for sae in saes]
    widths = [len(atom) for atom in atoms]
    chains = _chains([_unit(atom) for atom in atoms], max(widths) if latents is None else latents)
    lengths = torch.cat([atom.norm(dim=1) for atom in atoms])
    at = torch.cat(chains)
    share = lengths / at.bincount()[at]  # of each SAE's latent in the mean

    def mean(values: Tensor) -> Tensor:
        weighted = torch.where(share > 0, values * share.to(values), 0.0)  # an atom of length 0 has no threshold
        return values.new_zeros(int(at.max()) + 1).index_add(0, at, weighted)

    gate = _gate(saes, mean) if sparsifier is None else sparsifier
    sizes = len(saes), d_model, int(at.max()) + 1
    encoder, decoder = CrossLayerEncoder(DenseWeight(*sizes), gate), CrossLayerDecoder(DenseWeight(*sizes))
    made = Crosscoder(encoder, decoder).to(lengths.device, lengths.dtype)
    encoder.bias.copy_(mean(torch.cat([sae.encoder.bias for sae in saes])))
    read, written = (cast("DenseWeight", part.weight).factors[0].zero_() for part in (encoder, decoder))
    for layer, (sae, chain, own) in enumerate(zip(saes, chains, share.split(widths), strict=True)):
        read[chain, layer] = sae.encoder.weight.atoms(slice(None))[0].T * own[:, None]
        written[chain, layer] = _unit(atoms[layer])
        decoder.bias[layer] = sae.decoder.bias[0]
    return made


def _chains(units: list[Tensor], latents: int) -> list[Tensor]:
    """For each SAE, which latent of the crosscoder each of its latents becomes: 0 to latents - 1."""
    total, first = sum(map(len, units)), units[0]
    pairs = [_pairs(left, right) for left, right in pairwise(units)]
    joins = sum(len(cosine) for _, _, cosine in pairs)
    if not total - joins <= latents <= total:
        raise ValueError(
            f"from_saes can leave from {total - joins:,} latents (all joined) to {total:,} (none), "
            f"got latents={latents}; choose between"
        )
    closest = torch.cat([first.new_empty(0), *(cosine for _, _, cosine in pairs)]).argsort(descending=True, stable=True)
    joined = torch.zeros(joins, dtype=torch.bool, device=first.device)
    joined[closest[: total - latents]] = True
    chains, made = [torch.arange(len(first), device=first.device)], len(first)
    for unit, (left, right, _), chosen in zip(
        units[1:], pairs, joined.split([len(cosine) for _, _, cosine in pairs]), strict=True
    ):
        chain = torch.full((len(unit),), -1, device=first.device)
        chain[right[chosen]] = chains[-1][left[chosen]]
        alone = chain < 0
        chain[alone] = torch.arange(made, made + int(alone.sum()), device=first.device)
        made += int(alone.sum())
        chains.append(chain)
    return chains


def _pairs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of both and their cosines: the closest pair, then the closest of the rest, until one side is used up.

    Rows that are each other's nearest are such pairs whatever the others do, so a round takes all of them at once.
    """
    ours, theirs = (torch.arange(len(side), device=side.device) for side in (left, right))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    while len(ours) and len(theirs):
        cosine, there, back = _nearest(left[ours], right[theirs])
        mutual = back[there] == torch.arange(len(ours), device=left.device)
        found.append((ours[mutual], theirs[there[mutual]], cosine[mutual]))
        gone = torch.zeros(len(theirs), dtype=torch.bool, device=left.device)
        gone[there[mutual]] = True
        ours, theirs = ours[~mutual], theirs[~gone]
    one, other, cosine = (torch.cat(parts) for parts in zip(*found, strict=True))
    return one, other, cosine


def _nearest(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest of the other side: for each row of `left` its cosine and place, for each row of `right` its place."""
    cosines: list[Tensor] = []
    there: list[Tensor] = []
    best = right.new_full((len(right),), -torch.inf)
    back = torch.zeros(len(right), dtype=torch.int64, device=right.device)
    for start in range(0, len(left), _BLOCK):
        product = left[start : start + _BLOCK] @ right.T
        cosine, place = product.max(1)
        cosines.append(cosine)
        there.append(place)
        value, row = product.max(0)
        back = torch.where(value > best, row + start, back)
        best = torch.maximum(best, value)
    return torch.cat(cosines), torch.cat(there), back


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1, eps=torch.finfo(rows.dtype).tiny)


def _gate(saes: Sequence[Crosscoder], mean: Callable[[Tensor], Tensor]) -> nn.Module:
    """One gate for all, with the thresholds of each chain averaged as its pre-activations are."""
    if all(isinstance(sae.encoder.sparsifier, nn.ReLU) for sae in saes):
        return nn.ReLU()
    found = [frozen(sae.encoder.sparsifier, sae.encoder.weight.latents) for sae in saes]
    if None in found:
        kinds = ", ".join(dict.fromkeys(type(sae.encoder.sparsifier).__name__ for sae in saes))
        raise ValueError(
            f"from_saes carries over ReLU and thresholds, got {kinds}; "
            "give the crosscoder's gate: sparsifier=fx.BatchTopK(k=64)"
        )
    device = saes[0].encoder.bias.device
    threshold = mean(torch.cat([cast("HasThreshold", gate).threshold.to(device) for gate in found]))
    made = JumpReLU(len(threshold))
    made.threshold = threshold
    return made


def _check_saes(saes: Sequence[Crosscoder]) -> int:
    """The d_model that all of them have."""
    if not saes:
        raise ValueError("from_saes needs at least one SAE, got none")
    sizes = [(weight.layers, weight.d_model) for sae in saes for weight in (sae.encoder.weight, sae.decoder.weight)]
    if {layers for layers, _ in sizes} != {1} or len(set(sizes)) > 1:
        raise ShapeError(
            "from_saes joins crosscoders of layers=1 and one d_model, "
            f"got (layers, d_model) {', '.join(map(str, dict.fromkeys(sizes)))}; give one SAE for each layer"
        )
    for sae in saes:
        if why := own_code(sae):
            raise TypeError(
                f"from_saes joins weights and biases, and {why}, which would be passed by; "
                "make each SAE of shipped parts"
            )
        if not isinstance(sae.decoder, CrossLayerDecoder):
            raise TypeError(
                f"from_saes knows CrossLayerDecoder, got {type(sae.decoder).__name__}; "
                "only linear decoders can be joined"
            )
    return sizes[0][1]
