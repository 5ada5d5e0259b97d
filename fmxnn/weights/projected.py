"""A weight over the orthonormal columns of a projection."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from fmxnn.core.errors import ShapeError
from fmxnn.core.sizes import sizes_of
from fmxnn.sparse.codes import sum_rows
from fmxnn.weights.questions import startable
from fmxnn.weights.weight import Index, Part, Weight, check_latents


class Projection(nn.Module):
    """`... latents -> ... rank`: z U, with orthonormal columns that `retract_after` keeps so in training.

    - `latents`, `rank`: rows and columns of U; rank is at most latents.

    (PolySAE, U) Raises ValueError for other sizes.

    ```python
    columns = fx.Projection(20, 5).table
    torch.testing.assert_close(columns.T @ columns, torch.eye(5), atol=1e-5, rtol=0.0)
    ```
    """

    def __init__(self, latents: int, rank: int):
        super().__init__()
        self.latents, self.rank = sizes_of("Projection", latents=latents, rank=rank)
        if self.rank > self.latents:
            raise ValueError(
                f"Projection has orthonormal columns, at most one a latent, got latents={latents} and rank={rank}; "
                f"take rank <= {latents}"
            )
        self.table = nn.Parameter(torch.empty(self.latents, self.rank))
        nn.init.orthogonal_(self.table)

    @override
    def extra_repr(self) -> str:
        """The sizes, as the constructor takes them."""
        return f"latents={self.latents}, rank={self.rank}"

    def forward(self, z: Tensor) -> Tensor:
        """`... latents -> ... rank`; codes dense or torch.sparse_csr"""
        return sum_rows(z, self.table)

    @torch.no_grad()
    def retract_(self) -> "Projection":
        """Puts U back on orthonormal columns; one that is orthonormal stays as it is.

        It becomes the Q of its reduced QR with a positive diagonal of R.
        """
        wide = self.table.to(torch.promote_types(self.table.dtype, torch.float32))  # there is no QR in half precision
        q, r = torch.linalg.qr(wide)
        self.table.copy_(torch.where(r.diagonal() < 0, -q, q))
        return self


class ProjectedWeight(Weight):
    """`layers d_model latents`: any weight over the columns of a projection.

    - `projection`: its table is the weight's table, so codes may be sparse.
    - `weight`: what the columns write; its latents are the columns.

    The linear part of the published PolySAE, U C1^T. Raises ShapeError for a weight of other latents.

    ```python
    weight = fx.ProjectedWeight(fx.Projection(20, 5), fx.DenseWeight(3, 8, 5))
    assert weight.table.shape == (20, 5)
    ```
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

    @override
    def made_of(self) -> tuple[Part, ...]:
        """The weight, with all layers."""
        return (Part(self.weight, tuple(range(self.layers))),)

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
        """`... latents -> ... layers d_model`; codes dense or torch.sparse_csr.

        Raises ShapeError for other latents.
        """
        check_latents(self, z)
        return self.from_bonds(sum_rows(z, self.table))

    @override
    def atoms(self, index: Index) -> Tensor:
        """`to_dense()[..., index]`, from these rows of the projection."""
        return rearrange(self.from_bonds(self.table[index]), "... layers d_model -> layers d_model ...")

    def normal_(self, std: float) -> "ProjectedWeight":
        """Draws the weight so that entries of the dense form have standard deviation `std` on average.

        The projection stays. Raises TypeError for a weight that cannot be drawn.
        """
        startable(self.weight).normal_(std * (self.latents / self.projection.rank) ** 0.5)
        return self

    def scale_(self, factor: float) -> "ProjectedWeight":
        """Multiplies the dense form by `factor` > 0; the projection stays. Raises as `normal_` does."""
        startable(self.weight).scale_(factor)
        return self


def retract_after(optimizer: torch.optim.Optimizer, module: nn.Module) -> RemovableHandle:
    """Makes every step of `optimizer` end with the retraction of every Projection in `module`.

    `.remove()` on what it gives ends that. No state is added to either, so a resumed run only calls it again.
    Raises ValueError for a module without a Projection.
    """
    projections = [part for part in module.modules() if isinstance(part, Projection)]
    if not projections:
        raise ValueError(
            f"retract_after keeps projections orthonormal, got {type(module).__name__} without one; "
            "pass a PolynomialDecoder"
        )

    def retract(*_: Any) -> None:
        for projection in projections:
            projection.retract_()

    return optimizer.register_step_post_hook(retract)
