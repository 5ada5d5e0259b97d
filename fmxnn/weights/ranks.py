"""How wide the bonds of a factorised weight are, for a share of the dense weight's parameters."""

from math import ceil, sqrt

Ranks = tuple[int, int, int]


def cp_rank(layers: int, d_model: int, latents: int, *, share: float = 1.0) -> int:
    """The rank at which CP has `share` of the dense weight's parameters.

    At share 1 it is rounded to the nearest; a smaller share is taken of that number and rounded down, as the
    paper does (7707 // 8). (fmxcoders, appendix A)
    """
    _check_share(share)
    full = round(layers * d_model * latents / (layers + d_model + latents))
    return max(1, int(full * share))


def tensor_ring_ranks(layers: int, d_model: int, latents: int, *, share: float = 1.0) -> Ranks:
    """The bonds (r1, r2, r3) at which a tensor ring has `share` of the dense weight's parameters.

    Each bond is proportional to the geometric mean of the two axes that it joins, r1 layers and d_model,
    r2 d_model and latents, r3 latents and layers, and is rounded to the nearest. This rule gives every setting
    of the fmxcoders paper, whose printed ratio R2/R1 = sqrt(d/L) does not.
    """
    _check_share(share)
    r1, r2, r3 = sqrt(layers * d_model), sqrt(d_model * latents), sqrt(latents * layers)
    unscaled = r1 * d_model * r2 + r2 * latents * r3 + r3 * layers * r1
    scale = sqrt(share * layers * d_model * latents / unscaled)
    return max(1, round(scale * r1)), max(1, round(scale * r2)), max(1, round(scale * r3))


def wide_tensor_ring_ranks(layers: int, d_model: int, latents: int, *, share: float = 1.0) -> Ranks:
    """The bonds (r1, r2, r3) with the widest table r2 r3 that `share` of the dense parameters allows.

    They keep r1 r2 >= d_model and r1 <= layers. So the ring never makes the d_model axis low rank, which the paper's
    rule does at strong compression. Raises ValueError where the share is too small for any such ring.
    """
    _check_share(share)
    budget = share * layers * d_model * latents
    best: Ranks | None = None
    for r1 in range(1, layers + 1):
        r2 = ceil(d_model / r1)
        r3 = int((budget - r1 * d_model * r2) // (r2 * latents + layers * r1))
        if r3 >= 1 and (best is None or r2 * r3 > best[1] * best[2]):
            best = r1, r2, r3
    if best is None:
        raise ValueError(
            f"wide_tensor_ring_ranks finds no ring with r1 r2 >= d_model={d_model} in share={share:.4g} of the dense "
            "parameters; take a larger share, or tensor_ring_ranks"
        )
    return best


def _check_share(share: float) -> None:
    if not 0 < share < float("inf"):
        raise ValueError(f"a share of the dense weight's parameters is above 0, got share={share}")
