import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, randn, seeds
from test_sparsifiers import pre_activations

import fmxnn as fx
from fmxnn.training.losses import reconstruction_loss

assert_close = torch.testing.assert_close
SIGNED = {"topk": fx.SignedTopK, "batchtopk": fx.SignedBatchTopK}


@st.composite
def grouped(draw):
    """Pre-activations of any batch in groups of one size, often without positives; and the number of groups."""
    torch.manual_seed(draw(seeds))
    k, size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return randn(*draw(batches), k * size) + draw(st.sampled_from([0.0, -1.0, -9.0, 9.0])), k


@given(grouped())
def test_the_largest_of_each_group_is_kept_where_it_is_positive(drawn):
    pre, k = drawn
    latents = pre.shape[-1]
    assert_close(fx.SignedGroupMax(k, latents)(pre), reference.groupmax(pre, k))
    assert_close(fx.GroupMax(k, latents)(pre), reference.groupmax(pre, k).relu())


@given(pre_activations(), st.sampled_from(list(SIGNED)))
def test_signed_gates_keep_the_largest_whatever_their_sign(drawn, kind):
    pre, k = drawn
    z, rows = SIGNED[kind](k)(pre), pre.reshape(-1, pre.shape[-1]) if kind == "topk" else pre.reshape(1, -1)
    count = k if kind == "topk" else k * pre.numel() // pre.shape[-1]
    expected = [sum(sorted(row)[len(row) - count :]) for row in rows.tolist()]
    assert_close(z.reshape(rows.shape).sum(-1), torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(z[z != 0], pre[z != 0])
    assert (z != 0).sum() <= len(rows) * count


@given(grouped())
def test_gates_without_that_name_never_keep_a_negative(drawn):
    pre, k = drawn
    latents = pre.shape[-1]
    for gate in (fx.TopK(k), fx.BatchTopK(k), fx.BatchTopK(k).eval(), fx.JumpReLU(latents), fx.GroupMax(k, latents),
                 fx.TrainedJumpReLU(latents), fx.TrainedJumpReLU(latents).eval()):  # fmt: skip
        assert (gate(pre) >= 0).all()


@pytest.mark.parametrize(
    "gate", [fx.GroupMax(4, 40), fx.SignedGroupMax(4, 40), fx.SignedTopK(3), fx.SignedBatchTopK(3)], ids=repr
)
def test_a_crosscoder_says_that_its_codes_are_dense(gate):
    torch.manual_seed(0)
    coder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(3, 5, 40), gate), fx.CrossLayerDecoder(fx.DenseWeight(3, 5, 40))
    ).double()
    assert f"dense: {type(gate).__name__} has no choose" in repr(coder)
    x = randn(6, 3, 5)
    assert_close(coder.encode(x, layout=torch.sparse_csr).to_dense(), coder.encode(x))
    assert_close(coder.decode(coder.encode(x, layout=torch.sparse_csr)), coder(x))


@st.composite
def jumps(draw):
    """A gate with thresholds of its own, and pre-activations some of which lie in its window."""
    torch.manual_seed(draw(seeds))
    latents = draw(st.integers(1, 5))
    gate = fx.TrainedJumpReLU(latents, bandwidth=draw(st.sampled_from([0.3, 2.0]))).double()
    torch.nn.init.normal_(gate.log_threshold)
    return gate, randn(*draw(batches), latents)


@given(jumps())
def test_a_trained_jumprelu_has_the_gradients_of_the_paper(drawn):
    gate, pre = drawn
    pre, upstream = pre.requires_grad_(), randn(*pre.shape)
    z = gate(pre)
    kept = pre > gate.threshold
    assert torch.equal(z, torch.where(kept, pre, 0.0))
    (z * upstream).sum().backward()
    assert torch.equal(pre.grad, upstream * kept)
    assert_close(
        gate.log_threshold.grad,
        reference.jump_gradient(pre.detach(), upstream, gate.threshold.detach(), gate.bandwidth),
    )


@given(jumps())
def test_the_count_of_the_kept_moves_the_thresholds_alone(drawn):
    gate, pre = drawn
    pre.requires_grad_()
    active = gate.active(pre)
    assert torch.equal(active, (gate(pre) > 0).to(active.dtype))
    (gradient,) = torch.autograd.grad(active.sum(), gate.log_threshold)
    near = ((pre - gate.threshold).abs() < gate.bandwidth / 2).reshape(-1, pre.shape[-1]).sum(0)
    assert_close(gradient, (-gate.threshold / gate.bandwidth * near).detach())


@given(jumps())
def test_frozen_thresholds_make_the_same_choice(drawn):
    gate, pre = drawn
    frozen = gate.eval().frozen()
    assert torch.equal(frozen(pre), gate(pre))
    assert frozen.threshold.dtype == torch.float64
    assert not frozen.training


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_trained_thresholds_stay_float32_under_a_cast(cast):
    gate = fx.TrainedJumpReLU(3, start=1.0001)
    before = gate.log_threshold.detach().clone()
    getattr(torch.nn.Sequential(gate, torch.nn.Linear(2, 2)), cast)()
    assert torch.equal(gate.log_threshold, before)
    pre = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.bfloat16)
    for training in (True, False):
        assert torch.equal(gate.train(training)(pre), torch.tensor([[0.0, 0.0, 2.0]], dtype=torch.bfloat16))


def test_trained_thresholds_take_the_sparse_path_in_eval_alone():
    torch.manual_seed(0)
    gate = fx.TrainedJumpReLU(40, start=0.5)
    coder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(3, 5, 40), gate), fx.CrossLayerDecoder(fx.DenseWeight(3, 5, 40))
    ).double()
    assert "dense: TrainedJumpReLU learns its thresholds from pre-activations that it does not keep" in repr(coder)
    assert "dense:" not in repr(coder.eval())
    results, x = [], randn(6, 3, 5)
    for backend in ("dense", "sparse"):
        coder.backend = backend
        coder.zero_grad()
        x_hat = coder(x)
        reconstruction_loss(x, x_hat).backward()
        results.append([x_hat.detach(), *(p.grad for p in coder.parameters() if p.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@given(jumps())
def test_a_score_divides_what_thresholds_learn(drawn):
    """A JumpReLU on pre * s with thresholds t is, by latent, one on pre with thresholds t / s and bandwidth / s."""
    gate, pre = drawn
    weight = fx.DenseWeight(2, 3, gate.latents).double()
    upstream, score = randn(*pre.shape), fx.SumNorm(weight)()
    (fx.Scored(gate, fx.SumNorm(weight))(pre) * upstream).sum().backward()
    expected = reference.jump_gradient(pre * score, upstream / score, gate.threshold.detach(), gate.bandwidth)
    assert_close(gate.log_threshold.grad, expected)


def test_the_losses_of_jumprelu_by_hand():
    l0 = torch.tensor([2.0, 6.0])
    assert_close(fx.quadratic_l0_loss(l0, 4.0), torch.tensor(0.25))
    pre, threshold, norms = (
        torch.tensor([[0.5, 3.0], [-1.0, 1.0]]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([[1.0, 2.0], [1.0, 0.0]]),
    )
    assert_close(fx.preactivation_loss(pre, threshold, norms), torch.tensor((0.5 * 2 + 2 * 2 + 1 * 2) / 2))
    z = torch.tensor([[0.5, 0.0]])
    assert_close(fx.tanh_penalty(z, norms), torch.tensor(4.0).tanh())
    assert_close(fx.tanh_penalty(z, norms, 1.0), torch.tensor(1.0).tanh())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fx.GroupMax(3, 10),
            "GroupMax makes k groups of equal size, got k=3 and latents=10; take a k that divides latents",
        ),
        (
            lambda: fx.SignedGroupMax(3, 0),
            "SignedGroupMax makes k groups of equal size, got k=3 and latents=0; take a k that divides latents",
        ),
        (lambda: fx.GroupMax(0, 4), "GroupMax needs a whole k >= 1, got k=0"),
        (lambda: fx.SignedTopK(0), "SignedTopK needs a whole k >= 1, got k=0"),
        (lambda: fx.SignedBatchTopK(1.5), "SignedBatchTopK needs a whole k >= 1, got k=1.5"),
        (
            lambda: fx.TrainedJumpReLU(4, start=0.0),
            "TrainedJumpReLU needs latents >= 1, a finite start > 0 and a finite bandwidth > 0, "
            "got latents=4, start=0.0 and bandwidth=2.0",
        ),
        (
            lambda: fx.CrossLayerEncoder(fx.DenseWeight(2, 3, 6), fx.GroupMax(2, 8)),
            "the sparsifier is made for latents=8, and the weight has latents=6; make them equal",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    assert str(error.value) == message
