"""Which backend a crosscoder takes, dense products or sparse codes, from sizes, dtype and device alone."""

from dataclasses import dataclass
from typing import Literal

import torch

Backend = Literal["dense", "sparse"]


@dataclass(frozen=True)
class Rates:
    """What one core or one GPU does a second: FLOP of a dense product, bytes of scattered rows and of a stream; seconds spent on small operators."""

    product: float
    rows: float
    stream: float
    small: float


CORES = {
    torch.float32: Rates(9e10, 2.2e10, 2e10, 1.5e-3),
    torch.float64: Rates(4.5e10, 2.2e10, 2e10, 1.5e-3),
    torch.bfloat16: Rates(4e10, 0.5e10, 1e10, 1.5e-3),
    torch.float16: Rates(2e10, 0.5e10, 1e10, 1.5e-3),
}
"""One core of an AMD EPYC with AVX512, measured by benchmarks/parts.py; the choice hangs on their ratios only."""
GPUS = {
    torch.float32: Rates(2.5e14, 1.5e12, 2.4e12, 3e-4),
    torch.float64: Rates(3e13, 1.5e12, 2.4e12, 3e-4),
    torch.bfloat16: Rates(5.5e14, 1.5e12, 2.4e12, 3e-4),
    torch.float16: Rates(5.5e14, 1.5e12, 2.4e12, 3e-4),
}
"""An H100 by its data sheet, at 70 % of a product and 80 % of a stream; estimated, not measured. float32 products run in TF32."""
PROPOSAL = 4.5
"""How much faster a core with AVX512-BF16 multiplies in bf16 than in float32."""
FAST_BF16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
"""Whether this processor has it: asked of the processor and not timed, so that equal runs take equal paths."""


@dataclass(frozen=True)
class Sizes:
    """One call of a crosscoder. `read` and `written` are the bonds of the two tables, `k` the codes a token, `small` the FLOP a token of both small maps."""

    tokens: int
    latents: int
    read: int
    written: int
    k: int
    small: float = 0.0


@dataclass(frozen=True)
class Choice:
    """A backend with what it costs: FLOP, bytes beyond dense products' own, predicted seconds."""

    backend: Backend
    propose: bool
    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The choice taken, and what it was taken from. `str(plan)` is a table to read."""

    taken: Choice
    choices: tuple[Choice, ...]
    reason: str

    def forced(self, backend: Backend, reason: str) -> "Plan":
        """The same comparison with this backend taken, the cheaper of its choices."""
        taken = _cheapest([choice for choice in self.choices if choice.backend == backend])
        return Plan(taken, self.choices, f"{self.reason}; {backend}: {reason}")

    def __str__(self) -> str:
        lines = [f"{'backend':<16} {'GFLOP':>9} {'MB moved':>9} {'ms predicted':>13}"]
        for choice in self.choices:
            name = choice.backend + (" + bf16" if choice.propose else "")
            mark = " <- taken" if choice == self.taken else ""
            lines.append(f"{name:<16} {choice.flops / 1e9:>9.2f} {choice.bytes / 1e6:>9.1f} {choice.seconds * 1e3:>13.2f}{mark}")
        return "\n".join([*lines, self.reason])


def plan(sizes: Sizes, dtype: torch.dtype, device: torch.device, *, training: bool) -> Plan:
    """The cheapest choice in predicted time on one core or one GPU; the number of threads does not move it."""
    rates = (GPUS if device.type == "cuda" else CORES).get(dtype, CORES[torch.float32])
    choices = [_dense(sizes, dtype, rates, training), _sparse(sizes, dtype, rates, training, propose=False)]
    if dtype == torch.float32 and device.type == "cpu" and FAST_BF16:
        choices.append(_sparse(sizes, dtype, rates, training, propose=True))
    taken = _cheapest(choices)
    where = "one core" if device.type == "cpu" else device.type
    said = f"{'training step' if training else 'inference'}, {sizes}, {dtype}, times of {where}"
    share = _small(sizes, training) / max(taken.flops, 1.0)
    if share > 0.5:
        said = f"{said}; the small maps take {share:.0%} of the FLOP: lower the ranks that join layers and d_model"
    return Plan(taken, tuple(choices), said)


def _cheapest(choices: list[Choice]) -> Choice:
    cheapest = choices[0]
    for choice in choices[1:]:  # torch.compile reads no min with a key
        cheapest = choice if choice.seconds < cheapest.seconds else cheapest
    return cheapest


def _small(sizes: Sizes, training: bool) -> float:
    """FLOP of both small maps: once forward, and twice as much for the gradients of their input and of their factors."""
    return sizes.tokens * sizes.small * (3 if training else 1)


def _dense(sizes: Sizes, dtype: torch.dtype, rates: Rates, training: bool) -> Choice:
    product = 2.0 * sizes.tokens * sizes.latents
    flops = product * (sizes.read + sizes.written)
    if training:
        flops += product * (sizes.read + 2 * sizes.written)  # both tables' gradients, and the codes'
    flops += _small(sizes, training)
    moved = 6.0 * sizes.tokens * sizes.latents * dtype.itemsize
    return Choice("dense", False, flops, moved, flops / rates.product + moved / rates.stream)


def _sparse(sizes: Sizes, dtype: torch.dtype, rates: Rates, training: bool, *, propose: bool) -> Choice:
    entries = float(min(sizes.tokens * sizes.k, sizes.tokens * sizes.latents))
    product = 2.0 * sizes.tokens * sizes.latents * sizes.read
    rows = entries * sizes.written
    if training:
        rows += entries * (2 * sizes.written + sizes.read)
    if propose:
        rows += 2 * entries * sizes.read  # every candidate once more in float32
    stream = 3.0 * sizes.tokens * sizes.latents * dtype.itemsize + propose * 1.5 * sizes.latents * sizes.read * dtype.itemsize
    small = _small(sizes, training)
    seconds = product / rates.product / (PROPOSAL if propose else 1) + small / rates.product
    seconds += rows * dtype.itemsize / rates.rows + stream / rates.stream + rates.small
    return Choice("sparse", propose, product + small + 2 * rows, rows * dtype.itemsize + stream, seconds)
