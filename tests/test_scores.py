from copy import deepcopy

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, weights

import fmxnn as fx
from fmxnn.metrics import functional_coherence, off_to_on
from fmxnn.training import AuxiliaryLoss, Trainer
from fmxnn.training.losses import reconstruction_loss

assert_close = torch.testing.assert_close
SCORES = {"sum": fx.SumNorm, "concat": fx.ConcatNorm, "mixed": fx.MixedNorm}
GATES = {"topk": fx.TopK, "batchtopk": fx.BatchTopK, "jumprelu": lambda k: fx.JumpReLU(40)}
scores = st.sampled_from(list(SCORES))
gates = st.sampled_from(list(GATES))


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def scored(gate, score, weight=None, k=3):
    weight = weight or fx.TensorRingWeight(3, 5, 40, ranks=(2, 3, 4))
    coder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.CPWeight(3, 5, 40, rank=6), fx.Scored(GATES[gate](k), SCORES[score](weight))),
        fx.CrossLayerDecoder(weight),
    ).double()
    torch.nn.init.normal_(coder.encoder.bias)
    with torch.no_grad():
        weight.table.mul_(torch.rand(40, 1) * 3)  # norms that differ, and change the choice
    return coder


@given(seeds, scores, st.integers(1, 4))
def test_the_batch_selection_of_a_scored_gate_is_its_choice_in_training(seed, score, k):
    torch.manual_seed(seed)
    coder, x = scored("batchtopk", score, k=k).eval(), randn(7, 3, 5)
    gate, train = coder.encoder.sparsifier, deepcopy(coder.encoder.sparsifier).train()
    with torch.no_grad():
        pre = coder.encoder.pre_activations
        assert torch.equal(gate.select(pre(x)), train(pre(x)))
        assert gate.threshold == -1
        switched, off = reference.off_to_on(lambda x: train(pre(x)), x)
        hidden = [train(pre(x * (torch.arange(3) != layer).unsqueeze(-1))) for layer in range(3)]
        z = train(pre(x))
    found = off_to_on(coder, [x], selection="batch")
    assert (found.switched.tolist(), found.off.tolist()) == (switched, off)
    dependence = functional_coherence(coder, [x], estimator="ratio", selection="batch", min_active=1).per_layer
    assert_close(
        dependence, torch.stack([((z - gone).abs() * (z > 0)).sum(0) for gone in hidden]) / z.sum(0), equal_nan=True
    )


def test_a_batch_selection_needs_a_batchtopk_inside():
    with pytest.raises(
        ValueError, match="selection='batch' needs a gate with select, .* got Scored; use selection='threshold'"
    ):
        off_to_on(scored("topk", "sum"), [randn(7, 3, 5)], selection="batch")


@pytest.mark.parametrize("backend", ["dense", "sparse"])
@given(seeds, scores, st.integers(1, 6))
def test_dead_latents_are_revived_in_the_order_of_their_scores(backend, seed, score, k):
    torch.manual_seed(seed)
    coder, x = scored("topk", score), randn(7, 3, 5)
    coder.backend = backend
    options = AuxiliaryLoss(k=k, weight=0.5, after=10)
    trainer = Trainer(coder, torch.optim.SGD(coder.parameters(), lr=1e-3), auxiliary=options)
    trainer.silent[:30] = 10
    dead = trainer.silent >= 10
    with torch.no_grad():
        pre, x_hat, weight = coder.encoder.pre_activations(x), coder(x), coder.decoder.weight
        by = coder.encoder.sparsifier.score()
        expected = reference.dead_latent_loss(x - x_hat, pre, dead, weight.to_dense(), k, by)
    numbers = trainer.step(x)
    assert_close(numbers["loss"] - numbers["error"], 0.5 * expected)


@given(weights(), scores)
def test_a_score_is_what_the_loop_over_atoms_says(weight, kind):
    assert_close(SCORES[kind](weight)(), reference.score(weight.to_dense().detach(), kind))


@pytest.mark.parametrize(("kind", "expected"), [("sum", 7.0), ("concat", 5.0), ("mixed", 5.7)])
def test_the_norms_three_and_four(kind, expected):
    score = SCORES[kind](fx.DenseWeight(2, 3, 1))
    assert_close(score.combine(torch.tensor([[3.0], [4.0]])), torch.tensor([expected]))


def test_a_mix_takes_its_weights():
    assert_close(
        fx.MixedNorm(fx.DenseWeight(2, 3, 1), concat=2.0, sum=0.5).combine(torch.tensor([[3.0], [4.0]])),
        torch.tensor([13.5]),
    )


@given(seeds, scores, gates, st.booleans(), st.integers(1, 4))
def test_the_choice_is_by_scored_pre_activations_and_the_value_is_the_pre_activation(seed, score, gate, training, k):
    torch.manual_seed(seed)
    coder = scored(gate, score, k=k).train(training)
    sparsifier, pre = coder.encoder.sparsifier, randn(6, 40)
    for buffer in sparsifier.sparsifier.buffers():
        buffer.fill_(0.7)
    z = sparsifier(pre)
    assert torch.equal(z[z != 0], pre[z != 0])
    by = pre * sparsifier.score()
    if gate == "jumprelu" or (gate == "batchtopk" and not training):
        assert torch.equal(z != 0, by > 0.7)
    else:
        expected = reference.topk(by, k) if gate == "topk" else reference.batchtopk(by, k)
        assert torch.equal(z != 0, expected != 0)


def run(coder, x, backend):
    coder.backend = backend
    coder.zero_grad()
    for buffer in coder.buffers():
        buffer.fill_(0.25 if not coder.training else -1.0)
    x = x.clone().requires_grad_()
    x_hat = coder(x)
    reconstruction_loss(x, x_hat).backward()
    return [x_hat.detach(), x.grad, *(p.grad for p in coder.parameters()), *(b.clone() for b in coder.buffers())]


@given(seeds, scores, gates, st.booleans(), st.sampled_from([(1,), (7,), (2, 3)]))
def test_the_sparse_path_is_the_dense_path(seed, score, gate, training, batch):
    torch.manual_seed(seed)
    coder, x = scored(gate, score).train(training), randn(*batch, 3, 5)
    assert not coder.obstacle
    for ours, theirs in zip(run(coder, x, "sparse"), run(coder, x, "dense"), strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_gradient_goes_through_the_score():
    torch.manual_seed(0)
    gate = scored("batchtopk", "sum").encoder.sparsifier
    pre = randn(6, 40).requires_grad_()
    z = gate(pre)
    (z * torch.arange(40)).sum().backward()
    assert_close(pre.grad, (z != 0) * torch.arange(40, dtype=torch.float64))
    assert all(p.grad is None for p in gate.parameters())


@pytest.mark.parametrize("gate", GATES)
def test_a_latent_that_writes_nothing_is_never_kept_and_gives_no_nan(gate):
    torch.manual_seed(0)
    coder = scored(gate, "sum")
    with torch.no_grad():
        coder.decoder.weight.table[::2] = 0
    for training in (True, False):
        for backend in ("dense", "sparse"):
            results = run(coder.train(training), randn(6, 3, 5), backend)
            assert all(result.isfinite().all() for result in results)
            assert (coder.encode(randn(6, 3, 5))[:, ::2] == 0).all()


@pytest.mark.parametrize("gate", ["batchtopk", "jumprelu"])
def test_frozen_is_the_same_choice_without_the_weight(gate):
    torch.manual_seed(0)
    coder, pre = scored(gate, "mixed"), randn(50, 40)
    sparsifier = coder.encoder.sparsifier.eval()
    with torch.no_grad():
        coder.decoder.weight.table[3] = 0
    for buffer in sparsifier.sparsifier.buffers():
        buffer.fill_(0.7)
    frozen = sparsifier.frozen()
    assert torch.equal(frozen(pre), sparsifier(pre))
    assert (sparsifier(pre) != 0).any()
    assert not list(frozen.parameters())
    assert not frozen.training


@given(seeds, scores, st.integers(1, 3))
def test_calibration_keeps_k_a_token_on_average(seed, score, k):
    torch.manual_seed(seed)
    coder = scored("batchtopk", score, k=k).eval()
    pre = coder.encoder.pre_activations(randn(20, 3, 5)).detach()
    coder.encoder.sparsifier.calibrate(pre)
    assert (coder.encoder.sparsifier(pre) > 0).sum() == 20 * k


def test_a_gate_without_a_threshold_cannot_be_frozen():
    with pytest.raises(TypeError) as error:
        scored("topk", "sum").encoder.sparsifier.frozen()
    assert str(error.value) == "frozen needs a sparsifier with a threshold, got TopK; use BatchTopK or JumpReLU"


def test_a_weight_is_no_score():
    with pytest.raises(TypeError) as error:
        fx.Scored(fx.TopK(2), fx.DenseWeight(2, 3, 5))
    assert (
        str(error.value)
        == "Scored takes a score that holds the decoder's weight, got DenseWeight; pass SumNorm(weight)"
    )


@pytest.mark.parametrize("gate", GATES)
def test_the_weight_stays_shared_when_saved_and_loaded(gate, tmp_path):
    torch.manual_seed(0)
    coder = scored(gate, "mixed")
    coder(randn(6, 3, 5))
    fx.save_pretrained(coder, tmp_path / "m")
    again = fx.from_pretrained(tmp_path / "m")
    assert again.encoder.sparsifier.score.weight is again.decoder.weight
    assert fx.describe(coder)["Crosscoder"]["decoder"] == {
        "CrossLayerDecoder": {"weight": {"same": "encoder.sparsifier.score.weight"}}
    }
    assert all(torch.equal(again.state_dict()[key], value) for key, value in coder.state_dict().items())
    x = randn(4, 3, 5)
    assert torch.equal(again(x), coder.eval()(x))


def test_the_gate_shows_k_threshold_and_latents_of_what_it_holds():
    gate = scored("batchtopk", "sum").encoder.sparsifier
    assert (gate.k, gate.latents, gate.threshold.item()) == (3, 40, -1)
    gate.k = 5
    assert gate.sparsifier.k == 5
    assert not hasattr(scored("jumprelu", "sum").encoder.sparsifier, "k")
    assert not hasattr(scored("topk", "sum").encoder.sparsifier, "threshold")
    coder = scored("batchtopk", "sum").eval()
    assert "the threshold is not set" in coder.explain()


def test_a_gate_inside_that_has_no_sparse_codes_is_named():
    weight = fx.DenseWeight(3, 5, 40)
    coder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(3, 5, 40), fx.Scored(torch.nn.ReLU(), fx.SumNorm(weight))),
        fx.CrossLayerDecoder(weight),
    )
    assert "dense: ReLU has no choose" in repr(coder)
    assert coder.encode(torch.randn(4, 3, 5), layout=torch.sparse_csr).layout == torch.sparse_csr


def test_scores_are_float32_or_wider_and_codes_keep_their_dtype():
    coder = scored("batchtopk", "sum").bfloat16()
    assert coder.encoder.sparsifier.score().dtype == torch.float32
    assert coder.encoder.sparsifier.threshold.dtype == torch.float64
    pre = torch.randn(6, 40).bfloat16()
    z = coder.encoder.sparsifier(pre)
    assert z.dtype == torch.bfloat16
    assert torch.equal(z[z != 0], pre[z != 0])
    for backend in ("dense", "sparse"):
        assert all(r.isfinite().all() for r in run(coder, torch.randn(6, 3, 5).bfloat16(), backend))


@pytest.mark.parametrize(
    "gate", [lambda w: fx.Scored(fx.TopK(8), fx.SumNorm(w)), lambda w: fx.Decoupled(fx.TopK(8), fx.TopK(8), weight=w)]
)
def test_autocast_reorders_no_choice(gate):
    torch.manual_seed(0)
    pre, gate = torch.randn(200, 400), gate(fx.TensorRingWeight(2, 16, 400, ranks=(2, 3, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        z = gate(pre)
    assert torch.equal(z, gate(pre))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fx.Scored(fx.JumpReLU(4), fx.SumNorm(fx.DenseWeight(2, 3, 5))),
            "the sparsifier is made for latents=4, and the score has latents=5; make them equal",
        ),
        (
            lambda: fx.CrossLayerEncoder(
                fx.DenseWeight(2, 3, 4), fx.Scored(fx.TopK(2), fx.SumNorm(fx.DenseWeight(2, 3, 5)))
            ),
            "the sparsifier is made for latents=5, and the weight has latents=4; make them equal",
        ),
        (
            lambda: fx.CrossLayerEncoder(
                fx.DenseWeight(2, 3, 5), fx.Scored(fx.TopK(6), fx.SumNorm(fx.DenseWeight(2, 3, 5)))
            ),
            "the sparsifier keeps k=6 latents a token, and the weight has latents=5; take k <= 5",
        ),
        (
            lambda: fx.MixedNorm(fx.DenseWeight(2, 3, 5), concat=0.0, sum=0.0),
            "MixedNorm needs finite weights >= 0 that are not both 0, got concat=0.0 and sum=0.0",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    assert str(error.value) == message
