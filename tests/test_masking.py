import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, randn, seeds

from fmxnn import (
    BatchTopK,
    Crosscoder,
    CrossLayerDecoder,
    CrossLayerEncoder,
    DenseWeight,
    LayerMask,
    ShapeError,
    build,
    describe,
    reconstruction_loss,
)


@given(batches, st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.05, 0.3, 0.9]), seeds)
def test_a_mask_drops_whole_layers_and_rescales_nothing(batch, layers, d_model, p, seed):
    torch.manual_seed(seed)
    x = randn(*batch, layers, d_model)
    y = LayerMask(p)(x)
    dropped = (y == 0).all(-1)
    assert torch.equal(y, torch.where(dropped.unsqueeze(-1), 0.0, x))


@given(seeds, st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_a_dropped_layer_is_zero_whatever_it_held(seed, bad):
    torch.manual_seed(seed)
    x = torch.full((9, 4, 2), bad, dtype=torch.float64, requires_grad=True)
    y = LayerMask(0.5)(x)
    kept = ~(y == 0).all(-1)
    assert 0 < kept.sum() < 36
    y[~kept].sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@given(batches, st.sampled_from([0.0, 0.5]))
def test_a_mask_is_the_identity_in_eval_and_at_zero(batch, p):
    x = randn(*batch, 3, 2)
    assert LayerMask(p).eval()(x) is x
    assert LayerMask(0.0)(x) is x


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_share_dropped_is_p_independently_over_tokens_and_layers(p):
    kept = LayerMask(p)(torch.ones(20_000, 4, 3))[..., 0]
    spread = (p * (1 - p)) ** 0.5
    assert abs((1 - kept).mean() - p) < 5 * spread / 80_000**0.5
    for layer in kept.T:
        assert abs((1 - layer).mean() - p) < 5 * spread / 20_000**0.5
    centred = (kept - kept.mean(0)) / spread
    between_layers = centred.T @ centred / 20_000 - torch.eye(4)
    between_tokens = (centred[1:] * centred[:-1]).mean(0)
    assert between_layers.abs().max() < 5 * max(1, (1 - 2 * p) ** 2 / spread**2) ** 0.5 / 20_000**0.5
    assert between_tokens.abs().max() < 5 / 20_000**0.5


def test_the_loss_targets_the_clean_activations():
    encoder = CrossLayerEncoder(DenseWeight(2, 3, 5), BatchTopK(2), mask=LayerMask(0.5))
    coder, x = Crosscoder(encoder, CrossLayerDecoder(DenseWeight(2, 3, 5))).double(), randn(40, 2, 3)
    clean = x.clone()
    seed = torch.random.get_rng_state()
    loss = reconstruction_loss(x, coder(x))
    assert torch.equal(x, clean)
    torch.random.set_rng_state(seed)
    masked = encoder.mask(x)
    assert not torch.equal(masked, x)
    encoder.mask = LayerMask(0.0)
    torch.testing.assert_close(loss, reconstruction_loss(x, coder(masked)))


def shares(mask, layers, tokens=40_000):
    """How often each set of kept layers was drawn, as a dictionary from masks to shares."""
    kept = mask(torch.ones(tokens, layers, 1))[..., 0].long()
    numbers = (kept * 2 ** torch.arange(layers)).sum(-1)
    return torch.bincount(numbers, minlength=2**layers) / tokens


def probabilities(p, layers, *, keep_one):
    """The same by its definition: a product over the layers, divided by what is left where one is always kept."""
    p = [p] * layers if isinstance(p, float) else p
    found = torch.tensor(
        [math.prod(1 - q if number >> i & 1 else q for i, q in enumerate(p)) for number in range(2**layers)]
    )
    if keep_one:
        found[0] = 0
        found /= 1 - math.prod(p)
    return found


@pytest.mark.parametrize("keep_one", [False, True])
@pytest.mark.parametrize(
    ("p", "layers"), [(0.5, 4), (0.95, 2), ((0.1, 0.9, 0.5), 3), ((0.0, 0.7), 2), ((0.7, 0.0, 0.2), 3)]
)
def test_every_set_of_layers_is_kept_with_its_probability(p, layers, keep_one):
    expected = probabilities(p, layers, keep_one=keep_one)
    drawn = shares(LayerMask(p, keep_one=keep_one), layers)
    assert (drawn[expected == 0] == 0).all()
    assert ((drawn - expected).abs() < 5 * (expected * (1 - expected) / 40_000).sqrt() + 1e-9).all()
    each = [p] * layers if isinstance(p, float) else p
    dropped = sum(expected[number] for number in range(2**layers) if not number & 1)
    none = math.prod(each) if keep_one else 0.0
    assert abs(dropped - (each[0] - none) / (1 - none)) < 1e-6


@given(batches, st.integers(1, 4), st.sampled_from([0.5, 0.99]), seeds)
def test_a_token_always_keeps_a_layer_where_it_is_asked_for(batch, layers, p, seed):
    torch.manual_seed(seed)
    x = torch.ones(*batch, layers, 2)
    kept = LayerMask(p, keep_one=True)(x)
    assert kept.any(-1).any(-1).all()
    assert torch.equal(kept[..., 0], kept[..., 1])
    assert LayerMask(p, keep_one=True).eval()(x) is x


def test_without_it_every_layer_of_some_tokens_is_dropped():
    assert shares(LayerMask(0.5), 4)[0] > 0.05


def test_one_number_is_one_for_every_layer():
    x = torch.randn(50, 3, 2)
    torch.manual_seed(1)
    one = LayerMask(0.3)(x)
    torch.manual_seed(1)
    assert torch.equal(LayerMask([0.3] * 3)(x), one)


def test_the_draws_of_one_number_are_as_they_were():
    x = torch.randn(50, 3, 2)
    torch.manual_seed(1)
    masked = LayerMask(0.3)(x)
    torch.manual_seed(1)
    keep = torch.rand(50, 3) >= 0.3
    assert torch.equal(masked, torch.where(keep.unsqueeze(-1), x, 0.0))


@pytest.mark.parametrize("mask", [LayerMask(0.3), LayerMask((0.1, 0.2), keep_one=True)], ids=repr)
def test_a_mask_compiles_as_one_graph(mask):
    y = torch.compile(mask, fullgraph=True, backend="aot_eager")(torch.ones(200, 2, 3))
    assert 0 < (y == 0).sum() < y.numel()


def test_a_recipe_from_before_loads_and_a_new_one_goes_round():
    assert describe(LayerMask(0.05)) == {"LayerMask": {"p": 0.05}}
    old = build({"LayerMask": {"p": 0.05}}, [LayerMask])
    assert (old.p, old.keep_one) == (0.05, False)
    new = LayerMask([0.1, 0.2], keep_one=True)
    again = build(json.loads(json.dumps(describe(new))), [LayerMask])
    assert (again.p, again.keep_one) == ((0.1, 0.2), True)


@pytest.mark.parametrize("p", [-0.1, 1.0, 2, float("nan"), (0.1, 1.0), (), ("0.1",), "0.1", None])
def test_a_probability_outside_its_range_is_refused(p):
    with pytest.raises(
        ValueError, match=r"LayerMask needs 0 <= p < 1, the probability that a layer is dropped"
    ) as error:
        LayerMask(p)
    assert str(p)[:3] in str(error.value)


@pytest.mark.parametrize(
    "p", [np.array([0.1, 0.2]), torch.tensor([0.1, 0.2], dtype=torch.float64)], ids=["numpy", "torch"]
)
def test_probabilities_may_be_an_array(p):
    assert describe(LayerMask(p)) == {"LayerMask": {"p": [0.1, 0.2]}}


def test_other_layers_than_probabilities_are_named():
    with pytest.raises(ShapeError, match=r"layers=1"):
        LayerMask([0.1])(torch.zeros(5, 3, 4))
    with pytest.raises(ShapeError, match=r"layers=2.*\(5, 3, 4\); give as many as there are layers"):
        LayerMask((0.1, 0.2))(torch.zeros(5, 3, 4))


def test_the_repr_prints_p():
    assert repr(LayerMask(0.05)) == "LayerMask(p=0.05)"
    assert repr(LayerMask([0.1, 0.2], keep_one=True)) == "LayerMask(p=(0.1, 0.2), keep_one=True)"
