"""Cross-layer weights: three axes, `layers d_model latents`, held as an Einstein sum of factors."""

from math import prod
from typing import ClassVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.core.errors import PatternError, ShapeError
from fmxnn.core.shortcuts import why_replaced
from fmxnn.sparse.codes import sum_rows, to_dense_codes
from fmxnn.weights.factorized_layer import FactorizedLayer, check_dtype, flattened, unflattened
from fmxnn.weights.layer_map import LayerMap, layer_number
from fmxnn.weights.patterns import READS, LayerMaps, Maps, read_axes, read_weight
from fmxnn.weights.ranks import Ranks, cp_rank, tensor_ring_ranks
from fmxnn.weights.weight import BLOCK, Index, Weight, check_latents, check_layers

BY_FACTORS = ("to_latents", "to_layers", "to_bonds", "from_bonds", "table", "atoms")
"""What a weight does as its factors say; a subclass with one of these of its own is no longer its pattern alone."""


class FactorizedWeight(Weight):
    """`layers d_model latents` as a sum over factors: `latents r, d_model r, layers r`, or any other pattern.

    Where `latents` stands in one term only, that term is the `table` (one row a latent). The other terms are a small
    map between `bonds` and `layers d_model`. Otherwise `table` is None and the whole pattern is summed.
    `factors` are in the order of the terms. Fresh factors are Gaussian: every entry of the dense form has variance
    1 / (3 d_model), as in nn.Linear. `fmxnn.training.starts` has the starts of whole crosscoders.

    - `pattern`: the factors, each named by its axes.
    - `reads`: the axes of the activations, `layers` first. The others together are `d_model` to the rest of fmxnn;
      `flat` and `named` go between the two shapes.
    - `sizes`: the size of every axis.

    Raises PatternError for a pattern or sizes that make no weight.

    ```python
    weight = fx.FactorizedWeight("latents r, d_model r, layers r", layers=4, d_model=8, latents=32, r=6)
    z = weight.to_latents(torch.randn(5, 4, 8))  # tokens latents
    x = weight.to_layers(z)  # tokens layers d_model
    ```
    """

    added_later: ClassVar[tuple[str, ...]] = ("reads",)

    def __init__(self, pattern: str, *, reads: str = READS, **sizes: int):
        super().__init__()
        words = read_axes(reads)
        self.pattern, self.reads, self.axes = pattern, reads, (*words, "latents")
        self.terms = read_weight(pattern, sizes, words)
        self.sizes = sizes = {word: int(size) for word, size in sizes.items()}
        self.layers, self.latents = sizes["layers"], sizes["latents"]
        self.d_model = prod(sizes[word] for word in words[1:])
        self.factors = nn.ParameterList([torch.empty([sizes[word] for word in term]) for term in self.terms])
        self.inner = [sizes[word] for word in words[1:]]
        self._maps = Maps(self.terms, sizes, words)
        self._layer_maps = LayerMaps(self.terms, sizes, words)
        self.small_flops = self._maps.small_flops  # of one token through to_bonds or from_bonds
        self.normal_((3 * self.d_model) ** -0.5)

    @override
    def __repr__(self) -> str:
        axes = ", ".join(f"{word}={size}" for word, size in self.sizes.items())
        reads = "" if self.reads == READS else f", reads={self.reads!r}"
        count = sum(factor.numel() for factor in self.factors)
        return f"{type(self).__name__}({self.pattern!r}{reads}, {axes}; {count:,} parameters)"

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors, and so of what is read."""
        return self.factors[0].dtype

    @property
    def table(self) -> Tensor | None:
        """`latents bonds`: one row for each latent, or None where `latents` stands in several terms."""
        at = self._maps.table
        return None if at is None else self.factors[at].movedim(self.terms[at].index("latents"), 0).flatten(1)

    @property
    def table_parameter(self) -> Tensor | None:
        """The factor that is the table, as it is stored, so that an optimiser can treat it apart; None without one."""
        return None if self._maps.table is None else self.factors[self._maps.table]

    def small_parameters(self) -> list[Tensor]:
        """The factors that are not the table: few numbers, which every latent shares. All factors without a table."""
        return self._small()

    def flat(self, x: Tensor) -> Tensor:
        """From the axes of `reads`, say `... layers positions d_model`, to `... layers d_model`. Raises ShapeError."""
        expected = (self.layers, *self.inner)
        if x.shape[-len(expected) :] != expected:
            named = ", ".join(f"{word}={self.sizes[word]}" for word in self.axes[:-1])
            raise ShapeError(f"flat takes (..., {named}), got {tuple(x.shape)}; move the axes into the order of reads")
        return x.flatten(-len(self.inner))

    def named(self, x: Tensor) -> Tensor:
        """From `... layers d_model` back to the axes of `reads`; the inverse of `flat`. Raises ShapeError."""
        check_layers("weight", self, x)
        return x.unflatten(-1, self.inner)

    @override
    def at(self, layer: int) -> LayerMap:
        """`d_model latents`: one layer as a map of its own, from its slices of the factors. Raises IndexError."""
        if why_replaced(self, FactorizedWeight, BY_FACTORS):
            return super().at(layer)
        return FactorizedLayer(self, layer_number(layer, self.layers), self._layer_maps)

    def to_bonds(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... bonds`: the encoder's small map; `to_latents(x) = to_bonds(x) @ table.T`."""
        self._need_table("to_bonds")
        check_layers("weight", self, x)
        check_dtype(self, x)
        return self._maps.to_bonds(unflattened(x, self.inner), *self._small()).flatten(-len(self._maps.bonds))

    def from_bonds(self, h: Tensor) -> Tensor:
        """`... bonds -> ... layers d_model`: the decoder's small map; `to_layers(z) = from_bonds(z @ table)`."""
        self._need_table("from_bonds")
        h = h.unflatten(-1, [self.sizes[word] for word in self._maps.bonds])
        return flattened(self._maps.from_bonds(h, *self._small()), self.inner)

    def stored_at(self, latents: Tensor, layers: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`table[latents]` as a parameter and an index into it, to write rows or what an optimiser keeps for them.

        `parameter[index]` is a row for each latent, in the shape of the bonds; of a table that has layers, those in
        `layers`.
        """
        self._need_table("stored_at")
        at, axes = cast("int", self._maps.table), ("latents", *self._maps.bonds)
        picked = {"latents": latents} if layers is None else {"latents": latents, "layers": layers}
        ranges = [
            picked[word] if word in picked else torch.arange(self.sizes[word], device=latents.device) for word in axes
        ]
        mesh = dict(zip(axes, torch.meshgrid(ranges, indexing="ij"), strict=True))
        return self.factors[at], tuple(mesh[word] for word in self.terms[at])

    @override
    def to_latents(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`: reads all layers. Raises ShapeError, and TypeError for another dtype."""
        table = self.table
        if table is None:
            check_layers("weight", self, x)
            check_dtype(self, x)
            return self._maps.to_latents(unflattened(x, self.inner), *self.factors)
        return self.to_bonds(x) @ table.T

    @override
    def to_layers(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`: writes all layers; codes may be torch.sparse_csr. Raises ShapeError."""
        check_latents(self, z)
        table = self.table
        if table is None:
            return flattened(self._maps.to_layers(to_dense_codes(z), *self.factors), self.inner)
        return self.from_bonds(sum_rows(z, table))

    @override
    def atoms(self, index: Index) -> Tensor:
        """`to_dense()[..., index]`: what these latents write at every layer, without the rest of the dense form."""
        atoms = flattened(self._maps.atoms(*self._rows(index)), self.inner)
        return rearrange(atoms, "... layers d_model -> layers d_model ...")

    @override
    def norms(self) -> Tensor:
        """`-> layers latents`: the length of each latent's atom at each layer; the dense form is never held.

        From the factors' Gram matrices where that is cheaper than from atoms.
        """
        if self._maps.gram is None:
            return super().norms()
        blocks = [self._rows(slice(start, start + BLOCK)) for start in range(0, self.latents, BLOCK)]
        square = torch.cat([self._maps.gram(*rows, *rows) for rows in blocks]).T
        positive = square > 0  # rounding may leave a zero atom just below zero; its gradient is zero, not nan
        return torch.where(positive, square, 1.0).sqrt() * positive

    @torch.no_grad()
    def normal_(self, std: float) -> "FactorizedWeight":
        """Draws every entry of the dense form with standard deviation `std`. (fmxcoders, section 3.2)"""
        bonds = prod(size for word, size in self.sizes.items() if word not in self.axes)
        for factor in self.factors:
            if factor.is_meta:
                continue  # nothing to draw, and torch would take seconds to import what says so
            factor.normal_(0, (std / bonds**0.5) ** (1 / len(self.factors)))
        return self

    @torch.no_grad()
    def scale_(self, factor: float) -> "FactorizedWeight":
        """Multiplies the dense form by `factor` > 0, shared evenly over the factors."""
        if not 0 < factor < float("inf"):
            raise ValueError(f"scale_ needs a finite factor > 0, got {factor}")
        for tensor in self.factors:
            tensor.mul_(factor ** (1 / len(self.factors)))
        return self

    def carrier(self, axis: str) -> int:
        """The place of the smallest factor that carries an axis: scaling one of several scales the product."""
        return min((i for i, term in enumerate(self.terms) if axis in term), key=lambda i: self.factors[i].numel())

    @torch.no_grad()
    def scale_along_(self, axis: str, factors: Tensor) -> "FactorizedWeight":
        """Multiplies each layer, coordinate or latent of the dense form, as `axis` says, by its factor."""
        at = self.carrier(axis)
        self.factors[at].mul_(factors.reshape([-1 if word == axis else 1 for word in self.terms[at]]))
        return self

    def scale_layers_(self, factors: Tensor) -> "FactorizedWeight":
        """`layers -> `: multiplies each layer of the dense form by its factor."""
        return self.scale_along_("layers", factors)

    def _small(self) -> list[Tensor]:
        return [factor for i, factor in enumerate(self.factors) if i != self._maps.table]

    def _rows(self, index: Index) -> list[Tensor]:
        pairs = zip(self.terms, self.factors, strict=True)
        return [f.movedim(term.index("latents"), 0)[index] if "latents" in term else f for term, f in pairs]

    def _need_table(self, who: str) -> None:
        if self._maps.table is None:
            raise PatternError(
                f"{who} needs a table, and in {self.pattern!r} latents stands in more than one term; "
                "use to_latents and to_layers"
            )


class DenseWeight(FactorizedWeight):
    """`latents layers d_model`: the standard crosscoder's weight, one free tensor. (Lindsey et al. 2024)

    ```python
    weight = fx.DenseWeight(layers=4, d_model=8, latents=32)
    z = weight.to_latents(torch.randn(5, 4, 8))  # tokens latents
    ```
    """

    def __init__(self, layers: int, d_model: int, latents: int):
        super().__init__("latents layers d_model", layers=layers, d_model=d_model, latents=latents)


class CPWeight(FactorizedWeight):
    """`latents r, d_model r, layers r`: canonical polyadic. (fmxcoders, equation 6)

    `rank=None` takes as many parameters as the dense weight.

    ```python
    weight = fx.CPWeight(layers=4, d_model=8, latents=32, rank=6)
    z = weight.to_latents(torch.randn(5, 4, 8))  # tokens latents
    ```
    """

    def __init__(self, layers: int, d_model: int, latents: int, *, rank: int | None = None):
        rank = cp_rank(layers, d_model, latents) if rank is None else rank
        super().__init__("latents r, d_model r, layers r", layers=layers, d_model=d_model, latents=latents, r=rank)
        self.rank = rank


class TensorRingWeight(FactorizedWeight):
    """`latents r2 r3, r1 d_model r2, r3 layers r1`: a tensor ring. (fmxcoders, equation 3)

    `ranks` are (r1, r2, r3). `ranks=None` takes as many parameters as the dense weight.

    ```python
    weight = fx.TensorRingWeight(layers=4, d_model=8, latents=32, ranks=(2, 4, 3))
    z = weight.to_latents(torch.randn(5, 4, 8))  # tokens latents
    ```
    """

    def __init__(self, layers: int, d_model: int, latents: int, *, ranks: Ranks | None = None):
        r1, r2, r3 = tensor_ring_ranks(layers, d_model, latents) if ranks is None else ranks
        pattern = "latents r2 r3, r1 d_model r2, r3 layers r1"
        super().__init__(pattern, layers=layers, d_model=d_model, latents=latents, r1=r1, r2=r2, r3=r3)
        self.ranks = (r1, r2, r3)


class EinsumWeight(FactorizedWeight):
    """Any pattern over the axes of the activations and `latents`: a new factorisation in one line.

    The first below has one direction for each latent, with a gain for each layer. The second reads activations that
    have one axis more.

    ```python
    weight = fx.EinsumWeight("latents d_model, latents layers", layers=4, d_model=8, latents=32)
    sizes = dict(layers=4, positions=6, d_model=8, latents=32, r=5)
    patches = fx.EinsumWeight(
        "latents r, layers positions r, d_model r", reads="layers positions d_model", **sizes
    )
    z = patches.to_latents(patches.flat(torch.randn(5, 4, 6, 8)))  # tokens latents
    x = patches.named(patches.to_layers(z))  # tokens layers positions d_model
    ```
    """
