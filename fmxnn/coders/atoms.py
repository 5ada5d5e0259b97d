"""What a latent writes, in the units of the activations that were given."""

from collections.abc import Sequence
from functools import singledispatch

import torch
from einops import rearrange
from torch import Tensor, nn

from fmxnn.coders.crosscoder import Crosscoder, crosscoder_in
from fmxnn.coders.normalisation import Normalised


@singledispatch
@torch.no_grad()
def raw_atoms(module: nn.Module, latents: Sequence[int]) -> Tensor:
    """`-> latents layers d_model`: what one unit of each latent's code adds, whatever normalises the activations.

    Of a decoder with terms beside its linear part it is the linear part. A module that holds a `crosscoder` has the
    atoms of that one. Raises TypeError for a module that holds none.
    """
    crosscoder_in(module)
    return raw_atoms(module.get_submodule("crosscoder"), latents)


@raw_atoms.register
@torch.no_grad()
def _(module: Crosscoder, latents: Sequence[int]) -> Tensor:
    atoms = module.decoder.weight.atoms(list(latents))
    return rearrange(atoms, "layers d_model latents -> latents layers d_model")


@raw_atoms.register
@torch.no_grad()
def _(module: Normalised, latents: Sequence[int]) -> Tensor:
    atoms, scale = raw_atoms(module.crosscoder, latents), module.output.scale
    return (atoms / scale.unsqueeze(-1)).to(atoms.dtype)
