"""The latents that write alike."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fmxnn.metrics.progress import Progress, silently
from fmxnn.weights.weight import Weight

_BLOCK = 1024


@torch.no_grad()
def nearest_latents(
    weight: Weight, latents: list[int], *, count: int = 5, progress: Progress = silently
) -> tuple[Tensor, Tensor]:
    """`-> latents count, latents count`: each latent's largest cosines with another atom, and whose that is.

    An atom is all layers in one; one of zeros has cosine 0 with any. It is done in blocks of atoms: neither the dense
    weight nor all cosines are held. `progress`: `tqdm` shows how far it is.
    """
    starts = range(0, len(latents), _BLOCK)
    found = [
        _nearest(weight, latents[start : start + _BLOCK], count)
        for start in progress(starts, desc="nearest latents", total=len(starts))
    ]
    cosines, others = (torch.cat(parts) for parts in zip(*found, strict=True))
    return cosines, others


def _nearest(weight: Weight, latents: list[int], count: int) -> tuple[Tensor, Tensor]:
    asked = normalize(weight.atoms(latents).flatten(0, 1), dim=0)
    mine = torch.tensor(latents, device=asked.device).unsqueeze(1)
    best = asked.new_empty(len(latents), 0), mine[:, :0]
    for start in range(0, weight.latents, _BLOCK):
        block = list(range(start, min(start + _BLOCK, weight.latents)))
        others = torch.tensor(block, device=asked.device).expand(len(latents), -1)
        cosines = asked.T @ normalize(weight.atoms(block).flatten(0, 1), dim=0)
        cosines = torch.cat([best[0], cosines.masked_fill(others == mine, -torch.inf)], dim=1)
        others = torch.cat([best[1], others], dim=1)
        top = cosines.topk(min(count, cosines.shape[1]), dim=1)
        best = top.values, others.gather(1, top.indices)
    found = min(count, weight.latents - 1)
    return best[0][:, :found], best[1][:, :found]
