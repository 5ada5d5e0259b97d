import json
import re

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, randn, seeds

import fmxnn as fx
from fmxnn import BatchTopK, JumpReLU, SignedBatchTopK, SignedTopK, TopK, TrainedJumpReLU
from fmxnn.core.recipe import describe

assert_close = torch.testing.assert_close


@st.composite
def pre_activations(draw):
    """Pre-activations of any batch, often with ties, few positives or none; and a k."""
    torch.manual_seed(draw(seeds))
    pre = randn(*draw(batches), draw(st.integers(1, 6)))
    shift = draw(st.sampled_from([0.0, 0.0, -1.0, -9.0, 9.0]))
    return (pre.round() if draw(st.booleans()) else pre) + shift, draw(st.integers(1, pre.shape[-1]))


@given(pre_activations())
def test_topk_keeps_the_largest_positives_of_each_token(drawn):
    pre, k = drawn
    z = TopK(k)(pre)
    assert_close(z.sort(dim=-1).values, reference.topk(pre, k).sort(dim=-1).values)
    assert torch.equal((z > 0).sum(-1), (pre > 0).sum(-1).clamp(max=k))
    assert torch.equal(z[z != 0], pre[z != 0])


@given(pre_activations())
def test_batchtopk_keeps_the_largest_positives_of_the_whole_batch(drawn):
    pre, k = drawn
    z, tokens = BatchTopK(k)(pre), pre.numel() // pre.shape[-1]
    assert z.shape == pre.shape
    assert_close(z.flatten().sort().values, reference.batchtopk(pre, k).flatten().sort().values)
    assert (z > 0).sum() == min(tokens * k, int((pre > 0).sum()))
    assert torch.equal(z[z != 0], pre[z != 0])


@given(pre_activations())
def test_batchtopk_takes_any_batch_axes_as_tokens(drawn):
    pre, k = drawn
    assert torch.equal(BatchTopK(k)(pre), BatchTopK(k)(pre.reshape(-1, pre.shape[-1])).view_as(pre))


@given(pre_activations(), st.sampled_from(["topk", "batchtopk", "jumprelu"]))
def test_gradients_reach_the_kept_alone(drawn, kind):
    pre, k = drawn
    gate = {"topk": TopK(k), "batchtopk": BatchTopK(k), "jumprelu": JumpReLU(pre.shape[-1])}[kind]
    pre = pre.requires_grad_()
    z, scale = gate(pre), randn(*pre.shape)
    (gradient,) = torch.autograd.grad((z * scale).sum(), pre)
    assert torch.equal(gradient, scale * (z > 0))


def test_ties_never_change_the_count():
    pre = torch.ones(4, 6)
    assert (TopK(2)(pre) > 0).sum(-1).tolist() == [2] * 4
    assert (BatchTopK(2)(pre) > 0).sum() == 8


def test_a_token_may_keep_more_or_fewer_than_k():
    pre = torch.tensor([[9.0, 8.0, 7.0], [1.0, 0.5, 0.2]])
    assert (BatchTopK(2)(pre) > 0).sum(-1).tolist() == [3, 1]


@given(st.lists(pre_activations(), min_size=1, max_size=4), st.sampled_from([0.0, 0.5, 0.9]))
def test_the_threshold_follows_the_smallest_value_kept(steps, decay):
    gate, expected = BatchTopK(1, decay=decay), None
    for pre, _ in steps:
        gate(pre)
        kept = [value for value in reference.batchtopk(pre, 1).flatten().tolist() if value > 0]
        if kept:
            expected = min(kept) if expected is None else decay * expected + (1 - decay) * min(kept)
    assert_close(gate.threshold, torch.tensor(-1.0 if expected is None else expected, dtype=torch.float32))


def test_a_threshold_of_zero_was_set():
    gate = BatchTopK(1)
    gate.threshold.fill_(0.0)
    gate(torch.tensor([[3.0, 2.0]]))
    assert_close(gate.threshold, torch.tensor(0.3))


@given(pre_activations())
def test_eval_keeps_what_exceeds_the_threshold_and_leaves_it_alone(drawn):
    pre, k = drawn
    gate = BatchTopK(k).eval()
    assert torch.equal(gate(pre), pre.relu())
    assert gate.threshold == -1
    gate.threshold.fill_(0.5)
    assert torch.equal(gate(pre), torch.where(pre > 0.5, pre, 0.0))
    assert gate.threshold == 0.5
    assert torch.equal(gate.select(pre), BatchTopK(k)(pre))
    assert gate.threshold == 0.5


def test_the_choice_alone_leaves_the_threshold_in_training_too():
    gate = BatchTopK(1)
    gate.select(torch.ones(2, 3))
    assert gate.threshold == -1


@given(st.integers(1, 8), st.integers(1, 4), seeds)
def test_calibration_keeps_k_a_token_on_average(tokens, k, seed):
    torch.manual_seed(seed)
    pre, gate = randn(tokens, 2 * k + 1).abs() + 0.1, BatchTopK(k)
    gate.double().eval().calibrate(pre)
    assert (gate(pre) > 0).sum() == tokens * k


def test_calibration_with_too_few_positives_keeps_them_all():
    gate = BatchTopK(3).eval()
    gate.calibrate(torch.tensor([[1.0, -1.0, -1.0]]))
    assert gate.threshold == 0


@pytest.mark.parametrize("pre", [torch.zeros(0, 3), torch.tensor([[1.0, float("nan"), 2.0]])], ids=["none", "nan"])
def test_calibration_without_numbers_leaves_the_threshold(pre):
    gate = BatchTopK(1)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        gate.calibrate(pre)
    assert str(error.value) == (
        f"calibrate needs pre-activations without NaN of at least one token, got {tuple(pre.shape)}; "
        "the threshold stays"
    )
    assert gate.threshold == -1


@pytest.mark.parametrize("kind", [TopK, BatchTopK, SignedTopK, SignedBatchTopK])
def test_a_k_that_was_moved_above_the_latents_is_one_error(kind):
    gate = kind(4)
    assert (gate(torch.ones(3, 4)) == 1).all()  # all of them is well
    gate.k = 5
    calls = [lambda: gate(torch.ones(3, 4))]
    if hasattr(gate, "choose"):
        calls.append(lambda: gate.choose(torch.ones(3, 2), torch.ones(4, 2), torch.ones(4)))
    for call in calls:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            call()
        assert str(error.value) == f"{kind.__name__} cannot keep k=5 of latents=4; set k <= 4"


def test_no_positive_gives_no_code_and_no_threshold():
    gate = BatchTopK(2)
    assert (gate(-torch.rand(3, 4) - 1) == 0).all()
    assert gate.threshold == -1


def test_nan_does_not_enter_the_threshold():
    gate = BatchTopK(1)
    gate(torch.tensor([[2.0, 1.0]]))
    gate(torch.tensor([[float("nan"), 1.0]]))
    assert gate.threshold == 2


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
@pytest.mark.parametrize("gate", [BatchTopK(1), JumpReLU(3)], ids=repr)
def test_the_threshold_stays_float32_under_a_cast(gate, cast):
    gate.threshold.fill_(1.0001)
    getattr(torch.nn.Sequential(gate, torch.nn.Linear(2, 2)), cast)()
    assert gate.threshold.dtype == torch.float32
    assert torch.equal(gate.threshold, torch.full_like(gate.threshold, 1.0001))
    pre = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.bfloat16)
    assert torch.equal(gate.eval()(pre), torch.tensor([[0.0, 0.0, 2.0]], dtype=torch.bfloat16))


@given(st.floats(0.25, 4.0), seeds)
def test_a_cast_moves_no_pre_activation_across_the_threshold(threshold, seed):
    torch.manual_seed(seed)
    limit = torch.tensor(threshold)
    pre = (limit * torch.linspace(0.97, 1.03, 40)[torch.randperm(40)]).bfloat16()
    for gate in (BatchTopK(1), JumpReLU(40)):
        gate.bfloat16().eval().threshold.fill_(threshold)
        assert torch.equal(gate(pre) > 0, pre.float() > limit)
        assert torch.equal(gate(pre[None, None])[0, 0], gate(pre))


@pytest.mark.parametrize("gate", [BatchTopK(1), JumpReLU(4), TrainedJumpReLU(4), TopK(1)], ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_nan_is_seen_in_the_codes(gate, training):
    z = gate.train(training)(torch.tensor([[float("nan"), -1.0, 0.05, 2.0]]))
    assert z.isnan().tolist() == [[True, False, False, False]]


def test_the_threshold_is_saved_and_widened():
    gate = BatchTopK(1).double()
    assert gate.threshold.dtype == torch.float64
    assert list(gate.state_dict()) == ["threshold"]


@given(pre_activations())
def test_jumprelu_keeps_what_exceeds_each_latents_own_threshold(drawn):
    pre, _ = drawn
    gate = JumpReLU(pre.shape[-1]).double()
    assert torch.equal(gate(pre), pre.relu())
    gate.threshold.copy_(randn(pre.shape[-1]))
    for t, row in enumerate(pre.reshape(-1, pre.shape[-1]).tolist()):
        kept = [value if value > 0 and value > gate.threshold[n] else 0.0 for n, value in enumerate(row)]
        assert_close(gate(pre).reshape(-1, pre.shape[-1])[t], torch.tensor(kept, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), "TopK needs a whole k >= 1, got k=0"),
        (lambda: BatchTopK(-2), "BatchTopK needs a whole k >= 1, got k=-2"),
        (
            lambda: BatchTopK(1, decay=1.0),
            "BatchTopK needs 0 <= decay < 1, the share of the old threshold that stays at a step, got decay=1.0",
        ),
        (
            lambda: BatchTopK(1, decay=-0.1),
            "BatchTopK needs 0 <= decay < 1, the share of the old threshold that stays at a step, got decay=-0.1",
        ),
        (lambda: JumpReLU(0), "JumpReLU needs latents >= 1, got latents=0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    assert str(error.value) == message


def counted():
    """Every gate with a k, and those that pass it on."""
    weight = fx.DenseWeight(2, 3, 12)
    decoupled = fx.Decoupled(BatchTopK(2), BatchTopK(2), weight=weight)
    plain = [gate(2) for gate in (TopK, BatchTopK, fx.SignedTopK, fx.SignedBatchTopK)]
    return [*plain, fx.GroupMax(2, 12), fx.SignedGroupMax(2, 12), fx.Scored(TopK(2), fx.SumNorm(weight)), decoupled]


@pytest.mark.parametrize("gate", counted(), ids=lambda gate: type(gate).__name__)
@pytest.mark.parametrize("k", [0, -1, 2.5, 2.0, True, "2", None, torch.tensor([1, 2])], ids=str)
def test_a_k_that_is_no_number_of_latents_is_refused_when_it_is_set(gate, k):
    with pytest.raises(ValueError, match=f"needs a whole k >= 1, got k={re.escape(repr(k))}"):
        gate.k = k
    assert gate.k == 2


@pytest.mark.parametrize("gate", counted(), ids=lambda gate: type(gate).__name__)
def test_a_k_of_numpy_is_a_whole_number(gate):
    gate.k = np.int64(3)
    assert (gate.k, type(gate.k)) == (3, int)
    pre = randn(5, 12).abs() + 1
    assert (gate.train()(pre) != 0).sum() >= 15
    json.dumps(describe(gate))


def test_a_k_that_cannot_be_set_says_so():
    split = fx.SplitGate(TopK(1), TopK(1), runs=(2, 2))
    with pytest.raises(
        TypeError,
        match=re.escape("SplitGate's k is the sum of its 2 gates', got k=4; set a gate's own: split.gates[0].k"),
    ):
        split.k = 4
    scored = fx.Scored(torch.nn.ReLU(), fx.SumNorm(fx.DenseWeight(2, 3, 4)))
    with pytest.raises(
        TypeError, match="ReLU keeps no set number of latents, so its k cannot be set, got k=4; use TopK"
    ):
        scored.k = 4
    group = fx.GroupMax(2, 12)
    with pytest.raises(
        ValueError, match="k groups of equal size, got k=5 and latents=12; take a k that divides latents"
    ):
        group.k = 5
    assert not hasattr(scored.sparsifier, "k")


def test_the_repr_prints_the_choice():
    assert [repr(gate) for gate in (TopK(2), BatchTopK(3), JumpReLU(4))] == [
        "TopK(k=2)",
        "BatchTopK(k=3)",
        "JumpReLU(latents=4)",
    ]
