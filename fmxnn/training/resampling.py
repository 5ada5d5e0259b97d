"""Dead latents drawn anew, towards what a crosscoder rebuilds worst."""

import torch
from torch import Tensor

from fmxnn.coders.crosscoder import Crosscoder, crosscoder_in
from fmxnn.core.errors import ShapeError
from fmxnn.core.seeds import seed_of
from fmxnn.training.passes import inner_batch
from fmxnn.training.trainer import Trainer
from fmxnn.weights.parted import parts_of
from fmxnn.weights.table_rows import check_stored, is_rowed, nearest_rows, parts_with, write_rows
from fmxnn.weights.weight import Rowed, Weight


@torch.no_grad()
def resample(trainer: Trainer, x: Tensor, dead: Tensor, *, y: Tensor | None = None, share: float = 0.2) -> Tensor:
    """`tokens layers d_model, latents -> drawn`: draws the latents that are `dead` (True) anew from tokens.

    A token is drawn in proportion to its squared loss. The new decoder atom points along it less the decoder's bias,
    with the mean norm of living atoms; the encoder's along it with `share` times that of living ones. Where a
    transcoder rebuilds `y`, the decoder's points along y and the encoder's along x. The latent's bias and the
    optimiser's moments become 0. A factorised weight gets the row of its table whose atom is nearest, by least
    squares; its small factors, which all latents share, stay. A latent of a weight in parts points along its token at
    the layers that it has. Two latents of one token are alike: give many tokens. (Bricken et al. 2023)

    Gives the cosine of each new decoder atom with what was asked, at the layers that it writes: 1 where the factors
    can write anything. Raises TypeError for weights without a table and ShapeError for another number of latents.
    """
    module = trainer.crosscoder
    crosscoder = crosscoder_in(module)
    encoder, decoder = crosscoder.encoder, crosscoder.decoder
    reader, writer = encoder.weight, decoder.weight
    _check_rows(reader)
    _check_rows(writer)
    if dead.shape != (reader.latents,):
        raise ShapeError(
            f"resample takes dead of (latents={reader.latents},), True where a latent is drawn, got {tuple(dead.shape)}"
        )
    drawn = dead.nonzero().flatten().to(trainer.device)
    x, y = inner_batch(module, *trainer.placed(x, y))
    if not len(drawn):
        return x.new_empty(0)
    generator = torch.Generator().manual_seed(seed_of(trainer.seed, "resample", trainer.steps))
    chosen = torch.multinomial(
        _losses(crosscoder, x, y).pow(2).cpu(), len(drawn), replacement=True, generator=generator
    )
    chosen = chosen.to(x.device)
    wanted = y[chosen] - decoder.bias
    asked = wanted if y is x else x[chosen]
    living = ~dead.to(trainer.device) if not bool(dead.all()) else torch.ones_like(dead, device=trainer.device)
    if reader is not writer:
        _point(trainer, reader, drawn, asked, share * _length(reader, living))
    cosines = _point(trainer, writer, drawn, wanted, _length(writer, living))
    encoder.bias[drawn] = 0
    _forget(trainer, encoder.bias, (drawn,))
    trainer.silent[drawn] = 0
    return cosines


def _losses(crosscoder: Crosscoder, x: Tensor, y: Tensor) -> Tensor:
    """`tokens layers d_model, tokens layers d_model -> tokens`: the squared error of each token in eval mode."""
    training = crosscoder.training
    error = (y - crosscoder.eval()(x)).pow(2).sum((-1, -2))
    crosscoder.train(training)
    return error.double()


def _unit(directions: Tensor) -> Tensor:
    """`drawn layers d_model -> drawn layers d_model`: each at length one over its layers."""
    lengths = directions.flatten(1).norm(dim=1).clamp(min=torch.finfo(directions.dtype).tiny)
    return directions / lengths[:, None, None]


def _length(weight: Weight, living: Tensor) -> Tensor:
    """`latents -> `: the mean norm of the living's atoms, over all layers."""
    return weight.norms().norm(dim=0)[living].mean()


def _point(trainer: Trainer, weight: Weight, drawn: Tensor, toward: Tensor, size: Tensor) -> Tensor:
    """`drawn, drawn layers d_model -> drawn`: gives latents atoms of one size along what is asked; the cosines."""
    cosines = torch.zeros_like(toward[:, 0, 0])
    for part, mine, latents in parts_with(weight, drawn):
        asked, rowed = _unit(part.of(toward[mine])), _rowed(part.weight)
        rows = nearest_rows(rowed, asked)
        lengths = rowed.from_bonds(rows).flatten(1).norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        write_rows(rowed, latents, rows * size / lengths)
        _forget(trainer, *rowed.stored_at(latents))
        made = part.weight.atoms(latents).movedim(-1, 0)
        cosines[mine] = torch.cosine_similarity(made.flatten(1), asked.flatten(1), dim=1)
    return cosines


def _forget(trainer: Trainer, parameter: Tensor, index: tuple[Tensor, ...]) -> None:
    """Zeroes the optimiser's moments there; its count of steps is the whole parameter's and stays."""
    for moment in trainer.optimizer.state[parameter].values():
        if isinstance(moment, Tensor) and moment.shape == parameter.shape:
            moment[index] = 0


def _check_rows(weight: Weight) -> None:
    """Raises TypeError for a part whose rows cannot be written."""
    check_stored("resample", weight)
    for part in parts_of(weight):
        _rowed(part.weight)


def _rowed(weight: Weight) -> Rowed:
    if is_rowed(weight):
        return weight
    raise TypeError(
        f"resample writes rows of a table, and {type(weight).__name__} has none or no stored_at(latents) to find them; "
        "take a factorised weight with latents in one term, or parts of such"
    )
