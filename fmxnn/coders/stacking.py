"""Dictionaries of single layers side by side, as one dictionary of all of them."""

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.coders.crosscoder import Crosscoder, CrossLayerDecoder, CrossLayerEncoder
from fmxnn.coders.folding import Normalised
from fmxnn.coders.normalisation import Normalisation
from fmxnn.core.contraction import ShapeError
from fmxnn.gates.thresholds import Calibrated, ranked
from fmxnn.gates.top_k import why_dense
from fmxnn.sparse import codes as sparse
from fmxnn.sparse.tables import Tables, split_rows
from fmxnn.weights.combined import ConcatWeight
from fmxnn.weights.connectivity import PlacedWeight


class SplitGate(Calibrated):
    """`... latents -> ... latents`: each run of neighbouring latents goes through a gate of its own; `runs` says how long they are.

    `k`, where every gate has one, is what they keep together. Codes are sparse where every gate's can be.
    """

    def __init__(self, *gates: nn.Module, runs: tuple[int, ...]):
        super().__init__()
        if len(gates) != len(runs) or not gates:
            raise ValueError(f"SplitGate takes one run of latents for each gate, got {len(gates)} gates and runs={tuple(runs)}")
        self.gates, self.runs, self.latents = nn.ModuleList(gates), tuple(runs), sum(runs)

    @override
    def extra_repr(self) -> str:
        """How many latents each gate takes."""
        return f"runs={self.runs}"

    @property
    def k(self) -> int:
        """The sum of the gates'."""
        return sum(cast("int", gate.k) for gate in self.gates)

    @k.setter
    def k(self, k: int) -> NoReturn:
        """Raises TypeError: how a sum is shared out is not known."""
        raise TypeError(f"SplitGate's k is the sum of its {len(self.gates)} gates', got k={k!r:.200}; set a gate's own: split.gates[0].k")

    @property
    def threshold(self) -> Tensor:
        """The smallest of the gates' that have one."""
        found = [cast("Tensor", gate.threshold).amin() for gate in self.gates if hasattr(gate, "threshold")]
        if not found:
            raise AttributeError("no gate of this SplitGate has a threshold")
        return torch.stack(found).amin()

    @property
    def obstacle(self) -> str:
        """Why codes cannot be sparse, if they cannot."""
        return next(filter(None, map(why_dense, self.gates)), "")

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        return torch.cat([gate(run) for gate, run in zip(self.gates, pre.split(self.runs, dim=-1), strict=True)], dim=-1)

    def choose(self, read: Tensor, table: Tensor | Tables, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`: sparse codes, each gate's from its own rows."""
        pieces = zip(self.gates, split_rows(read, table, self.runs), bias.split(self.runs), strict=True)
        return sparse.side_by_side([cast("Any", gate).choose(*own, shift, propose=propose) for gate, own, shift in pieces])

    def ranked(self, pre: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """`... latents -> `: what each gate ranks of its own run."""
        for gate, run in zip(self.gates, pre.split(self.runs, dim=-1), strict=True):
            yield from ranked(gate, run)


@torch.no_grad()
def stack_layers(*crosscoders: nn.Module) -> Crosscoder | Normalised:
    """One crosscoder of the layers of all, in which each does what it did alone; from single-layer dictionaries the per-layer baseline.

    Its weights are theirs, each at its place and nothing elsewhere; weights and gates are shared with what was given, biases copied. Latents stand in the
    order given. Where one is a Normalised, so is the whole, with the scale and mean of each layer. Raises TypeError for anything but crosscoders
    with CrossLayerDecoders and ShapeError where one does not write the layers it reads.
    """
    if any(isinstance(one, Normalised) for one in crosscoders):
        stacked = stack_layers(*(one.crosscoder if isinstance(one, Normalised) else one for one in crosscoders))
        read, written = (_beside(crosscoders, which) for which in ("normalisation", "output"))
        return Normalised(cast("Crosscoder", stacked), read, output=written).train(stacked.training)
    given = [_stackable(crosscoder) for crosscoder in crosscoders]
    if not given:
        raise ValueError("stack_layers puts crosscoders side by side, got none; pass one for each layer")
    sizes = [coder.encoder.weight.layers for coder in given]
    at = [sum(sizes[:i]) for i in range(len(sizes))]
    readers = [PlacedWeight(coder.encoder.weight, layers=sum(sizes), at=first) for coder, first in zip(given, at, strict=True)]
    writers = [PlacedWeight(coder.decoder.weight, layers=sum(sizes), at=first) for coder, first in zip(given, at, strict=True)]
    gate = SplitGate(*(coder.encoder.sparsifier for coder in given), runs=tuple(weight.latents for weight in readers))
    encoder, decoder = CrossLayerEncoder(ConcatWeight(*readers), gate), CrossLayerDecoder(ConcatWeight(*writers))
    encoder.bias = nn.Parameter(torch.cat([coder.encoder.bias for coder in given]))
    decoder.bias = nn.Parameter(torch.cat([coder.decoder.bias for coder in given]))
    return Crosscoder(encoder, decoder).train(given[0].training)


def _beside(crosscoders: Sequence[nn.Module], which: str) -> Normalisation:
    """The normalisations of all, side by side; of one that has none, scale 1 and mean 0."""
    parts: list[Normalisation] = []
    for one in crosscoders:
        if isinstance(one, Normalised):
            parts.append(cast("Normalisation", one.get_submodule(which)))
        else:
            coder = cast("Crosscoder", one)
            weight = coder.encoder.weight
            parts.append(Normalisation(weight.layers, weight.d_model).to(coder.encoder.bias.device, coder.encoder.bias.dtype))
    return Normalisation.of(*(torch.cat([part.get_buffer(name) for part in parts]) for name in ("scale", "mean")))


def _stackable(given: nn.Module) -> Crosscoder:
    if not isinstance(given, Crosscoder):
        raise TypeError(
            f"stack_layers takes crosscoders, each with a CrossLayerDecoder, got {type(given).__name__}; it adds nothing beside latents"
        )
    for part, known in ((given, Crosscoder), (given.encoder, CrossLayerEncoder), (given.decoder, CrossLayerDecoder)):
        if type(part) is not known:  # a subclass may do what its weight does not say
            raise TypeError(
                f"stack_layers takes crosscoders, each with a {known.__name__}, got {type(part).__name__}; it adds nothing beside latents"
            )
    read, written = given.encoder.weight, given.decoder.weight
    if (read.layers, read.d_model) != (written.layers, written.d_model):
        raise ShapeError(
            f"stack_layers takes crosscoders that write the layers they read, got one that reads layers={read.layers}, d_model={read.d_model} "
            f"and writes layers={written.layers}, d_model={written.d_model}; place their weights yourself: PlacedWeight"
        )
    return given
