"""How far apart two classes of texts lie along each latent, for all latents by one sort."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fmxnn.core.errors import ShapeError

_ENTRIES_AT_ONCE = 2**21  # of texts x latents: a few dozen MB beside the codes, however many latents there are


def best_thresholds(codes: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """`texts latents, texts -> latents, latents`: each latent's threshold with the best F1, and that F1.

    A text is positive where its code exceeds the threshold. Thresholds are values that occur, so "keep all" is none of
    them. Of equal F1 the highest threshold is taken. A latent with one value has F1 0, at that value. (fmxcoders,
    appendix A.4) Raises ShapeError for other shapes, and ValueError where a class is empty.
    """
    _check(codes, positive)
    thresholds, scores = list[Tensor](), list[Tensor]()
    kept = torch.arange(1, len(codes), device=codes.device)
    for values, order in _sorted_blocks(codes):
        hits = positive.int()[order].cumsum(1, dtype=torch.int32)
        f1 = 2 * hits[:, :-1] / (kept + hits[:, -1:]).double()  # in float32 two fractions of thousands would be equal
        f1 = f1.where(values[:, :-1] > values[:, 1:], 0.0)  # no threshold lies between equal values
        best = f1.argmax(1, keepdim=True)  # the first of equals
        scores.append(f1.gather(1, best).squeeze(1))
        thresholds.append(torch.where(scores[-1] > 0, values.gather(1, best + 1).squeeze(1), values[:, 0]))
    return torch.cat(thresholds), torch.cat(scores)


def wasserstein(codes: Tensor, positive: Tensor) -> Tensor:
    """`texts latents, texts -> latents`: the 1-Wasserstein distance between the codes of both classes.

    It is in units of the codes: the area between the two empirical distribution functions, as in
    scipy.stats.wasserstein_distance, in float64. Raises as `best_thresholds`.
    """
    _check(codes, positive)
    texts, own, found = len(codes), int(positive.sum()), list[Tensor]()
    above = torch.arange(1, texts, device=codes.device)
    for values, order in _sorted_blocks(codes):
        hits = positive.long()[order].cumsum(1)[:, :-1]
        ahead = (hits * texts - above * own).abs().double() / (
            own * (texts - own)
        )  # hits / own - misses / rest, exact up to here
        found.append((ahead * (values[:, :-1].double() - values[:, 1:].double())).sum(1))
    return torch.cat(found)


def class_gap(codes: Tensor, positive: Tensor) -> Tensor:
    """`texts latents, texts -> latents`: how far the class means are apart, in units of the codes.

    It is in float64. Raises as `best_thresholds`.
    """
    _check(codes, positive)
    return (codes[positive].mean(0, dtype=torch.float64) - codes[~positive].mean(0, dtype=torch.float64)).abs()


def _sorted_blocks(codes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """`latents texts`: some latents at a time, each one's texts from the largest code down, and their places before."""
    for block in codes.split(max(1, _ENTRIES_AT_ONCE // max(len(codes), 1)), dim=1):
        yield block.T.contiguous().sort(dim=1, descending=True)


def _check(codes: Tensor, positive: Tensor) -> None:
    if codes.ndim != 2 or positive.shape != codes.shape[:1] or positive.dtype != torch.bool:
        raise ShapeError(
            f"codes are (texts, latents) and positive is one bool a text, got {tuple(codes.shape)} and "
            f"{tuple(positive.shape)} of {positive.dtype}"
        )
    if not positive.any() or positive.all():
        raise ValueError(
            f"two classes are told apart, got {int(positive.sum())} positive and {int((~positive).sum())} negative "
            "texts"
        )
