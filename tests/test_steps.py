"""One move of a threshold an optimiser step, however many micro-batches it has, and none in a repeated forward."""

import copy
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import randn, seeds
from torch.utils.checkpoint import checkpoint

import fmxnn as fx
from fmxnn.gates import one_step

assert_close = torch.testing.assert_close
decays = st.sampled_from([0.0, 0.5, 0.9])


def optimizer():
    """One whose step changes nothing that a gate knows of."""
    parameter = torch.nn.Parameter(torch.zeros(()))
    parameter.grad = torch.ones(())
    return torch.optim.SGD([parameter], lr=0.1)


def smallest(pre, k):
    kept = fx.BatchTopK(k).select(pre)
    return [kept[kept > 0].min()] if (kept > 0).any() else []


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), decays, seeds)
def test_a_step_moves_the_threshold_once_towards_the_mean_of_its_micro_batches(counts, decay, seed):
    torch.manual_seed(seed)
    gate, expected, steps = fx.BatchTopK(1, decay=decay).double(), None, optimizer()
    for count in counts:
        found = []
        for pre in randn(count, 3, 5) - 1.0:  # often none is positive
            with one_step():
                gate(pre)
            found += smallest(pre, 1)
        steps.step()
        if found:
            mean = torch.stack(found).mean()
            expected = mean if expected is None else decay * expected + (1 - decay) * mean
    assert_close(gate.threshold, torch.tensor(-1.0, dtype=torch.float64) if expected is None else expected)


@given(st.integers(1, 5), decays, seeds)
def test_one_micro_batch_a_step_gives_the_bits_of_no_context(count, decay, seed):
    torch.manual_seed(seed)
    inside, outside, steps = fx.BatchTopK(2, decay=decay), fx.BatchTopK(2, decay=decay), optimizer()
    for pre in torch.randn(count, 4, 6):
        with one_step():
            inside(pre)
        outside(pre)
        steps.step()
        assert torch.equal(inside.threshold, outside.threshold)


@pytest.mark.parametrize("context", [nullcontext, one_step])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_a_forward_that_the_backward_pass_repeats_moves_nothing(context, reentrant, backend):
    torch.manual_seed(0)
    weights = [fx.DenseWeight(2, 4, 12) for _ in range(2)]
    encoder = fx.CrossLayerEncoder(weights[0], fx.BatchTopK(2), mask=fx.LayerMask(0.3))
    coder = fx.Crosscoder(encoder, fx.CrossLayerDecoder(weights[1]), backend=backend)
    plain, steps, x = copy.deepcopy(coder), optimizer(), torch.randn(8, 2, 4, requires_grad=True)
    for _ in range(3):
        gradients = []
        for module in (coder, plain):
            module.zero_grad()
            torch.manual_seed(1)
            with context():
                x_hat = checkpoint(module, x, use_reentrant=reentrant) if module is coder else module(x)
                x_hat.square().sum().backward()
            gradients.append([parameter.grad for parameter in module.parameters()])
        steps.step()
        assert_close(*gradients, rtol=0, atol=0)
        assert torch.equal(encoder.sparsifier.threshold, plain.encoder.sparsifier.threshold)


@given(st.integers(1, 3), st.integers(0, 3), seeds)
def test_a_threshold_that_is_put_back_takes_its_micro_batch_back(before, after, seed):
    """As a trainer does at a loss that is not finite."""
    torch.manual_seed(seed)
    spoiled, clean = fx.BatchTopK(1), fx.BatchTopK(1)
    with one_step():
        for pre in torch.rand(before, 3, 5):
            spoiled(pre)
            clean(pre)
        kept = spoiled.threshold.clone()
        spoiled(9 * torch.rand(3, 5))
        spoiled.threshold.copy_(kept)
        for pre in torch.rand(after, 3, 5):
            spoiled(pre)
            clean(pre)
    assert torch.equal(spoiled.threshold, clean.threshold)


def test_a_threshold_that_is_set_within_a_step_starts_anew():
    gate = fx.BatchTopK(1, decay=0.5)
    with one_step():
        gate(torch.tensor([[4.0, 1.0]]))
        gate.threshold.fill_(10.0)
        gate(torch.tensor([[2.0, 1.0]]))
    assert gate.threshold == 6
    gate.calibrate(torch.tensor([[9.0, 7.0]]))
    with one_step():
        gate(torch.tensor([[2.0, 1.0]]))
    assert gate.threshold == 5


@given(st.integers(0, 3), seeds)
def test_a_copy_counts_on_its_own_and_a_resumed_run_needs_the_threshold_alone(count, seed):
    torch.manual_seed(seed)
    gate, steps = fx.BatchTopK(1), optimizer()
    with one_step():
        for pre in torch.rand(count, 3, 5):
            gate(pre)
        twin = copy.deepcopy(gate)
        first, second = torch.rand(2, 3, 5)
        twin(9 * first)  # moves the twin alone
        again = copy.deepcopy(gate)
        for each in (gate, again):
            each(second)
    assert torch.equal(gate.threshold, again.threshold)
    assert list(gate.state_dict()) == ["threshold"]
    assert len(list(gate.buffers())) == 1  # so that a folder from before holds all that a gate needs
    steps.step()
    resumed = fx.BatchTopK(1)
    resumed.load_state_dict(gate.state_dict())
    with one_step():
        for each in (gate, resumed):
            each(first)
            each(second)
    assert torch.equal(gate.threshold, resumed.threshold)


@pytest.mark.parametrize("where", ["around", "within", "recomputed around", "recomputed within"])
def test_a_compiled_graph_moves_it_once_a_step(where):
    torch.compiler.reset()
    gate, eager, steps = fx.BatchTopK(2), fx.BatchTopK(2), optimizer()

    def run(pre):
        if where == "within":
            with one_step():
                return gate(pre)
        return checkpoint(gate, pre, use_reentrant=False) if where == "recomputed within" else gate(pre)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for step in range(3):
        for pre in torch.randn(2, 4, 6):
            ours, theirs = pre.clone().requires_grad_(), pre.clone().requires_grad_()
            with nullcontext() if where == "within" else one_step():
                z = checkpoint(compiled, ours, use_reentrant=False) if where == "recomputed around" else compiled(ours)
                z.sum().backward()
            with one_step():
                eager(theirs).sum().backward()
            assert torch.equal(ours.grad, theirs.grad)
        steps.step()
        assert_close(gate.threshold, eager.threshold, rtol=0, atol=0, msg=f"at step {step}")
    assert eager.threshold > 0


def test_a_step_without_tokens_moves_nothing():
    gate = fx.BatchTopK(1)
    with one_step():
        gate(torch.zeros(0, 4))
        gate(torch.tensor([[torch.nan, 1.0]]))
    assert gate.threshold == -1
