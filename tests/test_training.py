import errno
import json
import os
import re
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from trainers import assert_same, batch, bits, make_trainer

import fmxnn as fx
import fmxnn.training.checkpoint as checkpoint
from fmxnn.core.files.integrity import IntegrityError
from fmxnn.training import (
    AuxiliaryLoss,
    CheckpointError,
    NonFiniteError,
    StopSignals,
    Trainer,
    anneal_k,
    fold_scale,
    list_checkpoints,
    load_checkpoint,
    resample,
    save_checkpoint,
)


def test_training_lowers_the_loss_and_counts():
    trainer = make_trainer()
    losses = [trainer.step(batch(0))["loss"].item() for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]
    assert (trainer.steps, trainer.tokens) == (60, 60 * 32)


def test_a_step_reports_the_error_against_clean_targets_and_the_exact_l0():
    trainer = make_trainer()
    numbers = trainer.step(batch(0))
    assert numbers["l0"] == 3
    assert numbers["loss"] == numbers["error"]
    again = make_trainer()
    again.crosscoder.encoder.mask.p = 0.0
    assert again.step(batch(0))["error"] != numbers["error"]  # the mask was at work


def test_the_mask_of_a_step_follows_from_seed_and_step_alone():
    torch.manual_seed(1)
    one = make_trainer()
    one.step(batch(0))
    other = make_trainer()
    torch.manual_seed(99)
    other.step(batch(0))
    assert_same(one, other)
    one.step(batch(1))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    other.step(batch(1))
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator is left alone
    assert_same(one, other)


def test_each_step_and_each_seed_hides_other_layers():
    hidden = []
    for trainer in (make_trainer(), make_trainer(seed=1)):
        trainer.crosscoder.encoder.mask.register_forward_hook(lambda _m, _i, x: hidden.append((x == 0).all(-1)))
        trainer.step(batch(0))
        trainer.step(batch(0))
    assert all(mask.any() for mask in hidden)
    assert not any(torch.equal(one, other) for i, one in enumerate(hidden) for other in hidden[:i])


def test_silent_counts_the_tokens_since_each_latent_fired():
    trainer = make_trainer()
    expected = torch.zeros(16, dtype=torch.int64)
    for step in range(5):
        x = batch(step)
        seen = []
        hook = trainer.crosscoder.encoder.sparsifier.register_forward_hook(
            lambda _m, _i, z, seen=seen: seen.append(z.detach())
        )
        trainer.step(x)
        hook.remove()
        fired = (seen[0] > 0).any(0)
        expected = torch.where(fired, 0, expected + 32)
        assert torch.equal(trainer.silent, expected)
    assert trainer.silent.unique().numel() > 1


def test_the_auxiliary_loss_reaches_latents_that_are_dead():
    plain, helped = make_trainer(), make_trainer(auxiliary=AuxiliaryLoss(k=4, weight=1.0, after=32))
    for trainer in (plain, helped):
        with torch.no_grad():
            trainer.crosscoder.encoder.bias[:8] = -1.0  # eight latents that do not fire
        trainer.silent[:8] = 1000
        before = trainer.crosscoder.encoder.bias.detach().clone()
        numbers = trainer.step(batch(0))
        trainer.moved = (trainer.crosscoder.encoder.bias - before)[:8].abs().sum()
    assert helped.moved > 0
    assert numbers["loss"] > numbers["error"]
    assert plain.step(batch(1))["loss"] < torch.inf


def test_bf16_autocast_leaves_parameters_threshold_and_optimiser_in_float32():
    trainer = make_trainer(dtype=torch.bfloat16)
    first = trainer.step(batch(0))["loss"]
    tensors, _ = bits(trainer)
    assert {tensor.dtype for name, tensor in tensors.items() if name != "silent"} == {torch.float32}
    assert first.dtype == torch.float32
    assert_close(first, make_trainer().step(batch(0))["loss"], rtol=3e-2, atol=0)  # bf16 has 8 bits


def test_bf16_activations_give_a_float32_loss():
    trainer, wide = make_trainer(), make_trainer()
    x = batch(0).bfloat16()
    loss = trainer.step(x)["loss"]
    assert loss.dtype == torch.float32
    assert loss == wide.step(x.float())["loss"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_changes_nothing_and_is_named(bad):
    trainer, untouched = make_trainer(), make_trainer()
    for each in (trainer, untouched):
        each.step(batch(0))
    x = batch(1)
    x[4, 2, 0] = bad
    x[5, 2, 1] = bad
    with pytest.raises(NonFiniteError) as caught:
        trainer.step(x)
    assert re.fullmatch(
        r"the loss is (nan|inf) at step 1, batch 1: 2 of its 32 tokens hold NaN or infinity, at layers axis \[2\]; "
        r"nothing was updated, and the last checkpoint is as it was",
        str(caught.value),
    )
    assert_same(trainer, untouched)
    trainer.step(batch(1))
    untouched.step(batch(1))
    assert_same(trainer, untouched)


@given(st.integers(1, 6), st.booleans())
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(cut, with_auxiliary):
    auxiliary = AuxiliaryLoss(k=4, after=64) if with_auxiliary else None
    whole, first, second = (make_trainer(auxiliary=auxiliary) for _ in range(3))
    for step in range(7):
        whole.step(batch(step))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in range(cut):
            first.step(batch(step))
        save_checkpoint(folder, first, {"k": 3})
        assert load_checkpoint(folder, second, {"k": 3}) == []
    for step in range(second.steps, 7):
        second.step(batch(step))
    assert_same(whole, second)


def test_shared_weights_survive_a_checkpoint(tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        weight = fx.DenseWeight(2, 4, 6)
        crosscoder = fx.Crosscoder(fx.CrossLayerEncoder(weight, fx.TopK(2)), fx.CrossLayerDecoder(weight))
        return Trainer(crosscoder, torch.optim.Adam(crosscoder.parameters(), lr=1e-2))

    one, other = make(0), make(1)
    one.step(torch.randn(8, 2, 4))
    save_checkpoint(tmp_path, one, {})
    load_checkpoint(tmp_path, other, {})
    assert_same(one, other)
    assert other.crosscoder.encoder.weight is other.crosscoder.decoder.weight


def test_the_newest_three_checkpoints_are_kept(tmp_path):
    trainer = make_trainer()
    for step in range(5):
        trainer.step(batch(step))
        save_checkpoint(tmp_path, trainer, {})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004", "step-00000005"]


@given(
    st.sampled_from(["crosscoder.safetensors", "trainer.safetensors", "trainer.json", "manifest.json"]),
    st.floats(0, 0.999),
    st.booleans(),
)
def test_a_changed_or_cut_file_is_passed_over_and_named_and_the_step_can_be_saved_again(name, place, cut):
    trainer = make_trainer()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        for step in range(2):
            trainer.step(batch(step))
            save_checkpoint(folder, trainer, {})
        path = folder / "step-00000002" / name
        body = bytearray(path.read_bytes())
        at = int(place * len(body))
        if name == "manifest.json":
            at = body.index(b'": "') + 10  # a digit of a checksum; whitespace elsewhere carries nothing
        body = body[:at] if cut else body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        path.write_bytes(body)
        resumed = make_trainer()
        (sentence,) = load_checkpoint(folder, resumed, {})
        assert sentence.startswith("passed over step-00000002: ")
        assert resumed.steps == 1
        resumed.step(batch(1))
        save_checkpoint(folder, resumed, {})
        again = make_trainer()
        assert load_checkpoint(folder, again, {}) == []
        assert_same(again, trainer)


def test_resuming_says_what_is_wrong(tmp_path):
    trainer = make_trainer()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, trainer, {})
    assert (
        str(caught.value)
        == f"no checkpoint in {tmp_path} can be resumed: it holds no step-* folder; start without resume"
    )
    trainer.step(batch(0))
    path = save_checkpoint(tmp_path, trainer, {"k": 3, "seed": 0})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, trainer, {"k": 4, "seed": 0})
    assert (
        str(caught.value)
        == f"{path} was saved with other arguments: k was 3 and is 4; resume with the same, or start in a new folder"
    )


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    trainer = make_trainer()
    trainer.step(batch(0))
    save_checkpoint(tmp_path, trainer, {})

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    trainer.step(batch(1))
    with pytest.raises(IntegrityError, match="No space left on device; nothing that stood there was changed"):
        save_checkpoint(tmp_path, trainer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(tmp_path, make_trainer(), {}) == []


def test_the_checkpoint_holds_no_pickle_and_its_json_is_plain(tmp_path):
    trainer = make_trainer()
    trainer.step(batch(0))
    path = save_checkpoint(tmp_path, trainer, {"layers": [1, 2]})
    assert {file.name for file in path.iterdir()} == {
        "crosscoder.safetensors",
        "trainer.safetensors",
        "trainer.json",
        "manifest.json",
    }
    about = json.loads((path / "trainer.json").read_text())
    assert about["module"] == fx.describe(trainer.crosscoder)
    assert about["arguments"] == {"layers": [1, 2]}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_noted_once_and_its_exit_code_is_the_shells(number, code):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert (stop.received, stop.exit_code) == (None, 0)
        os.kill(os.getpid(), number)
        assert (stop.received, stop.exit_code) == (number, code)
        assert signal.getsignal(number) is before  # a second one acts at once
    assert signal.getsignal(number) is before


@given(st.floats(1e-2, 1e2), st.sampled_from(["dense", "ring", "pattern", "sum", "polynomial"]))
def test_a_folded_scale_changes_units_and_nothing_else(scale, kind):
    make = {
        "dense": lambda: fx.DenseWeight(2, 4, 6),
        "ring": lambda: fx.TensorRingWeight(2, 4, 6, ranks=(2, 2, 2)),
        "pattern": lambda: fx.EinsumWeight("latents d_model, latents layers", layers=2, d_model=4, latents=6),
        "polynomial": lambda: fx.DenseWeight(2, 4, 6),
        "sum": lambda: fx.SumWeight(fx.DenseWeight(2, 4, 6), fx.CPWeight(2, 4, 6, rank=3)),
    }[kind]
    decoder = (
        fx.polysae_decoder(4, 6, layers=2, ranks=(4, 3, 2)) if kind == "polynomial" else fx.CrossLayerDecoder(make())
    )
    crosscoder = fx.Crosscoder(fx.CrossLayerEncoder(make(), fx.BatchTopK(2)), decoder).double()
    torch.nn.init.normal_(crosscoder.encoder.bias)
    torch.nn.init.normal_(crosscoder.decoder.bias)
    x = torch.randn(9, 2, 4, dtype=torch.float64)
    crosscoder(
        torch.randn(9, 2, 4, dtype=torch.float64)
    )  # a threshold between codes of x, so that rounding moves none across it
    crosscoder.eval()
    z, x_hat = crosscoder.encode(x), crosscoder(x)
    fold_scale(crosscoder, scale)
    assert_close(crosscoder.encode(x / scale), z)
    assert_close(crosscoder(x / scale), x_hat / scale)


@given(st.floats(0.01, 100).filter(lambda scale: abs(scale - 1) > 0.01), st.floats(0.01, 100))
def test_a_scale_is_folded_in_once_and_can_be_taken_out(scale, second):
    coder = make_trainer().crosscoder.double().eval()
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    expected = coder(x)
    fold_scale(coder, scale)
    assert coder.folded_scale == scale
    folded = {name: value.clone() for name, value in coder.state_dict().items()}
    with tempfile.TemporaryDirectory() as name:
        fx.save_pretrained(coder, Path(name) / "folded")
        again = fx.from_pretrained(Path(name) / "folded")
    for each in (coder, again):
        if abs(scale * second - 1) > 0.01 and second != 1:
            with pytest.raises(
                ValueError,
                match=r"folded in already, .* take the first out before another: fold_scale\(crosscoder, 1 / ",
            ):
                fold_scale(each, second)
        assert all(torch.equal(value, folded[name]) for name, value in each.state_dict().items())
        fold_scale(each, 1 / each.folded_scale)
        assert each.folded_scale == 1
        assert_close(each(x), expected)


def test_sparse_codes_train_as_dense_ones_do():
    trainers = [make_trainer(auxiliary=AuxiliaryLoss(k=4, weight=1.0, after=32)) for _ in range(2)]
    for trainer, backend in zip(trainers, ("dense", "sparse"), strict=True):
        trainer.crosscoder.double().backend = backend
        trainer.optimizer = torch.optim.SGD(trainer.crosscoder.parameters(), lr=1e-2)
        with torch.no_grad():
            trainer.crosscoder.encoder.bias[:3] = -1.0
        trainer.silent[:3] = 1000
        trainer.numbers = [trainer.step(batch(step).double()) for step in range(3)]
    for ours, theirs in zip(trainers[1].numbers, trainers[0].numbers, strict=True):
        for name in theirs:
            assert_close(ours[name], theirs[name])
    assert torch.equal(trainers[0].silent, trainers[1].silent)
    for ours, theirs in zip(trainers[1].crosscoder.parameters(), trainers[0].crosscoder.parameters(), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("clip", [1e-3, 1e3], ids=["clipped", "not reached"])
def test_a_fused_optimiser_clips_to_the_same_update(clip):
    updated = []
    for fused in (False, True):
        trainer = make_trainer()
        trainer.clip = clip
        trainer.optimizer = torch.optim.Adam(
            trainer.crosscoder.parameters(), lr=1e-2, eps=1e-3, fused=fused
        )  # eps: the clip shows in the update
        numbers = trainer.step(batch(0))
        assert 2e-3 < numbers["gradient_norm"] < 1e3
        assert not hasattr(trainer.optimizer, "grad_scale") or trainer.optimizer.grad_scale is None
        updated.append([p.detach().clone() for p in trainer.crosscoder.parameters()])
    for ours, theirs in zip(*updated, strict=True):
        assert_close(ours, theirs)


def transcoder(weight="ring", auxiliary=None):
    """From 2 layers of d_model=6 to 3 of d_model=8, with the batch that it is trained on."""
    torch.manual_seed(0)
    axes = {"d_model": 8, "layers": 3, "latents": 12}
    reader, writer = (
        fx.DenseWeight(2, 6, 12),
        fx.causal_weight(fx.DenseWeight, **axes) if weight == "causal" else fx.TensorRingWeight(**axes),
    )
    crosscoder = fx.gaussian_start(
        fx.Crosscoder(fx.CrossLayerEncoder(reader, fx.TopK(3)), fx.CrossLayerDecoder(writer)), decoder_std=0.1
    )
    trainer = Trainer(crosscoder.double(), torch.optim.Adam(crosscoder.parameters(), lr=1e-2), auxiliary=auxiliary)
    x = torch.randn(64, 2, 6, dtype=torch.float64)
    return trainer, x, torch.einsum("tld, ldmh -> tmh", x, torch.randn(2, 6, 3, 8, dtype=torch.float64)).relu()


@pytest.mark.parametrize("weight", ["ring", "causal"])
@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_a_transcoder_rebuilds_what_the_step_is_given(weight, backend):
    trainer, x, y = transcoder(weight)
    trainer.crosscoder.backend = backend
    expected = fx.reconstruction_loss(y, trainer.crosscoder(x))
    seen = []
    trainer.penalty = lambda run: seen.append(run) or run.x_hat.new_zeros(())
    numbers = [trainer.step(x, y) for _ in range(80)]
    assert_close(numbers[0]["error"], expected)
    assert torch.equal(seen[0].x, x)
    assert torch.equal(seen[0].y, y)
    assert seen[0].x_hat.shape == y.shape
    assert numbers[-1]["error"] < 0.7 * numbers[0]["error"]


@pytest.mark.parametrize("weight", ["ring", "causal"])
@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_the_auxiliary_loss_of_a_transcoder_is_of_what_it_should_write(weight, backend):
    trainer, x, y = transcoder(weight, AuxiliaryLoss(k=2, weight=0.5, after=10))
    crosscoder, dead = trainer.crosscoder, torch.arange(12) % 4 == 1
    crosscoder.backend = backend
    trainer.silent[dead] = 10
    with torch.no_grad():
        crosscoder.encoder.bias[dead] = 0.4
        residual = y - crosscoder(x)
        pre = crosscoder.encoder.pre_activations(x)
        auxiliary = fx.dead_latent_loss(residual, pre, dead, crosscoder.decoder.weight.to_layers, 2)
    numbers = trainer.step(x, y)
    assert auxiliary > 0
    assert_close(numbers["loss"] - numbers["error"], 0.5 * auxiliary)


def test_a_target_of_x_itself_changes_nothing():
    plain, told = make_trainer(), make_trainer()
    for step in range(3):
        assert plain.step(batch(step)) == told.step(batch(step), batch(step))
    assert_same(plain, told)


def test_a_transcoder_resumes_bit_for_bit(tmp_path):
    (whole, x, y), (resumed, *_) = transcoder(), transcoder()
    for step in range(5):
        whole.step(x, y)
        if step == 2:
            save_checkpoint(tmp_path, whole, {})
    assert load_checkpoint(tmp_path, resumed, {}) == []
    for _ in range(2):
        resumed.step(x, y)
    assert_same(whole, resumed)


@pytest.mark.parametrize(
    ("cut", "got"),
    [
        (lambda y: None, "none"),
        (lambda y: y[:, :2], "(64, 2, 8)"),
        (lambda y: y[1:], "(63, 3, 8)"),
        (lambda y: y[..., :6], "(64, 3, 6)"),
    ],
    ids=["none", "layers", "tokens", "d_model"],
)
def test_a_target_that_the_decoder_does_not_write_is_one_sentence(cut, got):
    trainer, x, y = transcoder()
    with pytest.raises(fx.ShapeError) as caught:
        trainer.step(x, cut(y))
    assert str(caught.value) == (
        "from x of (64, 2, 6) the crosscoder rebuilds y of (64, 3, 8), its decoder's layers=3 and d_model=8, "
        f"got {got}; give the same tokens: step(x, y)"
    )
    assert trainer.steps == 0


def test_what_the_encoder_does_not_read_is_still_its_own_sentence():
    trainer, x, y = transcoder()
    with pytest.raises(fx.ShapeError, match=r"^the encoder reads \(..., layers=2, d_model=6\), got \(64, 1, 6\)"):
        trainer.step(x[:, :1], y)
    with pytest.raises(fx.ShapeError, match=r"^the encoder reads \(..., layers=3, d_model=8\), got \(32, 2, 8\)"):
        make_trainer().step(batch(0)[:, :2])


REFUSED = {
    "one token": (
        lambda x: x[0],
        fx.ShapeError,
        r"x of \(..., tokens, layers, d_model\), got \(3, 8\) .*x.unsqueeze\(0\)",
    ),
    "no tokens": (lambda x: x[:0], fx.ShapeError, r"got \(0, 3, 8\), which holds no tokens; leave empty batches out"),
    "no tokens of 4 axes": (lambda x: x[None, :0], fx.ShapeError, "no tokens"),
    "integers": (lambda x: x.long(), TypeError, r"floating point, got torch.int64; .* x.float\(\)"),
    "complex": (lambda x: x.to(torch.complex64), TypeError, "floating point, got torch.complex64"),
    "bool": (lambda x: x > 0, TypeError, "got torch.bool"),
    "one axis": (lambda x: x.flatten(), fx.ShapeError, r"the encoder reads \(..., layers=3, d_model=8\), got \(768,\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_on_is_refused_before_anything_is_updated(name):
    change, kind, message = REFUSED[name]
    trainer, untouched = make_trainer(), make_trainer()
    for each in (trainer, untouched):
        each.step(batch(0))
    with pytest.raises(kind, match=message):
        trainer.step(change(batch(1)))
    with pytest.raises(
        kind,
        match=message.replace("x of", "y of").replace("x.", "y.") if name in ("integers", "complex", "bool") else None,
    ):
        trainer.step(batch(1), change(batch(1)))
    assert_same(trainer, untouched)
    assert trainer.step(batch(1)) == untouched.step(batch(1))


def test_any_batch_axes_are_trained_on_as_so_many_tokens():
    trainer, flat = make_trainer(), make_trainer()
    for each in (trainer, flat):
        each.crosscoder.encoder.mask.p = 0.0
    numbers, expected = trainer.step(batch(0).unflatten(0, (4, 2, 4))), flat.step(batch(0))
    assert_close(numbers, expected)
    assert trainer.tokens == 32


def test_schedules_add_up():
    trainer, seen = make_trainer(), []
    trainer.schedules.append(seen.append)
    anneal_k(trainer, start=16, k=4, steps=np.int64(3))
    trainer.schedules.append(lambda done: seen.append(trainer.crosscoder.encoder.sparsifier.k))
    for step in range(4):
        trainer.step(batch(step))
    assert seen == [0, 1, 12, 2, 8, 3, 4, 4, 4]
    with pytest.raises(
        AttributeError, match=re.escape("a new one replaces none; add it: trainer.schedules.append(schedule)")
    ):
        trainer.schedule = seen.append


def test_an_optimiser_that_would_train_nothing_is_refused():
    crosscoder, other = make_trainer().crosscoder, make_trainer().crosscoder
    with pytest.raises(
        ValueError, match="holds 8 parameters and none of this crosscoder's, so nothing would be trained; make it of"
    ):
        Trainer(crosscoder, torch.optim.Adam(other.parameters()))


def test_an_optimiser_that_leaves_parameters_out_is_refused_unless_they_are_frozen():
    crosscoder = make_trainer().crosscoder
    optimizer = torch.optim.Adam(crosscoder.encoder.parameters())
    with pytest.raises(
        ValueError, match=r"4 of the crosscoder's 8 parameters and not decoder.bias, .*requires_grad_\(False\)"
    ):
        Trainer(crosscoder, optimizer)
    before = crosscoder.decoder.requires_grad_(requires_grad=False).bias.clone()
    trainer = Trainer(crosscoder, optimizer)
    assert trainer.step(batch(0))["gradient_norm"] > 0
    assert torch.equal(crosscoder.decoder.bias, before)


def test_an_optimiser_that_holds_other_parameters_too_is_warned_of():
    crosscoder, gain = make_trainer().crosscoder, torch.nn.Parameter(torch.ones(()))
    with pytest.warns(
        UserWarning, match="1 of the optimiser's 9 parameters are not this crosscoder's.*unless a penalty trains them"
    ):
        trainer = Trainer(crosscoder, torch.optim.Adam([*crosscoder.parameters(), gain], lr=0.1))
    trainer.penalty = lambda run: gain**2
    trainer.step(batch(0))
    assert gain < 1


def test_a_penalty_that_is_not_finite_moves_no_threshold_either():
    trainer = make_trainer()
    trainer.step(batch(0))
    before = {key: value.clone() for key, value in bits(trainer)[0].items()}
    trainer.penalty = lambda run: run.x_hat.sum() * torch.nan
    with pytest.raises(NonFiniteError):
        trainer.step(batch(1))  # whose codes, unlike those of NaN, would have moved it
    assert all(torch.equal(value, before[key]) for key, value in bits(trainer)[0].items())


@pytest.mark.parametrize("fused", [False, True])
def test_a_finite_loss_whose_gradient_is_not_changes_nothing_and_is_named(fused):
    trainer = make_trainer()
    trainer.optimizer = torch.optim.Adam(trainer.crosscoder.parameters(), fused=fused)
    trainer.step(batch(0))
    before = {key: value.clone() for key, value in bits(trainer)[0].items()}
    trainer.penalty = lambda run: (run.x_hat - run.x_hat.detach()).pow(2).sum().sqrt()
    with pytest.raises(NonFiniteError) as caught:
        trainer.step(batch(1))
    assert str(caught.value) == (
        "the gradient is not finite at step 1, batch 1: the loss is; "
        "look for a penalty without a derivative, such as a root of 0; "
        "nothing was updated, and the last checkpoint is as it was"
    )
    assert all(torch.equal(value, before[key]) for key, value in bits(trainer)[0].items())


def test_a_target_that_is_not_finite_is_named():
    trainer, x, y = transcoder()
    before = bits(trainer)[0]
    before = {name: tensor.clone() for name, tensor in before.items()}
    y[3:5, 1, 0] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        trainer.step(x, y)
    assert str(caught.value) == (
        "the loss is nan at step 0, batch 0: 2 of its 64 targets hold NaN or infinity, at layers axis [1]; "
        "nothing was updated, and the last checkpoint is as it was"
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(trainer)[0].items())


def test_dead_latents_of_a_transcoder_are_drawn_from_both_sides():
    trainer, x, y = transcoder()
    crosscoder = trainer.crosscoder
    crosscoder.decoder = fx.CrossLayerDecoder(fx.DenseWeight(3, 8, 12).double())
    trainer.optimizer = torch.optim.Adam(crosscoder.parameters(), lr=1e-2)
    trainer.step(x, y)
    dead = torch.arange(12) < 2
    cosine = resample(trainer, x, dead, y=y)
    assert_close(cosine, torch.ones(2, dtype=torch.float64))
    read, written = (
        weight.atoms(dead).flatten(0, 1).T for weight in (crosscoder.encoder.weight, crosscoder.decoder.weight)
    )
    near = torch.cosine_similarity(read.unsqueeze(1), x.flatten(1), dim=-1)
    same = torch.cosine_similarity(written.unsqueeze(1), (y - crosscoder.decoder.bias).flatten(1), dim=-1)
    assert_close(near.amax(1), torch.ones(2, dtype=torch.float64))
    assert torch.equal(near.argmax(1), same.argmax(1))  # of one token
