"""Decoders in which latents act together: powers of a shared orthonormal projection beside the linear part."""

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from fmxnn.coders import CrossLayerDecoder
from fmxnn.contraction import ShapeError
from fmxnn.sizes import whole
from fmxnn.sparse import Codes, sum_rows
from fmxnn.weights import DenseWeight, FactorizedWeight, Index, Weight, check_latents


class Projection(nn.Module):
    """`... latents -> ... rank`: z U, with orthonormal columns that `retract_after` keeps so in training. (PolySAE, U)

    Raises ValueError for a rank above latents.
    """

    def __init__(self, latents: int, rank: int):
        super().__init__()
        if not 1 <= rank <= latents:
            raise ValueError(
                f"Projection has orthonormal columns, at most one a latent, got latents={latents} and rank={rank}; take rank <= {latents}"
            )
        self.latents, self.rank = latents, rank
        self.table = nn.Parameter(torch.empty(latents, rank))
        nn.init.orthogonal_(self.table)

    @override
    def extra_repr(self) -> str:
        """The sizes."""
        return f"latents={self.latents}, rank={self.rank}"

    def forward(self, z: Tensor | Codes) -> Tensor:
        """`... latents -> ... rank`; codes dense or torch.sparse_csr"""
        return sum_rows(z, self.table)

    @torch.no_grad()
    def retract_(self) -> "Projection":
        """Puts U back on orthonormal columns: the Q of its reduced QR with a positive diagonal of R, which leaves an orthonormal U alone."""
        wide = self.table.to(torch.promote_types(self.table.dtype, torch.float32))  # there is no QR in half precision
        q, r = torch.linalg.qr(wide)
        self.table.copy_(torch.where(r.diagonal() < 0, -q, q))
        return self


class ProjectedWeight(Weight):
    """`layers d_model latents`: any weight over the columns of a projection; the published PolySAE's linear part, U C1^T.

    Its table is the projection's, so it takes the sparse path. Raises ShapeError where the weight has other latents than the projection has columns.
    """

    def __init__(self, projection: Projection, weight: Weight):
        super().__init__()
        if weight.latents != projection.rank:
            raise ShapeError(
                f"ProjectedWeight writes from the columns of a projection of rank={projection.rank}, "
                f"got a weight of latents={weight.latents}; make them equal"
            )
        self.projection, self.weight = projection, weight
        self.layers, self.d_model, self.latents = weight.layers, weight.d_model, projection.latents
        self.small_flops = 2.0 * weight.latents * weight.layers * weight.d_model

    @property
    def table(self) -> Tensor:
        """`latents bonds`: the projection, bonds being its columns."""
        return self.projection.table

    def to_bonds(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... bonds`"""
        return self.weight.to_latents(x)

    def from_bonds(self, h: Tensor) -> Tensor:
        """`... bonds -> ... layers d_model`"""
        return self.weight.to_layers(h)

    @override
    def to_latents(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`"""
        return self.to_bonds(x) @ self.table.T

    @override
    def to_layers(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`; codes dense or torch.sparse_csr. Raises ShapeError for other latents."""
        check_latents(self, z)
        return self.from_bonds(sum_rows(z, self.table))

    @override
    def atoms(self, index: Index) -> Tensor:
        """`to_dense()[..., index]`, from these rows of the projection."""
        return rearrange(self.from_bonds(self.table[index]), "... layers d_model -> layers d_model ...")

    def normal_(self, std: float) -> "ProjectedWeight":
        """Draws the weight so that entries of the dense form have standard deviation `std` on average; the projection stays."""
        cast("FactorizedWeight", self.weight).normal_(std * (self.latents / self.projection.rank) ** 0.5)
        return self

    def scale_(self, factor: float) -> "ProjectedWeight":
        """Multiplies the dense form by `factor` > 0; the projection stays."""
        cast("FactorizedWeight", self.weight).scale_(factor)
        return self


class PowerTerm(nn.Module):
    """`... rank -> ... layers d_model`: a learned coefficient times what `weight` writes from the power of its first columns.

    `weight` is any weight whose latents are the columns that the term reads. `start` is the coefficient's first value. (PolySAE, l_k and C_k)
    """

    def __init__(self, weight: Weight, *, degree: int, start: float):
        super().__init__()
        if (whole(degree) or 0) < 2:
            raise ValueError(f"PowerTerm needs a whole degree >= 2, got degree={degree!r:.200}; degree 1 is the decoder's weight")
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
    def read(self, z: Tensor | Codes) -> Tensor | Codes:
        """What every term takes of the codes."""

    def forward(self, z: Tensor | Codes) -> Tensor:
        """`... latents -> ... layers d_model`; codes dense or torch.sparse_csr. Raises ShapeError for other latents."""
        x_hat = self.linear(z)
        read = self.read(z)
        for term in self.terms:
            x_hat = x_hat + term(read)
        return x_hat

    @torch.no_grad()
    def scale_(self, factor: float) -> "NonlinearDecoder":
        """Multiplies all that it writes by `factor` > 0: the linear part, the bias and every term."""
        cast("FactorizedWeight", self.weight).scale_(factor)
        for tensor in (self.bias, *(term.get_parameter("coefficient") for term in self.terms)):
            tensor.mul_(factor)
        return self


class PolynomialDecoder(NonlinearDecoder):
    """`... latents -> ... layers d_model`: bias + W z + sum over terms of l_k C_k (z U)^k; latents that fire together may write what none writes alone.

    The terms read the first columns of `projection`, one term a degree. Where the weight is a ProjectedWeight of the same projection this is the
    published PolySAE (shared mode); `polysae_decoder` makes it. Train with `retract_after`. Raises ShapeError for parts that do not fit.
    """

    def __init__(self, *terms: PowerTerm, weight: Weight, projection: Projection):
        super().__init__(weight)
        _check(weight, projection, terms)
        self.projection = projection
        self.terms = nn.ModuleList(terms)
        self.width = max(term.weight.latents for term in terms)

    @override
    def read(self, z: Tensor | Codes) -> Tensor:
        """`... latents -> ... rank`: the columns that some term reads"""
        return sum_rows(z, self.projection.table[:, : self.width])


def polysae_decoder(d_model: int, latents: int, *, layers: int = 1, ranks: tuple[int, int, int] = (768, 64, 64)) -> PolynomialDecoder:
    """The PolySAE decoder as published, for one layer or several: b + a C1^T + l2 a[:r2]^2 C2^T + l3 a[:r3]^3 C3^T with a = z U.

    U starts orthogonal, C_k Kaiming-uniform with fan_in r_k, l2 = -0.5 and l3 = 0.5. The default ranks are the paper's for GPT2.
    (PolySAE, shared mode) Raises ValueError or ShapeError for ranks that do not fit.
    """
    first, second, third = (DenseWeight(layers, d_model, rank) for rank in ranks)
    with torch.no_grad():
        for weight in (first, second, third):
            nn.init.kaiming_uniform_(weight.factors[0].flatten(1).T)  # `layers*d_model r`: its fan_in is r
    projection = Projection(latents, ranks[0])
    terms = PowerTerm(second, degree=2, start=-0.5), PowerTerm(third, degree=3, start=0.5)
    return PolynomialDecoder(*terms, weight=ProjectedWeight(projection, first), projection=projection)


def retract_after(optimizer: torch.optim.Optimizer, module: nn.Module) -> RemovableHandle:
    """Makes every step of `optimizer` end with the retraction of every Projection in `module`; `.remove()` on what it gives ends that.

    No state is added to either, so a resumed run only calls it again. Raises ValueError for a module without a Projection.
    """
    projections = [part for part in module.modules() if isinstance(part, Projection)]
    if not projections:
        raise ValueError(f"retract_after keeps projections orthonormal, got {type(module).__name__} without one; pass a PolynomialDecoder")

    def retract(*_: Any) -> None:
        for projection in projections:
            projection.retract_()

    return optimizer.register_step_post_hook(retract)


def _check(weight: Weight, projection: Projection, terms: tuple[PowerTerm, ...]) -> None:
    if not terms:
        raise ValueError("PolynomialDecoder needs at least one term, got none; without one it is a CrossLayerDecoder")
    degrees = [term.degree for term in terms]
    if len(set(degrees)) < len(degrees):
        raise ValueError(f"PolynomialDecoder takes one term a degree, got degrees {degrees}; one term of a SumWeight adds two")
    if projection.latents != weight.latents:
        raise ShapeError(f"the weight has latents={weight.latents} and the projection latents={projection.latents}; make them equal")
    for term in terms:
        if (term.weight.layers, term.weight.d_model) != (weight.layers, weight.d_model):
            raise ShapeError(
                f"the weight writes layers={weight.layers}, d_model={weight.d_model}, "
                f"got a term of degree {term.degree} with layers={term.weight.layers}, d_model={term.weight.d_model}; make them equal"
            )
        if term.weight.latents > projection.rank:
            raise ShapeError(
                f"the term of degree {term.degree} reads {term.weight.latents} columns, and the projection has rank={projection.rank}; "
                f"take a term with latents <= {projection.rank}"
            )
