"""What reproduce_paper.py trains: one preset for each model of the fmxcoders paper, and `tiny` for the model of this
repository; variants by name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

import fmxnn as fx
from fmxnn.reports.train import make_weight as weight_of

Kind = Literal["dense", "sae", "tr", "tr-wide", "cp"]
Start = Literal["paper", "tied", "isometric", "data"]
Activations = Callable[[], Tensor]
STARTS: dict[Start, Callable[[fx.Crosscoder, Activations], fx.Crosscoder]] = {
    "paper": lambda crosscoder, _: fx.gaussian_start(crosscoder),
    "tied": lambda crosscoder, _: fx.tied_start(crosscoder),
    "isometric": lambda crosscoder, _: fx.isometric_start(crosscoder),
    "data": lambda crosscoder, activations: fx.data_start(crosscoder, activations()),
}
TITLES: dict[Kind, str] = {"dense": "dense", "sae": "SAE per layer", "tr": "TR", "tr-wide": "TR wide", "cp": "CP"}
TINY = Path(__file__).parent / "tiny-lm"


@dataclass(frozen=True)
class Variant:
    """One dictionary. `tr` has the paper's ranks, `tr-wide` those with r1 r2 >= d_model; `share` is of the dense
    weight's parameters.
    """

    weight: Kind
    start: Start
    p: float = 0.0
    share: float = 1.0
    auxiliary: bool = False
    faster: float = 1.0
    """The preset's learning rate times this."""
    full: bool = field(default=False, compare=False)
    """Probed and spliced as well; trained with every seed before the others' second."""

    @property
    def name(self) -> str:
        """What a table calls it."""
        parts = [f"{TITLES[self.weight]}, {self.start} start"]
        parts += [f"p={self.p:g}"] if self.p else []
        parts += [f"1/{1 / self.share:g} of the parameters"] if self.share != 1 else []
        parts += ["auxiliary loss"] if self.auxiliary else []
        return ", ".join(parts + ([f"learning rate x{self.faster:g}"] if self.faster != 1 else []))

    @property
    def slug(self) -> str:
        """What its files are called."""
        return f"{self.weight}-{self.start}-p{self.p:g}-share{self.share:g}-aux{self.auxiliary:d}-lr{self.faster:g}"


def named(name: str) -> Variant:
    """The variant of a name such as tr-wide-isometric, or dense-tied-p0.05-share0.5-aux-lr2: what is left out is the
    default. Its slug is a name too.
    """
    kinds, starts = ("|".join(map(re.escape, each)) for each in (TITLES, STARTS))
    found = re.fullmatch(
        rf"({kinds})-({starts})(?:-p(\d[\d.]*))?(?:-share(\d[\d.]*))?(?:-aux([01]?))?(?:-lr(\d[\d.]*))?", name
    )
    if found is None:
        raise ValueError(
            f"a variant is called {', '.join(TITLES)}, then {', '.join(STARTS)}, as in tr-wide-isometric-aux, got "
            f"{name!r}"
        )
    weight, start, p, share, auxiliary, faster = found.groups()
    numbers = {key: float(value) for key, value in (("p", p), ("share", share), ("faster", faster)) if value}
    return Variant(cast("Kind", weight), cast("Start", start), auxiliary=auxiliary in ("", "1"), **numbers)


@dataclass(frozen=True)
class Preset:
    """A model, what is read of it, and the variants to train on it."""

    model: str
    layers: tuple[int, ...]
    tokens: int
    variants: tuple[Variant, ...]
    text: str = "Skylion007/openwebtext"
    latents: int = 16_384
    k: int = 64
    batch: int = 4096
    context: int = 128
    learning_rate: float = 3e-4
    dead_after: int = 10_000_000
    heldout: int = 200_000
    scaled: bool = False
    """Train on activations scaled to a mean norm of sqrt(d_model)."""
    stored: bool = False
    """Harvest once to a file that all jobs share, where it fits on a disk; else every job runs the language model."""
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def steps(self) -> int:
        """Batches a dictionary is trained on."""
        return self.tokens // self.batch


@dataclass(frozen=True)
class Job:
    """A variant with a seed: what one worker does in one go."""

    variant: Variant
    seed: int

    @property
    def slug(self) -> str:
        """What its files are called."""
        return f"{self.variant.slug}-seed{self.seed}"


def jobs(preset: Preset) -> list[Job]:
    """Every variant's first seed; then the other seeds of a variant together, those measured in full first."""
    first, *others = preset.seeds
    later = [Job(variant, seed) for variant in preset.variants for seed in others]
    return [*(Job(variant, first) for variant in preset.variants), *sorted(later, key=lambda job: not job.variant.full)]


def make_weight(variant: Variant, layers: int, d_model: int, latents: int) -> fx.Weight:
    """`layers d_model latents` of the variant's kind and share."""
    kind = "dense" if variant.weight == "sae" else variant.weight
    return weight_of(kind, layers, d_model, latents, share=variant.share)


def make_crosscoders(
    preset: Preset, job: Job, d_model: int, activations: Activations
) -> list[tuple[fx.Crosscoder, slice]]:
    """The job's dictionaries, with the places on the layers axis that each reads: one crosscoder for all, or an SAE for
    each.

    A start that wants `tokens layers d_model` to draw from asks `activations` for them.
    """
    torch.manual_seed(job.seed)
    count, variant = len(preset.layers), job.variant
    places = [slice(at, at + 1) for at in range(count)] if variant.weight == "sae" else [slice(0, count)]
    made: list[tuple[fx.Crosscoder, slice]] = []
    for place in places:
        weight = partial(make_weight, variant, place.stop - place.start, d_model, preset.latents)
        encoder = fx.CrossLayerEncoder(weight(), fx.BatchTopK(preset.k), mask=fx.LayerMask(variant.p))
        crosscoder = fx.Crosscoder(encoder, fx.CrossLayerDecoder(weight()))
        made.append((STARTS[variant.start](crosscoder, lambda place=place: activations()[:, place]), place))
    return made


BASELINES = (
    Variant("dense", "paper", full=True),
    Variant("dense", "tied", full=True),
    Variant("sae", "tied", full=True),
)
MASKED = tuple(Variant("dense", start, p=0.05, full=True) for start in ("paper", "tied"))
PAPER = tuple(Variant(weight, "paper", p=p, full=True) for weight in ("tr", "cp") for p in (0.0, 0.05))
OURS = tuple(Variant("tr-wide", "isometric", p=p, full=True) for p in (0.0, 0.05))
SWEEPS = tuple(Variant(weight, "paper", p=p) for weight in ("dense", "tr", "cp") for p in (0.02, 0.1))
SHARES = tuple(
    Variant(weight, "paper", p=p, share=share)
    for weight in ("tr", "cp")
    for share in (1 / 2, 1 / 4, 1 / 8)
    for p in (0.0, 0.05)
)
ROW = BASELINES + MASKED + PAPER + OURS

TINY_ROWS = (
    *(BASELINES[0], BASELINES[1], *OURS),
    *(Variant("dense", "data", full=True), Variant("tr-wide", "data", full=True)),
    Variant("tr-wide", "isometric", faster=2.0, full=True),
    *(Variant("dense", "tied", p=0.05, full=True), Variant("tr", "paper", full=True), Variant("cp", "tied", full=True)),
    *(BASELINES[2], Variant("cp", "tied", p=0.05, full=True), Variant("tr", "paper", p=0.05, full=True)),
    Variant("dense", "paper", p=0.05, full=True),
    *(Variant("dense", "tied", auxiliary=True, full=True), Variant("tr-wide", "isometric", auxiliary=True, full=True)),
    Variant("dense", "paper", auxiliary=True),
    *(Variant("tr-wide", "isometric", p=p) for p in (0.02, 0.1)),
    *(Variant("dense", "tied", p=p) for p in (0.02, 0.1)),
    Variant("tr", "tied"),
    *(
        Variant(weight, start, share=share)
        for share in (1 / 2, 1 / 4, 1 / 8)
        for weight, start in (("tr-wide", "isometric"), ("tr", "tied"), ("cp", "tied"))
    ),
    *(Variant("cp", "tied", p=p) for p in (0.02, 0.1)),
    Variant("cp", "paper"),
    *(Variant(weight, start, p=0.05, share=1 / 8) for weight, start in (("tr-wide", "isometric"), ("cp", "tied"))),
)
SEARCH = (
    *(
        Variant(weight, start, faster=faster)
        for faster in (1.0, 2.0, 0.5)
        for weight, start in (("dense", "tied"), ("tr-wide", "isometric"))
    ),
    *(Variant("tr-wide", "isometric", auxiliary=True), Variant("dense", "tied", auxiliary=True)),
    *(Variant(weight, "data", auxiliary=auxiliary) for auxiliary in (False, True) for weight in ("dense", "tr-wide")),
    *(
        Variant("tr-wide", "tied"),
        Variant("tr", "isometric"),
        Variant("cp", "isometric"),
        Variant("cp", "tied", faster=2.0),
    ),
    *(Variant("tr-wide", "tied", share=1 / 8), Variant("tr", "isometric", share=1 / 8)),
)
PILE = "EleutherAI/the_pile_deduplicated"
_TINY = partial(
    Preset,
    str(TINY),
    tuple(range(2, 10)),
    2000 * 512,
    latents=2048,
    k=16,
    batch=512,
    learning_rate=1e-3,
    dead_after=50_000,
    heldout=20_000,
    scaled=True,
    stored=True,
)
PRESETS: dict[str, Preset] = {
    "gpt2-small": Preset("openai-community/gpt2", tuple(range(2, 10)), 300_000_000, ROW),
    "pythia-410m": Preset("EleutherAI/pythia-410m", tuple(range(8, 16)), 500_000_000, ROW + SWEEPS + SHARES, text=PILE),
    "pythia-1.4b": Preset("EleutherAI/pythia-1.4b", tuple(range(8, 16)), 500_000_000, ROW, text=PILE),
    "gemma2-2b": Preset("google/gemma-2-2b", tuple(range(9, 17)), 500_000_000, ROW),
    "tiny": _TINY(TINY_ROWS),
    "tiny-search": _TINY(SEARCH, seeds=(10, 11, 12)),
}
"""`tiny-search` is what the best variant was looked for with, on seeds that `tiny` does not use."""
