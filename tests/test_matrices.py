"""An optimiser of matrices trains factors of any number of axes as the matrices that they are."""

import copy

import pytest
import torch
from torch import nn

from fmxnn import (
    BatchTopK,
    CPWeight,
    Crosscoder,
    CrossLayerDecoder,
    CrossLayerEncoder,
    DenseWeight,
    EinsumWeight,
    ShapeError,
    TensorRingWeight,
    matrix_optimizer,
    reconstruction_loss,
)

Muon = torch.optim.Muon


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


@pytest.mark.parametrize(
    ("shape", "sides"), [((5, 2, 3), (5, 6)), ((4, 6, 3), (4, 18)), ((2, 3, 4, 5), (6, 20)), ((7, 4), (7, 4))]
)
def test_a_step_is_that_of_the_matrix(shape, sides):
    tall, flat = parameter(*shape), parameter(*sides)
    flat.data = tall.detach().clone().view(sides)
    on_tall = matrix_optimizer(Muon, [tall], lr=0.1, momentum=0.9)
    on_flat = Muon([flat], lr=0.1, momentum=0.9)
    for _ in range(3):
        for optimizer, tensor in ((on_tall, tall), (on_flat, flat)):
            optimizer.zero_grad()
            tensor.flatten().sin().sum().backward()
            optimizer.step()
    assert tall.shape == tall.grad.shape == shape
    torch.testing.assert_close(tall.detach().view(sides), flat.detach())
    assert on_tall.state_dict()["state"][0]["momentum_buffer"].shape == sides


def test_the_memory_of_a_parameter_stays_where_it_is():
    tensor, turned = parameter(5, 2, 3), nn.Parameter(torch.randn(3, 2, 5).movedim(0, 2))
    places, strides = [t.data_ptr() for t in (tensor, turned)], [t.stride() for t in (tensor, turned)]
    before = turned.detach().clone()
    optimizer = matrix_optimizer(Muon, [tensor, turned], lr=0.1)
    (tensor.sin().sum() + turned.sin().sum()).backward()
    optimizer.step()
    assert [t.data_ptr() for t in (tensor, turned)] == places
    assert [t.stride() for t in (tensor, turned)] == strides
    assert not torch.equal(turned, before)


def test_a_step_that_fails_leaves_the_parameters_as_they_were():
    tensor = parameter(5, 2, 3)
    optimizer = matrix_optimizer(Muon, [tensor], lr=0.1)
    tensor.sum().backward()
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError):
        optimizer.step()
    assert tensor.shape == tensor.grad.shape == (5, 2, 3)


def test_closures_hooks_schedules_and_groups_work_as_with_the_optimiser_itself():
    first, second = parameter(5, 2, 3), parameter(4, 4)
    Muon([parameter(2, 2)])  # torch puts its hooks on the class when the first optimiser is made
    optimizer = matrix_optimizer(Muon, [{"params": [first]}, {"params": [second], "lr": 0.5}], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append(tuple(first.shape)))

    def closure():
        optimizer.zero_grad()
        loss = (first.shape == (5, 2, 3)) * (first.square().sum() + second.square().sum())
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    schedule.step()
    assert calls == ["before", (5, 2, 3)]
    assert loss > closure()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.25]


def test_a_state_goes_round():
    tensor = parameter(5, 2, 3)
    optimizer = matrix_optimizer(Muon, [tensor], lr=0.1)
    tensor.sin().sum().backward()
    optimizer.step()
    other = nn.Parameter(tensor.detach().clone())
    again = matrix_optimizer(Muon, [other], lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, of in ((tensor, optimizer), (other, again)):
        each.grad = None
        each.sin().sum().backward()
        of.step()
    assert torch.equal(tensor, other)


def test_a_parameter_of_one_axis_is_refused():
    with pytest.raises(ShapeError, match=r"two axes or more, got one of \(3,\).*AdamW"):
        matrix_optimizer(Muon, [parameter(3)])


@pytest.mark.parametrize("make", [DenseWeight, CPWeight, TensorRingWeight])
def test_a_table_and_small_parameters_are_all_factors(make):
    weight = make(2, 3, 5)
    assert weight.table_parameter is weight.factors[0]
    assert weight.table_parameter.shape[0] == 5
    assert {id(p) for p in [weight.table_parameter, *weight.small_parameters()]} == {id(p) for p in weight.parameters()}
    assert len(weight.small_parameters()) == len(weight.factors) - 1


def test_a_weight_without_a_table_has_small_parameters_only():
    weight = EinsumWeight("latents d_model, latents layers", layers=2, d_model=3, latents=5)
    assert weight.table_parameter is None
    assert weight.small_parameters() == list(weight.parameters())


def test_a_ring_trains_with_muon():
    torch.manual_seed(0)
    ring = TensorRingWeight(4, 8, 64)
    coder = Crosscoder(CrossLayerEncoder(ring, BatchTopK(8)), CrossLayerDecoder(ring))
    biases = [p for p in coder.parameters() if p.ndim < 2 or p is coder.decoder.bias]
    optimizers = [matrix_optimizer(Muon, ring.parameters(), lr=0.02), torch.optim.AdamW(biases, lr=1e-3)]
    x, losses = torch.randn(64, 4, 8), []
    for _ in range(60):
        loss = reconstruction_loss(x, coder(x))
        losses.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
