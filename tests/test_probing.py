import math
import re
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit
from torch.testing import assert_close

import fmxnn as fx
from fmxnn.core.seeds import seed_of
from fmxnn.metrics.probing import separation
from fmxnn.metrics.probing.probing import probe
from fmxnn.metrics.probing.protocols import Split, by_searched_regression
from fmxnn.metrics.probing.separation import best_thresholds, class_gap, wasserstein

HAND = torch.tensor([[0, 0, 0.2, 0.5, 0.9]], dtype=torch.float64).T
seeds = st.integers(0, 10**6)


def test_the_hand_vector_of_the_best_threshold():
    threshold, f1 = best_thresholds(HAND, torch.tensor([False, False, True, False, True]))
    assert (threshold.item(), f1.item()) == (0.0, 0.8)


def pooled(texts, latents, levels=4):
    """Codes as pooling gives them: many zeros, some equal values, one latent dead, one constant; and half of the texts
    positive.
    """
    codes = torch.randint(levels, (texts, latents)).double() * torch.rand(latents) + torch.rand(texts, latents) * (
        torch.rand(texts, latents) < 0.2
    )
    codes[:, 0], codes[:, -1] = 0, codes[0, -1] if latents > 3 else codes[:, -1]
    return codes, torch.arange(texts)[torch.randperm(texts)] % 2 == 0


def measured(result):
    return [
        [each.f1, each.auroc, each.balanced_accuracy, each.wasserstein, each.wasserstein_scaled]
        for each in result.classes
    ]


@given(seeds, st.integers(2, 12), st.integers(1, 6), st.integers(1, 4), st.integers(1, 40))
def test_thresholds_and_distances_of_all_latents_equal_a_loop_in_blocks_of_any_size(
    seed, texts, latents, levels, at_once
):
    torch.manual_seed(seed)
    codes, positive = pooled(texts, latents, levels)
    labels = positive.tolist()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(separation, "_ENTRIES_AT_ONCE", at_once)
        thresholds, f1 = best_thresholds(codes, positive)
        distances = wasserstein(codes, positive)
    expected = [reference.best_threshold(codes[:, n].tolist(), labels) for n in range(latents)]
    constant = (codes == codes[0]).all(0)
    assert f1.tolist() == [0.0 if constant[n] else each[1] for n, each in enumerate(expected)]
    assert thresholds.tolist() == [each[0] for each in expected]
    assert_close(
        distances, torch.tensor([reference.area_between(codes[:, n].tolist(), labels) for n in range(latents)]).double()
    )


@given(seeds, st.integers(2, 200), st.integers(1, 5))
def test_the_distance_is_scipys(seed, texts, latents):
    torch.manual_seed(seed)
    codes, positive = pooled(texts, latents)
    expected = [wasserstein_distance(codes[positive, n], codes[~positive, n]) for n in range(latents)]
    assert_close(wasserstein(codes, positive), torch.tensor(expected).double(), rtol=1e-12, atol=1e-12)


@given(seeds, st.integers(1, 8), st.integers(1, 8), st.integers(1, 5))
def test_the_default_protocol_equals_a_loop(seed, train, test, latents):
    torch.manual_seed(seed)
    train, test = pooled(2 * train, latents), pooled(2 * test, latents)
    result = probe(train[0], train[1].long(), test[0], test[1].long(), resamples=2)
    for each, here in zip(result.classes, (lambda y: ~y, lambda y: y)):
        latent, threshold, numbers = reference.probed(
            train[0], here(train[1]).tolist(), test[0], here(test[1]).tolist()
        )
        assert each.latents == (latent,)
        assert each.threshold == threshold
        assert_close(torch.tensor(measured(result)[int(each.label)]), torch.tensor(numbers), equal_nan=True)
        assert each.trivial_f1 == pytest.approx(2 / 3)
        assert each.dead_picks == int(not train[0][:, latent].any() or not test[0][:, latent].any())


@given(seeds, st.integers(2, 9), st.integers(2, 6))
def test_the_order_of_texts_and_latents_and_the_free_scale_move_nothing(seed, texts, latents):
    torch.manual_seed(seed)
    train, test, labels = (
        torch.rand(2 * texts, latents).double(),
        torch.rand(2 * texts, latents).double(),
        np.arange(2 * texts) % 2,
    )
    one = probe(train, labels, test, labels, resamples=2)
    rows, columns, scale = torch.randperm(2 * texts), torch.randperm(latents), torch.rand(latents).double() + 0.5
    other = probe(
        train[rows][:, columns] * scale, labels[rows], test[rows][:, columns] * scale, labels[rows], resamples=2
    )
    for a, b, x, y in zip(one.classes, other.classes, measured(one), measured(other)):
        at = b.latents[0]
        assert a.latents == (int(columns[at]),)
        c = float(scale[at])
        assert [*y[:3], y[3] / c, y[4], b.threshold / c] == pytest.approx([*x, a.threshold], nan_ok=True)


@pytest.mark.parametrize("protocol", ["polysae", "saeprobes"])
@pytest.mark.parametrize("texts", [20, 140])
def test_the_order_of_latents_moves_no_regression(protocol, texts):
    train, test, labels = torch.rand(texts, 9).double(), torch.rand(20, 9).double(), torch.arange(texts) % 2
    train[:, 4] += labels
    columns = torch.randperm(9)
    one = probe(train, labels, test, labels[:20], protocol=protocol, k=1)
    other = probe(train[:, columns], labels, test[:, columns], labels[:20], protocol=protocol, k=1)
    assert columns[list(other.classes[0].latents)].tolist() == list(one.classes[0].latents) == [4]
    assert_close(torch.tensor(measured(other)), torch.tensor(measured(one)), equal_nan=True)


def test_of_latents_with_equal_f1_the_wider_gap_then_the_first_is_taken():
    labels = [0, 0, 1, 1]
    codes = torch.tensor(
        [[0.0, 0.2, 0, 0], [0, 0, 0.1, 0.1], [1, 1, 1, 1], [0.7, 1, 1, 1]]
    ).double()  # all separate the two
    assert probe(codes, labels, codes, labels).classes[1].latents == (2,)


def test_polysae_is_the_regression_on_the_widest_gaps():
    train, test, y, held = (
        torch.rand(60, 12).double(),
        torch.rand(40, 12).double(),
        torch.arange(60) % 2,
        torch.arange(40) % 2,
    )
    gap = (train[y == 1].mean(0) - train[y == 0].mean(0)).abs()
    picks = sorted(range(12), key=lambda n: -gap[n])[:3]
    result = probe(train, y, test, held, protocol="polysae", k=3)
    fitted = LogisticRegression(C=1.0).fit(train[:, picks], y)
    assert result.classes[1].latents == tuple(picks)
    assert result.classes[1].f1 == f1_score(held, fitted.predict(test[:, picks]))
    expected = [wasserstein_distance(train[y == 1, n], train[y == 0, n]) for n in range(12)]
    assert result.classes[1].wasserstein == pytest.approx(np.mean(expected), rel=1e-12)
    assert result.classes[1].wasserstein_scaled == pytest.approx(
        np.mean(expected / train.std(0, correction=0).numpy()), rel=1e-12
    )
    assert_close(class_gap(train, y == 1), gap)


@pytest.mark.parametrize("texts", [60, 300])
def test_saeprobes_searches_c_for_the_widest_gaps_over_what_fires(texts):
    y = torch.arange(texts) % 2
    labels = y.numpy()
    codes = torch.rand(texts, 5).double() * torch.tensor([1, 0.05, 0.05, 1, 0]) + torch.tensor([100, 1, 1, 0, 0])
    codes[:, 0] += 5 * y  # the widest gap, and a narrow one of what the latent gives otherwise
    codes[:, 3] = y * (torch.rand(texts) < 0.6) * codes[:, 3]
    result = probe(codes, labels, codes, labels, protocol="saeprobes", k=2).classes[1]
    split = Split(codes, y == 1, torch.arange(texts))
    picked = by_searched_regression(split, split, 2, 0)
    assert result.latents == tuple(picked.latents.tolist()) == (3, 0)
    state = seed_of(0, "search") % 2**32
    folds = (
        StratifiedKFold(6, shuffle=True, random_state=state)
        if texts < 128
        else StratifiedShuffleSplit(1, test_size=60, random_state=state)
    )
    x, best = codes[:, [3, 0]].numpy(), (-1.0, 0.0)
    with warnings.catch_warnings(action="ignore"):
        fits = {
            c: LogisticRegression(C=c, l1_ratio=1, solver="saga", max_iter=1000, random_state=state)
            for c in np.logspace(5, -5, 10)
        }
        for c, fit in fits.items():
            scores = []
            for rows, held in folds.split(x, labels):
                scores.append(roc_auc_score(labels[held], fit.fit(x[rows], labels[rows]).decision_function(x[held])))
            best = max(best, (np.mean(scores), c))
        fitted = fits[best[1]].fit(x, labels)
    assert_close(picked.scores, torch.from_numpy(fitted.decision_function(x)))
    assert result.auroc == pytest.approx(roc_auc_score(labels, fitted.decision_function(x)))
    assert result.f1 == pytest.approx(f1_score(labels, fitted.predict(x)))
    assert math.isnan(result.wasserstein)
    assert probe(codes, labels, codes, labels, protocol="saeprobes", k=5).classes[0].dead_picks == 1


def test_classes_are_balanced_by_a_draw_of_their_own():
    labels = ["a"] * 30 + ["b"] * 10 + ["c"] * 5
    codes = torch.rand(45, 6)
    three = probe(codes, labels, codes, labels)
    assert [(each.label, each.train_texts, each.test_texts) for each in three.classes] == [
        ("a", 30, 30),
        ("b", 20, 20),
        ("c", 10, 10),
    ]
    assert all(each.trivial_f1 == pytest.approx(2 / 3) for each in three.classes)
    assert probe(codes, labels, codes, labels) == three
    assert probe(codes, labels, codes, labels, seed=1) != three
    renamed = probe(codes, [label.replace("c", "z") for label in labels], codes, labels[:40] + ["z"] * 5)
    assert asdict(renamed.classes[1]) == asdict(three.classes[1])
    assert renamed.classes[2].threshold != three.classes[2].threshold


def test_a_code_that_knows_the_label_scores_one_and_noise_what_chance_gives():
    labels = torch.arange(600) % 3
    codes = torch.rand(600, 4).double()
    codes[:, 1] = (labels == 1) * 5.0
    result = probe(codes[:300], labels[:300], codes[300:], labels[300:])
    known = result.classes[1]
    assert (known.latents, known.f1, known.auroc, known.balanced_accuracy, known.interval) == (
        (1,),
        1.0,
        1.0,
        1.0,
        (1.0, 1.0),
    )
    assert (known.wasserstein, known.wasserstein_scaled, known.dead_picks) == (5.0, 2.0, 0)
    noise = probe(codes[:300, :1], labels[:300], codes[300:, :1], labels[300:])
    assert all(abs(each.auroc - 0.5) < 0.1 for each in noise.classes)
    assert noise.interval[0] < noise.mean("f1") < noise.interval[1]


def test_the_interval_is_that_of_resampled_texts():
    torch.manual_seed(3)
    labels = torch.arange(200) % 2
    codes = (torch.rand(200, 1) + 0.3 * labels.unsqueeze(1)).double()
    result = probe(codes, labels, codes, labels, resamples=4000)
    each = result.classes[1]
    taken = (codes[:, 0] > each.threshold).numpy()
    drawn = np.random.default_rng(0).integers(200, size=(4000, 200))
    scores = [f1_score(labels[rows], taken[rows]) for rows in drawn[:1000]]
    assert np.quantile(scores, (0.025, 0.975)) == pytest.approx(each.interval, abs=0.01)
    assert probe(codes, labels, codes, labels, resamples=4000).interval == result.interval
    assert result.interval[0] < result.mean("f1") < result.interval[1]


def test_dead_codes_are_counted_not_hidden():
    labels = [0, 1] * 5
    result = probe(torch.zeros(10, 3), labels, torch.zeros(10, 3), labels)
    assert [(each.f1, each.auroc, each.dead_picks) for each in result.classes] == [(0.0, 0.5, 1)] * 2
    assert [each.dead_picks for each in probe(torch.rand(10, 3), labels, torch.zeros(10, 3), labels).classes] == [1, 1]
    numbers = result.numbers()
    assert numbers["dead_picks"] == 2
    assert numbers["wasserstein"] == 0.0
    assert math.isnan(numbers["wasserstein_scaled"])


def test_a_result_prints_as_a_table():
    labels = ["no", "yes"] * 20
    codes = torch.tensor([[0.0], [1.0]]).repeat(20, 1)
    assert str(probe(codes, labels, codes, labels)).splitlines() == [
        "fmx, k=1: mean F1 0.500 [0.500, 0.500]",
        "label     F1  [95 % interval]  trivial  AUROC  bal. acc.        W1  W1/std  dead picks",
        "no     0.000  [0.000, 0.000]   0.667  0.000      0.500         1   2.000  0 of 1",
        "yes    1.000  [1.000, 1.000]   0.667  1.000      1.000         1   2.000  0 of 1",
    ]


CODES, LABELS = torch.rand(6, 3), ["a", "b"] * 3


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        (
            fx.ShapeError,
            {"train_codes": CODES[:5]},
            "probe takes train codes of (texts, latents) and a label a text, got (5, 3) and 6 labels",
        ),
        (
            fx.ShapeError,
            {"test_codes": CODES[0]},
            "probe takes test codes of (texts, latents) and a label a text, got (3,) and 6 labels",
        ),
        (
            fx.ShapeError,
            {"test_codes": CODES[:, :2]},
            "the train codes have latents=3 and the test codes latents=2; take both from one crosscoder",
        ),
        (
            ValueError,
            {"test_codes": CODES.log() / 0},
            "probe needs finite codes, and the test codes hold a NaN or an infinity",
        ),
        (ValueError, {"protocol": "sae"}, "probe knows protocol fmx, polysae, saeprobes, got 'sae'"),
        (ValueError, {"k": 0}, "probe picks 1 to latents=3 latents, got k=0"),
        (ValueError, {"k": 4}, "probe picks 1 to latents=3 latents, got k=4"),
        (ValueError, {"k": 2}, "protocol 'fmx' picks one latent, got k=2; use protocol='polysae' or 'saeprobes'"),
        (ValueError, {"resamples": 0}, "probe needs resamples >= 1 for its intervals, got resamples=0"),
        (
            ValueError,
            {"test_labels": ["a", "b", "c"] * 2},
            "probe needs each label in both splits, and 'c' is in test only; take it out or add train texts of it",
        ),
        (
            ValueError,
            {"train_labels": ["a", "b", "c"] * 2},
            "probe needs each label in both splits, and 'c' is in train only; take it out or add test texts of it",
        ),
        (
            ValueError,
            {"train_labels": ["a"] * 6, "test_labels": ["a"] * 6},
            "probe tells labels apart and needs two or more, got 'a'",
        ),
        (
            ValueError,
            dict.fromkeys(("train_codes", "test_codes"), CODES[:0])
            | dict.fromkeys(("train_labels", "test_labels"), ()),
            "probe tells labels apart and needs two or more, got no texts",
        ),
        (
            ValueError,
            {"train_labels": ["a"] * 5 + ["b"], "protocol": "saeprobes"},
            "protocol 'saeprobes' searches for C and needs 2 train texts of each label or more, got 1; use "
            "protocol='fmx'",
        ),
    ],
)
def test_probing_says_what_is_wrong(kind, change, sentence):
    given_ = {"train_codes": CODES, "train_labels": LABELS, "test_codes": CODES, "test_labels": LABELS} | change
    with pytest.raises(kind, match=f"^{re.escape(sentence)}$"):
        probe(**given_)


def test_a_scan_says_what_is_wrong():
    sentence = "codes are (texts, latents) and positive is one bool a text, got (6, 3) and (6,) of torch.int64"
    with pytest.raises(fx.ShapeError, match=f"^{re.escape(sentence)}$"):
        best_thresholds(CODES, torch.ones(6).long())
    for scan in (best_thresholds, wasserstein, class_gap):
        with pytest.raises(ValueError, match=r"^two classes are told apart, got 6 positive and 0 negative texts$"):
            scan(CODES, torch.ones(6).bool())
