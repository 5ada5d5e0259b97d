"""Weights whose latents stand side by side in parts, each part with layers of its own."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from fmxnn.core.shortcuts import why_replaced
from fmxnn.sparse.codes import Codes, is_sparse, sum_rows, to_codes, to_dense_codes
from fmxnn.sparse.tables import Tables
from fmxnn.weights.layer_map import LayerMap, check_last, layer_number, with_bias
from fmxnn.weights.questions import startable
from fmxnn.weights.weight import Index, Part, Tabled, Weight, check_latents, check_layers, table_of

_WHOLE = ("to_latents", "to_layers", "to_bonds", "from_bonds", "table")
"""What a weight in parts does through its parts; a subclass with one of these of its own is not taken apart."""


class PartedWeight(Weight, ABC):
    """`layers d_model latents`: abstract; parts side by side along latents, each with layers of its own.

    A class of yours says which `parts` it has and what it is `made_of`; reading, writing, atoms, norms, starts and
    scales follow, with codes of every kind. Layers that a part lacks cost neither memory nor time.

    ```python
    class FirstAndAll(fx.PartedWeight):  # half of the latents know the first layer alone
        def __init__(self, layers: int, d_model: int, latents: int):
            super().__init__()
            self.layers, self.d_model, self.latents = layers, d_model, latents
            self.first = fx.DenseWeight(1, d_model, latents // 2)
            self.all = fx.DenseWeight(layers, d_model, latents - latents // 2)

        def parts(self):
            return fx.Part(self.first, (0,)), fx.Part(self.all, tuple(range(self.layers)))

        def made_of(self):
            return self.parts()

    fx.check_weight(FirstAndAll(3, 4, 6).double())
    ```
    """

    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """The parts in order of their latents, taken apart as far as they go."""

    @abstractmethod
    @override
    def made_of(self) -> tuple[Part, ...]:
        """The weights that it is made of, as they are, each with its layers in the stack."""

    @property
    def table(self) -> Tensor | Tables | None:
        """`latents bonds`: the tables of all parts, or None where a part has none."""
        tables = [table_of(part.weight) for part in self.parts()]
        if any(table is None for table in tables):
            return None
        found = cast("list[Tensor]", tables)
        return found[0] if len(found) == 1 else Tables(tuple(found))

    @property
    @override
    def relies_on(self) -> tuple[Weight, ...]:
        """The weights of its parts."""
        return tuple(part.weight for part in self.parts())

    @property
    @override
    def obstacle(self) -> str:
        """None but those of its parts, which are asked before it."""
        return ""

    def to_bonds(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... bonds`: what each part's table reads, side by side.

        Raises ShapeError for other layers or d_model.
        """
        check_layers("weight", self, x)
        return torch.cat([_tabled(part).to_bonds(part.of(x)) for part in self.parts()], dim=-1)

    def from_bonds(self, h: Tensor) -> Tensor:
        """`... bonds -> ... layers d_model`: what each part writes from its bonds, added up."""
        parts = self.parts()
        split = h.split([_table(part).shape[1] for part in parts], dim=-1)
        return self._stacked((part, _tabled(part).from_bonds(own)) for part, own in zip(parts, split, strict=True))

    @override
    def to_latents(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`: every part reads its layers.

        Raises ShapeError for other layers or d_model.
        """
        check_layers("weight", self, x)
        return torch.cat([part.weight.to_latents(part.of(x)) for part in self.parts()], dim=-1)

    @override
    def to_layers(self, z: Tensor | Codes) -> Tensor:
        """`... latents -> ... layers d_model`: every part writes its layers; codes dense or torch.sparse_csr.

        Raises ShapeError for other latents.
        """
        check_latents(self, z)
        if isinstance(z, Codes) or (is_sparse(z) and self.table is not None):
            codes = z if isinstance(z, Codes) else to_codes(z)
            return self._stacked(
                (part, _tabled(part).from_bonds(codes.rows_of(_table(part), first))) for part, first in self._firsts()
            )
        z = to_dense_codes(z)
        return self._stacked(
            (part, part.weight.to_layers(z[..., first : first + part.weight.latents])) for part, first in self._firsts()
        )

    @override
    def atoms(self, index: Index) -> Tensor:
        """`to_dense()[..., index]`: what these latents write at every layer, without the rest of the dense form."""
        wanted = torch.arange(self.latents, device=next(self.parameters()).device)[index]
        places: list[Tensor] = []
        columns: list[Tensor] = []
        for part, first in self._firsts():
            mine = ((wanted >= first) & (wanted < first + part.weight.latents)).flatten().nonzero().flatten()
            written = part.weight.atoms(wanted.flatten()[mine] - first).movedim(-1, 0)
            places, columns = [*places, mine], [*columns, self._stacked([(part, written)])]
        return (
            torch.cat(columns)[torch.cat(places).argsort()]
            .movedim(0, -1)
            .reshape(self.layers, self.d_model, *wanted.shape)
        )

    @override
    def at(self, layer: int) -> LayerMap:
        """`d_model latents`: one layer as a map of its own, of the parts that have it. Raises IndexError outside."""
        number = layer_number(layer, self.layers)
        return super().at(layer) if why_replaced(self, PartedWeight, _WHOLE) else PartedLayer(self, number)

    @override
    def norms(self) -> Tensor:
        """`-> layers latents`: each part's own, and zero at the layers it does not write."""
        spread: list[Tensor] = []
        for part in self.parts():
            norms = part.weight.norms()
            rows = dict(zip(part.at, norms, strict=True))
            spread.append(torch.stack([rows.get(layer, torch.zeros_like(norms[0])) for layer in range(self.layers)]))
        return torch.cat(spread, dim=-1)

    def normal_(self, std: float) -> "PartedWeight":
        """Draws every part so that each entry that it has, the absent ones left out, has standard deviation `std`.

        Raises TypeError where a part cannot be drawn; nothing is drawn then.
        """
        for leaf in [startable(leaf) for leaf in self.leaves()]:
            leaf.normal_(std)
        return self

    def scale_(self, factor: float) -> "PartedWeight":
        """Multiplies every part by `factor` > 0, once where several places share it. Raises as `normal_` does."""
        for leaf in [startable(leaf) for leaf in self.leaves()]:
            leaf.scale_(factor)
        return self

    def leaves(self) -> tuple[Weight, ...]:
        """The weights at the bottom, each once; of any class."""
        found = (weight.leaves() if isinstance(weight, PartedWeight) else (weight,) for weight, _ in self.made_of())
        return tuple(dict.fromkeys(leaf for leaves in found for leaf in leaves))

    def _firsts(self) -> Iterator[tuple[Part, int]]:
        """Each part with its first latent."""
        first = 0
        for part in self.parts():
            yield part, first
            first += part.weight.latents

    def _stacked(self, written: Iterable[tuple[Part, Tensor]]) -> Tensor:
        """`... layers d_model`: what parts wrote, added layer by layer as it comes, so that only one part's is held."""
        total: list[Tensor | None] = [None] * self.layers
        like = torch.empty(0)
        for part, wrote in written:
            missing = self.d_model - wrote.shape[-1]
            wrote = functional.pad(wrote, (0, missing)) if missing else wrote  # a padding of nothing would be a copy
            for layer, row in zip(part.at, wrote.unbind(-2), strict=True):
                before = total[layer]
                like = total[layer] = row if before is None else before + row
        return torch.stack([torch.zeros_like(like) if row is None else row for row in total], dim=-2)


class PartedLayer(LayerMap):
    """`d_model latents`: one layer of a weight in parts; a part that does not have this layer is not computed."""

    def __init__(self, weight: PartedWeight, layer: int):
        super().__init__(weight, layer)
        self._parts = weight.parts()

    @override
    def to_latents(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`... d_model -> ... latents`: reads this layer, zero for latents that do not. Raises ShapeError."""
        check_last(x, "reads", "d_model", self.d_model)
        read: list[Tensor] = []
        for part, here in self._layers():
            zeros = x.new_zeros(*x.shape[:-1], part.weight.latents)
            read.append(zeros if here is None else here.to_latents(x[..., : here.d_model]))
        return with_bias(torch.cat(read, dim=-1), bias)

    @override
    def to_layers(self, z: Tensor) -> Tensor:
        """`... latents -> ... d_model`: writes this layer; codes dense or torch.sparse_csr. Raises ShapeError."""
        check_last(z, "writes codes of", "latents", self.latents)
        if is_sparse(z):
            return super().to_layers(z)
        written, first = z.new_zeros(*z.shape[:-1], self.d_model), 0
        for part, here in self._layers():
            if here is not None:
                wrote = here.to_layers(z[..., first : first + part.weight.latents])
                written = written + functional.pad(wrote, (0, self.d_model - here.d_model))
            first += part.weight.latents
        return written

    @override
    def to_dense(self) -> Tensor:
        """`-> d_model latents`: `weight.to_dense()[layer]`."""
        like = next(cast("PartedWeight", self.weight).parameters())
        columns: list[Tensor] = []
        for part, here in self._layers():
            zeros = like.new_zeros(self.d_model, part.weight.latents)
            filled = zeros if here is None else functional.pad(here.to_dense(), (0, 0, 0, self.d_model - here.d_model))
            columns.append(filled)
        return torch.cat(columns, dim=-1)

    def _layers(self) -> Iterator[tuple[Part, LayerMap | None]]:
        """Each part with its own map of this layer, if it has one."""
        for part in self._parts:
            yield part, part.weight.at(part.at.index(self.layer)) if self.layer in part.at else None


def _tabled(part: Part) -> Tabled:
    return cast("Tabled", part.weight)


def _table(part: Part) -> Tensor:
    return cast("Tensor", _tabled(part).table)


def write_codes(weight: Weight, z: Codes) -> Tensor:
    """`tokens latents -> tokens layers d_model`: what a weight with a table writes from the codes that were chosen.

    A weight in parts is written a part at a time.
    """
    if isinstance(weight, PartedWeight) and not why_replaced(weight, PartedWeight, ("from_bonds", "table")):
        return weight.to_layers(z)
    tabled = cast("Tabled", weight)
    return tabled.from_bonds(sum_rows(z, cast("Tensor", tabled.table)))


def parts_of(weight: Weight) -> tuple[Part, ...]:
    """The parts of any weight, in order of their latents.

    One that is not parted, or whose class reads or writes in a way of its own, is a part by itself.
    """
    if isinstance(weight, PartedWeight) and not why_replaced(weight, PartedWeight, _WHOLE):
        return weight.parts()
    return (Part(weight, tuple(range(weight.layers))),)
