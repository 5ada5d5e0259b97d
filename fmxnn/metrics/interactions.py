"""Which latents act together: what pairs of them write through a polynomial decoder's quadratic term."""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from fmxnn.coders.polynomial import PolynomialDecoder, PowerTerm

_BLOCK = 1024


class Interactions(NamedTuple):
    """Pairs of latents, the strongest first: `first` < `second`, and how long what they write together is.

    The length is at unit codes.

    ```python
    from fmxnn.metrics.interactions import top_interactions

    decoder = fx.polysae_decoder(6, 16, ranks=(8, 4, 4))
    top_interactions(decoder, count=3).strengths
    ```
    """

    first: Tensor
    second: Tensor
    strengths: Tensor


def interaction(decoder: PolynomialDecoder, first: int | Tensor, second: int | Tensor) -> Tensor:
    """`..., ... -> ... layers d_model`: what two latents at unit codes write together beyond what each writes alone.

    It is 2 l2 sum_r U_ir U_jr c2_r; for codes z_i and z_j, times z_i z_j. It is exact where no term is of higher
    degree. (PolySAE) Raises ValueError without a term of degree 2.
    """
    term = _quadratic(decoder)
    table = decoder.projection.table[:, : term.weight.latents]
    return 2 * term.coefficient * term.weight.to_layers(table[first] * table[second])


def interaction_strengths(decoder: PolynomialDecoder, first: int | Tensor, second: int | Tensor) -> Tensor:
    """`..., ... -> ...`: the length of `interaction` over layers and d_model together."""
    return interaction(decoder, first, second).flatten(-2).norm(dim=-1)


@torch.no_grad()
def top_interactions(decoder: PolynomialDecoder, count: int = 20) -> Interactions:
    """`-> count`: the strongest pairs among all latents, fewer where there are fewer pairs.

    Blocks of 1,024 x 1,024 pairs by the Gram matrix of C2: beside the decoder and C2 it holds about 1,024 (2,048 + 2
    r2^2) numbers and takes latents^2 r2^2 / 2 FLOP. Raises ValueError without a term of degree 2 or for count < 1.
    """
    if count < 1:
        raise ValueError(f"top_interactions needs count >= 1, got count={count}")
    term = _quadratic(decoder)
    table, written = decoder.projection.table[:, : term.weight.latents], term.weight.to_dense().flatten(0, 1)
    rows, columns = torch.triu_indices(table.shape[1], table.shape[1], device=table.device)
    gram = (written.T @ written)[rows, columns] * torch.where(rows == columns, 1.0, 2.0).to(table.dtype)
    best, pairs = table.new_empty(0), torch.empty(2, 0, dtype=torch.int64, device=table.device)
    blocks = [slice(start, start + _BLOCK) for start in range(0, decoder.weight.latents, _BLOCK)]
    for i, left in enumerate(blocks):
        weighted = table[left][:, rows] * table[left][:, columns] * gram
        for right in blocks[i:]:
            squares = weighted @ (table[right][:, rows] * table[right][:, columns]).T
            later = torch.ones_like(squares, dtype=torch.bool).triu(1 + left.start - right.start)
            found = squares.where(later, -torch.inf).flatten().topk(min(count, int(later.sum())))
            there = torch.stack(
                [found.indices // squares.shape[1] + left.start, found.indices % squares.shape[1] + right.start]
            )
            best, pairs = torch.cat([best, found.values]), torch.cat([pairs, there], dim=1)
            kept = best.topk(min(count, len(best))).indices
            best, pairs = best[kept], pairs[:, kept]
    exact = interaction_strengths(decoder, pairs[0], pairs[1])  # from the vectors, without the Gram matrix's rounding
    strengths, order = exact.sort(descending=True)
    return Interactions(pairs[0][order], pairs[1][order], strengths)


def _quadratic(decoder: PolynomialDecoder) -> PowerTerm:
    for term in cast("list[PowerTerm]", list(decoder.terms)):
        if term.degree == 2:
            return term
    raise ValueError(
        "two latents interact by the term of degree 2, and the decoder has none; give it a PowerTerm(..., degree=2)"
    )
