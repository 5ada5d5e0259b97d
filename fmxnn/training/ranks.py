"""What a step must know of other processes that train the same parameters."""

from typing import Any, cast
from warnings import warn

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fmxnn.core.sharding import has_processes


def groups_of(module: nn.Module) -> list[Any]:
    """The process groups over which a module's gradients are averaged; none where it is trained by one process."""
    groups = [part.process_group for part in module.modules() if isinstance(part, DistributedDataParallel)]
    meshes = [cast("Any", p).device_mesh for p in module.parameters() if hasattr(p, "device_mesh")][:1]
    return groups + [group for mesh in meshes for group in mesh.get_all_groups()]


def finite_everywhere(value: Tensor, module: nn.Module) -> bool:
    """Whether a number is finite in every process that trains this module, so that all or none of them update."""
    finite = torch.isfinite(value)
    for group in groups_of(module) if has_processes() else ():
        agreed = finite.to(torch.uint8)
        distributed.all_reduce(agreed, distributed.ReduceOp.MIN, group=group)
        finite = agreed.bool()
    return bool(finite)


def warn_apart(module: nn.Module) -> None:
    """Warns where there are several processes, and what each of them trains is its own."""
    if not has_processes() or distributed.get_world_size() < 2:
        return
    if not groups_of(module):
        warn(
            f"{distributed.get_world_size()} processes run, and this trainer's {type(module).__name__} averages its "
            "gradients with none of them, so each trains weights of its own; give the trainer the wrapper: "
            "Trainer(DistributedDataParallel(fx.Objective(crosscoder)), optimizer)",
            stacklevel=3,
        )
