import re
from copy import deepcopy

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import weights
from torch.testing import assert_close

import fmxnn as fx
from fmxnn.metrics.planted import recovery as module
from fmxnn.metrics.planted.planted import PlantedFeatures
from fmxnn.metrics.planted.planting import Firing, Planting, Surroundings
from fmxnn.metrics.planted.recovery import Support, chance_cosine, cosines, match, recovery
from fmxnn.training import Trainer

seeds = st.integers(0, 10**6)
FEW = dict(batches=range(-2, 0), tokens=200)
PERFECT = ("mcc", "recovered", "nearest", "detection_f1", "precision", "recall", "iou")


def planted(layers=5, d_model=30, features=12, *, seed=0, **surroundings):
    planting = Planting(firing=Firing(zipf=0.5), surroundings=Surroundings(**surroundings))
    return PlantedFeatures(layers, d_model, features, planting=planting, seed=seed).double()


def random_like(truth, latents):
    made = [fx.DenseWeight(truth.layers, truth.d_model, latents) for _ in range(2)]
    return fx.gaussian_start(
        fx.Crosscoder(fx.CrossLayerEncoder(made[0], fx.JumpReLU(latents)), fx.CrossLayerDecoder(made[1])).double()
    )


@torch.no_grad()
def latents_of(crosscoder, order, scale=1.0):
    """The same crosscoder with these latents in this order, codes times `scale` and atoms over it."""
    encoder, decoder = crosscoder.encoder, crosscoder.decoder
    scale = torch.as_tensor(scale, dtype=torch.float64).expand(len(order))
    made = [fx.DenseWeight(decoder.weight.layers, decoder.weight.d_model, len(order)) for _ in range(2)]
    picked = fx.Crosscoder(
        fx.CrossLayerEncoder(made[0], fx.JumpReLU(len(order))), fx.CrossLayerDecoder(made[1])
    ).double()
    made[0].factors[0].copy_(encoder.weight.factors[0][order] * scale.view(-1, 1, 1))
    made[1].factors[0].copy_(decoder.weight.factors[0][order] / scale.view(-1, 1, 1))
    picked.encoder.bias.copy_(encoder.bias[order] * scale)
    picked.encoder.sparsifier.threshold = encoder.sparsifier.threshold[order] * scale
    picked.decoder.bias.copy_(decoder.bias)
    return picked


def assert_same(one, other):
    for name in ("cosine", "nearest", "f1", "c_n", "c_f"):
        assert_close(getattr(one, name), getattr(other, name), equal_nan=True)
    assert (one.silent, one.zero, one.chance) == (other.silent, other.zero, other.chance)


@given(seeds, st.floats(0.8, 1.3), st.sampled_from([0.0, 0.05]))
def test_the_dictionary_built_by_hand_scores_one(seed, growth, massive):
    truth = planted(seed=seed, growth=growth, mean=3.0, massive=massive)
    report = recovery(truth.crosscoder(), truth, **FEW)
    for numbers in report.by_kind().values():
        assert [numbers[name] for name in PERFECT] == pytest.approx([1] * len(PERFECT), abs=1e-12)
        assert [numbers[f"{c}_{what}"] for c in ("c_n", "c_f") for what in ("bias", "error")] == pytest.approx(
            [0] * 4, abs=1e-7
        )
    assert torch.equal(report.latent, torch.arange(12))
    assert (report.silent, report.zero) == (0, 0)


def test_a_random_dictionary_scores_at_chance():
    truth, generator = planted(4, 16, 300), torch.Generator().manual_seed(1)
    numbers = recovery(random_like(truth, 300), truth, **FEW).numbers()
    directions = [
        torch.nn.functional.normalize(torch.randn(300, 64, generator=generator).double(), dim=1) for _ in range(2)
    ]
    cosine = directions[0] @ directions[1].T
    simulated = cosine[torch.arange(300), match(cosine)].mean()
    assert numbers["nearest"] == pytest.approx(chance_cosine(300, 64), abs=0.005)
    assert numbers["mcc"] == pytest.approx(float(simulated), abs=0.01)
    assert numbers["recovered"] == 0
    assert numbers["detection_f1"] < 0.25


@pytest.mark.parametrize(("latents", "dimensions"), [(1, 9), (2, 3), (50, 8), (1000, 64)])
def test_chance_is_the_mean_of_a_simulation(latents, dimensions):
    directions = torch.nn.functional.normalize(
        torch.randn(max(400_000 // latents, 400), latents, dimensions).double(), dim=2
    )
    largest = directions[..., 0].amax(1)
    assert chance_cosine(latents, dimensions) == pytest.approx(
        float(largest.mean()), abs=5 * float(largest.std()) / len(largest) ** 0.5
    )


@given(weights(), seeds)
def test_cosines_equal_a_loop_for_any_weight(weight, seed):
    torch.manual_seed(seed)
    atoms = torch.randn(4, weight.layers, weight.d_model, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 2)
        found = cosines(weight, atoms)
    assert_close(found, reference.cosines(atoms, weight.to_dense().detach()), equal_nan=True)


@given(seeds, st.integers(1, 5), st.integers(1, 5))
def test_no_matching_is_better(seed, features, latents):
    torch.manual_seed(seed)
    cosine = torch.rand(features, latents, dtype=torch.float64) * 2 - 1
    latent = match(cosine)
    matched = latent >= 0
    assert len(set(latent[matched].tolist())) == matched.sum()
    gained = cosine[matched, latent[matched]]
    assert (gained > 0).all()
    assert_close(gained.sum().item(), reference.best_matching(cosine))


@given(seeds)
def test_every_number_equals_a_loop(seed):
    torch.manual_seed(seed)
    truth = planted(4, 3, 4, seed=seed)
    crosscoder = random_like(truth, 6)
    report = recovery(crosscoder, truth, **FEW, share=0.4)
    x, z = (torch.cat(parts) for parts in zip(*(truth.batch(number, 200) for number in (-2, -1))))
    with torch.no_grad():
        learned, w = crosscoder.eval().encode(x), crosscoder.decoder.weight.to_dense().detach()
    cosine, norms = reference.cosines(truth.atoms, w), w.norm(dim=1).T
    assert_close(report.cosine.sum().item(), reference.best_matching(cosine[:, (learned > 0).any(0)]))
    for feature, latent in enumerate(report.latent.tolist()):
        if latent < 0:
            assert report.cosine[feature] == report.f1[feature] == 0
            continue
        assert_close(report.cosine[feature], cosine[feature, latent])
        assert report.f1[feature] == pytest.approx(reference.detection_f1(learned[:, latent] > 0, z[:, feature] > 0))
        expected = reference.overlap(norms[latent], truth.atoms[feature].norm(dim=-1), 0.4)
        found = [getattr(report.support, name)()[feature].item() for name in ("precision", "recall", "iou")]
        assert found == pytest.approx(expected)
        assert report.c_n[feature, 0] == pytest.approx(float(norms[latent].sum() / norms[latent].max()))


def test_support_by_layer_and_where_there_is_nothing():
    support = Support(torch.tensor([[1, 1, 0], [0, 1, 1]]).bool(), torch.tensor([[1, 0, 1], [0, 0, 0]]).bool())
    nan = float("nan")
    assert_close(support.precision(), torch.tensor([0.5, nan]).double(), equal_nan=True)
    assert_close(support.recall(), torch.tensor([0.5, 0.0]).double())
    assert_close(support.iou(), torch.tensor([1 / 3, 0.0]).double())
    assert_close(support.precision(axis=0), torch.tensor([1.0, nan, 0.0]).double(), equal_nan=True)
    assert_close(support.recall(axis=0), torch.tensor([1.0, 0.0, 0.0]).double())


@given(seeds)
def test_the_order_of_latents_and_layers_and_the_scale_of_codes_do_not_matter(seed):
    torch.manual_seed(seed)
    truth = planted(4, 6, 9, seed=seed, mean=1.0)
    crosscoder = random_like(truth, 11)
    expected = recovery(crosscoder, truth, **FEW)
    order = torch.randperm(11)
    assert_same(recovery(latents_of(crosscoder, order, torch.rand(11) + 0.1), truth, **FEW), expected)
    layers, turned, moved = torch.randperm(4), deepcopy(truth), deepcopy(crosscoder)
    for name in ("atoms", "offset", "massive"):
        setattr(turned, name, getattr(truth, name)[..., layers, :].contiguous())
    with torch.no_grad():
        for part in (moved.encoder, moved.decoder):
            part.weight.factors[0].copy_(part.weight.factors[0][:, layers])
    assert_same(recovery(moved, turned, **FEW), expected)


def test_fewer_latents_than_features_leave_some_unmatched_and_more_do_no_harm():
    truth = planted()
    oracle = truth.crosscoder()
    few = recovery(latents_of(oracle, torch.arange(12)[3:]), truth, **FEW)
    assert few.latent.tolist()[3:] == list(range(9))
    assert few.numbers()["mcc"] == pytest.approx((9 + few.cosine[:3].sum().item()) / 12)
    assert (few.numbers()["recovered"], few.cosine[:3].tolist(), few.f1[:3].tolist()) == (9 / 12, [0] * 3, [0] * 3)
    assert few.support.recall()[:3].tolist() == [0] * 3
    more = latents_of(oracle, torch.arange(24) % 12)
    with torch.no_grad():
        more.decoder.weight.factors[0][12:].normal_()
    numbers = recovery(more, truth, **FEW).numbers()
    assert [numbers[name] for name in PERFECT] == pytest.approx([1] * len(PERFECT), abs=1e-12)


def test_atoms_of_zeros_and_the_silent_are_left_out_and_counted():
    truth, oracle = planted(), planted().crosscoder()
    with torch.no_grad():
        oracle.decoder.weight.factors[0][2] = 0
        oracle.encoder.weight.factors[0][5] = 0
    report = recovery(oracle, truth, **FEW)
    assert (report.zero, report.silent) == (1, 1)
    assert report.latent[[2, 5]].tolist() == [-1, -1]
    assert report.nearest_feature.isnan().nonzero().flatten().tolist() == [2, 5]
    assert "1 silent latents, 1 atoms of zeros, 0 features that never fired" in report.table()
    rare = PlantedFeatures(5, 30, 12, planting=Planting(firing=Firing(zipf=3))).double()
    seen = recovery(rare.crosscoder(), rare, batches=[-1], tokens=40)
    quiet = (rare.codes(-1, 40) > 0).sum(0) == 0
    assert torch.equal(seen.cosine.isnan(), quiet)
    assert seen.numbers()["features"] == 12 - int(quiet.sum()) < 12
    assert seen.numbers()["mcc"] == pytest.approx(1)


def test_a_feature_that_never_fired_takes_no_latent():
    truth = PlantedFeatures(5, 30, 12, planting=Planting(firing=Firing(zipf=3))).double()
    quiet = (truth.codes(-1, 40) > 0).sum(0) == 0
    report = recovery(random_like(truth, 30), truth, batches=[-1], tokens=40)
    assert torch.equal(report.latent < 0, quiet)
    assert torch.equal(report.nearest.isnan(), quiet)


def test_measuring_runs_in_eval_and_gives_the_mode_back():
    truth = planted()
    encoder = fx.CrossLayerEncoder(fx.DenseWeight(5, 30, 9), fx.BatchTopK(2), mask=fx.LayerMask(0.9))
    crosscoder = fx.Crosscoder(encoder, fx.CrossLayerDecoder(fx.DenseWeight(5, 30, 9))).double()
    with torch.no_grad():
        crosscoder(truth.batch(0, 100)[0])
    for training in (False, True):
        report = recovery(crosscoder.train(training), truth, **FEW)
        assert crosscoder.training == training
        if not training:
            expected = report
    assert_same(report, expected)


def test_training_recovers_clearly_more_than_chance():
    truth = PlantedFeatures(4, 16, 24, planting=Planting(firing=Firing(0.3, 0.5)))
    made = [fx.DenseWeight(4, 16, 32) for _ in range(2)]
    crosscoder = fx.tied_start(
        fx.Crosscoder(fx.CrossLayerEncoder(made[0], fx.BatchTopK(3)), fx.CrossLayerDecoder(made[1]))
    )
    trainer = Trainer(crosscoder, torch.optim.Adam(crosscoder.parameters(), lr=1e-2))
    before = recovery(crosscoder, truth)
    for number in range(400):
        trainer.step(truth.batch(number, 256)[0])
    after = recovery(crosscoder, truth)
    assert before.numbers()["nearest"] == pytest.approx(before.chance, abs=0.05)
    assert after.numbers()["mcc"] > 0.8
    assert after.numbers()["recovered"] > 0.4


def test_a_crosscoder_of_other_sizes_is_refused():
    truth = planted()
    with pytest.raises(
        fx.ShapeError,
        match=re.escape(
            "the truth has (layers=5, d_model=30) and the weight (layers=4, d_model=30); compare a crosscoder that "
            "was trained on this truth"
        ),
    ):
        recovery(random_like(planted(4), 8), truth)
    with pytest.raises(
        ValueError, match=re.escape("recovery needs 0 <= share < 1, of an atom's largest norm, got share=1.5")
    ):
        recovery(truth.crosscoder(), truth, share=1.5)
    with pytest.raises(ValueError, match="functional_coherence has seen no tokens"):
        recovery(truth.crosscoder(), truth, batches=[])
