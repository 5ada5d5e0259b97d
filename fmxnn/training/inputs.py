"""What a step is given, checked before anything is updated."""

from warnings import warn

import torch
from torch import Tensor

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.core.contraction import ShapeError
from fmxnn.weights.factorized import check_layers


def check_batch(crosscoder: Crosscoder, x: Tensor, y: Tensor | None) -> None:
    """`... tokens layers d_model, ... tokens layers d_model -> `: raises ShapeError or TypeError for what cannot be trained on; nothing is changed."""
    reader, writer = crosscoder.encoder.weight, crosscoder.decoder.weight
    check_layers("encoder", reader, x)
    _check_tokens("x", x)
    if y is None and (reader.layers, reader.d_model) == (writer.layers, writer.d_model):
        return
    wanted = (*x.shape[:-2], writer.layers, writer.d_model)
    if y is None or y.shape != wanted:
        raise ShapeError(
            f"from x of {tuple(x.shape)} the crosscoder rebuilds y of {wanted}, its decoder's layers={writer.layers} and d_model={writer.d_model}, "
            f"got {'none' if y is None else tuple(y.shape)}; give the same tokens: step(x, y)"
        )
    _check_tokens("y", y)


def check_optimizer(crosscoder: Crosscoder, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError where a parameter that requires a gradient would not be trained, and warns of parameters that are not the crosscoder's."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    mine = dict(crosscoder.named_parameters())
    if held.isdisjoint(map(id, mine.values())):
        raise ValueError(
            f"the optimiser holds {len(held)} parameters and none of this crosscoder's, so nothing would be trained; "
            "make it of crosscoder.parameters(), after the crosscoder was loaded or copied"
        )
    left = [name for name, parameter in mine.items() if parameter.requires_grad and id(parameter) not in held]
    if left:
        raise ValueError(
            f"the optimiser holds {len(mine) - len(left)} of the crosscoder's {len(mine)} parameters and not {', '.join(left)[:200]}; "
            "add them, or freeze what shall stay as it is: parameter.requires_grad_(False)"
        )
    strange = len(held - set(map(id, mine.values())))
    if strange:
        warn(
            f"{strange} of the optimiser's {len(held)} parameters are not this crosscoder's: their gradients are neither clipped nor looked at "
            "before an update; leave them out unless a penalty trains them",
            stacklevel=3,
        )


def _check_tokens(name: str, given: Tensor) -> None:
    wanted, shape = f"a step takes {name} of (..., tokens, layers, d_model)", tuple(given.shape)
    if len(shape) < 3:
        raise ShapeError(f"{wanted}, got {shape} without an axis of tokens; give one token as {name}.unsqueeze(0)")
    if not given.numel():
        raise ShapeError(f"{wanted}, got {shape}, which holds no tokens; leave empty batches out")
    if not given.is_floating_point():
        raise TypeError(f"{wanted} in floating point, got {given.dtype}; give real activations, such as {name}.float()")
