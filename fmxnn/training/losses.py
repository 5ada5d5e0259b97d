"""What a crosscoder is trained on."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from fmxnn.coders.decoder import Decoder, written_prefixes
from fmxnn.core.errors import ShapeError
from fmxnn.sparse.codes import Codes, sum_rows


def reconstruction_loss(x: Tensor, x_hat: Tensor) -> Tensor:
    """`... layers d_model, ... layers d_model -> `: the squared error over d_model, averaged over layers and tokens.

    The sum over d_model is not averaged, so it is in squared units of the activations. Raises ShapeError for two
    shapes. (fmxcoders, equation 2)
    """
    if x.shape != x_hat.shape:
        raise ShapeError(
            f"the loss compares x and x_hat of one shape, got {tuple(x.shape)} and {tuple(x_hat.shape)}; "
            "decode all layers of the same tokens"
        )
    # holds one temporary where a written sum holds three
    return functional.mse_loss(x_hat, x, reduction="sum") / x.shape[:-1].numel()


def l1_penalty(z: Tensor | Codes, norms: Tensor) -> Tensor:
    """`... latents, layers latents -> `: codes times their decoder norms summed over layers, averaged over tokens.

    `norms` is `decoder.weight.norms()`; codes dense or sparse. Multiply by mu and add to the error.
    (Lindsey et al. 2024)
    """
    return sum_rows(z, norms.sum(0).unsqueeze(-1)).mean()


def dead_latent_loss(
    residual: Tensor,
    pre: Tensor,
    dead: Tensor,
    to_layers: Callable[[Tensor], Tensor],
    k_aux: int,
    *,
    score: Tensor | None = None,
) -> Tensor:
    """`... layers d_model, ... latents, latents -> `: how badly the most active dead latents rebuild the residual.

    A share of the residual's variance (about 1 where they rebuild nothing), so it has no unit; the papers add
    it times 1/32. `to_layers` decodes without bias. With fewer than `k_aux` dead latents it is scaled down in
    proportion; where the residual has no variance it is 0. Beside a `Scored` gate give its `score` (`latents`): the
    most active are then those of the largest `pre * score`, and what they write is still their pre-activation.
    (chat-tuning crosscoders, A.1)
    """
    residual = residual.detach().reshape(-1, *residual.shape[-2:])
    pre = pre.reshape(len(residual), -1)
    k_aux = min(k_aux, pre.shape[-1])
    by = pre if score is None else pre.detach() * score
    chosen = by.masked_fill(~dead, -torch.inf).topk(k_aux, dim=-1, sorted=False).indices
    z = torch.zeros_like(pre).scatter(-1, chosen, torch.where(dead[chosen], pre.gather(-1, chosen).relu(), 0.0))
    spread = (residual - residual.mean(0)).pow(2).sum((-1, -2)).mean()
    varied = spread > 0
    error = (residual - to_layers(z)).pow(2).sum((-1, -2)).mean() / spread.where(varied, 1.0)
    return torch.where(varied, error * (dead.sum() / k_aux).clamp(max=1), 0.0)


def quadratic_l0_loss(l0: Tensor, count: float) -> Tensor:
    """`... -> `: how far each token's L0 is from `count`, relative and squared, averaged over tokens.

    `l0` is `TrainedJumpReLU.active(pre).sum(-1)`, whose gradient reaches the thresholds alone.
    (Rajamanoharan et al. 2024, appendix)
    """
    return (l0 / count - 1).pow(2).mean()


def tanh_penalty(z: Tensor, norms: Tensor, stretch: float = 4.0, *, active: Tensor | None = None) -> Tensor:
    """`... latents, layers latents -> `: a smooth L0; a code that writes much counts 1, whatever its size.

    The tanh of `stretch` times code times decoder norm (summed over layers), summed over latents and averaged over
    tokens. Dense codes. (Anthropic, January 2025 update) As published, the gradient at a threshold is the slope of
    tanh at zero and not the step that the count makes there: too large by `stretch` times threshold times norm, so
    that thresholds run away where that is large. To give them the step itself, pass pre-activations for z and
    `active=TrainedJumpReLU.active(pre)`; the value is the same.
    """
    counted = (stretch * z * norms.sum(0)).tanh()
    return (counted if active is None else active * counted.relu()).sum(-1).mean()


def preactivation_loss(pre: Tensor, threshold: Tensor, norms: Tensor) -> Tensor:
    """`... latents, latents, layers latents -> `: how far pre-activations lie below their threshold.

    Times the decoder norm summed over layers, summed over latents and averaged over tokens. With a small weight it
    brings back latents that never fire. (Anthropic, January 2025 update)
    """
    return ((threshold - pre).relu() * norms.sum(0)).sum(-1).mean()


def matryoshka_loss(x: Tensor, z: Tensor | Codes, decoder: Decoder, prefixes: Sequence[int]) -> Tensor:
    """`... layers d_model, ... latents -> `: the reconstruction losses from the first latents alone, summed.

    There is one for each number in `prefixes`. One encoding serves all: the codes are those of the gate over the full
    set, dense or sparse. With latents as the last prefix this is the whole loss; an objective adds the error over all
    latents itself, so leave that one out there. In squared units of the activations. Raises ValueError for prefixes
    that do not rise from 1 to latents at most. (Bussmann et al. 2025)
    """
    latents = decoder.weight.latents
    rises = all(before < after for before, after in pairwise(prefixes))
    if not prefixes or not rises or prefixes[0] < 1 or prefixes[-1] > latents:
        raise ValueError(
            f"matryoshka_loss needs prefixes that rise from 1 to latents={latents} at most, got {list(prefixes)}"
        )
    losses = [reconstruction_loss(x, x_hat.view_as(x).to(x.dtype)) for x_hat in written_prefixes(decoder, z, prefixes)]
    return torch.stack(losses).sum()
