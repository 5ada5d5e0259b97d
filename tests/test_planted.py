import re

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm
from torch.testing import assert_close

from fmxnn.metrics import functional_coherence, measure_reconstruction, norm_coherence
from fmxnn.metrics.planted.planted import PRESETS, PlantedFeatures
from fmxnn.metrics.planted.planting import Firing, Planting, Surroundings

seeds = st.integers(0, 10**6)
HARSH = Surroundings(growth=1.3, mean=4.0, massive=0.05)
SPANS = ("single", "local", "band", "global", "gapped", "ramp")
MOTIONS = ("static", "transport", "drift", "switch", "independent")


def planted(layers=4, d_model=5, features=12, *, seed=0, firing=None, surroundings=None, spans=SPANS, motions=MOTIONS):
    planting = Planting(spans, motions, firing=firing or Firing(), surroundings=surroundings or Surroundings())
    return PlantedFeatures(layers, d_model, features, planting=planting, seed=seed).double()


@st.composite
def separable(draw):
    """Truths whose features, offset and massive direction all find room at every layer."""
    features, layers = draw(st.integers(1, 12)), draw(st.integers(4, 7))
    surroundings = Surroundings(
        draw(st.floats(0.8, 1.3)), draw(st.floats(0, 5)), draw(st.sampled_from([0.0, 0.1])), 20.0
    )
    firing = Firing(0.5, draw(st.floats(0, 1)), draw(st.sampled_from([0.0, 0.5])), draw(st.integers(1, 5)))
    d_model = 2 * features + 4  # room to spare: rounding grows where directions fill the layer
    return planted(layers, d_model, features, seed=draw(seeds), firing=firing, surroundings=surroundings)


@given(seeds, st.integers(-5, 5), st.integers(1, 20))
def test_a_batch_depends_on_its_number_and_the_seed_alone(seed, number, tokens):
    truth, again = planted(seed=seed, surroundings=HARSH), planted(seed=seed, surroundings=HARSH)
    before = torch.random.get_rng_state()
    x, z = truth.batch(number, tokens)
    again.batch(number + 1, tokens)
    for one, other in zip((x, z), again.batch(number, tokens)):
        assert torch.equal(one, other)
    assert torch.equal(z, again.codes(number, tokens))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(truth.codes(number, 200), truth.codes(number + 1, 200))
    other = planted(seed=seed + 1, surroundings=HARSH)
    for one, another in (
        (truth.atoms, other.atoms),
        (truth.offset, other.offset),
        (truth.codes(0, 200), other.codes(0, 200)),
    ):
        assert not torch.equal(one, another)


def test_dtypes_agree_on_what_fires_and_the_default_is_torchs():
    truth = PlantedFeatures(4, 5, 12)
    x, z = truth.batch(0, 100)
    assert (x.dtype, z.dtype, x.shape, z.shape) == (torch.float32, torch.float32, (100, 4, 5), (100, 12))
    wide = truth.double().batch(0, 100)
    assert_close(wide[0].float(), x)
    assert_close(wide[1].float(), z, rtol=1e-6, atol=0)
    narrow = truth.bfloat16().batch(0, 100)
    assert narrow[0].dtype == torch.bfloat16
    assert torch.equal(narrow[1] > 0, z > 0)


@given(seeds)
def test_activations_are_the_sum_over_features(seed):
    truth = planted(seed=seed, surroundings=Surroundings(growth=1.2, mean=2.0))
    x, z = truth.batch(0, 7)
    assert_close(x, reference.planted(z, truth.atoms, truth.offset))


def test_kinds_are_equally_frequent_and_spans_are_where_atoms_are():
    truth = planted(6, 5, 90)
    assert sorted(truth.kinds) == sorted(truth.kinds[:30] * 3)  # 6 spans times 5 motions, in rounds
    assert truth.kinds[:30] != truth.kinds[30:60]
    assert torch.equal(truth.spans, truth.atoms.norm(dim=-1) > 0)
    for (span, _), on in zip(truth.kinds, truth.spans):
        assert {"single": 1, "global": 6, "ramp": 6}.get(span, int(on.sum())) == on.sum()


@given(seeds, st.sampled_from([0.0, 0.6]), st.floats(0, 1.2))
def test_features_fire_as_often_as_they_should(seed, correlation, zipf):
    truth, tokens = planted(features=20, seed=seed, firing=Firing(0.4, zipf, correlation)), 4000
    expected = torch.tensor([0.4 / (i + 1) ** zipf for i in range(20)], dtype=torch.float64)
    assert_close(truth.frequencies, expected)
    z = truth.codes(0, tokens)
    spread = (expected * (1 - expected) / tokens).sqrt()
    assert (((z > 0).double().mean(0) - expected).abs() < 5 * spread).all()
    fired = z[z > 0]
    assert fired.min() >= 0.5
    if not correlation:  # magnitudes are then independent, and their mean has a known spread
        assert abs(float(fired.mean()) - 1) < 5 * 0.5 / len(fired) ** 0.5


def test_groups_fire_together_as_the_copula_says():
    truth, tokens = planted(features=8, firing=Firing(0.3, 0.5, correlation=0.7, group=4)), 100_000
    on, p = (truth.codes(0, tokens) > 0).double(), truth.frequencies.numpy()
    together = on.T @ on / tokens
    for i in range(8):
        for j in range(i):
            rho = 0.7 if i // 4 == j // 4 else 0.0
            expected = multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf(norm.ppf([p[i], p[j]]))
            assert abs(float(together[i, j]) - expected) < 5 * (expected / tokens) ** 0.5


def test_layers_grow_and_have_means_and_massive_tokens():
    truth = planted(
        features=6, spans=("global",), surroundings=Surroundings(growth=2.0, mean=3.0, massive=0.25, massive_norm=1e4)
    )
    assert_close(
        truth.atoms.norm(dim=-1), torch.tensor([[1.0, 2, 4, 8]] * 6).double(), rtol=1e-6, atol=0
    )  # planted in float32
    assert_close(truth.offset.norm(dim=-1), 3 * torch.tensor([1.0, 2, 4, 8]).double(), rtol=1e-6, atol=0)
    x, z = truth.batch(0, 2000)
    rest = x - reference.planted(z, truth.atoms, truth.offset)
    huge = rest.norm(dim=-1)[:, 0] > 5e3
    assert abs(float(huge.double().mean()) - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5
    assert_close(rest[huge], truth.massive.expand_as(rest[huge]))
    assert_close(rest[~huge], torch.zeros_like(rest[~huge]))


@pytest.mark.parametrize(
    ("norms", "c_n", "c_f"), [([1, 1, 1], 3, 3), ([2, 1, 1], 2, 1.5), ([3, 4, 0], 1.75, 1.5625), ([1, 0, 0], 1, 1)]
)
def test_closed_forms_of_coherence_by_hand(norms, c_n, c_f):
    truth = planted(3, 2, 1, spans=("global",))
    truth.atoms = torch.tensor(norms, dtype=torch.float64).view(1, 3, 1) * torch.tensor([0.6, -0.8]).double()
    assert_close(truth.norm_coherence, torch.tensor([c_n]).double())
    assert_close(truth.functional_coherence, torch.tensor([c_f]).double())


@given(separable())
def test_the_oracle_of_a_separable_truth_is_exact_in_everything(truth):
    assert truth.separable
    oracle, (x, z) = truth.crosscoder(), truth.batch(0, 400)
    assert_close(oracle.encode(x), z)
    assert_close(norm_coherence(oracle.decoder.weight).values, truth.norm_coherence)
    functional = functional_coherence(oracle, [x], min_active=1).values
    assert_close(functional, truth.functional_coherence.where((z > 0).any(0), torch.nan), equal_nan=True)


@given(seeds)
def test_the_oracle_of_crowded_layers_still_has_the_codes(seed):
    truth = planted(6, 8, 20, seed=seed, surroundings=HARSH)
    x, z = truth.batch(0, 200)
    assert not truth.separable
    assert_close(truth.crosscoder().encode(x), z, rtol=1e-6, atol=1e-6)  # crowded directions are near dependent


def test_the_oracle_rebuilds_every_token_that_is_not_massive():
    truth = planted(6, 40, 20, surroundings=Surroundings(mean=4.0))
    assert measure_reconstruction(truth.crosscoder(), [truth.batch(0, 500)[0]]).ev_pooled == pytest.approx(1, abs=1e-12)


def test_the_oracle_of_more_features_than_there_is_room_for_does_its_best():
    truth = planted(4, 8, 60, firing=Firing(0.3), surroundings=Surroundings(mean=4.0))
    assert not truth.separable
    x, z = truth.batch(0, 2000)
    found = truth.crosscoder().encode(x).detach()
    assert float(torch.corrcoef(torch.stack([found.flatten(), z.flatten()]))[0, 1]) > 0.8
    pre = truth.crosscoder().encoder.pre_activations(truth.offset)
    assert_close(pre, torch.zeros_like(pre))  # the offset alone reads as nothing


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: PlantedFeatures(4, 8, 0), "PlantedFeatures needs features >= 1, got features=0"),
        (lambda: PlantedFeatures(0, 8, 3), "PlantedFeatures needs layers >= 1, got layers=0"),
        (lambda: PlantedFeatures(4, 1, 3), "PlantedFeatures needs d_model >= 2, got d_model=1"),
        (
            lambda: PlantedFeatures(3, 8, 3),
            "the span 'band' needs layers >= 4, got layers=3; leave it out of Planting(spans=...)",
        ),
        (
            lambda: PlantedFeatures(4, 8, 100, planting=Planting(firing=Firing(zipf=4))),
            "at zipf=4 the rarest of features=100 fires on a share of 5e-09 of the tokens, which is never; take zipf "
            "<= 2.84",
        ),
    ],
)
def test_a_wrong_truth_says_what_is_wrong(make, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make()


def test_the_way_out_that_the_message_names_works():
    assert PlantedFeatures(4, 8, 100, planting=Planting(firing=Firing(zipf=2.84))).features == 100


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_room_for_what_they_plant(name):
    preset = PRESETS[name]
    truth = preset.truth(seed=3)
    assert (truth.layers, truth.d_model, truth.features, truth.seed) == (
        preset.layers,
        preset.d_model,
        preset.features,
        3,
    )
    training = preset.training
    assert training.k >= 0.9 * float(truth.frequencies.sum())
    assert training.latents >= preset.features <= preset.layers * preset.d_model - 2  # the oracle's codes are exact
    assert float(truth.frequencies.min()) * training.steps * training.tokens > 300
    assert truth.batch(0, 8)[0].shape == (8, preset.layers, preset.d_model)
