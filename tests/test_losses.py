import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, randn, seeds, sizes

from fmxnn import (
    DenseWeight,
    ShapeError,
    TrainedJumpReLU,
    dead_latent_loss,
    l1_penalty,
    reconstruction_loss,
    tanh_penalty,
    to_csr,
)

assert_close = torch.testing.assert_close


@given(batches, sizes, sizes, seeds)
def test_the_error_is_summed_over_d_model_and_averaged_over_layers_and_tokens(batch, layers, d_model, seed):
    torch.manual_seed(seed)
    x, x_hat = randn(*batch, layers, d_model), randn(*batch, layers, d_model)
    assert_close(reconstruction_loss(x, x_hat), reference.reconstruction_loss(x, x_hat))


@given(batches, sizes, sizes, seeds)
def test_the_penalty_weights_codes_by_their_norms_over_all_layers(batch, layers, latents, seed):
    torch.manual_seed(seed)
    z, norms = randn(*batch, latents).relu(), randn(layers, latents).abs()
    assert_close(l1_penalty(z, norms), reference.l1_penalty(z, norms))
    if len(batch) == 1:
        assert_close(l1_penalty(to_csr(z), norms), l1_penalty(z, norms))


@given(batches, sizes, sizes, st.sampled_from([0.3, 4.0]), seeds)
def test_thresholds_take_the_whole_step_of_the_tanh_penalty_and_nothing_else_changes(
    batch, layers, latents, stretch, seed
):
    torch.manual_seed(seed)
    gate, norms = TrainedJumpReLU(latents).double(), randn(layers, latents).abs().requires_grad_()
    torch.nn.init.normal_(gate.log_threshold)
    pre = randn(*batch, latents).requires_grad_()
    published = tanh_penalty(gate(pre), norms, stretch)
    penalty = tanh_penalty(pre, norms, stretch, active=gate.active(pre))
    assert_close(penalty, published)
    expected = torch.autograd.grad(published, (pre, norms))
    *found, thresholds = torch.autograd.grad(penalty, (pre, norms, gate.log_threshold))
    assert_close(found, list(expected))
    assert_close(
        thresholds,
        reference.step_gradient(pre.detach(), norms.detach(), gate.threshold.detach(), gate.bandwidth, stretch),
    )


@given(
    st.lists(st.integers(2, 3), min_size=1, max_size=3),
    sizes,
    sizes,
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([0, 1, 9]),
    st.booleans(),
    seeds,
)
def test_dead_latents_rebuild_the_residual_as_the_loop_says(
    batch, layers, d_model, latents, k_aux, alive, scored, seed
):
    torch.manual_seed(seed)
    weight = DenseWeight(layers, d_model, latents).double()
    residual, pre, dead = randn(*batch, layers, d_model), randn(*batch, latents), torch.arange(latents) >= alive
    score = randn(latents).abs() + 0.1 if scored else None
    expected = reference.dead_latent_loss(residual, pre, dead, weight.to_dense().detach(), k_aux, score)
    assert_close(dead_latent_loss(residual, pre, dead, weight.to_layers, k_aux, score=score), expected)


def test_only_dead_latents_learn_from_the_dead_latent_loss():
    weight = DenseWeight(2, 3, 5).double()
    residual, pre = randn(6, 2, 3).requires_grad_(), (randn(6, 5).abs() + 0.1).requires_grad_()
    dead = torch.tensor([True, False, True, False, False])
    dead_latent_loss(residual, pre, dead, weight.to_layers, 2).backward()
    assert residual.grad is None
    assert (pre.grad[:, ~dead] == 0).all()
    assert (pre.grad[:, dead] != 0).all()
    assert (weight.factors[0].grad[~dead] == 0).all()


def test_no_dead_latent_costs_nothing_and_breaks_no_gradient():
    weight, pre = DenseWeight(2, 3, 5).double(), randn(6, 5).requires_grad_()
    loss = dead_latent_loss(randn(6, 2, 3), pre, torch.zeros(5, dtype=torch.bool), weight.to_layers, 2)
    assert loss == 0
    loss.backward()
    assert pre.grad.isfinite().all()
    assert weight.factors[0].grad.isfinite().all()


def test_a_residual_without_variance_costs_nothing():
    weight, pre = DenseWeight(2, 3, 5).double(), randn(6, 5)
    assert (
        dead_latent_loss(torch.zeros(6, 2, 3).double(), pre, torch.ones(5, dtype=torch.bool), weight.to_layers, 2) == 0
    )


def test_a_residual_without_variance_breaks_no_gradient():
    weight, pre = DenseWeight(2, 3, 5).double(), randn(1, 5).requires_grad_()
    dead_latent_loss(randn(1, 2, 3), pre, torch.ones(5, dtype=torch.bool), weight.to_layers, 2).backward()
    assert pre.grad.isfinite().all()
    assert weight.factors[0].grad.isfinite().all()


def test_one_token_without_batch_axes_is_a_batch_of_one():
    weight, residual, pre, dead = DenseWeight(2, 3, 5).double(), randn(2, 3), randn(5), torch.ones(5, dtype=torch.bool)
    one = dead_latent_loss(residual[None], pre[None], dead, weight.to_layers, 2)
    assert_close(dead_latent_loss(residual, pre, dead, weight.to_layers, 2), one)


def test_activations_and_reconstructions_of_other_shapes_are_refused():
    with pytest.raises(ShapeError) as error:
        reconstruction_loss(torch.zeros(4, 2, 3), torch.zeros(4, 1, 3))
    assert str(error.value) == (
        "the loss compares x and x_hat of one shape, got (4, 2, 3) and (4, 1, 3); decode all layers of the same tokens"
    )
