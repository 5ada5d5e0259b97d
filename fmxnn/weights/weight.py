"""The contract of a weight: what it must give, what it may give, and which of its methods may stand for which."""

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor, nn

from fmxnn.core.errors import ShapeError
from fmxnn.core.shortcuts import Shortcuts, why_overridden
from fmxnn.sparse.codes import Codes
from fmxnn.sparse.tables import Tables
from fmxnn.weights.layer_map import LayerMap, layer_number

Index = int | slice | list[int] | Tensor
"""Which latents: what a tensor may be indexed with."""

BLOCK = 1024

WEIGHT: Shortcuts = {"to_latents": ("to_bonds",), "to_layers": ("from_bonds",)}
"""Each slow method of a weight with the fast one that stands for it where codes are sparse."""

ROWS: Shortcuts = {"table": ("stored_at",)}
"""The table, with the method that says where its rows are stored."""


class Weight(nn.Module, ABC):
    """`layers d_model latents`: what a cross-layer weight does, whatever it is made of.

    Yours must give `layers`, `d_model`, `latents`, `to_latents` and `to_layers`; atoms, dense form and norms follow. It
    may give a table (`Tabled`), rows that can be written (`Rowed`), a start (`Startable`) and scales (`Scalable`,
    `LayerScalable`). One that is made of weights says so in `relies_on` and `made_of`. `check_weight` tries all of it.

    ```python
    class OneDirection(fx.Weight):
        def __init__(self, layers: int, d_model: int, latents: int):
            super().__init__()
            self.layers, self.d_model, self.latents = layers, d_model, latents
            self.directions = nn.Parameter(torch.randn(latents, d_model))

        def to_latents(self, x):
            return x.sum(-2) @ self.directions.T

        def to_layers(self, z):
            return (z @ self.directions).unsqueeze(-2).expand(*z.shape[:-1], self.layers, self.d_model)

    fx.check_weight(OneDirection(2, 3, 5).double())
    ```
    """

    layers: int
    d_model: int
    latents: int
    _small_flops: float | None = None

    @abstractmethod
    def to_latents(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`: reads all layers."""

    @abstractmethod
    def to_layers(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`: writes all layers, the adjoint of reading.

        Codes are dense or torch.sparse_csr.
        """

    def atoms(self, index: Index) -> Tensor:
        """`to_dense()[..., index]`: what these latents write at every layer, without the rest of the dense form."""
        like = next(self.parameters())
        one_hot = torch.eye(self.latents, dtype=like.dtype, device=like.device)[index]
        return rearrange(self.to_layers(one_hot), "... layers d_model -> layers d_model ...")

    def to_dense(self) -> Tensor:
        """`-> layers d_model latents`: the weight as one tensor."""
        return self.atoms(slice(None))

    def at(self, layer: int) -> LayerMap:
        """`d_model latents`: one layer as a map of its own, which shares the parameters. Raises IndexError outside."""
        return LayerMap(self, layer_number(layer, self.layers))

    def norms(self) -> Tensor:
        """`-> layers latents`: the length of each latent's atom at each layer; never makes the dense form."""
        blocks = [slice(start, min(start + BLOCK, self.latents)) for start in range(0, self.latents, BLOCK)]
        return torch.cat([self.atoms(block).norm(dim=1) for block in blocks], dim=-1)

    @property
    def small_flops(self) -> float:
        """FLOP of one token through `to_bonds` or `from_bonds`, for the planner; set it to say another number.

        0 says that the bonds are the layers and coordinates themselves, and that a row is its atom. Unless it is set,
        it is the sum over the weights that this one relies on, or else that of a dense map; 0 without a table.
        """
        if self._small_flops is not None:
            return self._small_flops
        if self.relies_on:
            return float(sum(map(flops_of, self.relies_on)))
        table = table_of(self)
        return 0.0 if table is None else 2.0 * table.shape[1] * self.layers * self.d_model

    @small_flops.setter
    def small_flops(self, flops: float) -> None:
        """Says what a token costs."""
        self._small_flops = flops

    @property
    def obstacle(self) -> str:
        """Why codes cannot be read and written at its table, if they cannot.

        It is asked at every pass whose sizes would take sparse codes, so it should take microseconds.
        """
        return _no_table(self)

    @property
    def relies_on(self) -> "tuple[Weight, ...]":
        """The weights whose tables are its own; an override or hook on one of them is found through here."""
        return ()

    def made_of(self) -> "tuple[Part, ...]":
        """The weights that it is made of, each with its layers in the stack: to scale theirs is to scale its own."""
        return ()


class Part(NamedTuple):
    """A weight of neighbouring latents, and which layers of the whole stack its own layers are.

    ```python
    part = fx.Part(fx.DenseWeight(2, 4, 6), at=(0, 2))
    assert part.of(torch.randn(10, 3, 4)).shape == (10, 2, 4)
    ```
    """

    weight: Weight
    at: tuple[int, ...]

    def of(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... layers d_model`: of the whole stack, what this part reads.

        A view where its layers are neighbours.
        """
        first, end = self.at[0], self.at[-1] + 1
        x = x[..., first:end, :] if end - first == len(self.at) else x[..., list(self.at), :]
        return x[..., : self.weight.d_model]


@runtime_checkable
class Tabled(Protocol):
    """A weight whose cost lies at a table of one row a latent; one with these three methods runs sparse.

    `to_latents(x)` is `to_bonds(x) @ table.T`, and `to_layers(z)` is `from_bonds(z @ table)`.

    ```python
    assert isinstance(fx.DenseWeight(2, 3, 5), fx.Tabled)
    ```
    """

    @property
    def table(self) -> Tensor | Tables | None:
        """`latents bonds`: one row a latent; None where this weight has none."""
        ...

    def to_bonds(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... bonds`: what the table's rows are multiplied with."""
        ...

    def from_bonds(self, h: Tensor) -> Tensor:
        """`... bonds -> ... layers d_model`: what a sum of rows writes, the adjoint of `to_bonds`."""
        ...


@runtime_checkable
class Rowed(Tabled, Protocol):
    """A tabled weight whose rows can be written: by `resample`, by `data_start`, and where a decoder is tied.

    A class that overrides `table` gives its own `stored_at` too, or its rows are left alone.

    ```python
    weight = fx.DenseWeight(2, 3, 5)
    parameter, index = weight.stored_at(torch.tensor([4, 0]))
    assert torch.equal(parameter[index].flatten(1), weight.table[[4, 0]])
    ```
    """

    small_flops: float

    def stored_at(self, latents: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`table[latents]` as a parameter and an index into it, also for what an optimiser keeps of these rows."""
        ...


@runtime_checkable
class Scalable(Protocol):
    """A weight or decoder that can be multiplied by a number; `fold_scale` asks for it.

    ```python
    weight = fx.DenseWeight(2, 3, 5)
    before = weight.norms().detach()
    torch.testing.assert_close(weight.scale_(3.0).norms(), 3 * before)
    ```
    """

    def scale_(self, factor: float) -> object:
        """Multiplies the dense form of a weight, or all that a decoder writes, by `factor` > 0; gives itself."""
        ...


@runtime_checkable
class Startable(Scalable, Protocol):
    """A weight that can be drawn and scaled: all that `gaussian_start` and `tied_start` ask for.

    ```python
    weight = fx.DenseWeight(2, 30, 500).normal_(0.5)
    assert 0.45 < weight.to_dense().std() < 0.55
    ```
    """

    def normal_(self, std: float) -> object:
        """Draws it so that every entry of the dense form has standard deviation `std`; gives itself."""
        ...


@runtime_checkable
class LayerScalable(Protocol):
    """A weight or decoder whose layers can be multiplied each by its own number; `fold` asks for it.

    ```python
    weight = fx.DenseWeight(2, 3, 5)
    before = weight.norms().detach()
    weight.scale_layers_(torch.tensor([1.0, 10.0]))
    torch.testing.assert_close(weight.norms()[1], 10 * before[1])
    ```
    """

    def scale_layers_(self, factors: Tensor) -> object:
        """`layers -> `: multiplies each layer by its factor, in place: of a decoder what it writes, its bias apart."""
        ...


def why_untabled(weight: Weight) -> str:
    """Why a weight cannot be read and written at its table, if it cannot.

    It has none, or it does something else than its table says: a slow method is overridden below the fast one.
    """
    for inner in getattr(weight, "relies_on", ()):
        if why := why_untabled(inner):
            return why
    is_weight = isinstance(weight, Weight)  # pyright: ignore[reportUnnecessaryIsInstance]  # or has the methods of one
    why = weight.obstacle if is_weight else _no_table(weight)
    return why or why_overridden(weight, WEIGHT)


def table_of(weight: nn.Module) -> Tensor | Tables | None:
    """`latents bonds`: the table of any weight, or None; faster than to ask whether it is `Tabled`."""
    return getattr(weight, "table", None)


def flops_of(weight: Weight) -> float:
    """Its `small_flops`; 0 of a module that has the methods of a weight and is none."""
    return getattr(weight, "small_flops", 0.0)


def check_latents(weight: Weight, z: Tensor | Codes) -> None:
    """`... latents -> `: raises ShapeError for other latents than the weight's."""
    if z.shape[-1:] != (weight.latents,):
        raise ShapeError(f"the weight writes codes of (..., latents={weight.latents}), got {tuple(z.shape)}")


def check_layers(who: str, weight: Weight, x: Tensor) -> None:
    """`... layers d_model -> `: raises ShapeError for other layers or d_model than the weight's."""
    if x.shape[-2:] != (weight.layers, weight.d_model):
        raise ShapeError(
            f"the {who} reads (..., layers={weight.layers}, d_model={weight.d_model}), got {tuple(x.shape)}; "
            "stack one activation per layer: torch.stack(hidden, dim=-2)"
        )


def _no_table(weight: nn.Module) -> str:
    return f"{type(weight).__name__} has no table" if table_of(weight) is None else ""
