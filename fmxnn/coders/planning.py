"""Which backend a crosscoder takes, dense products or sparse codes, from sizes, dtype and device alone."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

Backend = Literal["dense", "sparse"]


@dataclass(frozen=True)
class Overhead:
    """What sparse codes cost beside their products, in seconds: a call, and a token of it."""

    call: float
    token: float


@dataclass(frozen=True)
class Rates:
    """What one core or one GPU does a second.

    - `product`: FLOP of a dense product.
    - `rows`: bytes of scattered rows.
    - `chosen`: bytes of a matrix tokens x latents from which codes are chosen.
    - `learned`: the same in training, with the dense path's masks and gradients, which are as large.
    """

    product: float
    rows: float
    chosen: float
    learned: float
    overhead: Overhead


_CORE, _GPU = Overhead(3.5e-3, 1.2e-5), Overhead(3e-4, 0.0)
CORES = {
    torch.float32: Rates(9e10, 2.2e10, 6.5e8, 1.3e8, _CORE),
    torch.float64: Rates(4.5e10, 2.2e10, 6.5e8, 1.3e8, _CORE),
    torch.bfloat16: Rates(4e10, 0.5e10, 3.5e8, 7e7, _CORE),
    torch.float16: Rates(2e10, 0.5e10, 3.5e8, 7e7, _CORE),
}
"""One core of an AMD EPYC with AVX512: float32 fitted to benchmarks/choice.py and parts.py, the others in proportion.

Only their ratios decide. A core waits for fresh memory more than it computes on it, so `chosen` and `learned` are far
below what it copies a second. What a call and a token cost hardly shrinks with more threads, so it is counted as
on four.
"""
GPUS = {
    torch.float32: Rates(2.5e14, 1.5e12, 8e11, 4e11, _GPU),
    torch.float64: Rates(3e13, 1.5e12, 8e11, 4e11, _GPU),
    torch.bfloat16: Rates(5.5e14, 1.5e12, 8e11, 4e11, _GPU),
    torch.float16: Rates(5.5e14, 1.5e12, 8e11, 4e11, _GPU),
}
"""An H100 by its data sheet, estimated and not measured.

70 % of a product and 80 % of a stream, which is read three times to choose and six times to learn.
"""
PROPOSAL = 4.5
"""How much faster a core with AVX512-BF16 multiplies in bf16 than in float32."""
FAST_BF16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
"""Whether this processor has it: asked of the processor and not timed, so that equal runs take equal paths."""


@dataclass(frozen=True)
class Bonds:
    """How many numbers a latent has at the table that is read and at the one that is written."""

    read: int
    written: int


@dataclass(frozen=True)
class Sizes:
    """One call of a crosscoder: `k` codes a token, and `small` FLOP a token for both small maps.

    ```python
    from fmxnn.coders.planning import Bonds, Sizes, plan

    sizes = Sizes(tokens=4096, latents=131072, bonds=Bonds(read=2048, written=2048), k=32)
    plan(sizes, torch.float32, torch.device("cpu"), training=True).taken.backend  # "sparse"
    ```
    """

    tokens: int
    latents: int
    bonds: Bonds
    k: int
    small: float = 0.0

    def __str__(self) -> str:
        return (
            f"tokens={self.tokens}, latents={self.latents}, k={self.k}, "
            f"bonds read={self.bonds.read} and written={self.bonds.written}, small={self.small}"
        )


@dataclass(frozen=True)
class Setting:
    """Where a call runs."""

    dtype: torch.dtype
    device: torch.device
    training: bool

    def __str__(self) -> str:
        where = "one core" if self.device.type == "cpu" else self.device.type
        return f"{self.dtype}, times of {where}"


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
    """The choice taken, and what it was taken from. `str(plan)` is a table to read.

    ```python
    coder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(2, 8, 64), fx.TopK(4)), fx.CrossLayerDecoder(fx.DenseWeight(2, 8, 64))
    )
    coder.plan(1024).taken.backend  # "dense"
    ```
    """

    taken: Choice
    choices: tuple[Choice, ...]
    sizes: Sizes
    setting: Setting
    forced_by: str = ""

    def forced(self, backend: Backend, why: str) -> "Plan":
        """The same comparison with this backend taken, the cheaper of its choices."""
        taken = _cheapest([choice for choice in self.choices if choice.backend == backend])
        return replace(self, taken=taken, forced_by=f"{backend}: {why}")

    @property
    def reason(self) -> str:
        """What was compared, what rules its cost, and why it does not decide where it does not."""
        training = self.setting.training
        said = [f"{'training step' if training else 'inference'}, {self.sizes}, {self.setting}"]
        share = _small(self.sizes, training) / max(_cheapest(list(self.choices)).flops, 1.0)
        if share > 0.5:
            said.append(f"the small maps take {share:.0%} of the FLOP: lower the ranks that join layers and d_model")
        return "; ".join([*said, self.forced_by] if self.forced_by else said)

    def __str__(self) -> str:
        lines = [f"{'backend':<16} {'GFLOP':>9} {'MB moved':>9} {'ms predicted':>13}"]
        for choice in self.choices:
            name = choice.backend + (" + bf16" if choice.propose else "")
            mark = " <- taken" if choice == self.taken else ""
            lines.append(
                f"{name:<16} {choice.flops / 1e9:>9.2f} {choice.bytes / 1e6:>9.1f} {choice.seconds * 1e3:>13.2f}{mark}"
            )
        return "\n".join([*lines, self.reason])


def plan(sizes: Sizes, dtype: torch.dtype, device: torch.device, *, training: bool) -> Plan:
    """The cheapest choice in predicted time on one core or one GPU; the number of threads does not move it."""
    rates = (GPUS if device.type == "cuda" else CORES).get(dtype, CORES[torch.float32])
    choices = [_dense(sizes, dtype, rates, training), _sparse(sizes, dtype, rates, training, propose=False)]
    if proposes(dtype, device):
        choices.append(_sparse(sizes, dtype, rates, training, propose=True))
    return Plan(_cheapest(choices), tuple(choices), sizes, Setting(dtype, device, training))


def proposes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether bf16 may propose codes that float32 decides: where this processor multiplies it faster."""
    return dtype == torch.float32 and device.type == "cpu" and FAST_BF16


def _cheapest(choices: list[Choice]) -> Choice:
    cheapest = choices[0]
    for choice in choices[1:]:  # torch.compile reads no min with a key
        cheapest = choice if choice.seconds < cheapest.seconds else cheapest
    return cheapest


def _small(sizes: Sizes, training: bool) -> float:
    """FLOP of both small maps: once forward, and twice for the gradients of their input and of their factors."""
    return sizes.tokens * sizes.small * (3 if training else 1)


def _dense(sizes: Sizes, dtype: torch.dtype, rates: Rates, training: bool) -> Choice:
    product = 2.0 * sizes.tokens * sizes.latents
    flops = product * (sizes.bonds.read + sizes.bonds.written)
    if training:
        flops += product * (sizes.bonds.read + 2 * sizes.bonds.written)  # both tables' gradients, and the codes'
    flops += _small(sizes, training)
    matrix = float(sizes.tokens * sizes.latents * dtype.itemsize)
    return Choice(
        "dense",
        False,
        flops,
        6 * matrix,
        flops / rates.product + matrix / (rates.learned if training else rates.chosen),
    )


def _sparse(sizes: Sizes, dtype: torch.dtype, rates: Rates, training: bool, *, propose: bool) -> Choice:
    read, written = sizes.bonds.read, sizes.bonds.written
    entries = float(min(sizes.tokens * sizes.k, sizes.tokens * sizes.latents))
    product = 2.0 * sizes.tokens * sizes.latents * read
    rows = entries * written
    if training:
        rows += entries * (2 * written + read)
    if propose:
        rows += 2 * entries * read  # every candidate once more in float32
    matrix = float(sizes.tokens * sizes.latents * dtype.itemsize)
    copied = propose * 1.5 * sizes.latents * read * dtype.itemsize
    small, beside = _small(sizes, training), rates.overhead.call + rates.overhead.token * sizes.tokens
    seconds = product / rates.product / (PROPOSAL if propose else 1) + small / rates.product
    seconds += (rows * dtype.itemsize + copied) / rates.rows + matrix / rates.chosen + beside
    return Choice("sparse", propose, product + small + 2 * rows, rows * dtype.itemsize + 3 * matrix + copied, seconds)
