"""Decoders in which latents act together: powers of a shared orthonormal projection beside the linear part."""

from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.coders.decoder import DECODER, CrossLayerDecoder
from fmxnn.core.errors import ShapeError
from fmxnn.core.shortcuts import why_overridden, why_replaced, why_watched
from fmxnn.core.sizes import whole
from fmxnn.sparse.codes import Codes, sum_rows
from fmxnn.weights.factorized import DenseWeight
from fmxnn.weights.projected import ProjectedWeight, Projection
from fmxnn.weights.weight import Startable, Weight


class PowerTerm(nn.Module):
    """`... rank -> ... layers d_model`: what `weight` writes from a power of the first columns it is given.

    `weight` is any weight; its latents are the columns that the term reads. What it writes is multiplied by a learned
    coefficient, whose first value is `start`. (PolySAE, l_k and C_k)

    ```python
    term = fx.PowerTerm(fx.DenseWeight(2, 8, 4), degree=2, start=-0.5)
    term(torch.randn(5, 6)).shape  # (5, 2, 8): it reads 4 of the 6 columns
    ```
    """

    def __init__(self, weight: Weight, *, degree: int, start: float):
        super().__init__()
        if (whole(degree) or 0) < 2:
            raise ValueError(
                f"PowerTerm needs a whole degree >= 2, got degree={degree!r:.200}; degree 1 is the decoder's weight"
            )
        self.weight, self.degree, self.start = weight, int(degree), start
        self.coefficient = nn.Parameter(torch.tensor(float(start)))

    @override
    def extra_repr(self) -> str:
        """The degree and where the coefficient started."""
        return f"degree={self.degree}, start={self.start}"

    def forward(self, a: Tensor) -> Tensor:
        """`... rank -> ... layers d_model`"""
        return self.coefficient * self.weight.to_layers(a[..., : self.weight.latents].pow(self.degree))


class NonlinearDecoder(nn.Module, ABC):
    """`... latents -> ... layers d_model`: abstract; bias + W z + terms in which latents act together.

    `weight` is the linear part, of any kind; metrics, starts and the auxiliary loss read it as they read any decoder's.
    A decoder of your own gives `terms` and says what they `read`; with `from_codes` it also runs sparse.

    ```python
    class Bent(fx.coders.NonlinearDecoder):
        def __init__(self, *terms, weight):
            super().__init__(weight)
            self.terms = nn.ModuleList(terms)

        def read(self, z):
            return fx.sparse.to_dense_codes(z).tanh()

    term = fx.PowerTerm(fx.DenseWeight(2, 3, 5), degree=2, start=0.1)
    fx.check_decoder(Bent(term, weight=fx.DenseWeight(2, 3, 5)).double())
    ```
    """

    terms: nn.ModuleList

    def __init__(self, weight: Weight):
        super().__init__()
        self.linear = CrossLayerDecoder(weight)

    @property
    def weight(self) -> Weight:
        """The linear part; norms and atoms of the decoder are those of this."""
        return self.linear.weight

    @property
    def bias(self) -> nn.Parameter:
        """`layers d_model`: what no code writes."""
        return self.linear.bias

    @abstractmethod
    def read(self, z: Tensor) -> Tensor:
        """What every term takes of the codes."""

    def forward(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`; codes dense or torch.sparse_csr. Raises ShapeError for other latents."""
        x_hat = self.linear(z)
        read = self.read(z)
        for term in self.terms:
            x_hat = x_hat + term(read)
        return x_hat

    @torch.no_grad()
    def scale_(self, factor: float) -> "NonlinearDecoder":
        """Multiplies all that it writes by `factor` > 0: the linear part, the bias and every term."""
        cast("Startable", self.weight).scale_(factor)
        for tensor in (self.bias, *(term.get_parameter("coefficient") for term in self.terms)):
            tensor.mul_(factor)
        return self


class PolynomialDecoder(NonlinearDecoder):
    """`... latents -> ... layers d_model`: bias + W z + sum over terms of l_k C_k (z U)^k.

    Latents that fire together may so write what none writes alone. The terms read the first columns of `projection`,
    one term a degree. Where the weight is a ProjectedWeight of the same projection this is the published PolySAE
    (shared mode); `polysae_decoder` makes it. Train with `retract_after`. Raises ShapeError for parts that do not fit.

    ```python
    term = fx.PowerTerm(fx.DenseWeight(2, 8, 4), degree=2, start=-0.5)
    decoder = fx.PolynomialDecoder(term, weight=fx.DenseWeight(2, 8, 16), projection=fx.Projection(16, rank=4))
    ```
    """

    def __init__(self, *terms: PowerTerm, weight: Weight, projection: Projection):
        super().__init__(weight)
        _check(weight, projection, terms)
        self.projection = projection
        self.terms = nn.ModuleList(terms)
        self.width = max(term.weight.latents for term in terms)

    @property
    def obstacle(self) -> str:
        """Why it cannot write from sparse codes, if it cannot."""
        read = why_replaced(self, PolynomialDecoder, ("read",)) or why_replaced(
            self.projection, Projection, ("forward",)
        )
        return read or why_overridden(self.linear, DECODER)

    @override
    def read(self, z: Tensor) -> Tensor:
        """`... latents -> ... rank`: the columns that some term reads"""
        if why_replaced(self.projection, Projection, ("forward",)) or why_watched([self.projection]):
            return self.projection(z)[..., : self.width]
        return sum_rows(z, self.projection.table[:, : self.width])

    def from_codes(self, z: Codes) -> Tensor:
        """`tokens latents -> tokens layers d_model`: `forward` from the codes that `CrossLayerEncoder.choose` gave."""
        x_hat, columns = self.linear.from_codes(z), sum_rows(z, self.projection.table[:, : self.width])
        for term in self.terms:
            x_hat = x_hat + term(columns)
        return x_hat


def polysae_decoder(
    d_model: int, latents: int, *, layers: int = 1, ranks: tuple[int, int, int] = (768, 64, 64)
) -> PolynomialDecoder:
    """The PolySAE decoder as published: b + a C1^T + l2 a[:r2]^2 C2^T + l3 a[:r3]^3 C3^T with a = z U.

    It writes one layer or several. U starts orthogonal, C_k Kaiming-uniform with fan_in r_k, l2 = -0.5 and l3 = 0.5.
    The default ranks are the paper's for GPT2. (PolySAE, shared mode)
    Raises ValueError or ShapeError for ranks that do not fit.
    """
    first, second, third = (DenseWeight(layers, d_model, rank) for rank in ranks)
    with torch.no_grad():
        for weight in (first, second, third):
            nn.init.kaiming_uniform_(weight.factors[0].flatten(1).T)  # `layers*d_model r`: its fan_in is r
    projection = Projection(latents, ranks[0])
    terms = PowerTerm(second, degree=2, start=-0.5), PowerTerm(third, degree=3, start=0.5)
    return PolynomialDecoder(*terms, weight=ProjectedWeight(projection, first), projection=projection)


def _check(weight: Weight, projection: Projection, terms: tuple[PowerTerm, ...]) -> None:
    if not terms:
        raise ValueError("PolynomialDecoder needs at least one term, got none; without one it is a CrossLayerDecoder")
    degrees = [term.degree for term in terms]
    if len(set(degrees)) < len(degrees):
        raise ValueError(
            f"PolynomialDecoder takes one term a degree, got degrees {degrees}; one term of a SumWeight adds two"
        )
    if projection.latents != weight.latents:
        raise ShapeError(
            f"the weight has latents={weight.latents} and the projection latents={projection.latents}; make them equal"
        )
    for term in terms:
        if (term.weight.layers, term.weight.d_model) != (weight.layers, weight.d_model):
            raise ShapeError(
                f"the weight writes layers={weight.layers}, d_model={weight.d_model}, "
                f"got a term of degree {term.degree} with layers={term.weight.layers}, d_model={term.weight.d_model}; "
                "make them equal"
            )
        if term.weight.latents > projection.rank:
            raise ShapeError(
                f"the term of degree {term.degree} reads {term.weight.latents} columns, "
                f"and the projection has rank={projection.rank}; take a term with latents <= {projection.rank}"
            )
