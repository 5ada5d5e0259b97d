"""Any gate that chooses by thresholds, as one threshold for each latent."""

from functools import singledispatch

import torch
from torch import Tensor, nn

from fmxnn.gates.gate import Freezable
from fmxnn.gates.jump_relu import JumpReLU
from fmxnn.gates.questions import threshold_of
from fmxnn.gates.scored import Scored
from fmxnn.gates.top_k import BatchTopK


@singledispatch
def frozen(gate: nn.Module, latents: int) -> nn.Module | None:
    """The choice that a gate makes in eval mode, as a JumpReLU with a threshold for each of so many latents.

    None for a gate that chooses by more than that. A gate of your own joins with a method `frozen()`, or from outside
    with `frozen.register(MyGate, function)`.
    """
    return gate.frozen() if isinstance(gate, Freezable) else None


@frozen.register
def _(gate: nn.ReLU, latents: int) -> JumpReLU:
    return JumpReLU(latents)


@frozen.register
def _(gate: BatchTopK, latents: int) -> JumpReLU:
    return _with(gate.threshold.expand(latents), gate.dim)


@frozen.register
def _(gate: JumpReLU, latents: int) -> JumpReLU:
    return _with(gate.threshold, gate.dim)


@frozen.register
def _(gate: Scored, latents: int) -> JumpReLU | None:
    return gate.frozen() if threshold_of(gate.sparsifier) is not None else None


@torch.no_grad()
def _with(threshold: Tensor, dim: int) -> JumpReLU:
    made = JumpReLU(len(threshold), dim=dim).to(threshold.device, threshold.dtype)
    made.threshold.copy_(threshold.clamp(min=0))
    return made
