"""Every variant of gate and loss: trains, is saved and loaded bit for bit, and its sparse path is its dense path."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, weights

import fmxnn as fx
from fmxnn.sparse.codes import to_codes
from fmxnn.training import CheckpointError, Pass, Trainer, anneal_k, load_checkpoint, resample, save_checkpoint

assert_close = torch.testing.assert_close
LAYERS, D_MODEL, LATENTS, K = 3, 16, 64, 6


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def source(step, tokens=256):
    """Activations of 40 features, each on 6 % of tokens, with directions of their own at every layer."""
    atoms = torch.randn(40, LAYERS, D_MODEL, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(step + 1)
    z = torch.rand(tokens, 40, generator=generator) * (torch.rand(tokens, 40, generator=generator) < 0.06)
    return torch.einsum("tf,fld->tld", z, atoms)


def ring():
    return fx.TensorRingWeight(LAYERS, D_MODEL, LATENTS, ranks=(4, 8, 6))


def crosscoder(gate, weight=None):
    weight = weight or ring()
    made = fx.Crosscoder(fx.CrossLayerEncoder(ring(), gate), fx.CrossLayerDecoder(weight))
    return fx.tied_start(made, decoder_norm=0.5)


def scored(score, inner):
    weight = ring()
    return crosscoder(fx.Scored(inner, score(weight)), weight)


def decoupled():
    weight = ring()
    gate = fx.Decoupled(*(fx.BatchTopK(K) for _ in range(LAYERS)), weight=weight)
    return fx.tied_start(
        fx.Crosscoder(fx.CrossLayerEncoder(ring(), gate), fx.DecoupledDecoder(weight, gate)), decoder_norm=0.5
    )


def norms(coder):
    return coder.decoder.weight.norms()


def l1(coder):
    return lambda run: 0.02 * fx.l1_penalty(run.z, norms(coder))


def quadratic_l0(coder):
    return lambda run: 0.1 * fx.quadratic_l0_loss(coder.encoder.sparsifier.active(run.pre).sum(-1), K)


def anthropic(coder):
    gate = coder.encoder.sparsifier

    def penalty(run: Pass):
        return 0.02 * fx.tanh_penalty(run.z, norms(coder)) + 3e-6 * fx.preactivation_loss(
            run.pre, gate.threshold, norms(coder)
        )

    return penalty


def matryoshka(coder):
    return lambda run: fx.matryoshka_loss(run.x, run.z, coder.decoder, (8, 24))


def trained_jumprelu():
    return fx.TrainedJumpReLU(LATENTS, bandwidth=0.5)


VARIANTS = {
    "relu l1": (lambda: crosscoder(torch.nn.ReLU()), l1),
    "topk": (lambda: crosscoder(fx.TopK(K)), None),
    "batchtopk": (lambda: crosscoder(fx.BatchTopK(K)), None),
    "batchtopk sum": (lambda: scored(fx.SumNorm, fx.BatchTopK(K)), None),
    "batchtopk concat": (lambda: scored(fx.ConcatNorm, fx.BatchTopK(K)), None),
    "batchtopk mixed": (lambda: scored(fx.MixedNorm, fx.BatchTopK(K)), None),
    "topk sum": (lambda: scored(fx.SumNorm, fx.TopK(K)), None),
    "decoupled": (decoupled, None),
    "jumprelu l0": (lambda: crosscoder(trained_jumprelu()), quadratic_l0),
    "jumprelu tanh": (lambda: crosscoder(trained_jumprelu()), anthropic),
    "jumprelu sum": (lambda: scored(fx.SumNorm, trained_jumprelu()), l1),
    "groupmax": (lambda: crosscoder(fx.GroupMax(8, LATENTS)), None),
    "signed groupmax": (lambda: crosscoder(fx.SignedGroupMax(8, LATENTS)), None),
    "signed topk": (lambda: crosscoder(fx.SignedTopK(K)), None),
    "signed batchtopk": (lambda: crosscoder(fx.SignedBatchTopK(K)), None),
    "matryoshka": (lambda: crosscoder(fx.BatchTopK(K)), matryoshka),
}


def make_trainer(name, seed=0):
    torch.manual_seed(seed)
    make, penalty = VARIANTS[name]
    coder = make()
    trainer = Trainer(coder, torch.optim.Adam(coder.parameters(), lr=1e-2), seed=seed)
    trainer.penalty = penalty and penalty(coder)
    return trainer


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_and_comes_back_bit_for_bit(name, tmp_path):
    trainer = make_trainer(name)
    losses = [trainer.step(source(step))["loss"].item() for step in range(25)]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    coder = trainer.crosscoder
    assert all(p.isfinite().all() for p in coder.parameters())
    fx.save_pretrained(coder, tmp_path / "m")
    again, x = fx.from_pretrained(tmp_path / "m"), source(99)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in coder.state_dict().items())
    coder.eval()
    again.backend = coder.backend = "dense"
    assert torch.equal(again(x), coder(x))
    if not coder.obstacle:
        x = x.double()
        coder.double()
        dense = coder(x)
        coder.backend = "sparse"
        assert_close(coder(x), dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["jumprelu l0", "jumprelu sum"])
def test_learned_thresholds_move_towards_what_the_loss_asks(name):
    trainer = make_trainer(name)
    gate = trainer.crosscoder.encoder.sparsifier
    gate = getattr(gate, "sparsifier", gate)
    before = gate.log_threshold.detach().clone()
    trainer.step(source(0))
    assert (gate.log_threshold != before).any()


def test_a_quadratic_l0_loss_leads_to_its_count():
    torch.manual_seed(0)
    gate, pre = trained_jumprelu(), torch.randn(500, LATENTS)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        fx.quadratic_l0_loss(gate.active(pre).sum(-1), K).backward()
        optimizer.step()
    assert abs((gate(pre) > 0).sum(-1).double().mean() - K) < 1


def prefixes(draw_latents, count):
    return st.lists(st.integers(1, draw_latents), min_size=1, max_size=count, unique=True).map(sorted)


@given(weights(), seeds, st.data())
def test_the_matryoshka_loss_is_the_sum_over_crosscoders_cut_short(weight, seed, data):
    torch.manual_seed(seed)
    decoder = fx.CrossLayerDecoder(weight).double()
    torch.nn.init.normal_(decoder.bias)
    x, z = randn(4, weight.layers, weight.d_model), (randn(4, weight.latents) + 0.5).relu()
    cut = data.draw(prefixes(weight.latents, 3))
    expected = sum(fx.reconstruction_loss(x, decoder(z * (torch.arange(weight.latents) < m))) for m in cut)
    parameters = list(decoder.parameters())
    theirs = torch.autograd.grad(expected, parameters)
    for codes in (z, fx.to_csr(z)) if getattr(weight, "table", None) is not None else (z,):
        loss = fx.matryoshka_loss(x, codes, decoder, cut)
        assert_close(loss, expected)
        for ours, other in zip(torch.autograd.grad(loss, parameters), theirs, strict=True):
            assert_close(ours, other)
    batched = fx.matryoshka_loss(x.unflatten(0, (2, 2)), z.unflatten(0, (2, 2)), decoder, cut)
    assert_close(batched, expected)


def test_a_matryoshka_of_a_polynomial_decoder_cuts_its_codes_too():
    torch.manual_seed(0)
    decoder, x, z = fx.polysae_decoder(4, 10, ranks=(6, 2, 2)).double(), randn(5, 1, 4), randn(5, 10).relu()
    expected = sum(fx.reconstruction_loss(x, decoder(z * (torch.arange(10) < m))) for m in (3, 10))
    for codes in (z, to_codes(fx.to_csr(z))):
        assert_close(fx.matryoshka_loss(x, codes, decoder, (3, 10)), expected)


@given(weights(), seeds, st.data())
def test_a_matryoshka_of_a_decoupled_decoder_cuts_the_choice_of_all_latents(weight, seed, data):
    torch.manual_seed(seed)
    gate = fx.Decoupled(*(fx.BatchTopK(1) for _ in range(weight.layers)), weight=weight)
    decoder, pre = fx.DecoupledDecoder(weight, gate).double(), randn(4, weight.latents)
    x, cut = randn(4, weight.layers, weight.d_model), data.draw(prefixes(weight.latents, 3))
    for training in (True, False):
        kept = [
            reference.batchtopk(pre * norm, 1) > 0 if training else pre * norm > 0.5 for norm in weight.norms().detach()
        ]
        for part in gate.train(training).sparsifiers:
            part.threshold.fill_(0.5)
        z, expected = gate(pre), 0.0
        for m in cut:
            codes = [pre * chosen * (torch.arange(weight.latents) < m) for chosen in kept]
            x_hat = (
                torch.stack([code @ w.T for code, w in zip(codes, weight.to_dense(), strict=True)], dim=1)
                + decoder.bias
            )
            expected = expected + reference.reconstruction_loss(x, x_hat.detach())
        assert_close(fx.matryoshka_loss(x, z, decoder, cut), expected)
        assert_close(fx.matryoshka_loss(x, fx.to_csr(z), decoder, cut), expected)


def test_a_matryoshka_trains_on_sparse_codes_as_on_dense_ones():
    losses = []
    for backend in ("dense", "sparse"):
        trainer = make_trainer("matryoshka")
        trainer.crosscoder.backend = backend
        losses.append([trainer.step(source(step))["loss"].item() for step in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("cut", [(), (4, 4), (8, 4), (0, 4), (4, 65)], ids=str)
def test_prefixes_that_do_not_rise_are_refused(cut):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        fx.matryoshka_loss(source(0), torch.zeros(256, LATENTS), fx.CrossLayerDecoder(ring()), cut)
    assert str(error.value) == f"matryoshka_loss needs prefixes that rise from 1 to latents=64 at most, got {list(cut)}"


def annealed(name="batchtopk sum"):
    trainer = make_trainer(name)
    anneal_k(trainer, start=20, k=4, steps=8)
    return trainer


@pytest.mark.parametrize("name", ["topk", "batchtopk sum", "decoupled"])
def test_k_goes_from_start_to_k_in_a_straight_line(name):
    trainer, seen = annealed(name), []
    for step in range(10):
        seen.append(trainer.crosscoder.encoder.sparsifier.k)
        trainer.step(source(step))
    assert seen == [20, 18, 16, 14, 12, 10, 8, 6, 4, 4]


@pytest.mark.parametrize("stop", [3, 9])
def test_a_resumed_run_anneals_on_bit_for_bit(stop, tmp_path):
    whole = annealed()
    for step in range(12):
        whole.step(source(step))
        if step + 1 == stop:
            save_checkpoint(tmp_path, whole, {})
    resumed = annealed()
    assert load_checkpoint(tmp_path, resumed, {}) == []
    for step in range(stop, 12):
        resumed.step(source(step))
    for key, value in whole.crosscoder.state_dict().items():
        assert torch.equal(resumed.crosscoder.state_dict()[key], value), key
    assert fx.describe(resumed.crosscoder) == fx.describe(whole.crosscoder)


def test_resuming_without_the_annealing_is_noticed(tmp_path):
    trainer = annealed()
    trainer.step(source(0))
    save_checkpoint(tmp_path, trainer, {})
    with pytest.raises(CheckpointError, match=r"BatchTopK.k was 18 and is 6;"):
        load_checkpoint(tmp_path, make_trainer("batchtopk sum"), {})


@pytest.mark.parametrize(
    ("name", "sizes", "kind", "message"),
    [
        (
            "batchtopk",
            (16, 65, 4),
            ValueError,
            "anneal_k goes from start to k, whole numbers from 1 to latents=64, over at least one step, "
            "got start=16, k=65 and steps=4",
        ),
        (
            "batchtopk",
            (65, 6, 4),
            ValueError,
            "anneal_k goes from start to k, whole numbers from 1 to latents=64, over at least one step, "
            "got start=65, k=6 and steps=4",
        ),
        (
            "batchtopk",
            (16, 6.5, 4),
            ValueError,
            "anneal_k goes from start to k, whole numbers from 1 to latents=64, over at least one step, "
            "got start=16, k=6.5 and steps=4",
        ),
        (
            "relu l1",
            (16, 6, 4),
            TypeError,
            "anneal_k moves the k of a sparsifier, and that of ReLU cannot move; use TopK or BatchTopK",
        ),
        (
            "groupmax",
            (16, 8, 4),
            TypeError,
            "anneal_k moves the k of a sparsifier, and that of GroupMax cannot move; use TopK or BatchTopK",
        ),
    ],
)
def test_a_k_that_cannot_be_is_one_error_before_training(name, sizes, kind, message):
    start, k, steps = sizes
    with pytest.raises(kind) as error:
        anneal_k(make_trainer(name), start=start, k=k, steps=steps)
    assert str(error.value) == message


def test_the_k_of_a_gate_for_each_run_cannot_move():
    half = LATENTS // 2
    coder = crosscoder(fx.SplitGate(fx.TopK(2), fx.TopK(3), runs=(half, LATENTS - half)), ring())
    with pytest.raises(TypeError) as error:
        anneal_k(Trainer(coder, torch.optim.Adam(coder.parameters())), start=8, k=5, steps=2)
    assert (
        str(error.value)
        == "anneal_k moves the k of a sparsifier, and that of SplitGate cannot move; use TopK or BatchTopK"
    )


@pytest.mark.parametrize(
    "hold", [lambda gate, w: fx.Scored(gate, fx.SumNorm(w)), lambda gate, w: fx.Decoupled(*[gate] * LAYERS, weight=w)]
)
def test_a_k_that_cannot_move_is_found_inside_another_gate(hold):
    weight = ring()
    coder = crosscoder(hold(fx.SignedGroupMax(8, LATENTS), weight), weight)
    with pytest.raises(
        TypeError, match=r"^anneal_k moves the k of a sparsifier, and that of SignedGroupMax cannot move;"
    ):
        anneal_k(Trainer(coder, torch.optim.Adam(coder.parameters())), start=16, k=8, steps=4)


def run_with_dead(weight=None):
    """A trainer five latents of which can never fire, trained so that the optimiser has moments."""
    torch.manual_seed(0)
    made = [weight() for _ in range(2)] if weight else [ring(), ring()]
    coder = fx.tied_start(
        fx.Crosscoder(fx.CrossLayerEncoder(made[0], fx.BatchTopK(K)), fx.CrossLayerDecoder(made[1])), decoder_norm=0.5
    )
    trainer = Trainer(coder, torch.optim.Adam(coder.parameters(), lr=3e-3))
    for step in range(30):
        with torch.no_grad():
            coder.encoder.bias[:5] = -9.0
        trainer.step(source(step))
    return trainer


KINDS = {
    "dense": lambda: fx.DenseWeight(LAYERS, D_MODEL, LATENTS),
    "cp": lambda: fx.CPWeight(LAYERS, D_MODEL, LATENTS, rank=20),
    "ring": ring,
    "latents last": lambda: fx.EinsumWeight("layers d_model latents", layers=LAYERS, d_model=D_MODEL, latents=LATENTS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_dead_latents_are_drawn_towards_tokens_with_a_large_loss(kind):
    trainer = run_with_dead(KINDS[kind])
    encoder, decoder = trainer.crosscoder.encoder, trainer.crosscoder.decoder
    dead, x = torch.arange(LATENTS) < 5, source(50)
    before = {name: p.detach().clone() for name, p in trainer.crosscoder.named_parameters()}
    atoms = encoder.weight.atoms(~dead), decoder.weight.atoms(~dead)
    living = [weight.norms().norm(dim=0)[~dead].mean() for weight in (encoder.weight, decoder.weight)]
    cosine = resample(trainer, x, dead)
    assert torch.equal(encoder.weight.atoms(~dead), atoms[0])
    assert torch.equal(decoder.weight.atoms(~dead), atoms[1])
    assert torch.equal(encoder.bias[5:], before["encoder.bias"][5:])
    assert (encoder.bias[:5] == 0).all()
    assert_close(encoder.weight.norms().norm(dim=0)[:5], (0.2 * living[0]).expand(5), rtol=1e-4, atol=0)
    assert_close(decoder.weight.norms().norm(dim=0)[:5], living[1].expand(5), rtol=1e-4, atol=0)
    directions = torch.nn.functional.normalize((x - decoder.bias).flatten(1), dim=1)
    best = (
        torch.nn.functional.normalize(decoder.weight.atoms(dead).movedim(-1, 0).flatten(1), dim=1) @ directions.T
    ).amax(1)
    assert (best > cosine - 1e-4).all()
    if kind in ("dense", "latents last"):
        assert_close(cosine, torch.ones(5))
    assert (cosine > 0.3).all()
    assert (trainer.silent[:5] == 0).all()
    for name, parameter in trainer.crosscoder.named_parameters():
        moment = trainer.optimizer.state[parameter]["exp_avg"]
        assert (moment != 0).any()
        if name == "encoder.bias":
            assert (moment[:5] == 0).all()
    firing = trainer.crosscoder.train().encode(x)[:, :5]
    assert (firing > 0).any()


@pytest.mark.parametrize("kind", ["cp", "ring"])
def test_no_other_row_is_nearer_to_what_was_asked(kind):
    torch.manual_seed(0)
    trainer = run_with_dead(KINDS[kind])
    writer, dead = trainer.crosscoder.decoder.weight, torch.arange(LATENTS) < 5
    cosine = resample(trainer, source(50, tokens=1), dead)
    wanted = torch.nn.functional.normalize((source(50, tokens=1)[0] - trainer.crosscoder.decoder.bias).flatten(), dim=0)
    small = writer.from_bonds(torch.eye(writer.table.shape[1])).flatten(1).double().detach()
    q = torch.linalg.qr(small.T).Q if small.shape[0] < small.shape[1] else torch.eye(small.shape[1]).double()
    assert_close(cosine.double(), (q.T @ wanted.double().detach()).norm().expand(5), rtol=1e-3, atol=1e-3)


def test_the_draw_follows_from_seed_and_step_alone():
    rows = []
    for noise in (1, 2):
        trainer = run_with_dead()
        torch.manual_seed(noise)
        resample(trainer, source(50), torch.arange(LATENTS) < 5)
        rows.append(trainer.crosscoder.decoder.weight.table[:5])
    assert torch.equal(*rows)


def test_nothing_dead_changes_nothing():
    trainer = run_with_dead()
    before = [p.detach().clone() for p in trainer.crosscoder.parameters()]
    assert resample(trainer, source(50), torch.zeros(LATENTS, dtype=torch.bool)).shape == (0,)
    assert all(torch.equal(p, old) for p, old in zip(trainer.crosscoder.parameters(), before, strict=True))


def test_what_cannot_be_resampled_is_named():
    weight = fx.SumWeight(ring(), ring())
    coder = fx.Crosscoder(fx.CrossLayerEncoder(weight, fx.TopK(2)), fx.CrossLayerDecoder(ring()))
    trainer = Trainer(coder, torch.optim.Adam(coder.parameters()))
    with pytest.raises(TypeError) as error:
        resample(trainer, source(0), torch.ones(LATENTS, dtype=torch.bool))
    assert str(error.value).startswith(
        "resample writes rows of a table, and SumWeight has none or no stored_at(latents) to find them; "
    )
    with pytest.raises(fx.ShapeError) as error:
        resample(make_trainer("topk"), source(0), torch.ones(3, dtype=torch.bool))
    assert str(error.value) == "resample takes dead of (latents=64,), True where a latent is drawn, got (3,)"
