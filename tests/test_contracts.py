"""A weight of a user's own, from the slow methods alone to all that it may give, runs through every part of fmxnn."""

from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import randn, seeds

import fmxnn as fx
from fmxnn.coders.folding import weights_of
from fmxnn.metrics import functional_coherence, norm_coherence
from fmxnn.training import Trainer, fold_scale, isometric_, resample
from fmxnn.weights.parted import parts_of

assert_close = torch.testing.assert_close
LAYERS, D_MODEL, LATENTS = AXES = 3, 4, 12


class Slow(fx.Weight):
    """One direction a latent, and a gain above zero for each layer, which no pattern can say."""

    def __init__(self, layers, d_model, latents):
        super().__init__()
        self.layers, self.d_model, self.latents = layers, d_model, latents
        self.log_gains = torch.nn.Parameter(torch.zeros(layers))
        self.directions = torch.nn.Parameter(torch.randn(latents, d_model))

    def to_latents(self, x):
        return torch.einsum("...ld,l->...d", x, self.log_gains.exp()) @ self.directions.T

    def to_layers(self, z):
        return torch.einsum("...d,l->...ld", z @ self.directions, self.log_gains.exp())


class Whole(Slow):
    """The same with everything that a weight may give."""

    @property
    def table(self):
        return self.directions

    def to_bonds(self, x):
        return torch.einsum("...ld,l->...d", x, self.log_gains.exp())

    def from_bonds(self, h):
        return torch.einsum("...d,l->...ld", h, self.log_gains.exp())

    def stored_at(self, latents):
        return self.directions, (latents,)

    @torch.no_grad()
    def normal_(self, std):
        self.log_gains.zero_()
        self.directions.normal_(0, std)
        return self

    @torch.no_grad()
    def scale_(self, factor):
        self.directions.mul_(factor)
        return self

    def scale_layers_(self, factors):
        self.log_gains.add_(factors.log())


@isometric_.register
@torch.no_grad()
def _(weight: Whole) -> None:
    weight.log_gains.fill_(weight.layers**-0.5).log_()
    weight.directions.copy_(torch.nn.functional.normalize(torch.randn_like(weight.directions), dim=1))


def crosscoder(reader, writer=None, gate=None):
    coder = fx.Crosscoder(
        fx.CrossLayerEncoder(reader, gate or fx.TopK(2)), fx.CrossLayerDecoder(reader if writer is None else writer)
    ).double()
    torch.nn.init.normal_(coder.encoder.bias)
    torch.nn.init.normal_(coder.decoder.bias)
    return coder


AROUND = {
    "alone": lambda: Whole(*AXES),
    "sum": lambda: fx.SumWeight(Whole(*AXES), fx.CPWeight(*AXES, rank=2)),
    "concat": lambda: fx.ConcatWeight(fx.PlacedWeight(Whole(2, 3, 5), layers=3, at=[0, 2], d_model=4), Whole(3, 4, 7)),
    "ragged": lambda: fx.RaggedWeight(Whole(*AXES), widths=(2, 4, 3)),
    "projected": lambda: fx.ProjectedWeight(fx.Projection(LATENTS, 5), Whole(LAYERS, D_MODEL, 5)),
}
around = pytest.mark.parametrize("kind", AROUND)


def test_the_slow_methods_alone_make_a_weight():
    fx.check_weight(Slow(*AXES).double())
    coder = crosscoder(Slow(*AXES), Slow(*AXES))
    assert coder.obstacle == "Slow has no table"
    trainer = Trainer(coder, torch.optim.Adam(coder.parameters(), lr=1e-2))
    x = randn(30, LAYERS, D_MODEL)
    losses = [trainer.step(x)["loss"].item() for _ in range(30)]
    assert losses[-1] < losses[0]


@around
def test_a_whole_weight_obeys_every_law_wherever_it_stands(kind):
    fx.check_weight(AROUND[kind]().double())


@around
@given(seeds)
@settings(max_examples=3)
def test_it_runs_sparse_with_the_numbers_of_dense_products(kind, seed):
    torch.manual_seed(seed)
    coder, x = crosscoder(AROUND[kind](), AROUND[kind]()), randn(7, LAYERS, D_MODEL)
    assert coder.obstacle == ""
    found = []
    for coder.backend in ("sparse", "dense"):
        x_hat = coder(x)
        found.append([x_hat.detach(), *torch.autograd.grad((x_hat - x).square().sum(), list(coder.parameters()))])
    assert_close(*found)


def test_it_is_taken_for_sparse_codes_where_they_are_cheaper():
    axes = 2, 16, 4096
    coder = crosscoder(Whole(*axes), Whole(*axes))
    assert coder.plan(64).taken.backend == "sparse"
    assert "MB" in coder.explain(64)


STARTS = {
    "gaussian": fx.gaussian_start,
    "tied": fx.tied_start,
    "isometric": fx.isometric_start,
    "data": lambda coder: fx.data_start(coder, randn(60, LAYERS, D_MODEL)),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["alone", "concat"])
def test_it_starts_in_every_way(kind, start):
    coder = STARTS[start](crosscoder(AROUND[kind](), AROUND[kind]()))
    length = coder.decoder.weight.norms().norm(dim=0)
    if start == "gaussian":
        assert coder.decoder.weight.to_dense().abs().max() > 0
        return
    assert_close(length.mean().item(), 0.1)
    atoms = [w.to_dense().flatten(0, 1) for w in (coder.encoder.weight, coder.decoder.weight)]
    assert_close(torch.cosine_similarity(*atoms, dim=0), torch.ones(LATENTS).double())


def test_it_is_tied_to_a_weight_of_another_kind():
    for reader, writer in ((Whole(*AXES), fx.DenseWeight(*AXES)), (fx.DenseWeight(*AXES), Whole(*AXES))):
        coder = fx.tied_start(crosscoder(reader, writer))
        asked = coder.encoder.weight.to_dense().flatten(0, 1)
        found = coder.decoder.weight.to_dense().flatten(0, 1)
        assert (torch.cosine_similarity(asked, found, dim=0) > 0.1).all()


@pytest.mark.parametrize("kind", ["alone", "concat", "ragged"])
def test_its_dead_latents_are_drawn_anew(kind):
    coder = crosscoder(AROUND[kind](), AROUND[kind](), fx.TopK(LATENTS))
    trainer, dead = Trainer(coder, torch.optim.Adam(coder.parameters())), torch.arange(LATENTS) % 3 == 0
    x = randn(20, LAYERS, D_MODEL)
    trainer.step(x)
    before = coder.decoder.weight.to_dense().detach().clone()
    cosine = resample(trainer, x, dead)
    after = coder.decoder.weight.to_dense().detach()
    assert torch.equal(after[..., ~dead], before[..., ~dead])
    assert (after[..., dead] != before[..., dead]).flatten(0, 1).any(dim=0).all()
    assert (cosine > 0).all()
    assert (trainer.optimizer.state[next(iter(coder.encoder.weight.parameters()))]["exp_avg"] != 0).any()


@around
def test_a_normalisation_and_a_scale_are_folded_into_it(kind):
    coder, x = crosscoder(AROUND[kind](), AROUND[kind]()), randn(9, LAYERS, D_MODEL)
    scale = torch.tensor([0.1, 3.0, 40.0], dtype=torch.float64)
    whole = fx.Normalised(coder, fx.Normalisation.of(scale, randn(LAYERS, D_MODEL)))
    assert_close(fx.fold(whole)(x), whole(x))
    expected = coder(0.3 * x) / 0.3
    assert_close(fold_scale(coder, 0.3)(x), expected)


def test_it_is_taken_apart_and_measured():
    weight = AROUND["concat"]()
    assert [(type(part.weight), part.at) for part in parts_of(weight)] == [(Whole, (0, 2)), (Whole, (0, 1, 2))]
    coder = crosscoder(Whole(*AXES), Whole(*AXES))
    x = randn(40, LAYERS, D_MODEL)
    dense = coder.materialize()
    assert_close(dense(x), coder(x))
    assert_close(norm_coherence(coder.decoder.weight).values, norm_coherence(dense.decoder.weight).values)
    ours, theirs = (functional_coherence(each, [x], min_active=1).values for each in (coder, dense))
    assert_close(ours, theirs, equal_nan=True)
    fitted = fx.fit_weight(coder.decoder.weight, fx.EinsumWeight("latents d_model, layers", **named(AXES)).double())
    assert fitted.error < 1e-6  # one direction with a gain for each layer is of rank one


def named(axes):
    return dict(zip(("layers", "d_model", "latents"), axes, strict=True))


def test_it_is_saved_and_loaded(tmp_path):
    coder = crosscoder(Whole(*AXES), AROUND["concat"]())
    fx.save_pretrained(coder, tmp_path / "own")
    again = fx.from_pretrained(tmp_path / "own", classes=[Whole])
    x = randn(5, LAYERS, D_MODEL)
    assert torch.equal(again(x), coder.eval()(x))


@pytest.mark.parametrize("name", ["to_latents", "to_layers", "to_bonds", "from_bonds"])
def test_what_is_overridden_in_it_is_followed(name):
    axes = 2, 16, 4096
    original = getattr(Whole, name)
    changed = {name: lambda self, given: 2 * original(self, given), "__module__": __name__}
    part = type("Changed", (Whole,), changed)
    x, plain = randn(64, 2, 16), crosscoder(Whole(*axes), Whole(*axes))
    coder = deepcopy(plain)
    for weight in (coder.encoder.weight, coder.decoder.weight):
        weight.__class__ = part
    reads = name.endswith(("latents", "to_bonds"))
    wanted = plain.encoder.pre_activations(x) - plain.encoder.bias
    z = plain.encoder.sparsifier(wanted * 2 + plain.encoder.bias) if reads else plain.encode(x)
    x_hat = plain.decode(z) if reads else 2 * (plain.decode(z) - plain.decoder.bias) + plain.decoder.bias
    assert_close(coder(x), x_hat)
    assert (f"overrides {name}" in coder.obstacle) == (name in ("to_latents", "to_layers"))


class Louder(fx.DenseWeight):
    """Has a table of its own and inherits where the rows of another are stored."""

    @property
    def table(self):
        return 2 * super().table


def test_rows_are_not_written_through_an_inherited_place():
    coder = crosscoder(Louder(*AXES), Louder(*AXES))
    trainer = Trainer(coder, torch.optim.Adam(coder.parameters()))
    with pytest.raises(TypeError, match="resample writes rows of a table, and Louder .*stored_at"):
        resample(trainer, randn(5, LAYERS, D_MODEL), torch.ones(LATENTS, dtype=torch.bool))
    with pytest.raises(ValueError, match="data_start needs .* got Louder"):
        fx.data_start(coder, randn(60, LAYERS, D_MODEL))


def test_a_weight_is_not_fitted_by_factors_that_it_does_not_go_by():
    with pytest.raises(TypeError, match="fit_weight fits the factors of a pattern, and Louder overrides table; fit"):
        fx.fit_weight(fx.DenseWeight(*AXES), Louder(*AXES))
    assert fx.fit_weight(Louder(*AXES), fx.DenseWeight(*AXES)).error < 1e-6


def test_one_tensor_of_two_patterns_is_not_tied_by_copying_it():
    torch.manual_seed(0)
    axes = {"layers": 3, "d_model": 3, "latents": 5}
    reader, writer = (fx.EinsumWeight(f"latents {words}", **axes) for words in ("layers d_model", "d_model layers"))
    coder = fx.tied_start(crosscoder(reader, writer))
    ours, theirs = (w.to_dense().flatten(0, 1) for w in (coder.encoder.weight, coder.decoder.weight))
    assert_close(torch.cosine_similarity(ours, theirs, dim=0), torch.ones(5).double())


class OnlyScaled(Slow):
    @torch.no_grad()
    def scale_(self, factor):
        self.directions.mul_(factor)
        return self


def test_a_scale_asks_for_scale_alone():
    coder, x = crosscoder(OnlyScaled(*AXES), OnlyScaled(*AXES)), randn(5, LAYERS, D_MODEL)
    expected = coder(4 * x) / 4
    assert_close(fold_scale(coder, 4.0)(x), expected)
    with pytest.raises(TypeError, match=r"fold_scale needs a weight with scale_\(factor\), and Slow lacks it; add"):
        fold_scale(crosscoder(Slow(*AXES)), 2.0)


class Squares(torch.nn.Module):
    """A decoder of a user's own: what squared codes write beside the linear part."""

    def __init__(self, weight, more):
        super().__init__()
        self.weight, self.more = weight, more
        self.bias = torch.nn.Parameter(torch.randn(weight.layers, weight.d_model))

    def forward(self, z):
        return self.weight.to_layers(z) + self.more.to_layers(z.square()) + self.bias


class Scaled(Squares):
    def scale_layers_(self, factors):
        self.weight.scale_layers_(factors)
        self.more.scale_layers_(factors)


class Registered(Squares):
    """Joins by one line."""


weights_of.register(Registered, lambda decoder: (decoder.weight, decoder.more))


@pytest.mark.parametrize("decoder", [Scaled, Registered])
def test_a_decoder_of_ones_own_is_scaled_whole(decoder):
    made = decoder(fx.DenseWeight(*AXES), fx.DenseWeight(*AXES))
    coder = fx.Crosscoder(fx.CrossLayerEncoder(Whole(*AXES), fx.TopK(3)), made, backend="dense").double()
    x = randn(9, LAYERS, D_MODEL)
    whole = fx.Normalised(coder, fx.Normalisation.of(torch.tensor([0.1, 3.0, 9.0]).double(), randn(LAYERS, D_MODEL)))
    assert_close(fx.fold(whole)(x), whole(x))
    expected = coder(5 * x) / 5
    assert_close(fold_scale(coder, 5.0)(x), expected)


def test_a_decoder_that_says_nothing_of_its_scale_is_refused_before_anything_changes():
    made = Squares(fx.DenseWeight(*AXES), fx.DenseWeight(*AXES))
    coder = fx.Crosscoder(fx.CrossLayerEncoder(Whole(*AXES), fx.TopK(3)), made).double()
    before = deepcopy(coder.state_dict())
    for act in (
        lambda: fold_scale(coder, 5.0),
        lambda: fx.fold(fx.Normalised(coder, fx.Normalisation(LAYERS, D_MODEL))),
    ):
        with pytest.raises(
            TypeError, match=r"^fold and fold_scale .* Squares does not say .*weights_of\.register\(Squares, "
        ):
            act()
    assert coder.folded_scale == 1
    assert all(torch.equal(value, before[name]) for name, value in coder.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [
        lambda: fx.SumWeight(fx.DenseWeight(*AXES), Slow(*AXES)),
        lambda: fx.ConcatWeight(fx.DenseWeight(*AXES), Slow(*AXES)),
        lambda: fx.ProjectedWeight(fx.Projection(LATENTS, 5), Slow(LAYERS, D_MODEL, 5)),
    ],
)
@pytest.mark.parametrize("act", [lambda weight: weight.normal_(1.0), lambda weight: weight.scale_(2.0)])
def test_a_weight_inside_that_cannot_be_drawn_is_named_and_nothing_is_changed(make, act):
    weight = make()
    before = deepcopy(weight.state_dict())
    with pytest.raises(
        TypeError, match=r"needs a weight with normal_\(std\) and scale_\(factor\), and Slow lacks them"
    ):
        act(weight)
    assert all(torch.equal(value, before[name]) for name, value in weight.state_dict().items())


PROTOCOLS = [fx.Tabled, fx.Rowed, fx.Startable, fx.Scalable, fx.LayerScalable]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.__name__)
def test_a_protocol_is_joined_by_its_methods_alone(protocol):
    assert isinstance(Whole(*AXES), protocol)
    assert isinstance(fx.DenseWeight(*AXES), protocol)
    assert not isinstance(Slow(*AXES), protocol)


def test_the_cost_of_a_small_map_is_that_of_a_dense_one_unless_it_is_said():
    assert Whole(*AXES).small_flops == 2.0 * D_MODEL * LAYERS * D_MODEL
    assert Slow(*AXES).small_flops == fx.DenseWeight(*AXES).small_flops == 0
    assert fx.SumWeight(Whole(*AXES), fx.DenseWeight(*AXES)).small_flops == Whole(*AXES).small_flops


def test_a_weight_of_ones_own_is_compiled():
    coder, x = crosscoder(Whole(*AXES)), randn(5, LAYERS, D_MODEL)
    assert_close(torch.compile(coder, backend="eager", fullgraph=True)(x), coder(x))


whole = st.integers(1, 4).map(np.int64)


@settings(max_examples=5)
@given(whole, whole, st.integers(2, 4).map(np.int64))
def test_sizes_may_be_numpys(layers, d_model, share):
    latents = layers * share
    axes = {"layers": layers, "d_model": d_model, "latents": latents}
    some = np.arange(layers)
    made = [
        fx.sae_stack_weight(fx.DenseWeight, **axes),
        fx.causal_weight(partial(fx.CPWeight, rank=np.int64(2)), **axes),
        fx.windowed_weight(fx.DenseWeight, layers=layers, d_model=d_model, latents=share, window=layers),
        fx.PlacedWeight(fx.DenseWeight(layers, d_model, share), layers=layers + 1, at=np.int64(1), d_model=d_model + 1),
        fx.PlacedWeight(fx.DenseWeight(layers, d_model, share), layers=layers, at=some),
        fx.RestrictedWeight(fx.DenseWeight(**axes), at=[some[i:] for i in some]),
        fx.RaggedWeight(fx.DenseWeight(**axes), widths=np.full(layers, d_model)),
        fx.ProjectedWeight(fx.Projection(latents, share), fx.DenseWeight(layers, d_model, share)),
        fx.Normalisation(layers, d_model),
    ]
    for module in made:
        assert "int64" not in repr(module)
        again = fx.build(fx.describe(module), {type(part) for part in module.modules()})
        assert repr(again) == repr(module)
    fx.check_weight(made[4].double(), tokens=np.int64(3))
    fitted = fx.fit_weight(made[0], fx.DenseWeight(**axes), sweeps=np.int64(2), tries=np.int64(1))
    assert fitted.error < 1e-5
    x = torch.randn(5, layers, d_model)
    assert [row.shape for row in fx.unpad_layers(x, np.full(layers, d_model))] == [(5, d_model)] * layers


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fx.PlacedWeight(fx.DenseWeight(1, 2, 3), layers=2.5, at=0), "PlacedWeight needs a whole layers"),
        (
            lambda: fx.PlacedWeight(fx.DenseWeight(1, 2, 3), layers=2, at=0.5),
            r"PlacedWeight needs 1 places .* got at=0.5",
        ),
        (lambda: fx.PlacedWeight(fx.DenseWeight(1, 2, 3), layers=2, at=[]), "PlacedWeight needs 1 places"),
        (lambda: fx.PlacedWeight(fx.DenseWeight(1, 2, 3), layers=2, at=0, d_model="x"), "needs a whole d_model"),
        (lambda: fx.RestrictedWeight(fx.DenseWeight(2, 3, 4), at=[0, 1]), "for each group, ascending, got 0"),
        (lambda: fx.RaggedWeight(fx.DenseWeight(2, 3, 4), widths=3), "one width for each of layers=2"),
        (lambda: fx.Projection(5, 0), "Projection needs a whole rank"),
        (
            lambda: fx.sae_stack_weight(fx.DenseWeight, layers=0, d_model=2, latents=2),
            "sae_stack_weight needs a whole layers",
        ),
        (lambda: fx.Normalisation(2.5, 3), "Normalisation needs a whole layers"),
        (lambda: fx.check_weight(fx.DenseWeight(2, 3, 4), tokens=0), "check_weight needs a whole tokens"),
    ],
)
def test_sizes_that_are_none_are_refused_in_one_sentence(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seeds)
def test_a_product_with_a_reciprocal_in_float64_rounds_as_the_quotient(dtype, seed):
    torch.manual_seed(seed)
    weight, lengths = fx.DenseWeight(2, 8, 64).to(dtype), (torch.rand(64) + 0.01).to(dtype)
    expected = weight.factors[0].detach() / lengths.view(-1, 1, 1)
    assert torch.equal(weight.scale_along_("latents", 1 / lengths.double()).factors[0], expected)


class Halved(torch.nn.Module):
    def forward(self, factor):
        return factor / 2


@pytest.mark.parametrize(
    "act", [fx.gaussian_start, fx.tied_start, fx.isometric_start, "data", "scale", "fold", "resample"]
)
@pytest.mark.parametrize("place", ["encoder", "decoder"])
def test_what_a_parametrization_computes_is_not_written_to(place, act):
    coder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(*AXES), fx.TopK(3)), fx.CrossLayerDecoder(fx.DenseWeight(*AXES))
    )
    torch.nn.utils.parametrize.register_parametrization(getattr(coder, place).weight.factors, "0", Halved())
    x, dead = torch.randn(LATENTS, LAYERS, D_MODEL), torch.ones(LATENTS, dtype=torch.bool)
    trainer = Trainer(coder, torch.optim.Adam(coder.parameters()))
    acts = {
        "data": lambda coder: fx.data_start(coder, x),
        "scale": lambda coder: fold_scale(coder, 5.0),
        "fold": lambda coder: fx.fold(fx.Normalised(coder, fx.Normalisation(LAYERS, D_MODEL))),
        "resample": lambda coder: resample(trainer, x, dead),
    }
    before = deepcopy(coder.state_dict())
    with pytest.raises(TypeError, match="writes to the tensors of a weight, and those of .* are computed by a param"):
        acts.get(act, act)(coder)
    assert coder.folded_scale == 1
    assert all(torch.equal(value, before[name]) for name, value in coder.state_dict().items())
