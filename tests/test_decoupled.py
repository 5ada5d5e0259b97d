import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, weights

import fmxnn as fx
from fmxnn.training import Trainer, fold_scale
from fmxnn.training.losses import reconstruction_loss

assert_close = torch.testing.assert_close


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def decoupled(weight, *sparsifiers):
    gate = fx.Decoupled(*sparsifiers, weight=weight)
    reader = fx.DenseWeight(weight.layers, weight.d_model, weight.latents)
    coder = fx.Crosscoder(fx.CrossLayerEncoder(reader, gate), fx.DecoupledDecoder(weight, gate)).double()
    torch.nn.init.normal_(coder.encoder.bias)
    torch.nn.init.normal_(coder.decoder.bias)
    return coder


def trained(layers=3, latents=12, k=2, seed=0):
    """After a pass in training, so that its thresholds are set."""
    torch.manual_seed(seed)
    weight = fx.CPWeight(layers, 4, latents, rank=5)
    coder = decoupled(weight, *(fx.BatchTopK(k) for _ in range(layers)))
    coder(randn(20, layers, 4))
    return coder


@given(weights(), seeds)
def test_each_layer_is_written_from_what_exceeds_its_own_threshold(weight, seed):
    torch.manual_seed(seed)
    coder = decoupled(weight, *(fx.BatchTopK(1) for _ in range(weight.layers))).eval()
    thresholds = torch.rand(weight.layers)
    for part, threshold in zip(coder.encoder.sparsifier.sparsifiers, thresholds, strict=True):
        part.threshold.copy_(threshold)
    x = randn(5, weight.layers, weight.d_model)
    pre = coder.encoder.pre_activations(x).detach()
    assert_close(
        coder(x), reference.decoupled(pre, weight.to_dense().detach(), coder.decoder.bias.detach(), thresholds)
    )


@given(weights(), seeds)
def test_a_jumprelu_of_scaled_codes_at_each_layer(weight, seed):
    """f_h = act(u ||d_h||) / ||d_h|| with one JumpReLU for all layers, whose thresholds are one a latent."""
    torch.manual_seed(seed)
    act = fx.JumpReLU(weight.latents).double()
    act.threshold.copy_(torch.rand(weight.latents))
    coder = decoupled(weight, *[act] * weight.layers)
    x = randn(5, weight.layers, weight.d_model)
    pre = coder.encoder.pre_activations(x).detach()
    limits = act.threshold.expand(weight.layers, -1)
    assert_close(coder(x), reference.decoupled(pre, weight.to_dense().detach(), coder.decoder.bias.detach(), limits))


@given(weights(), seeds, st.integers(1, 3))
def test_in_training_each_layer_keeps_its_n_k_largest(weight, seed, k):
    torch.manual_seed(seed)
    k = min(k, weight.latents)
    coder = decoupled(weight, *(fx.BatchTopK(k) for _ in range(weight.layers)))
    x = randn(6, weight.layers, weight.d_model)
    pre, norms = coder.encoder.pre_activations(x).detach(), weight.norms().detach()
    codes = coder.encoder.sparsifier.split(coder.encode(x))
    for layer, code in enumerate(codes):
        expected = reference.batchtopk(pre * norms[layer], k)
        assert torch.equal(code != 0, expected != 0)
        assert torch.equal(code[code != 0], pre[code != 0])
    union = coder.encode(x) != 0
    assert torch.equal(union, torch.stack(codes).ne(0).any(0))


def test_thresholds_move_once_a_step():
    coder, x = trained(), randn(20, 3, 4)
    gate = coder.encoder.sparsifier
    before = [part.threshold.item() for part in gate.sparsifiers]
    pre, norms = coder.encoder.pre_activations(x).detach(), gate.weight.norms().detach()
    coder(x)
    for part, old, norm in zip(gate.sparsifiers, before, norms, strict=True):
        kept = reference.batchtopk(pre * norm, 2)
        assert_close(part.threshold.item(), 0.9 * old + 0.1 * kept[kept > 0].min().item())
    after = [part.threshold.item() for part in gate.sparsifiers]
    coder.decode(randn(20, 12).relu())
    coder.eval()(x)
    assert [part.threshold.item() for part in gate.sparsifiers] == after


def test_it_trains_and_lowers_its_loss():
    coder = trained().float()
    trainer, x = Trainer(coder, torch.optim.Adam(coder.parameters(), lr=1e-2)), torch.randn(64, 3, 4)
    losses = [trainer.step(x)["loss"].item() for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


def test_gradients_of_atoms_come_from_the_layers_that_keep_them():
    coder, x = trained(), randn(20, 3, 4)
    coder.decoder.weight = fx.DenseWeight(3, 4, 12).double()
    reconstruction_loss(x, coder(x)).backward()
    codes = coder.encoder.sparsifier.split(coder.encode(x))
    for layer, code in enumerate(codes):
        silent = (code == 0).all(0)
        assert (coder.decoder.weight.factors[0].grad[silent, layer] == 0).all()


def test_gate_and_weight_stay_shared_when_saved_and_loaded(tmp_path):
    coder = trained()
    fx.save_pretrained(coder, tmp_path / "m")
    again = fx.from_pretrained(tmp_path / "m")
    assert again.decoder.gate is again.encoder.sparsifier
    assert again.decoder.weight is again.decoder.gate.weight
    assert all(torch.equal(again.state_dict()[key], value) for key, value in coder.state_dict().items())
    x = randn(5, 3, 4)
    assert torch.equal(again(x), coder.eval()(x))


@given(seeds)
def test_folding_leaves_every_layers_choice(seed):
    coder = trained(seed=seed).eval()
    scale, mean = torch.rand(3).double() * 10 + 0.1, randn(3, 4)
    normalised = fx.Normalised(coder, fx.Normalisation.of(scale, mean))
    x = randn(6, 3, 4) / scale.unsqueeze(-1) + mean
    folded = fx.fold(normalised)
    assert_close(folded(x), normalised(x), rtol=1e-10, atol=1e-10)
    assert folded.decoder.gate is folded.encoder.sparsifier
    whole = trained(seed=seed).eval()
    expected = whole(3.0 * x) / 3.0
    assert_close(fold_scale(whole, 3.0)(x), expected, rtol=1e-10, atol=1e-10)


def test_folding_a_scale_leaves_a_scored_choice():
    torch.manual_seed(0)
    weight = fx.DenseWeight(2, 4, 12)
    coder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(2, 4, 12), fx.Scored(fx.BatchTopK(2), fx.SumNorm(weight))),
        fx.CrossLayerDecoder(weight),
    ).double()
    coder(randn(20, 2, 4))
    x = randn(6, 2, 4)
    expected = coder.eval()(7.0 * x) / 7.0
    assert_close(fold_scale(coder, 7.0)(x), expected)
    assert coder.encoder.sparsifier.score.weight is not coder.decoder.weight


def test_thresholds_that_were_never_set_are_an_error_in_eval_mode():
    coder = decoupled(fx.DenseWeight(2, 4, 6), fx.BatchTopK(1), fx.BatchTopK(1)).eval()
    coder.encoder.sparsifier.sparsifiers[0].threshold.fill_(0.5)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        coder(randn(3, 2, 4))
    assert str(error.value) == (
        "Decoupled chooses by a threshold for each layer, and those at layers axis [1] were never set; "
        "train it, calibrate(pre), or fill sparsifiers[layer].threshold"
    )


@pytest.mark.parametrize("training", [True, False])
def test_nan_is_seen_at_the_layers_that_its_token_writes(training):
    coder, x = trained().train(training), randn(4, 3, 4)
    x[1] = float("nan")
    assert coder(x).isnan().all(-1).all(-1).tolist() == [False, True, False, False]


def test_calibration_sets_every_layers_threshold():
    torch.manual_seed(0)
    coder, x = decoupled(fx.DenseWeight(2, 4, 6), fx.BatchTopK(1), fx.BatchTopK(2)), randn(50, 2, 4)
    coder.encoder.sparsifier.calibrate(coder.encoder.pre_activations(x))
    codes = coder.eval().encoder.sparsifier.split(coder.encode(x))
    assert [(code != 0).sum().item() for code in codes] == [50, 100]


def test_a_threshold_of_zero_was_set():
    coder = decoupled(fx.DenseWeight(2, 4, 6), fx.BatchTopK(1), fx.BatchTopK(1)).eval()
    for part in coder.encoder.sparsifier.sparsifiers:
        part.threshold.fill_(0.0)
    x = randn(3, 2, 4)
    assert_close(coder.encode(x), coder.encoder.pre_activations(x).relu())


def test_norms_are_float32_or_wider_under_a_cast():
    torch.manual_seed(0)
    weight, act = fx.DenseWeight(2, 4, 200).bfloat16(), fx.JumpReLU(200)
    act.threshold.fill_(1.0)
    pre, norms = torch.randn(50, 200).bfloat16(), weight.norms().float()
    kept = (pre.float() * norms[:, None] > 1.0).any(0)
    assert torch.equal(fx.Decoupled(act, act, weight=weight)(pre) != 0, kept)


def test_calibration_of_a_shared_gate_is_for_all_its_layers():
    torch.manual_seed(0)
    shared, own = fx.BatchTopK(2), fx.BatchTopK(1)
    coder, x = decoupled(fx.DenseWeight(3, 4, 6), shared, own, shared), randn(50, 3, 4)
    coder.encoder.sparsifier.calibrate(coder.encoder.pre_activations(x))
    kept = [(code != 0).sum().item() for code in coder.eval().encoder.sparsifier.split(coder.encode(x))]
    assert (kept[0] + kept[2], kept[1]) == (200, 50)


def test_the_gate_shows_the_largest_k_and_sets_all():
    gate = fx.Decoupled(fx.TopK(1), fx.TopK(3), weight=fx.DenseWeight(2, 4, 6))
    assert gate.k == 3
    gate.k = 2
    assert [part.k for part in gate.sparsifiers] == [2, 2]
    assert "dense: Decoupled has no choose" in repr(decoupled(fx.DenseWeight(2, 4, 6), fx.TopK(1), fx.TopK(1)))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: fx.Decoupled(fx.TopK(1), weight=fx.DenseWeight(2, 4, 6)),
            ValueError,
            "Decoupled takes one sparsifier a layer, got 1 for layers=2; repeat one to share it",
        ),
        (
            lambda: fx.Decoupled(fx.JumpReLU(5), weight=fx.DenseWeight(1, 4, 6)),
            fx.ShapeError,
            "Decoupled has a weight of latents=6, got JumpReLU(latents=5); make them equal",
        ),
        (
            lambda: fx.Decoupled(fx.TrainedJumpReLU(6), weight=fx.DenseWeight(1, 4, 6)),
            TypeError,
            "Decoupled passes no gradient to thresholds, got TrainedJumpReLU; give its frozen()",
        ),
        (
            lambda: fx.DecoupledDecoder(fx.DenseWeight(1, 4, 6), fx.TopK(1)),
            TypeError,
            "DecoupledDecoder takes the encoder's own Decoupled as its gate, got TopK; use CrossLayerDecoder",
        ),
        (
            lambda: fx.DecoupledDecoder(
                fx.DenseWeight(1, 4, 5), fx.Decoupled(fx.TopK(1), weight=fx.DenseWeight(1, 4, 6))
            ),
            fx.ShapeError,
            "the weight writes layers=1 from latents=5, and the gate is made for layers=1, latents=6; make them equal",
        ),
    ],
)
def test_bad_arguments_are_named(make, kind, message):
    with pytest.raises(kind) as error:
        make()
    assert str(error.value) == message
