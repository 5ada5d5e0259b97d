"""The contract of a decoder, and the linear decoder."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from fmxnn.core.errors import ShapeError
from fmxnn.core.outputs import checked
from fmxnn.core.shortcuts import Shortcuts, why_overridden, why_watched
from fmxnn.sparse.codes import Codes, is_sparse, to_codes, to_dense_codes
from fmxnn.weights.parted import write_codes
from fmxnn.weights.weight import Tabled, Weight, why_untabled

DECODER: Shortcuts = {"forward": ("from_codes",), "__call__": ("from_codes",)}
"""Each slow method of a decoder with the fast one that stands for it where codes are sparse."""
_PREFIXES: Shortcuts = {name: ("write_prefixes",) for name in ("forward", "__call__", "from_codes")}


class Decoder(Protocol):
    """`... latents -> ... layers d_model`: a module with a linear part and a bias, and whatever it adds to them.

    CrossLayerDecoder adds nothing. The protocols below say what a decoder may give beside; `fmxnn.check_decoder` tries
    the laws of all that it gives.

    ```python
    class Doubled(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight, self.bias = weight, nn.Parameter(torch.zeros(weight.layers, weight.d_model))

        def forward(self, z):
            return 2 * self.weight.to_layers(z) + self.bias

    fx.check_decoder(Doubled(fx.DenseWeight(2, 3, 5)))
    ```
    """

    @property
    def weight(self) -> Weight:
        """The linear part, which starts, metrics and the auxiliary loss read."""
        ...

    @property
    def bias(self) -> nn.Parameter:
        """`layers d_model`: what is written where no latent is active."""
        ...

    def __call__(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`; codes dense or torch.sparse_csr"""
        ...


@runtime_checkable
class CodesWriter(Protocol):
    """A decoder that writes from sparse codes, touching only the rows of active latents.

    It may also give `obstacle`, a property that says why it cannot do so now ("" where it can).

    ```python
    decoder, z = fx.CrossLayerDecoder(fx.DenseWeight(2, 8, 32)), torch.rand(5, 32)
    codes = fx.sparse.to_codes(fx.to_csr(z))
    torch.testing.assert_close(decoder.from_codes(codes), decoder(z))
    ```
    """

    def from_codes(self, z: Codes) -> Tensor:
        """`tokens latents -> tokens layers d_model`: what `forward` gives, from the codes that a gate chose."""
        ...


@runtime_checkable
class PrefixWriter(Protocol):
    """A decoder that knows a better way to write from the first latents alone; the Matryoshka loss asks for it.

    ```python
    decoder, z = fx.CrossLayerDecoder(fx.DenseWeight(2, 8, 32)), torch.rand(5, 32)
    small, large = decoder.write_prefixes(z, [8, 32])
    torch.testing.assert_close(large, decoder(z))
    ```
    """

    def write_prefixes(self, z: Tensor | Codes, stops: Sequence[int]) -> Iterator[Tensor]:
        """What the latents before each stop write, `... layers d_model`, one after the other; stops rise."""
        ...


class CrossLayerDecoder(nn.Module):
    """`... latents -> ... layers d_model`: every layer from one code.

    To what `weight` writes it adds a bias for each layer and coordinate, which starts at zero. Codes are dense or
    torch.sparse_csr. (fmxcoders, equation 1)

    ```python
    decoder = fx.CrossLayerDecoder(fx.DenseWeight(8, 64, 512))
    decoder(torch.rand(5, 512)).shape  # (5, 8, 64)
    ```
    """

    def __init__(self, weight: Weight):
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(weight.layers, weight.d_model))

    def forward(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`. Raises ShapeError for other latents."""
        weight, shape = self.weight, z.shape
        if shape[-1:] != (weight.latents,):
            raise ShapeError(f"the decoder reads codes of (..., latents={weight.latents}), got {tuple(shape)}")
        x_hat = weight.to_layers(z)
        return checked(x_hat, (*shape[:-1], weight.layers, weight.d_model), weight, "to_layers") + self.bias

    def from_codes(self, z: Codes) -> Tensor:
        """`tokens latents -> tokens layers d_model`: `forward` from the codes that `CrossLayerEncoder.choose` gave."""
        weight = self.weight
        x_hat = write_codes(weight, z)
        return checked(x_hat, (z.shape[0], weight.layers, weight.d_model), weight, "from_bonds") + self.bias

    def write_prefixes(self, z: Tensor | Codes, stops: Sequence[int]) -> Iterator[Tensor]:
        """What the latents before each stop write, `... layers d_model`, one after the other.

        Dense codes are added up at the weight's table: what each prefix adds to the one before.
        """
        table = cast("Tabled", self.weight).table if not why_untabled(self.weight) else None
        if isinstance(z, Codes) or is_sparse(z) or not isinstance(table, Tensor):
            yield from each_prefix(self, z, stops)
            return
        h = z.new_zeros(())
        for start, stop in pairwise((0, *stops)):
            h = h + z[..., start:stop] @ table[start:stop]
            yield cast("Tabled", self.weight).from_bonds(h) + self.bias


def why_not_written(decoder: Decoder) -> str:
    """Why a decoder cannot write from sparse codes, if it cannot."""
    module = cast("nn.Module", decoder)
    return (
        why_untabled(decoder.weight)
        or why_overridden(module, DECODER)
        or cast("str", getattr(decoder, "obstacle", ""))
        or why_watched(module.modules())
    )


def written(decoder: Decoder, z: Codes) -> Tensor:
    """`tokens latents -> tokens layers d_model`: what a decoder without an obstacle writes from sparse codes."""
    weight, x_hat = decoder.weight, cast("CodesWriter", decoder).from_codes(z)
    return checked(x_hat, (z.shape[0], weight.layers, weight.d_model), decoder, "from_codes")


def written_prefixes(decoder: Decoder, z: Tensor | Codes, stops: Sequence[int]) -> Iterator[Tensor]:
    """What the latents before each stop write, `... layers d_model`, one after the other.

    It asks the decoder's `write_prefixes`, unless that would pass by a method or a hook of the user's own.
    """
    module = cast("nn.Module", decoder)
    if why_overridden(module, _PREFIXES) or why_watched(module.modules()):
        return each_prefix(decoder, z, stops)
    return cast("PrefixWriter", decoder).write_prefixes(z, stops)


def each_prefix(decoder: Decoder, z: Tensor | Codes, stops: Sequence[int]) -> Iterator[Tensor]:
    """The same by one whole decoding for each stop, sparse where codes and decoder are."""
    if not (isinstance(z, Tensor) and not is_sparse(z)) and not why_not_written(decoder):
        codes = to_codes(z) if isinstance(z, Tensor) else z
        for stop in stops:
            yield written(decoder, codes._replace(values=torch.where(codes.columns < stop, codes.values, 0.0)))
        return
    z = to_dense_codes(z)
    places = torch.arange(z.shape[-1], device=z.device)
    for stop in stops:
        yield decoder(torch.where(places < stop, z, 0.0))
