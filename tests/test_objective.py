"""An objective gives one loss whoever runs it, and a trainer runs the module that it was given."""

import copy
import json

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch.testing import assert_close
from trainers import assert_same, batch, bits, make_trainer

import fmxnn as fx
from fmxnn.training import (
    AuxiliaryLoss,
    Matryoshka,
    NonFiniteError,
    Trainer,
    anneal_k,
    load_checkpoint,
    resample,
    save_checkpoint,
)

LAYERS, D_MODEL, LATENTS = 2, 4, 16


def coder(gate=None, cls=fx.Crosscoder, backend="auto"):
    torch.manual_seed(0)
    encoder = fx.CrossLayerEncoder(fx.DenseWeight(LAYERS, D_MODEL, LATENTS), gate or fx.TopK(3))
    made = cls(encoder, fx.CrossLayerDecoder(fx.CPWeight(LAYERS, D_MODEL, LATENTS, rank=5))).double()
    torch.nn.init.normal_(made.decoder.bias)
    made.backend = backend
    return made


def normalisation():
    mean = torch.randn(LAYERS, D_MODEL, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return fx.Normalisation.of(torch.tensor([2.0, 0.25], dtype=torch.float64), mean)


def skipped(crosscoder):
    made = fx.SkipCrosscoder(crosscoder).double()
    torch.nn.init.normal_(made.skip, generator=torch.Generator().manual_seed(3))
    return made


def normalised(crosscoder):
    return fx.Normalised(crosscoder, normalisation())


WRAPPED = {
    "plain": lambda crosscoder: crosscoder,
    "skip": skipped,
    "normalised": normalised,
    "normalised skip": lambda crosscoder: normalised(skipped(crosscoder)),
    "skip of normalised": lambda crosscoder: skipped(normalised(crosscoder)),
}


def tokens(step=0):
    return torch.randn(24, LAYERS, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=1e-2)


def l1(objective):
    return lambda run: 0.1 * fx.l1_penalty(run.codes, objective.coder.decoder.weight.norms())


def full(module):
    """An objective with every kind of term, some latents dead."""
    objective = fx.Objective(module, {"matryoshka": Matryoshka((4, 9), weight=0.5)})
    objective.terms |= {"l1": l1(objective), "auxiliary": AuxiliaryLoss(k=3, weight=0.7, after=50)}
    objective.silent[::3] = 100
    return objective


@pytest.mark.parametrize("backend", ["dense", "sparse"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_the_loss_is_the_sum_of_its_terms_in_the_units_of_the_crosscoder(kind, backend):
    module = WRAPPED[kind](coder(backend=backend))
    objective, x = full(module), tokens()
    given = objective.silent.clone()
    numbers = objective(x)
    inner = objective.coder
    x_hat, read, y = module(x), x, x
    if "normalised" in kind:
        norm = normalisation()
        x_hat, read, y = norm(x_hat), norm(x), norm(x)
    error = fx.reconstruction_loss(y, x_hat)
    own = inner(read)  # what the latents write, without a skip
    rest = y - (x_hat - own)
    dead, pre, z = given >= 50, inner.encoder.pre_activations(read), inner.encode(read)
    expected = {
        "error": error,
        "matryoshka": 0.5 * fx.matryoshka_loss(rest, z, inner.decoder, (4, 9)),
        "l1": 0.1 * fx.l1_penalty(z, inner.decoder.weight.norms()),
        "auxiliary": 0.7 * fx.dead_latent_loss(rest - own, pre, dead, inner.decoder.weight.to_layers, 3),
    }
    for name, value in expected.items():
        assert_close(numbers[name], value.detach())
    assert_close(numbers["loss"], sum(expected.values()))
    assert numbers["l0"] == (z != 0).sum(-1).double().mean()
    assert torch.equal(objective.silent, torch.where((z != 0).any(0), 0, given + 24))
    assert_close(numbers["dead"], (objective.silent >= 2400).double().mean())
    assert all(not value.requires_grad for name, value in numbers.items() if name != "loss")


@pytest.mark.parametrize("backend", ["dense", "sparse"])
@pytest.mark.parametrize("kind", ["skip", "normalised", "normalised skip", "skip of normalised"])
def test_a_module_around_a_crosscoder_is_trained_whether_or_not_it_is_watched(kind, backend):
    trained = []
    for watched in (False, True):
        objective, calls = full(WRAPPED[kind](coder(fx.BatchTopK(3), backend="dense" if watched else backend))), []
        if watched:
            objective.crosscoder.register_forward_hook(lambda module, given, out, calls=calls: calls.append(out.shape))
        trainer = Trainer(objective, adam(objective))
        losses = [trainer.step(tokens(step))["loss"] for step in range(3)]
        assert len(calls) == 3 * watched
        trained.append({**objective.state_dict(), "losses": torch.stack(losses)})
        assert all(p.grad is not None and bool(p.grad.any()) for p in objective.parameters())
    for ours, theirs in zip(*(each.values() for each in trained), strict=True):
        assert_close(ours, theirs)


@given(st.integers(0, 99), st.sampled_from(["dense", "sparse"]))
def test_a_normalised_crosscoder_trains_as_its_crosscoder_on_normalised_activations(seed, backend):
    plain, inside = (coder(fx.BatchTopK(3), backend=backend) for _ in range(2))
    whole = normalised(inside)
    one, other = Trainer(whole, adam(whole)), Trainer(plain, adam(plain))
    for step in range(3):
        x = tokens(seed + step)
        assert one.step(x) == other.step(normalisation()(x))
    assert all(
        torch.equal(a, b) for a, b in zip(inside.state_dict().values(), plain.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("kind", WRAPPED)
def test_whatever_is_trained_resumes_bit_for_bit(kind, tmp_path):
    def made():
        objective = full(WRAPPED[kind](coder(fx.BatchTopK(3))))
        return Trainer(objective, adam(objective), seed=3)

    whole, resumed = made(), made()
    for step in range(4):
        whole.step(tokens(step))
        if step == 1:
            save_checkpoint(tmp_path, whole, {})
    assert load_checkpoint(tmp_path, resumed, {}) == []
    for step in range(2, 4):
        resumed.step(tokens(step))
    assert_same(whole, resumed)


@pytest.mark.parametrize("kind", ["normalised", "skip"])
def test_dead_latents_inside_are_drawn_from_what_the_crosscoder_reads(kind):
    module, x, dead = WRAPPED[kind](coder()), tokens(), torch.arange(LATENTS) < 3
    trainer, inner = Trainer(module, adam(module)), copy.deepcopy(module.crosscoder)
    plain = Trainer(inner, adam(inner))
    read, y = module.within(x, x)
    other = None if y is read else y.detach()
    assert_close(resample(trainer, x, dead), resample(plain, read, dead, y=other))
    for ours, theirs in zip(module.crosscoder.parameters(), inner.parameters(), strict=True):
        assert_close(ours, theirs)
    anneal_k(trainer, start=9, k=3, steps=4)
    assert module.crosscoder.encoder.sparsifier.k == 9


def test_terms_of_an_objective_and_arguments_of_a_trainer_are_one_thing():
    helped = make_trainer(auxiliary=AuxiliaryLoss(k=4, weight=0.5, after=32))
    helped.penalty = lambda run: 0.1 * run.z.sum(-1).mean()
    other = make_trainer().crosscoder
    objective = fx.Objective(other, {"penalty": helped.penalty, "auxiliary": helped.auxiliary})
    trainer = Trainer(objective, torch.optim.Adam(objective.parameters(), lr=1e-2, fused=True))
    for step in range(4):
        assert helped.step(batch(step)) == trainer.step(batch(step))
    assert_same(helped, trainer)
    assert trainer.auxiliary is helped.auxiliary
    assert trainer.penalty is helped.penalty
    trainer.penalty = trainer.auxiliary = None
    assert trainer.objective.terms == {}


def test_checkpoints_keep_the_names_that_they_had(tmp_path):
    """What a version before the objective wrote can be resumed, since this one writes the same names."""
    trainer = make_trainer(auxiliary=AuxiliaryLoss(k=4))
    trainer.penalty = lambda run: run.x_hat.sum() * 0
    trainer.step(batch(0))
    path = save_checkpoint(tmp_path, trainer, {})
    with safe_open(path / "trainer.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    assert names == {"silent"} | {f"optimizer.{i}.{key}" for i in range(8) for key in ("step", "exp_avg", "exp_avg_sq")}
    with safe_open(path / "crosscoder.safetensors", "pt") as tensors:
        assert set(tensors.keys()) == set(trainer.crosscoder.state_dict())
    about = json.loads((path / "trainer.json").read_text())
    assert about["objective"] == {
        "seed": 0,
        "dtype": "torch.float32",
        "clip": "1.0",
        "auxiliary": {"k": 4, "weight": 1 / 32, "after": 10_000_000},
        "penalty": "a lambda",
        "schedules": [],
    }
    assert about["optimizer"]["groups"] == [[name for name, _ in trainer.crosscoder.named_parameters()]]


class Gain(torch.nn.Module):
    """A term with a parameter and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, run):
        self.seen += 1
        return self.gain**2 * run.z.sum(-1).mean()


def test_a_term_that_is_a_module_is_trained_and_saved(tmp_path):
    def made():
        objective = fx.Objective(coder(), {"gain": Gain()})
        return Trainer(objective, adam(objective))

    trainer, resumed = made(), made()
    for step in range(2):
        trainer.step(tokens(step))
    save_checkpoint(tmp_path, trainer, {})
    load_checkpoint(tmp_path, resumed, {})
    assert_same(trainer, resumed)
    term = resumed.objective.terms["gain"]
    assert term.seen == 2
    assert term.gain < 1
    trainer.penalty = lambda run: run.x_hat.sum() * torch.nan
    with pytest.raises(NonFiniteError):
        trainer.step(tokens(2))
    assert trainer.objective.terms["gain"].seen == 2


def test_silence_is_saved_with_the_objective_and_moves_in_training_alone():
    objective = fx.Objective(coder())
    objective(tokens())
    after = objective.silent.clone()
    assert after.max() == 24
    objective.eval()(tokens(1))
    assert torch.equal(objective.silent, after)
    again = fx.Objective(coder())
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again.silent, after)


def test_a_transcoder_reads_x_and_rebuilds_y_by_name():
    encoder = fx.CrossLayerEncoder(fx.DenseWeight(2, 4, 16), fx.TopK(3))
    crosscoder = fx.Crosscoder(encoder, fx.CrossLayerDecoder(fx.DenseWeight(3, 5, 16)))
    objective, x, y = fx.Objective(crosscoder), torch.randn(9, 2, 4), torch.randn(9, 3, 5)
    assert_close(objective(x=x, y=y)["loss"], fx.reconstruction_loss(y, crosscoder(x)))
    with pytest.raises(fx.ShapeError, match=r"rebuilds y of \(9, 3, 5\), .* got none"):
        objective(x)


# Whose forward runs


class Counting(fx.Crosscoder):
    calls = 0

    def forward(self, x):
        Counting.calls += 1
        return 0.5 * super().forward(x)


class Loop(torch.nn.Module):
    """A wrapper of a user's own, as DistributedDataParallel is one."""

    def __init__(self, objective):
        super().__init__()
        self.objective, self.calls = objective, 0

    def forward(self, *given):
        self.calls += 1
        return self.objective(*given)


def test_a_trainer_calls_what_it_was_given_and_every_hook_on_it():
    trainer, plain, seen = None, make_trainer(), []
    loop = Loop(fx.Objective(make_trainer().crosscoder))
    trainer = Trainer(loop, torch.optim.Adam(loop.parameters(), lr=1e-2, fused=True))
    loop.register_forward_hook(lambda module, given, out: seen.append("loop"))
    loop.objective.register_forward_hook(lambda module, given, out: seen.append("objective"))
    for step in range(2):
        assert trainer.step(batch(step)) == plain.step(batch(step))
    assert loop.calls == 2
    assert seen == ["objective", "loop"] * 2
    assert_same(trainer, plain)
    assert trainer.objective is loop.objective


def test_a_subclass_is_called_once_a_step_and_its_numbers_are_followed():
    crosscoder, Counting.calls = coder(cls=Counting), 0
    expected = fx.reconstruction_loss(tokens(), 0.5 * coder()(tokens()))
    assert_close(Trainer(crosscoder, adam(crosscoder)).step(tokens())["error"], expected)
    assert Counting.calls == 1


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["plain", "skip", "normalised"])
def test_a_compiled_objective_runs_compiled_as_one_graph_and_trains_alike(kind, in_place):
    torch.compiler.reset()
    graphs, pair = [], [full(WRAPPED[kind](coder(fx.BatchTopK(3), backend="dense"))).float() for _ in range(2)]

    def counted(graph, _):
        graphs.append(graph)
        return graph

    module = pair[0]
    if in_place:
        module.compile(backend=counted, fullgraph=True)
    else:
        module = torch.compile(module, backend=counted, fullgraph=True)
    trainers = [Trainer(each, adam(each)) for each in (module, pair[1])]
    for step in range(2):
        assert_close(*(trainer.step(tokens(step)) for trainer in trainers))
    assert len(graphs) == 1
    for ours, theirs in zip(*(objective.state_dict().values() for objective in pair), strict=True):
        assert_close(ours, theirs)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler's own
def test_a_compiled_subclass_trains_as_it_does_uncompiled():
    torch.compiler.reset()
    pair = [fx.Objective(coder(cls=Counting)) for _ in range(2)]
    trainers = [Trainer(torch.compile(pair[0], backend="eager"), adam(pair[0])), Trainer(pair[1], adam(pair[1]))]
    for step in range(2):
        assert_close(*(trainer.step(tokens(step)) for trainer in trainers))


# Bad input


class NoSparsifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(3, 4), torch.nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.nn.Linear(3, 4), "got Linear without encoder.weight, encoder.sparsifier"),
        (NoSparsifier, "got NoSparsifier without encoder.sparsifier; "),
        (
            lambda: torch.compile(coder(), backend="eager"),
            r"got OptimizedModule without code .*torch.compile\(fx.Objective\(crosscoder\)\)",
        ),
    ],
)
def test_a_module_without_the_contract_is_one_sentence(make, words):
    module = make()
    for ask in (fx.Objective, lambda given: Trainer(given, adam(given))):
        with pytest.raises(TypeError, match=f"^an objective holds a Crosscoder, .*{words}"):
            ask(module)


def bent(place, change):
    """A crosscoder with a hook that changes what one of its modules gives."""

    def make():
        made = coder(fx.BatchTopK(3))
        made.get_submodule(place).register_forward_hook(lambda module, given, out: change(out))
        return made

    return make


def overriding(**methods):
    return lambda: coder(fx.BatchTopK(3), cls=type("Mine", (fx.Crosscoder,), methods))


WRONG = {
    "forward drops layers": (
        overriding(forward=lambda self, x: self.decode(self.encode(x))[:, :1]),
        fx.ShapeError,
        r"Mine gave \(24, 1, 4\), expected \(24, 2, 4\), as y is; mend its forward, or the hook",
    ),
    "forward gives None": (
        overriding(forward=lambda self, x: setattr(self, "last", self.decode(self.encode(x)))),
        TypeError,
        r"Mine gave None, expected a tensor of \(24, 2, 4\)",
    ),
    "decode gives a tuple": (
        overriding(decode=lambda self, z: (self.decoder(z), z)),
        TypeError,
        r"Mine gave a tuple, expected a tensor of \(24, 2, 4\)",
    ),
    "encode drops latents": (
        overriding(encode=lambda self, x: self.encoder(x)[..., :7]),
        fx.ShapeError,
        r"the decoder reads codes of \(..., latents=16\), got \(24, 7\)",
    ),
    "encode drops tokens": (
        overriding(encode=lambda self, x: self.encoder(x)[:5]),
        fx.ShapeError,
        r"Mine gave \(5, 2, 4\), expected \(24, 2, 4\)",
    ),
    "encode gives None": (
        overriding(encode=lambda self, x: setattr(self, "last", self.encoder(x))),
        TypeError,
        "the decoder CrossLayerDecoder was handed None, expected a tensor; look at the hooks",
    ),
    "a hook on the crosscoder": (bent("", lambda out: [out]), TypeError, "Crosscoder gave a list, expected a tensor"),
    "a hook on the decoder": (
        bent("decoder", lambda out: out[..., :2]),
        fx.ShapeError,
        r"CrossLayerDecoder.forward must give a tensor of \(24, 2, 4\), got \(24, 2, 2\)",
    ),
    "a hook on the encoder": (
        bent("encoder", str),
        TypeError,
        r"CrossLayerEncoder.forward must give a tensor of \(24, 16\), got str",
    ),
    "a hook on the gate": (
        bent("encoder.sparsifier", lambda out: {}),
        TypeError,
        r"BatchTopK.forward must give a tensor of \(24, 16\), got dict",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_override_or_hook_that_spoils_the_pass_is_one_sentence_and_changes_nothing(case):
    make, kind, words = WRONG[case]
    crosscoder = make()
    trainer = Trainer(crosscoder, adam(crosscoder))
    before = {name: value.clone() for name, value in bits(trainer)[0].items()}
    with pytest.raises(kind, match=words):
        trainer.step(tokens())
    assert trainer.steps == 0
    assert all(torch.equal(value, before[name]) for name, value in bits(trainer)[0].items())


def test_a_hook_that_returns_nothing_changes_nothing():
    plain, watched = coder(fx.BatchTopK(3), backend="dense"), bent("encoder.sparsifier", lambda out: None)()
    assert Trainer(plain, adam(plain)).step(tokens()) == Trainer(watched, adam(watched)).step(tokens())


@pytest.mark.parametrize(
    ("terms", "kind", "words"),
    [
        ({"loss": abs}, ValueError, "a term's name is a word of its own beside loss, error, .*got 'loss'"),
        ({"my l1": abs}, ValueError, "got 'my l1'; take another"),
        ({"pop": abs}, ValueError, "got 'pop'"),
        ({"training": abs}, ValueError, "got 'training'"),
        ({1: abs}, ValueError, "got 1; take another"),
        ({"l1": 0.1}, TypeError, "the term 'l1' of an objective is called with the pass, got 0.1"),
    ],
)
def test_terms_that_cannot_be_are_refused(terms, kind, words):
    with pytest.raises(kind, match=words):
        fx.Objective(coder(), terms)
    objective = fx.Objective(coder())
    with pytest.raises(kind, match=words):
        objective.terms |= terms
    assert objective.terms == {}


def test_terms_have_names_and_an_objective_holds_no_objective():
    with pytest.raises(TypeError, match=r"^an objective's terms have names, got \[.*; give them as \{'l1': l1\}$"):
        fx.Objective(coder(), [abs])
    with pytest.raises(TypeError, match="^an objective holds a crosscoder, got an Objective; "):
        fx.Objective(fx.Objective(coder()))
    with pytest.raises(TypeError, match="^an objective holds a Crosscoder, .* got NoneType without encoder.weight"):
        fx.Objective(None)


def test_an_objective_is_saved_as_what_it_trains(tmp_path):
    with pytest.raises(fx.RecipeError, match=r"save what it trains: save_pretrained\(objective\.crosscoder, folder\)$"):
        fx.save_pretrained(fx.Objective(coder()), tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("term", "words"),
    [
        (lambda run: run.z, r"gives one number, got a tensor of \(24, 16\)"),
        (lambda run: None, "gives one number, got NoneType"),
    ],
)
def test_a_term_that_gives_no_number_is_one_sentence(term, words):
    with pytest.raises(TypeError, match=f"the term 'mine' of an objective {words}"):
        fx.Objective(coder(), {"mine": term})(tokens())


class Recomputed(fx.Crosscoder):
    """Runs its encoder a second time in the backward pass, as activation checkpointing does."""

    def forward(self, x):
        return self.decoder(torch.utils.checkpoint.checkpoint(self.encoder, x, use_reentrant=False))


def test_recomputing_activations_changes_neither_gradients_nor_counts():
    pair = [coder(cls=cls, backend="dense") for cls in (Recomputed, fx.Crosscoder)]
    trainers = [Trainer(each, adam(each)) for each in pair]
    for step in range(3):
        assert_close(*(trainer.step(tokens(step)) for trainer in trainers))
    assert_same(*trainers)


@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_a_threshold_moves_once_an_optimiser_step_whatever_the_micro_batches_and_recomputations(backend):
    """Without the context each of these forwards would move it, and those that the backward pass repeats too."""
    crosscoder = coder(fx.BatchTopK(3, decay=0.5), backend=backend)
    objective, threshold = fx.Objective(crosscoder), crosscoder.encoder.sparsifier.threshold
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.0)
    expected = -1.0
    for turn in range(3):
        smallest = []
        for part in range(2):
            x = torch.randn(
                20, LAYERS, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * turn + part)
            )
            alone = fx.BatchTopK(3, decay=0.0)
            alone(crosscoder.encoder.pre_activations(x))
            smallest.append(float(alone.threshold))
            run = torch.utils.checkpoint.checkpoint(lambda x: objective(x)["loss"], x, use_reentrant=False)
            (run / 2).backward()
        optimizer.step()
        expected = sum(smallest) / 2 if expected < 0 else 0.5 * expected + 0.5 * sum(smallest) / 2
        assert_close(float(threshold), expected, rtol=1e-6, atol=0)  # the threshold is float32
