"""A loss under which the first latents alone rebuild as well as they can."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from fmxnn.coders.crosscoder import CrossLayerDecoder, Tabled, written
from fmxnn.coders.decoder import Decoder
from fmxnn.coders.obstacles import why_not_written
from fmxnn.gates.decoupled import DecoupledDecoder
from fmxnn.sparse.codes import Codes, is_sparse, to_codes, to_dense_codes
from fmxnn.training.losses import reconstruction_loss


def matryoshka_loss(x: Tensor, z: Tensor | Codes, decoder: Decoder, prefixes: Sequence[int]) -> Tensor:
    """`... layers d_model, ... latents -> `: the reconstruction losses from the first m latents alone, summed over the `prefixes` m.

    One encoding serves all: the codes are those of the gate over the full set. With latents as the last prefix this is the
    whole loss; beside an error over all latents, a Trainer's, leave that one out. In squared units of the activations. Codes dense or sparse.
    Raises ValueError for prefixes that do not rise from 1 to latents at most. (Bussmann et al. 2025)
    """
    latents = decoder.weight.latents
    rises = all(before < after for before, after in pairwise(prefixes))
    if not prefixes or not rises or prefixes[0] < 1 or prefixes[-1] > latents:
        raise ValueError(f"matryoshka_loss needs prefixes that rise from 1 to latents={latents} at most, got {list(prefixes)}")
    losses = [reconstruction_loss(x, x_hat.view_as(x).to(x.dtype)) for x_hat in _nested(z, decoder, prefixes)]
    return torch.stack(losses).sum()


def _nested(z: Tensor | Codes, decoder: Decoder, prefixes: Sequence[int]) -> Iterator[Tensor]:
    """The reconstruction from each prefix; a linear decoder adds at its table what each prefix adds to the one before."""
    if isinstance(decoder, DecoupledDecoder):  # in training a layer would choose otherwise among fewer latents
        dense = to_dense_codes(z)
        own, places = decoder.gate.split(dense), torch.arange(dense.shape[-1], device=dense.device)
        for stop in prefixes:
            yield decoder.write([torch.where(places < stop, code, 0.0) for code in own])
        return
    why, weight = why_not_written(decoder), decoder.weight
    if not why and (isinstance(z, Codes) or is_sparse(z)):
        codes = z if isinstance(z, Codes) else to_codes(z)
        for stop in prefixes:
            yield written(decoder, codes._replace(values=torch.where(codes.columns < stop, codes.values, 0.0)))
        return
    z = to_dense_codes(z)
    plain = not why and isinstance(decoder, CrossLayerDecoder)
    table = cast("Tabled", weight).table if plain else None
    if not isinstance(table, Tensor):  # none, or several side by side, or a decoder that does more
        for stop in prefixes:
            yield decoder(torch.where(torch.arange(z.shape[-1], device=z.device) < stop, z, 0.0))
        return
    h = z.new_zeros(())
    for start, stop in pairwise((0, *prefixes)):
        h = h + z[..., start:stop] @ table[start:stop]
        yield cast("Tabled", weight).from_bonds(h) + decoder.bias
