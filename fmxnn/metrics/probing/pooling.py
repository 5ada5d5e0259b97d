"""One code for each text: a crosscoder's codes pooled over the text's tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fmxnn.activations.batches import bunches
from fmxnn.activations.configs import check_context, check_vocabulary
from fmxnn.activations.layer_reader import LayerReader
from fmxnn.activations.places import Layer
from fmxnn.activations.text import separate_contexts
from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.inputs import check_activations
from fmxnn.core.modes import evaluating
from fmxnn.core.progress import Progress, silently

Pool = Literal["mean", "max", "last"]


@dataclass(frozen=True)
class PooledCodes:
    """`texts latents`: the `codes`, in the order of the texts.

    `tokens` (`texts`) says over how many tokens each was pooled; `cut` counts texts longer than the context.

    ```python
    from fmxnn.metrics.probing.pooling import PooledCodes

    PooledCodes(torch.zeros(2, 8), tokens=torch.tensor([5, 9]), cut=0)
    ```
    """

    codes: Tensor
    tokens: Tensor
    cut: int


@torch.no_grad()
def pooled_codes(
    crosscoder: Crosscoder,
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    layers: Sequence[Layer],
    at: str = "block_out",
    pool: Pool = "mean",
    context: int = 128,
    tokens: int = 2048,
    path: str | None = None,
    progress: Progress = silently,
) -> PooledCodes:
    """`-> texts latents`: each text's codes as one: their `mean`, `max` or `last` over its own tokens.

    - `layers`, `at`, `path`: those of `harvest`
    - `context`: a longer text is cut, and counted
    - `tokens`: about so many run at once, which does not change the numbers
    - `progress`: `tqdm` shows how far it is

    A text stands alone behind one BOS; BOS, EOS and padding are dropped. Model and crosscoder run in eval mode and are
    put back. Activations are the model's own: fold a training scale into the crosscoder first (`fold_scale`).

    Raises ValueError for an unknown pool, a text without tokens, a context longer than the model reads or ids outside
    its vocabulary. Raises ShapeError for a crosscoder of other layers or d_model.
    """
    check_pool("pooled_codes", pool)
    check_context(model, context)
    text, cut = separate_contexts(texts, tokenizer, context=context)
    check_vocabulary(model, text.ids)
    reader, counts = LayerReader(model, layers, at=at, path=path), text.keep.sum(1)
    device, like = next(model.parameters()).device, crosscoder.encoder.bias
    codes = like.new_zeros(
        len(text), crosscoder.encoder.weight.latents, dtype=torch.promote_types(like.dtype, torch.float32)
    )
    batches = list(bunches(text.keep, tokens))
    with evaluating(model, crosscoder):
        for rows, longest in progress(batches, desc="pooled codes", total=len(batches)):
            x = reader(text.ids[rows, :longest].long().to(device))
            check_activations(crosscoder, x.shape[-2:], layers)
            z = crosscoder.encode(x[text.keep[rows, :longest].to(device)].to(like.device, like.dtype))
            codes[rows.to(like.device)] = _POOLS[pool](z.to(codes.dtype), counts[rows].to(like.device))
    return PooledCodes(codes, counts, cut)


def check_pool(who: str, pool: str) -> None:
    """Raises ValueError for an unknown pool."""
    if pool not in _POOLS:
        raise ValueError(f"{who} knows pool {', '.join(_POOLS)}, got {pool!r}")


def _last(z: Tensor, counts: Tensor) -> Tensor:
    return z[counts.cumsum(0) - 1]


def _reduce(how: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, counts: torch.segment_reduce(z, how, lengths=counts, axis=0)


_POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _reduce("mean"), "max": _reduce("max"), "last": _last}
