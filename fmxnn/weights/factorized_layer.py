"""One layer of a factorised weight, summed from that layer's slices of the factors."""

from collections.abc import Iterable, Iterator
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from fmxnn.sparse.codes import is_sparse, sum_rows, to_dense_codes
from fmxnn.weights.layer_map import Layered, LayerMap, check_last, with_bias
from fmxnn.weights.patterns import LayerMaps, Terms


class Factorized(Layered, Protocol):
    """What a layer is cut from: the factors, their terms, and the sizes of the axes that make up d_model."""

    terms: Terms
    inner: list[int]

    @property
    def factors(self) -> Iterable[Tensor]:
        """In the order of the terms."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors, and so of what is read."""
        ...


class FactorizedLayer(LayerMap):
    """`d_model latents`: one layer of a factorised weight, summed from that layer's slices of the factors alone."""

    def __init__(self, weight: Factorized, layer: int, maps: LayerMaps):
        super().__init__(weight, layer)
        self.weight: Factorized = weight
        self._maps = maps

    @override
    def to_latents(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`... d_model -> ... latents`: reads this layer, and adds a bias if one is given.

        From the factors or from their product, whichever takes fewer FLOP. Raises ShapeError, and TypeError for
        another dtype.
        """
        check_last(x, "reads", "d_model", self.d_model)
        check_dtype(self.weight, x, who="a layer's weight")
        if self._maps.is_denser(x.shape[:-1].numel()):
            return functional.linear(x, self.to_dense().T, bias)
        x, small = unflattened(x, self.weight.inner), self._factors()
        if self._maps.table is None:
            return with_bias(self._maps.to_latents(x, *small), bias)
        table = self._table_of(small)
        return functional.linear(self._maps.to_bonds(x, *small).flatten(-len(self._maps.bonds)), table.flatten(1), bias)

    @override
    def to_layers(self, z: Tensor) -> Tensor:
        """`... latents -> ... d_model`: writes this layer; codes dense or torch.sparse_csr. Raises ShapeError."""
        check_last(z, "writes codes of", "latents", self.latents)
        if not is_sparse(z) or self._maps.table is None:
            return flattened(self._maps.to_layers(to_dense_codes(z), *self._factors()), self.weight.inner)
        small = self._factors()
        table = self._table_of(small)
        written = sum_rows(z, table.flatten(1)).unflatten(-1, table.shape[1:])
        return flattened(self._maps.from_bonds(written, *small), self.weight.inner)

    @override
    def rows(self, index: Tensor) -> Tensor:
        """`... -> ... d_model`: what these latents write, as an embedding looks up tokens. Raises IndexError."""
        return flattened(
            self._maps.atoms(*(self._looked_up(index, *pair) for pair in self._pairs())), self.weight.inner
        )

    @override
    def to_dense(self) -> Tensor:
        """`-> d_model latents`: `weight.to_dense()[layer]`."""
        latents_first = [
            factor.movedim(term.index("latents"), 0) if "latents" in term else factor for term, factor in self._pairs()
        ]
        return flattened(self._maps.atoms(*latents_first), self.weight.inner).T

    def _looked_up(self, index: Tensor, term: tuple[str, ...], factor: Tensor) -> Tensor:
        if "latents" not in term:
            return factor
        table = factor.movedim(term.index("latents"), 0)
        found = functional.embedding(index, table.reshape(len(table), -1))
        return found.reshape(*index.shape, *table.shape[1:])

    def _table_of(self, factors: list[Tensor]) -> Tensor:
        """`-> latents bonds`: the table, which is taken out of the factors; its bonds are still axes of their own."""
        at = cast("int", self._maps.table)
        return factors.pop(at).movedim(self._maps.terms[at].index("latents"), 0)

    def _pairs(self) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        return zip(self._maps.terms, self._factors(), strict=True)

    def _factors(self) -> list[Tensor]:
        """The factors, each cut to this layer where it has layers."""
        cut: list[Tensor] = []
        for term, kept, factor in zip(self.weight.terms, self._maps.terms, self.weight.factors, strict=True):
            if "layers" in kept:
                factor = factor.narrow(0, self.layer, 1)
            elif "layers" in term:
                factor = factor.select(term.index("layers"), self.layer)
            cut.append(factor)
        return cut


def unflattened(x: Tensor, inner: list[int]) -> Tensor:
    """`... d_model` as the axes that make it up."""
    return x if len(inner) == 1 else x.unflatten(-1, inner)


def flattened(x: Tensor, inner: list[int]) -> Tensor:
    """The axes that make up `d_model`, as one again."""
    return x if len(inner) == 1 else x.flatten(-len(inner))


def check_dtype(weight: Factorized, x: Tensor, *, who: str = "the encoder's weight") -> None:
    """`... layers d_model -> `: raises TypeError for another dtype than the weight's, outside autocast."""
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        owner = "crosscoder" if who == "the encoder's weight" else "module"
        other = (
            f", or cast the {owner}: {owner}.to({x.dtype}), or run both under torch.autocast"
            if x.is_floating_point()
            else ""
        )
        raise TypeError(
            f"{who} is {weight.dtype} and reads activations of that dtype, got {x.dtype}; "
            f"cast them: x.to({weight.dtype}){other}"
        )
