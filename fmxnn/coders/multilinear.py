"""Decoders with products of several projections of the codes beside the linear part: PolySAE's unshared mode."""

from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.coders.decoder import DECODER
from fmxnn.coders.polynomial import NonlinearDecoder
from fmxnn.core.errors import ShapeError
from fmxnn.core.shortcuts import why_overridden, why_replaced
from fmxnn.sparse.codes import Codes, sum_rows
from fmxnn.weights.projected import Projection
from fmxnn.weights.weight import Weight


class ProductTerm(nn.Module):
    """`... latents -> ... layers d_model`: what `weight` writes from the product of projections of the codes.

    `weight` is any weight; its latents are the first columns of each projection, which are multiplied with each other.
    What it writes is multiplied by a learned coefficient, whose first value is `start`.
    (PolySAE, l_k and C_k, unshared)
    Raises ValueError without projections and ShapeError for a projection with fewer columns or other latents.

    ```python
    one, other = fx.Projection(16, rank=4), fx.Projection(16, rank=4)
    term = fx.ProductTerm(one, other, weight=fx.DenseWeight(2, 8, 4), start=-0.5)
    term(torch.rand(5, 16)).shape  # (5, 2, 8)
    ```
    """

    def __init__(self, *projections: Projection, weight: Weight, start: float):
        super().__init__()
        if not projections:
            raise ValueError("ProductTerm multiplies projections of the codes, got none; pass one for each factor")
        for projection in projections:
            if projection.rank < weight.latents or projection.latents != projections[0].latents:
                raise ShapeError(
                    f"ProductTerm reads {weight.latents} columns of projections of latents={projections[0].latents}, "
                    f"got one of rank={projection.rank} and latents={projection.latents}"
                )
        self.weight, self.start = weight, start
        self.projections = nn.ModuleList(projections)
        self.coefficient = nn.Parameter(torch.tensor(float(start)))

    @override
    def extra_repr(self) -> str:
        """The degree and where the coefficient started."""
        return f"degree={len(self.projections)}, start={self.start}"

    def forward(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`; codes dense or torch.sparse_csr"""
        return self._written(z)

    def from_codes(self, z: Codes) -> Tensor:
        """`tokens latents -> tokens layers d_model`: `forward` from the codes that `CrossLayerEncoder.choose` gave."""
        return self._written(z)

    def _written(self, z: Tensor | Codes) -> Tensor:
        columns = [sum_rows(z, cast("Projection", p).table[:, : self.weight.latents]) for p in self.projections]
        return self.coefficient * self.weight.to_layers(torch.stack(columns).prod(0))


class MultilinearDecoder(NonlinearDecoder):
    """`... latents -> ... layers d_model`: bias + W z + sum over terms of l_k C_k (z U_1 * ... * z U_k).

    Each factor has a projection of its own. One that stands in several terms, or in the ProjectedWeight of the linear
    part, is shared. Train with `retract_after`, which keeps the columns of each projection orthonormal, though not
    those of one to another's. (PolySAE, unshared mode) Raises ShapeError for parts that do not fit.

    ```python
    one, other = fx.Projection(16, rank=4), fx.Projection(16, rank=4)
    term = fx.ProductTerm(one, other, weight=fx.DenseWeight(2, 8, 4), start=-0.5)
    decoder = fx.MultilinearDecoder(term, weight=fx.DenseWeight(2, 8, 16))
    ```
    """

    def __init__(self, *terms: ProductTerm, weight: Weight):
        super().__init__(weight)
        for term in terms:
            theirs = term.weight.layers, term.weight.d_model, cast("Projection", term.projections[0]).latents
            if theirs != (weight.layers, weight.d_model, weight.latents):
                raise ShapeError(
                    f"the weight has layers={weight.layers}, d_model={weight.d_model}, latents={weight.latents}, "
                    f"got a term with layers={theirs[0]}, d_model={theirs[1]}, latents={theirs[2]}; make them equal"
                )
        self.terms = nn.ModuleList(terms)

    @property
    def obstacle(self) -> str:
        """Why it cannot write from sparse codes, if it cannot."""
        why = why_replaced(self, MultilinearDecoder, ("read",)) or why_overridden(self.linear, DECODER)
        for term in self.terms:
            why = why or why_overridden(term, DECODER)
        return why

    @override
    def read(self, z: Tensor) -> Tensor:
        """`... latents -> ... latents`: the codes themselves, which each term projects"""
        return z

    def from_codes(self, z: Codes) -> Tensor:
        """`tokens latents -> tokens layers d_model`: `forward` from the codes that `CrossLayerEncoder.choose` gave."""
        x_hat = self.linear.from_codes(z)
        for term in self.terms:
            x_hat = x_hat + cast("ProductTerm", term).from_codes(z)
        return x_hat
