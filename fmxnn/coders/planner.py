"""What a crosscoder asks before each pass: the plan for its sizes, kept, and the reasons against sparse codes."""

from typing import Protocol, cast

import torch

from fmxnn.coders.decoder import Decoder
from fmxnn.coders.encoder import Encoder
from fmxnn.coders.planning import Backend, Bonds, Plan, Sizes, plan
from fmxnn.core.contraction import PLANNED_BATCH
from fmxnn.gates.questions import k_of, why_uncounted
from fmxnn.weights.weight import Tabled, Weight


class _Plannable(Protocol):
    """What a planner reads of a crosscoder."""

    training: bool

    @property
    def encoder(self) -> Encoder: ...
    @property
    def decoder(self) -> Decoder: ...
    @property
    def backend(self) -> str: ...
    @property
    def obstacle(self) -> str: ...


class Planner:
    """Plans for one crosscoder and keeps the last plan, since making one takes as long as a small batch.

    ```python
    coder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(2, 8, 64), fx.TopK(4)), fx.CrossLayerDecoder(fx.DenseWeight(2, 8, 64))
    )
    coder.plan(256) is coder.plan(256)  # True
    ```
    """

    def __init__(self) -> None:
        self._kept: tuple[object, Plan] | None = None

    def __reduce__(self) -> tuple[type["Planner"], tuple[()]]:
        """A copy keeps nothing: what was planned for may be changed in it."""
        return Planner, ()

    def plan(self, of: _Plannable, tokens: int) -> Plan:
        """The backend for a batch of so many tokens; a compiled graph keeps no plan."""
        obstacle = of.obstacle
        plan = _fresh(of, tokens, obstacle) if torch.compiler.is_compiling() else self._plan(of, tokens, obstacle)
        if of.backend == "auto" and plan.taken.backend == "sparse" and (why := why_unknown(of)):
            return plan.forced("dense", why)
        return plan

    def sparse_plan(self, of: _Plannable, tokens: int) -> Plan | None:
        """The plan of one pass, where it is sparse. Where sizes make it dense, no obstacle is looked for."""
        if torch.compiler.is_compiling():
            tokens = PLANNED_BATCH
        elif self._plan(of, tokens, "").taken.backend == "dense":
            return None
        plan = self.plan(of, tokens)
        return plan if plan.taken.backend == "sparse" else None

    def explain(self, of: _Plannable, tokens: int) -> str:
        """The plan as a table, with the reason why it is dense, also where sizes alone would make it so."""
        plan, why = self.plan(of, tokens), why_unknown(of) if of.backend == "auto" else ""
        return str(plan.forced("dense", why) if why and not plan.forced_by else plan)

    def _plan(self, of: _Plannable, tokens: int, obstacle: str) -> Plan:
        """The plan that is kept, unless something that it was made from changed."""
        encoder = of.encoder
        gate, bias = encoder.sparsifier, encoder.bias
        modes = of.backend, of.training, gate.training, k_of(gate), bias.dtype, bias.device
        asked = tokens, obstacle, modes, encoder.weight, of.decoder.weight, gate
        if self._kept is None or self._kept[0] != asked:
            self._kept = asked, _fresh(of, tokens, obstacle)
        return self._kept[1]


def why_unknown(of: _Plannable) -> str:
    """Why the number of a crosscoder's codes is not known beforehand, if it is not."""
    return why_uncounted(of.encoder.sparsifier, training=of.training)


def _fresh(of: _Plannable, tokens: int, obstacle: str) -> Plan:
    if obstacle and of.backend == "sparse":
        raise TypeError(f"the sparse backend cannot run: {obstacle}; set backend to 'auto' or 'dense'")
    reader, writer, k = of.encoder.weight, of.decoder.weight, k_of(of.encoder.sparsifier)
    small = sum(getattr(weight, "small_flops", 0.0) for weight in (reader, writer))
    bonds = Bonds(_bonds(reader), _bonds(writer))
    sizes = Sizes(tokens, reader.latents, bonds, reader.latents if k is None else k, small)
    made = plan(sizes, of.encoder.bias.dtype, of.encoder.bias.device, training=of.training)
    if obstacle:
        return made.forced("dense", obstacle)
    return made if of.backend == "auto" else made.forced(cast("Backend", of.backend), "set by hand")


def _bonds(weight: Weight) -> int:
    table = weight.table if isinstance(weight, Tabled) else None
    return weight.layers * weight.d_model if table is None else -(-table.numel() // weight.latents)
