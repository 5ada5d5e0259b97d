"""One code for each text, from activations of one's own."""

from collections.abc import Callable, Iterable
from operator import length_hint

import torch
from torch import Tensor

from fmxnn.activations.own_batches import tensors_of
from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.inputs import check_activations
from fmxnn.core.errors import ShapeError
from fmxnn.core.modes import evaluating
from fmxnn.core.progress import Progress, silently
from fmxnn.metrics.probing.pooling import Pool, PooledCodes, check_pool


@torch.no_grad()
def pooled_own_codes(
    crosscoder: Crosscoder,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    pool: Pool = "mean",
    progress: Progress = silently,
) -> PooledCodes:
    """`tokens layers d_model, tokens -> texts latents`: each text's codes as one, from activations of your own.

    A batch is x and, for each token, the number of its text, counted from 0. A text's tokens come in their order, in
    one batch or in several. Leave out what does not count, such as BOS and padding. The crosscoder runs in eval mode
    and is put back. `progress`: `tqdm` shows how far it is.

    Raises ValueError for an unknown pool and for a text without tokens. Raises ShapeError for other layers or d_model,
    and for numbers of other tokens.
    """
    check_pool("pooled_own_codes", pool)
    like, first = crosscoder.encoder.bias, -torch.inf if pool == "max" else 0.0
    codes = like.new_zeros(0, len(like), dtype=torch.promote_types(like.dtype, torch.float32))
    total = length_hint(batches) or None
    counts = torch.zeros(0, dtype=torch.long, device=like.device)
    with evaluating(crosscoder):
        for number, batch in enumerate(progress(batches, desc="pooled codes", total=total)):
            x, texts = _numbered(crosscoder, batch, number)
            if not len(texts):
                continue
            more = max(0, int(texts.max()) + 1 - len(counts))
            codes, counts = torch.cat([codes, codes.new_full((more, len(like)), first)]), _longer(counts, more)
            codes = _ADDED[pool](codes, texts, crosscoder.encode(x).to(codes.dtype))
            counts = counts.index_add(0, texts, torch.ones_like(texts))
    if not len(counts) or not counts.all():
        empty = f"text {int(counts.argmin())} has none" if len(counts) else "there is no text"
        raise ValueError(f"pooled_own_codes pools the tokens of each text, and {empty}; number the texts 0, 1, 2, ...")
    return PooledCodes(codes / counts.unsqueeze(1) if pool == "mean" else codes, counts.cpu(), cut=0)


def _numbered(crosscoder: Crosscoder, batch: object, number: int) -> tuple[Tensor, Tensor]:
    """`-> tokens layers d_model, tokens`: where the crosscoder is, x in its dtype."""
    parts = tensors_of(batch)
    if len(parts) != 2 or parts[1].shape != parts[0].shape[:-2] or parts[1].is_floating_point():
        shown = ", ".join(f"{tuple(part.shape)} of {part.dtype}" for part in parts)[:200]
        raise ShapeError(
            f"batch {number} is {shown}, expected x of (tokens, layers, d_model) and for each of its tokens the number "
            "of the text; give (x, texts)"
        )
    x, texts = parts
    check_activations(crosscoder, x.shape)
    if texts.numel() and int(texts.min()) < 0:
        raise ValueError(
            f"batch {number} has a token of text {int(texts.min())}, and texts count from 0; leave tokens of none out"
        )
    like = crosscoder.encoder.bias
    return x.flatten(0, -3).to(like.device, like.dtype), texts.flatten().to(like.device, torch.long)


def _longer(counts: Tensor, more: int) -> Tensor:
    return torch.cat([counts, counts.new_zeros(more)])


def _last(codes: Tensor, texts: Tensor, z: Tensor) -> Tensor:
    none = texts.new_full((len(codes),), -1)
    last = none.scatter_reduce(0, texts, torch.arange(len(texts), device=texts.device), "amax")
    return torch.where((last >= 0).unsqueeze(1), z[last], codes)


_ADDED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mean": lambda codes, texts, z: codes.index_add(0, texts, z),
    "max": lambda codes, texts, z: codes.scatter_reduce(0, texts.unsqueeze(1).expand_as(z), z, "amax"),
    "last": _last,
}
"""`texts latents, tokens, tokens latents`: what the codes of a batch make of those so far."""
