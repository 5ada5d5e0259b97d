"""Three ways of telling two classes of texts apart by few latents; needs `pip install 'fmxnn[metrics]'`."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, StratifiedShuffleSplit
from torch import Tensor

from fmxnn.core.seeds import seed_of
from fmxnn.metrics.probing.separation import best_thresholds, class_gap, wasserstein

_STEPS = 1000


@dataclass(frozen=True)
class Split:
    """`texts latents` of one label against the rest, which texts have the label, and their rows in the whole split.

    ```python
    from fmxnn.metrics.probing.protocols import Split, by_best_latent

    positive = torch.arange(8) % 2 == 0
    split = Split(torch.rand(8, 3) + positive[:, None], positive, torch.arange(8))
    by_best_latent(split, split, k=1, seed=0).latents
    ```
    """

    codes: Tensor
    positive: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Picked:
    """What a protocol decided: the latents, its `scores` of the test texts, and two distances.

    A text is taken for the label where its score is above `threshold`.

    ```python
    from fmxnn.metrics.probing.protocols import Picked

    Picked(torch.tensor([3]), 0.5, torch.tensor([0.2, 0.9])).taken  # tensor([False, True])
    ```
    """

    latents: Tensor
    threshold: float
    scores: Tensor
    wasserstein: float = math.nan
    wasserstein_scaled: float = math.nan

    @property
    def taken(self) -> Tensor:
        """`-> texts`: which test texts are taken for the label."""
        return self.scores > self.threshold


def by_best_latent(train: Split, test: Split, k: int, seed: int) -> Picked:
    """The latent and the threshold with the best train F1; `k` is 1. (fmxcoders, appendix A.4)

    Of latents with equal F1 the one whose class means differ by more standard deviations, then the first; of thresholds
    the highest. The Wasserstein distance is the pick's on the test texts, and scaled by its standard deviation on the
    train texts.
    """
    thresholds, f1 = best_thresholds(train.codes, train.positive)
    equals = (f1 == f1.max()).nonzero().squeeze(1)
    among = train.codes[:, equals]
    spread = among.double().std(0, correction=0)
    best = (class_gap(among, train.positive) / spread.where(spread > 0, 1.0)).argmax()
    latent, scores = equals[best], test.codes[:, equals[best]]
    distance = wasserstein(scores.unsqueeze(1), test.positive)
    scaled = float(distance / spread[best]) if spread[best] > 0 else math.nan
    return Picked(latent.unsqueeze(0), float(thresholds[latent]), scores, float(distance), scaled)


def by_regression(train: Split, test: Split, k: int, seed: int) -> Picked:
    """The `k` latents whose class means differ most, and logistic regression. (PolySAE's code)

    It has an L2 penalty and C = 1. The Wasserstein distance is the mean over all latents on the train texts; scaled,
    over those that are not constant.
    """
    latents = _first(class_gap(train.codes, train.positive), k)
    fitted = LogisticRegression(C=1.0, max_iter=_STEPS).fit(_array(train.codes[:, latents]), _array(train.positive))
    distances, spread = wasserstein(train.codes, train.positive), train.codes.std(0, correction=0).double()
    scaled = float((distances / spread)[spread > 0].mean())
    return Picked(latents, 0.0, _log_odds(fitted, test, latents), float(distances.mean()), scaled)


def by_searched_regression(train: Split, test: Split, k: int, seed: int) -> Picked:
    """The `k` latents whose class means differ most, and an L1 logistic regression whose C was searched for.

    After Kantamneni et al. 2025 and their package sae-probes. Each difference is divided by the mean of the latent's
    non-zero codes. C is the one of 10 from 1e5 to 1e-5 with the best AUROC, of equals the largest. It is tried on a
    fifth of the texts, 100 at most; below 128 texts in cross-validation with up to 6 folds. Then all texts are fitted,
    in at most 1,000 steps of SAGA.

    Here folds are stratified and drawn. There they are the last texts, and below 13 texts each pair is left out. There
    a text's code is its last token's (`pool="last"`). There is no Wasserstein distance.

    Raises ValueError where a class has less than 2 texts.
    """
    texts, smaller = len(train.positive), int(min(train.positive.sum(), (~train.positive).sum()))
    if smaller < 2:
        raise ValueError(
            f"protocol 'saeprobes' searches for C and needs 2 train texts of each label or more, got {smaller}; use "
            "protocol='fmx'"
        )
    level = train.codes.sum(0, dtype=torch.float64) / train.codes.count_nonzero(0).clamp(min=1)
    latents = _first(class_gap(train.codes, train.positive) / level.abs().where(level != 0, 1.0), k)
    state = seed_of(seed, "search") % 2**32
    if texts < 128:
        folds = StratifiedKFold(min(6, smaller), shuffle=True, random_state=state)
    else:
        folds = StratifiedShuffleSplit(1, test_size=min(texts // 5, 100), random_state=state)
    fit = LogisticRegression(l1_ratio=1.0, solver="saga", max_iter=_STEPS, random_state=state)
    search = GridSearchCV(fit, {"C": np.logspace(5, -5, 10)}, scoring="roc_auc", cv=folds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the limit of steps is part of the protocol
        search.fit(_array(train.codes[:, latents]), _array(train.positive))
    return Picked(latents, 0.0, _log_odds(search, test, latents))


PROTOCOLS: dict[str, Callable[[Split, Split, int, int], Picked]] = {
    "fmx": by_best_latent,
    "polysae": by_regression,
    "saeprobes": by_searched_regression,
}


def _first(score: Tensor, k: int) -> Tensor:
    return score.sort(descending=True, stable=True).indices[:k]


def _array(values: Tensor) -> NDArray[np.float64]:
    return values.double().cpu().numpy()


def _log_odds(fitted: LogisticRegression | GridSearchCV, test: Split, latents: Tensor) -> Tensor:
    return torch.from_numpy(fitted.decision_function(_array(test.codes[:, latents]))).to(test.codes.device)
