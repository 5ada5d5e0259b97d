"""Why codes are not sparse: a part cannot, or sparse codes would pass by a method of the user's own, a hook or a parametrization."""

from typing import Protocol, cast

from torch import nn

from fmxnn.core.shortcuts import DECODER, ENCODER, why_overridden, why_watched
from fmxnn.gates.gate import why_dense
from fmxnn.sparse.tables import Tables
from fmxnn.weights.weight import Tabled, Weight, why_untabled


class _Encoder(Protocol):
    weight: Weight
    sparsifier: nn.Module


class _Decoder(Protocol):
    @property
    def weight(self) -> Weight: ...


def why_not_chosen(encoder: _Encoder) -> str:
    """Why an encoder cannot choose sparse codes, if it cannot."""
    read, gate = cast("nn.Module", encoder), encoder.sparsifier
    return (
        why_untabled(encoder.weight)
        or why_dense(gate)
        or (_why_one_table(gate) if isinstance(cast("Tabled", encoder.weight).table, Tables) else "")
        or why_overridden(read, ENCODER)
        or why_watched([read, *encoder.weight.modules(), *gate.modules()])
    )


def why_not_written(decoder: _Decoder) -> str:
    """Why a decoder cannot write from sparse codes, if it cannot."""
    module = cast("nn.Module", decoder)
    return (
        why_untabled(decoder.weight)
        or why_overridden(module, DECODER)
        or cast("str", getattr(decoder, "obstacle", ""))
        or why_watched(module.modules())
    )


def _why_one_table(gate: nn.Module) -> str:
    """A `choose` from outside fmxnn is handed one table, as a tensor, never several."""
    for part in gate.modules():
        choose = getattr(type(part), "choose", None)
        if choose is not None and not choose.__module__.startswith("fmxnn."):
            return f"{type(part).__name__}.choose takes one table, and the weight has several"
    return ""
