"""How well few latents tell labelled texts apart, under three protocols; needs `pip install 'fmxnn[metrics]'`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score
from torch import Tensor

from fmxnn.core.errors import ShapeError
from fmxnn.core.seeds import seed_of
from fmxnn.metrics.probing.protocols import PROTOCOLS, Picked, Split

Protocol = Literal["fmx", "polysae", "saeprobes"]
Labels = Sequence[str | int] | Tensor


@dataclass(frozen=True)
class ClassProbe:
    """One label against the rest, with as many texts of both; measured on held-out texts.

    - `latents`: the picked ones; `threshold`: a text is taken for this label where the code (a regression: the log
      odds) exceeds it
    - `f1` with its 95 % bootstrap `interval`; `trivial_f1`: what "always this label" scores; `auroc`;
      `balanced_accuracy`
    - `wasserstein`: distance between the classes in units of the codes, for `polysae` on the train texts;
      `wasserstein_scaled`: divided by the latent's standard deviation on the train texts, which the free scale of codes
      does not move
    - `dead_picks`: how many picked latents are zero on all train or on all test texts

    ```python
    from fmxnn.metrics.probing import probe

    codes, labels = torch.rand(40, 8), ["sea", "land"] * 20
    first, second = probe(codes, labels, codes, labels, resamples=50).classes
    first.label, first.f1, first.interval
    ```
    """

    label: str
    latents: tuple[int, ...]
    threshold: float
    f1: float
    interval: tuple[float, float]
    trivial_f1: float
    auroc: float
    balanced_accuracy: float
    wasserstein: float
    wasserstein_scaled: float
    dead_picks: int
    train_texts: int
    test_texts: int


@dataclass(frozen=True)
class ProbeResult:
    """A `ClassProbe` for each label; `interval` is the 95 % bootstrap interval of the mean F1.

    Print it for a table.

    ```python
    from fmxnn.metrics.probing import probe

    labels = ["sea", "land"] * 20
    codes = torch.rand(40, 8)
    codes[::2, 3] += 1
    result = probe(codes, labels, codes, labels, resamples=50)
    result.mean("f1"), result.classes[1].latents
    ```
    """

    protocol: Protocol
    k: int
    seed: int
    classes: tuple[ClassProbe, ...]
    interval: tuple[float, float]

    def mean(self, name: str) -> float:
        """The mean of a number, such as `mean("f1")`, over the labels that have one; nan where none has."""
        values = np.array([getattr(each, name) for each in self.classes], dtype=float)
        return float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else float("nan")

    def numbers(self) -> dict[str, float]:
        """Every headline number by name, for a log line or a table.

        `dead_picks` is a sum, the rest are means over labels.
        """
        names = ("f1", "trivial_f1", "auroc", "balanced_accuracy", "wasserstein", "wasserstein_scaled")
        interval = {"f1_low": self.interval[0], "f1_high": self.interval[1]}
        return {
            **{name: self.mean(name) for name in names},
            **interval,
            "dead_picks": sum(each.dead_picks for each in self.classes),
        }

    def __str__(self) -> str:
        width = max(5, *(len(each.label) for each in self.classes))
        rows = [f"{'label':{width}}     F1  [95 % interval]  trivial  AUROC  bal. acc.        W1  W1/std  dead picks"]
        for each in self.classes:
            rows.append(
                f"{each.label:{width}}  {each.f1:.3f}  [{each.interval[0]:.3f}, {each.interval[1]:.3f}]   "
                f"{each.trivial_f1:.3f}  {each.auroc:.3f}"
                f"      {each.balanced_accuracy:.3f}  {each.wasserstein:8.3g}  {each.wasserstein_scaled:6.3f}  "
                f"{each.dead_picks} of {self.k}"
            )
        name = (
            f"{self.protocol}, k={self.k}: mean F1 {self.mean('f1'):.3f} [{self.interval[0]:.3f}, "
            f"{self.interval[1]:.3f}]"
        )
        return "\n".join([name, *rows])


def probe(
    train_codes: Tensor | NDArray[Any],
    train_labels: Labels,
    test_codes: Tensor | NDArray[Any],
    test_labels: Labels,
    *,
    protocol: Protocol = "fmx",
    k: int = 1,
    seed: int = 0,
    resamples: int = 1000,
) -> ProbeResult:
    """`texts latents, texts, texts latents, texts ->`: each label told from the rest by `k` latents.

    Latents are chosen on the train texts and measured on the test texts. For each label as many other texts are drawn
    as it has, or fewer of its own where it is the larger. The draw depends on (`seed`, split, label), so labels do not
    influence each other, and a task of two equal classes draws all. The `protocol` is one of three; see
    `fmxnn.metrics.probing.protocols`.

    - `fmx`: the latent and the threshold with the best train F1 (k = 1)
    - `polysae`: the `k` latents whose class means differ most, and logistic regression with C = 1
    - `saeprobes`: a similar choice, with a searched C; its number is the AUROC

    The free scale of codes (z to c z) moves no number of `fmx` but `wasserstein` and `threshold`; it moves those of the
    other two. Intervals come from `resamples` bootstrap samples of the test texts, the same for all labels; the choice
    of latents is held fixed.

    Raises ValueError for a single label, a label that one split lacks, an unknown protocol or codes that are not
    finite. Raises ShapeError for codes and labels that do not fit.
    """
    train, test = _checked(train_codes, train_labels, "train"), _checked(test_codes, test_labels, "test")
    _check_choice(protocol, k, resamples, (train[0].shape[1], test[0].shape[1]))
    splits, picks = list[tuple[Split, Split]](), list[Picked]()
    labels = _shared(train[1], test[1])
    for label in labels:
        splits.append(
            (
                _against_rest(*train, label, seed_of(seed, "train", label)),
                _against_rest(*test, label, seed_of(seed, "test", label)),
            )
        )
        picks.append(PROTOCOLS[protocol](*splits[-1], k, seed))
    *intervals, interval = _intervals([heldout for _, heldout in splits], picks, len(test[1]), resamples, seed)
    classes = tuple(starmap(_measured, zip(labels, splits, picks, intervals, strict=True)))
    return ProbeResult(protocol, k, seed, classes, interval)


def _measured(label: str, splits: tuple[Split, Split], picked: Picked, interval: tuple[float, float]) -> ClassProbe:
    train, test = splits
    true, taken, scores = (tensor.cpu().numpy() for tensor in (test.positive, picked.taken, picked.scores))
    alive = (train.codes[:, picked.latents] != 0).any(0) & (test.codes[:, picked.latents] != 0).any(0)
    return ClassProbe(
        label=label,
        latents=tuple(picked.latents.tolist()),
        threshold=picked.threshold,
        f1=float(f1_score(true, taken)),
        interval=interval,
        trivial_f1=float(f1_score(true, np.ones_like(true))),
        auroc=float(roc_auc_score(true, scores)),
        balanced_accuracy=float(balanced_accuracy_score(true, taken)),
        wasserstein=picked.wasserstein,
        wasserstein_scaled=picked.wasserstein_scaled,
        dead_picks=int((~alive).sum()),
        train_texts=len(train.rows),
        test_texts=len(test.rows),
    )


def _intervals(
    tests: list[Split], picks: list[Picked], texts: int, resamples: int, seed: int
) -> list[tuple[float, float]]:
    """95 % intervals of each label's F1 and, last, of their mean; a resample is how often each test text was drawn."""
    drawn = np.random.default_rng(seed_of(seed, "bootstrap")).multinomial(
        texts, np.full(texts, 1 / texts), size=resamples
    )
    scores = list[Any]()
    for test, picked in zip(tests, picks, strict=True):
        times = drawn[:, test.rows.numpy()].astype(float)
        true, taken = test.positive.cpu().numpy(), picked.taken.cpu().numpy()
        both, either = times @ (true & taken), times @ true + times @ taken
        scores.append(2 * both / np.maximum(either, 1))
    bounds = [np.quantile(each, (0.025, 0.975)) for each in [*scores, np.mean(scores, axis=0)]]
    return [(float(low), float(high)) for low, high in bounds]


def _against_rest(codes: Tensor, labels: list[str], label: str, seed: int) -> Split:
    has = torch.tensor([each == label for each in labels])
    generator = torch.Generator().manual_seed(seed)
    own, rest = has.nonzero().squeeze(1), (~has).nonzero().squeeze(1)
    count = min(len(own), len(rest))
    rows = (
        torch.cat([some[torch.randperm(len(some), generator=generator)[:count]] for some in (own, rest)]).sort().values
    )
    return Split(codes[rows.to(codes.device)], has[rows].to(codes.device), rows)


def _checked(codes: Tensor | NDArray[Any], labels: Labels, which: str) -> tuple[Tensor, list[str]]:
    found, names = (
        torch.as_tensor(codes).detach(),
        [str(label) for label in (labels.tolist() if isinstance(labels, Tensor) else labels)],
    )
    if found.ndim != 2 or len(found) != len(names):
        raise ShapeError(
            f"probe takes {which} codes of (texts, latents) and a label a text, got {tuple(found.shape)} and "
            f"{len(names)} labels"
        )
    if not found.isfinite().all():
        raise ValueError(f"probe needs finite codes, and the {which} codes hold a NaN or an infinity")
    return found.to(torch.promote_types(found.dtype, torch.float32)), names


def _check_choice(protocol: str, k: int, resamples: int, latents: tuple[int, int]) -> None:
    if latents[0] != latents[1]:
        raise ShapeError(
            f"the train codes have latents={latents[0]} and the test codes latents={latents[1]}; take both from one "
            "crosscoder"
        )
    if protocol not in PROTOCOLS:
        raise ValueError(f"probe knows protocol {', '.join(PROTOCOLS)}, got {protocol!r}")
    if not 1 <= k <= latents[0]:
        raise ValueError(f"probe picks 1 to latents={latents[0]} latents, got k={k}")
    if protocol == "fmx" and k > 1:
        raise ValueError(f"protocol 'fmx' picks one latent, got k={k}; use protocol='polysae' or 'saeprobes'")
    if resamples < 1:
        raise ValueError(f"probe needs resamples >= 1 for its intervals, got resamples={resamples}")


def _shared(train: list[str], test: list[str]) -> list[str]:
    for here, there, name, other in ((train, test, "train", "test"), (test, train, "test", "train")):
        if alone := sorted(set(here) - set(there)):
            raise ValueError(
                f"probe needs each label in both splits, and {', '.join(map(repr, alone))} is in {name} only; take it "
                f"out or add {other} texts of it"
            )
    if len(set(train)) < 2:
        raise ValueError(
            f"probe tells labels apart and needs two or more, got {', '.join(map(repr, set(train))) or 'no texts'}"
        )
    return sorted(set(train))
