import re

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


@pytest.mark.parametrize("p", [-0.1, 1.0, 2, float("nan")])
def test_a_probability_outside_its_range_is_refused(p):
    message = f"LayerMask needs 0 <= p < 1, the probability that a layer is dropped, got p={p}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LayerMask(p)


def test_the_repr_prints_p():
    assert repr(LayerMask(0.05)) == "LayerMask(p=0.05)"
