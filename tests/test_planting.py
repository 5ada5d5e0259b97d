import re
from math import cos

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fmxnn.metrics.planted.planting import MOTIONS, SPANS, Firing, Planting, Surroundings

seeds = st.integers(0, 10**6)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def runs(on):
    """The lengths of the runs of layers that are on."""
    return [len(run) for run in re.findall("1+", "".join(str(int(layer)) for layer in on))]


@given(seeds, st.integers(4, 12))
def test_every_span_is_what_its_name_says(seed, layers):
    profile = {name: span.draw(layers, generator(seed)) for name, span in SPANS.items()}
    found = {name: runs(norms > 0) for name, norms in profile.items()}
    assert found["single"] == [1]
    assert found["local"] in ([1], [2])
    assert len(found["band"]) == 1
    assert 3 <= found["band"][0] < layers
    assert len(found["gapped"]) == 2
    assert found["global"] == found["ramp"] == [layers]
    for name in ("single", "local", "band", "gapped", "global"):
        assert set(profile[name].tolist()) <= {0.0, 1.0}
    steps = profile["ramp"].diff()
    assert_close(steps, steps.sign() / layers)
    assert abs(int(steps.sign().sum())) == layers - 1


@pytest.mark.parametrize("name", SPANS)
def test_the_least_number_of_layers_is_enough(name):
    for seed in range(20):
        assert (SPANS[name].draw(SPANS[name].least, generator(seed)) > 0).any()


def directions(name, seed, d_model=6, turn=0.4):
    torch.manual_seed(seed)
    on = torch.rand(9, 5) < 0.7
    on[:, 2] = True
    return on, MOTIONS[name](on, d_model, turn, generator(seed))


@given(seeds, st.sampled_from(list(MOTIONS)), st.integers(2, 7))
def test_directions_are_of_unit_length(seed, name, d_model):
    on, moved = directions(name, seed, d_model)
    assert moved.shape == (*on.shape, d_model)
    assert_close(moved.norm(dim=-1), torch.ones(on.shape).double())


@given(seeds, st.floats(0, 1.5))
def test_every_motion_keeps_its_law(seed, turn):
    _, static = directions("static", seed)
    assert torch.equal(static, static[:, :1].expand_as(static))
    _, moved = directions("transport", seed, turn=turn)
    inner = torch.einsum("ild, jld -> lij", moved, moved)
    assert_close(inner, inner[:1].expand_as(inner))  # one rotation, shared by all
    _, drifting = directions("drift", seed, turn=turn)
    assert_close((drifting[:, 1:] * drifting[:, :-1]).sum(-1), torch.full((9, 4), cos(turn)).double())
    on, switching = directions("switch", seed)
    for layers, feature in zip(on, switching):
        there = feature[layers]
        same = there @ there[0]
        assert_close(
            same, same.round(), atol=1e-12, rtol=0
        )  # each layer has the first direction or one orthogonal to it
        assert same[0].round() == 1
        assert (same.round()[-1] == 0) == (len(there) > 1)
        assert (same.round().diff() <= 0).all()


def test_transport_turns_by_about_the_angle():
    moved = MOTIONS["transport"](torch.ones(200, 3).bool(), 64, 0.3, generator(0))
    angles = (moved[:, 1:] * moved[:, :-1]).sum(-1).acos()
    assert 0.28 < float(angles.mean()) < 0.32


def test_a_control_has_support_and_no_shared_direction():
    moved = MOTIONS["independent"](torch.ones(400, 2).bool(), 16, 0.4, generator(0))
    inner = (moved[:, 0] * moved[:, 1]).sum(-1)
    assert abs(float(inner.mean())) < 5 / (16 * 400) ** 0.5
    assert float(inner.pow(2).mean()) == pytest.approx(1 / 16, rel=0.3)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: Firing(most=1.0),
            "Firing needs 1e-06 <= most < 1, the frequency of the most frequent feature, got most=1.0",
        ),
        (
            lambda: Firing(zipf=-1),
            "Firing needs a finite zipf >= 0, the exponent by which frequencies fall, got zipf=-1",
        ),
        (
            lambda: Firing(correlation=1),
            "Firing needs 0 <= correlation < 1 between features of a group, got correlation=1",
        ),
        (lambda: Firing(group=0), "Firing needs group >= 1, the features of a group, got group=0"),
        (
            lambda: Surroundings(growth=0),
            "Surroundings needs a finite growth > 0, a layer's norm over the one before, got growth=0",
        ),
        (lambda: Surroundings(mean=-1.0), "Surroundings needs a finite mean >= 0, a norm, got mean=-1.0"),
        (
            lambda: Surroundings(massive=2),
            "Surroundings needs 0 <= massive <= 1, the share of massive tokens, got massive=2",
        ),
        (
            lambda: Planting(spans=("wide",)),
            "Planting takes a tuple of spans from single, local, band, global, gapped, ramp, got ('wide',)",
        ),
        (
            lambda: Planting(motions=()),
            "Planting takes a tuple of motions from static, transport, drift, switch, independent, got ()",
        ),
        (
            lambda: Planting(spans="band"),
            "Planting takes a tuple of spans from single, local, band, global, gapped, ramp, got 'band'",
        ),
    ],
)
def test_a_wrong_planting_says_what_is_wrong(make, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make()
