"""What a step is given, checked before anything is updated."""

from warnings import warn

import torch

from fmxnn.coders.crosscoder import Crosscoder


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
