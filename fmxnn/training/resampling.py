"""Dead latents drawn anew, towards what a crosscoder rebuilds worst."""

from typing import cast

import torch
from torch import Tensor

from fmxnn.coders import Crosscoder
from fmxnn.contraction import ShapeError
from fmxnn.seeds import seed_of
from fmxnn.training.step import Trainer
from fmxnn.weights import FactorizedWeight, Weight


@torch.no_grad()
def resample(trainer: Trainer, x: Tensor, dead: Tensor, *, y: Tensor | None = None, share: float = 0.2) -> Tensor:
    """`tokens layers d_model, latents -> drawn`: draws the latents that are `dead` (True) anew from tokens, each in proportion to its squared loss.

    A drawn latent's atoms point along its token less the decoder's bias: the decoder's with the mean norm of living atoms, the encoder's with `share`
    times that of living ones; where a transcoder rebuilds `y`, the decoder's along y less the bias and the encoder's along x. Its bias is 0 and the
    optimiser's moments of all it holds are 0. A factorised weight gets the row of its table whose atom is nearest, by least squares; its small factors,
    which all latents share, stay. Gives the cosine of each new decoder atom with what was asked: 1 where the factors can write anything. Two latents
    of one token are alike: give many tokens. (Bricken et al. 2023, neuron resampling)
    Raises TypeError for weights without a table and ShapeError for another number of latents.
    """
    crosscoder, encoder, decoder = trainer.crosscoder, trainer.crosscoder.encoder, trainer.crosscoder.decoder
    reader, writer = _tabled(encoder.weight), _tabled(decoder.weight)
    if dead.shape != (reader.latents,):
        raise ShapeError(f"resample takes dead of (latents={reader.latents},), True where a latent is drawn, got {tuple(dead.shape)}")
    drawn = dead.nonzero().flatten().to(trainer.device)
    x, y = trainer.placed(x, y)
    if not len(drawn):
        return x.new_empty(0)
    generator = torch.Generator().manual_seed(seed_of(trainer.seed, "resample", trainer.steps))
    chosen = torch.multinomial(_losses(crosscoder, x, y).pow(2).cpu(), len(drawn), replacement=True, generator=generator)
    chosen = chosen.to(x.device)
    wanted = _unit(y[chosen] - decoder.bias)
    asked = wanted if y is x else _unit(x[chosen])
    living = ~dead.to(trainer.device) if not bool(dead.all()) else torch.ones_like(dead, device=trainer.device)
    for weight, toward, length in ((reader, asked, share), (writer, wanted, 1.0)) if reader is not writer else ((writer, wanted, 1.0),):
        size = weight.norms().norm(dim=0)[living].mean() * length
        _put(trainer, weight, drawn, _nearest_rows(weight, toward), size)
    encoder.bias[drawn] = 0
    _forget(trainer, encoder.bias, 0, drawn)
    trainer.silent[drawn] = 0
    made = writer.atoms(drawn).movedim(-1, 0).flatten(1)
    return torch.cosine_similarity(made, wanted.flatten(1), dim=1)


def _losses(crosscoder: Crosscoder, x: Tensor, y: Tensor) -> Tensor:
    """`tokens layers d_model, tokens layers d_model -> tokens`: the squared error of each token in eval mode."""
    training = crosscoder.training
    error = (y - crosscoder.eval()(x)).pow(2).sum((-1, -2))
    crosscoder.train(training)
    return error.double()


def _unit(directions: Tensor) -> Tensor:
    """`drawn layers d_model -> drawn layers d_model`: each at length one over all layers."""
    return directions / directions.flatten(1).norm(dim=1).clamp(min=torch.finfo(directions.dtype).tiny)[:, None, None]


def _nearest_rows(weight: FactorizedWeight, wanted: Tensor) -> Tensor:
    """`drawn layers d_model -> drawn bonds`: rows whose atoms are nearest, of those the shortest."""
    if len(weight.factors) == 1:  # the bonds are layers and d_model themselves
        return weight.to_bonds(wanted)
    bonds = cast("Tensor", weight.table).shape[1]
    small = weight.from_bonds(torch.eye(bonds, dtype=wanted.dtype, device=wanted.device)).flatten(1)
    found = torch.linalg.lstsq(small.T.double().cpu(), wanted.flatten(1).T.double().cpu(), driver="gelsd").solution
    return found.T.to(wanted)


def _put(trainer: Trainer, weight: FactorizedWeight, drawn: Tensor, rows: Tensor, size: Tensor) -> None:
    """Writes rows into the table, with atoms of this size."""
    at = next(i for i, term in enumerate(weight.terms) if "latents" in term)
    axis, factor = weight.terms[at].index("latents"), weight.factors[at]
    lengths = weight.from_bonds(rows).flatten(1).norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    table = factor.movedim(axis, 0)
    table[drawn] = (rows * size / lengths).view_as(table[drawn])
    _forget(trainer, factor, axis, drawn)


def _forget(trainer: Trainer, parameter: Tensor, axis: int, drawn: Tensor) -> None:
    """Zeroes the optimiser's moments of what was drawn; its count of steps is the whole parameter's and stays."""
    for moment in trainer.optimizer.state[parameter].values():
        if isinstance(moment, Tensor) and moment.shape == parameter.shape:
            moment.movedim(axis, 0)[drawn] = 0


def _tabled(weight: Weight) -> FactorizedWeight:
    if not isinstance(weight, FactorizedWeight) or weight.table is None:
        raise TypeError(f"resample writes the rows of a FactorizedWeight's table, and {type(weight).__name__} has none")
    return weight
