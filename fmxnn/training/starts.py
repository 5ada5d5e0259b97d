"""Four ways to start a crosscoder; the start moves the result more than the factorisation does."""

from collections.abc import Callable
from functools import singledispatch
from math import prod

import torch
from torch import Tensor

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.core.errors import ShapeError
from fmxnn.weights.factorized import FactorizedWeight
from fmxnn.weights.parted import PartedWeight, parts_of
from fmxnn.weights.questions import startable
from fmxnn.weights.table_rows import check_stored, is_rowed, nearest_rows, parts_with, write_rows
from fmxnn.weights.weight import Part, Rowed, Weight


def gaussian_start(
    crosscoder: Crosscoder, *, encoder_std: float | None = None, decoder_std: float | None = None
) -> Crosscoder:
    """The paper's start: encoder and decoder Gaussian and independent, biases zero.

    None takes nn.Linear's variance 1 / (3 fan_in) for one layer's slice: fan_in is d_model for the encoder and latents
    for the decoder. A dense crosscoder then has many dead latents. (fmxcoders, section 3.2)
    Raises TypeError for a weight that cannot be drawn (`Startable`); nothing is drawn then.
    """
    encoder, decoder = crosscoder.encoder.weight, crosscoder.decoder.weight
    check_stored("a start", encoder, decoder)
    read, written = startable(encoder), startable(decoder)
    read.normal_((3 * encoder.d_model) ** -0.5 if encoder_std is None else encoder_std)
    written.normal_((3 * decoder.latents) ** -0.5 if decoder_std is None else decoder_std)
    return _zero_biases(crosscoder)


def tied_start(crosscoder: Crosscoder, *, encoder_norm: float = 1.0, decoder_norm: float = 0.1) -> Crosscoder:
    """The decoder starts as the encoder's transpose: same directions, atoms of one small mean norm, biases zero.

    The norms are of atoms over all layers together, averaged over latents. Both weights are free afterwards. A decoder
    of another factorisation or connectivity gets the rows whose atoms are nearest to the encoder's; a dense one gets
    the encoder's atoms at the layers that both have, and zeros at the others. Raises TypeError for a weight that cannot
    be drawn (`Startable`) and ValueError for a decoder that cannot have the encoder's atoms (`Rowed`).
    """
    check_stored("a start", crosscoder.encoder.weight, crosscoder.decoder.weight)
    _normal_(crosscoder.encoder.weight)
    return _tie(crosscoder, (encoder_norm, decoder_norm), _normal_)


@torch.no_grad()
def isometric_start(crosscoder: Crosscoder, *, encoder_norm: float = 1.0, decoder_norm: float = 0.1) -> Crosscoder:
    """Tied, with orthogonal small factors and table rows of unit norm, so that `to_bonds` keeps lengths.

    A factorised weight then starts as a dense one in a rotated basis. For a ring it needs r1 r2 >= d_model
    (`wide_tensor_ring_ranks`). A weight without a table gets its rows at unit norm. Of a weight in parts, each part
    starts so. A weight of your own joins through `isometric_`. Raises ValueError for another.
    """
    check_stored("a start", crosscoder.encoder.weight, crosscoder.decoder.weight)
    isometric_(crosscoder.encoder.weight)
    return _tie(crosscoder, (encoder_norm, decoder_norm), isometric_)


@torch.no_grad()
def data_start(
    crosscoder: Crosscoder, x: Tensor, *, encoder_norm: float = 1.0, decoder_norm: float = 0.1
) -> Crosscoder:
    """`tokens layers d_model`: isometric, with a random token of `x` for each latent's atom, and biases that centre.

    Table rows are what the small factors make of the tokens less their mean, at unit norm. The decoder's bias is the
    mean and the encoder's takes it off again, so that no latent has to learn it. `x` is in the units of training, with
    at least one token a latent. Raises ValueError for fewer tokens, tokens that are not finite or do not differ, and a
    weight without rows (`Rowed`); ShapeError for other layers or d_model.
    """
    weight = crosscoder.encoder.weight
    check_stored("a start", weight, crosscoder.decoder.weight)
    x = _tokens(x, weight).to(crosscoder.encoder.bias)
    mean = x.mean(0)
    parts = [(part, _rowed(part)) for part in parts_of(weight)]
    isometric_(weight)
    for part, rowed in parts:
        picks = torch.randperm(len(x))[: part.weight.latents]
        rows = rowed.to_bonds(part.of(x[picks] - mean))
        write_rows(rowed, torch.arange(len(rows), device=rows.device), torch.nn.functional.normalize(rows, dim=-1))
    _tie(crosscoder, (encoder_norm, decoder_norm), isometric_)
    crosscoder.encoder.bias.copy_(-weight.to_latents(mean))
    crosscoder.decoder.bias.copy_(mean)
    return crosscoder


@singledispatch
def isometric_(weight: Weight) -> None:
    """Draws a weight so that `to_bonds` keeps lengths and every row of the table has unit norm, up to one scale.

    A weight of your own joins with one line: `isometric_.register(Mine, draw)`, where `draw(weight)` draws it in place.
    Raises ValueError for a weight that is neither factorised nor registered.
    """
    raise ValueError(
        f"isometric_start needs a factorised weight, got {type(weight).__name__}; use tied_start, or say how to draw "
        "it: fmxnn.training.isometric_.register"
    )


@isometric_.register
def _(weight: PartedWeight) -> None:
    for leaf in weight.leaves():
        isometric_(leaf)


@isometric_.register
def _(weight: FactorizedWeight) -> None:
    weight.normal_(1.0)
    small = [i for i, term in enumerate(weight.terms) if "latents" not in term]
    rows = {word for term in weight.terms for word in term if "latents" in term} - set(weight.axes)
    with torch.no_grad():
        for i, factor in zip(small, _orthogonal(weight, small, rows), strict=True):
            weight.factors[i].copy_(factor)
        for term, factor in zip(weight.terms, weight.factors, strict=True):
            if "latents" in term:
                others = [i for i, word in enumerate(term) if word != "latents"]
                factor.div_(factor.norm(dim=others, keepdim=True))


def _rowed(part: Part) -> Rowed:
    if is_rowed(part.weight):
        return part.weight
    raise ValueError(
        f"data_start needs a factorised weight with latents in one term, got {type(part.weight).__name__}; "
        "use tied_start"
    )


def _tokens(x: Tensor, weight: Weight) -> Tensor:
    if x.shape[-2:] != (weight.layers, weight.d_model):
        raise ShapeError(
            f"data_start takes (..., layers={weight.layers}, d_model={weight.d_model}) activations, "
            f"got {tuple(x.shape)}"
        )
    x = x.reshape(-1, weight.layers, weight.d_model)
    if len(x) < weight.latents:
        raise ValueError(
            f"data_start draws a token for each of latents={weight.latents}, got {len(x)}; give more tokens"
        )
    if not x.isfinite().all():
        raise ValueError("data_start needs finite activations, got NaN or infinity; leave those tokens out")
    if (x == x[0]).all():
        raise ValueError(
            f"data_start needs tokens that differ, got {len(x)} times the same; give activations of other text"
        )
    return x


def _normal_(weight: Weight) -> None:
    startable(weight).normal_((3 * weight.d_model) ** -0.5)


@torch.no_grad()
def _tie(crosscoder: Crosscoder, norms: tuple[float, float], draw: Callable[[Weight], None]) -> Crosscoder:
    encoder, decoder = crosscoder.encoder.weight, crosscoder.decoder.weight
    if not _take_over(encoder, decoder):
        draw(decoder)
        _write_transpose(encoder, decoder)
    for weight, norm in zip((encoder, decoder), norms, strict=True):
        mean = weight.norms().pow(2).sum(0).sqrt().mean().item()
        startable(weight).scale_(norm / mean)
    return _zero_biases(crosscoder)


def _take_over(encoder: Weight, decoder: Weight) -> bool:
    """Gives the decoder the encoder's tensors where they fit; whether its atoms are then the encoder's."""
    if _shape(encoder) != _shape(decoder):
        return False
    decoder.load_state_dict(encoder.state_dict())
    some = torch.linspace(0, encoder.latents - 1, 16).long()  # one tensor is read otherwise by another pattern
    return torch.equal(encoder.atoms(some), decoder.atoms(some))


def _shape(weight: Weight) -> tuple[dict[str, torch.Size], list[tuple[int, ...]]]:
    """Of each tensor, and the layers of each part."""
    return {name: tensor.shape for name, tensor in weight.state_dict().items()}, [part.at for part in parts_of(weight)]


def _write_transpose(encoder: Weight, decoder: Weight) -> None:
    """Gives the decoder's latents the rows whose atoms are nearest to the encoder's."""
    sizes = [(weight.layers, weight.d_model) for weight in (encoder, decoder)]
    if sizes[0] != sizes[1] or not all(is_rowed(part.weight) for part in parts_of(decoder)):
        raise ValueError(
            "a tied start needs a decoder with the encoder's layers and d_model, and of its factorisation or with "
            "latents in tables; use gaussian_start for others"
        )
    latents = torch.arange(decoder.latents, device=next(decoder.parameters()).device)
    for part, mine, own in parts_with(decoder, latents):
        asked = part.of(encoder.atoms(latents[mine]).movedim(-1, 0))
        if not asked.flatten(1).any(dim=1).all():
            raise ValueError(
                "a tied start needs latents that write a layer which they read, and some have none; use gaussian_start"
            )
        rowed = _rowed(part)
        write_rows(rowed, own, nearest_rows(rowed, asked))


def _orthogonal(weight: FactorizedWeight, small: list[int], rows: set[str]) -> list[Tensor]:
    """The small factors of an isometric start, in the order of their terms; `rows` are the axes of the table.

    A term is a matrix from the axes that are open already (those of the activations first) to its new ones, with
    orthonormal rows or columns. A bond of the table that several terms share (CP) has products of basis
    vectors for columns, distinct ones chosen at random, which are orthonormal as well.
    """
    terms, sizes = [weight.terms[i] for i in small], weight.sizes
    shared = {word: [i for i, term in enumerate(terms) if word in term] for word in rows}
    columns: dict[int, Tensor] = {}
    for word, at in shared.items():
        if len(at) > 1:
            picks = _columns([prod(sizes[w] for w in terms[i] if w != word) for i in at], sizes[word])
            columns.update(zip(at, picks, strict=True))
    open_axes: set[str] = set(weight.axes[:-1])
    made = [torch.empty(0)] * len(terms)
    for i in sorted(range(len(terms)), key=lambda i: not open_axes.intersection(terms[i])):
        hyper = i in columns
        outer = [w for w in terms[i] if (w in rows and len(shared[w]) > 1 if hyper else w not in open_axes)]
        inner = [w for w in terms[i] if w not in outer]
        width = prod(sizes[w] for w in inner)
        matrix = torch.empty(width, width if hyper else prod(sizes[w] for w in outer), dtype=torch.float64)
        torch.nn.init.orthogonal_(matrix)
        matrix = matrix[:, columns[i]] if hyper else matrix
        made[i] = matrix.reshape([sizes[w] for w in inner + outer]).permute(
            [(inner + outer).index(w) for w in terms[i]]
        )
        open_axes.update(outer)
    return made


def _columns(bases: list[int], size: int) -> list[Tensor]:
    """For each of `bases`, which basis vector stands in each of `size` product columns.

    No product comes twice before all have come.
    """
    total = prod(bases)
    pick = torch.cat([torch.randperm(total) for _ in range(-(-size // total))])[:size]
    digits: list[Tensor] = []
    for width in bases:
        digits.append(pick % width)
        pick = pick // width
    return digits


def _zero_biases(crosscoder: Crosscoder) -> Crosscoder:
    torch.nn.init.zeros_(crosscoder.encoder.bias)
    torch.nn.init.zeros_(crosscoder.decoder.bias)
    return crosscoder
