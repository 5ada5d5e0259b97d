"""Rows of tables, found and written; and dead latents of weights in parts, drawn anew row by row."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import projected
from strategies import factorized, named, randn, seeds

import fmxnn as fx
from fmxnn.training import Trainer, resample
from fmxnn.weights.ragged import RaggedPart
from fmxnn.weights.table_rows import nearest_rows, parts_with, write_rows

assert_close = torch.testing.assert_close
MAKERS = {
    "dense": fx.DenseWeight,
    "ring": partial(fx.TensorRingWeight, ranks=(2, 3, 2)),
    "cp": partial(fx.CPWeight, rank=3),
}
OWN, CAUSAL = [[0], [1], [2]], [[0, 1, 2], [1, 2], [2]]
AXES = {"layers": 3, "d_model": 4, "latents": 12}
ragged = partial(fx.RaggedWeight, widths=[2, 4, 3])
PAIRS = {
    "SAE stack": lambda make: (fx.sae_stack_weight(make, **AXES), fx.sae_stack_weight(make, **AXES)),
    "weakly causal": lambda make: (fx.sae_stack_weight(make, **AXES), fx.causal_weight(make, **AXES)),
    "windowed": lambda make: (fx.windowed_weight(make, window=2, **AXES), fx.windowed_weight(make, window=2, **AXES)),
    "one factorisation": lambda make: (
        fx.RestrictedWeight(make(**AXES), at=OWN),
        fx.RestrictedWeight(make(**AXES), at=CAUSAL),
    ),
    "scattered": lambda make: (
        fx.RestrictedWeight(make(**AXES), at=[[0, 2], [1]]),
        fx.PlacedWeight(make(2, 4, 12), layers=3, at=[0, 2]),
    ),
    "ragged": lambda make: (ragged(fx.sae_stack_weight(make, **AXES)), ragged(make(**AXES))),
    "whole and parts": lambda make: (
        make(**AXES),
        fx.ConcatWeight(make(3, 4, 5), fx.PlacedWeight(make(1, 2, 7), layers=3, at=1, d_model=4)),
    ),
}
pairs, makers = pytest.mark.parametrize("pair", PAIRS), pytest.mark.parametrize("maker", MAKERS)


def trained(pair, maker):
    """A trainer whose optimiser has moments of every latent."""
    coder = fx.Crosscoder(
        *(side(w) for side, w in zip((reader, fx.CrossLayerDecoder), PAIRS[pair](MAKERS[maker]), strict=True))
    )
    fx.gaussian_start(coder.double(), decoder_std=0.3)
    trainer = Trainer(coder, torch.optim.Adam(coder.parameters(), lr=1e-3))
    for _ in range(3):
        trainer.step(tokens(pair, 20))
    return trainer


def tokens(pair, count):
    """Activations, with zeros for padding where layers are ragged."""
    x = randn(count, 3, 4)
    return fx.pad_layers(fx.unpad_layers(x, ragged.keywords["widths"])) if pair == "ragged" else x


def reader(weight):
    return fx.CrossLayerEncoder(weight, fx.TopK(12))


def kept(weight):
    """`layers d_model latents`: which entries are there at all."""
    there = torch.zeros(3, 4, 12, dtype=torch.bool)
    for part, mine, _ in parts_with(weight, torch.arange(12)):
        for layer in part.at:
            width = ragged.keywords["widths"][layer] if isinstance(part.weight, RaggedPart) else part.weight.d_model
            there[layer, :width, mine] = True
    return there


def nearest(weight, asked):
    """`layers d_model latents`: of all that each latent can write, what is nearest to what is asked."""
    found = torch.zeros(3, 4, 12, dtype=torch.float64)
    for part, mine, _ in parts_with(weight, torch.arange(12)):
        there = kept(weight)[..., mine][..., 0]
        written = part.weight.from_bonds(torch.eye(part.weight.table.shape[1], dtype=torch.float64)).detach()
        basis = written[:, there[list(part.at), : part.weight.d_model]]
        found[..., mine] = (
            torch.zeros(3, 4).double().masked_scatter(there, projected(basis, asked[there])).unsqueeze(-1)
        )
    return found


@given(st.one_of(factorized(), named()), seeds)
def test_a_row_is_stored_where_it_is_said(weight, seed):
    assume(weight.table is not None)
    torch.manual_seed(seed)
    latents = torch.randperm(weight.latents)[: 1 + seed % weight.latents]
    parameter, index = weight.stored_at(latents)
    assert any(parameter is factor for factor in weight.factors)
    assert torch.equal(parameter[index].flatten(1), weight.table[latents])
    before, rows = weight.table.detach().clone(), randn(len(latents), weight.table.shape[1])
    write_rows(weight, latents, rows)
    before[latents] = rows
    assert torch.equal(weight.table, before)


@given(st.data(), st.one_of(factorized(latents=4), named(latents=4)), seeds)
def test_a_row_of_a_restriction_is_written_into_its_source(data, weight, seed):
    assume(weight.table is not None)
    torch.manual_seed(seed)
    group = st.sets(st.integers(0, weight.layers - 1), min_size=1).map(sorted)
    restricted = fx.RestrictedWeight(weight, at=[data.draw(group), data.draw(group)])
    before, bonds = weight.table.detach().clone(), weight.table.shape[1]
    view = restricted.parts()[1].weight
    row = randn(1, view.table.shape[1])
    write_rows(view, torch.tensor([1]), row)
    assert torch.equal(view.table[1:], row)
    assert torch.equal(weight.table[:3], before[:3])
    assert int((weight.table[3] != before[3]).sum()) == row.shape[1] <= bonds


@given(st.one_of(factorized(), named()), seeds)
def test_the_nearest_row_has_the_nearest_atom(weight, seed):
    assume(weight.table is not None)
    torch.manual_seed(seed)
    atoms = randn(2, weight.layers, weight.d_model)
    basis = weight.from_bonds(torch.eye(weight.table.shape[1]).double()).flatten(1)
    found = weight.from_bonds(nearest_rows(weight, atoms)).flatten(1)
    assert_close(found, torch.stack([projected(basis, atom.flatten()) for atom in atoms]))


@given(seeds)
def test_rounding_of_float32_is_no_direction_to_write_in(seed):
    torch.manual_seed(seed)
    weight, atoms = (
        fx.TensorRingWeight(1, 40, 8, ranks=(2, 6, 3)),
        torch.randn(2, 1, 40),
    )  # 18 bonds that reach 12 directions
    found = weight.from_bonds(nearest_rows(weight, atoms)).double().flatten(1)
    basis = copy.deepcopy(weight).double().from_bonds(torch.eye(18).double()).flatten(1)
    wanted = torch.stack([projected(basis, atom.double().flatten()) for atom in atoms])
    assert_close(
        found, wanted, rtol=1e-3, atol=1e-3
    )  # float32 times the condition of random factors; without the cut it is off by 1 and more


def test_a_pattern_without_a_table_stores_no_rows():
    weight = fx.EinsumWeight("latents d_model, latents layers", layers=2, d_model=3, latents=5)
    with pytest.raises(
        fx.PatternError,
        match="^stored_at needs a table, and in 'latents d_model, latents layers' latents stands in more",
    ):
        weight.stored_at(torch.arange(2))


@pairs
@makers
@settings(max_examples=6)  # of each of 21
@given(seeds)
def test_dead_latents_of_every_part_are_drawn_towards_their_token(pair, maker, seed):
    torch.manual_seed(seed)
    trainer = trained(pair, maker)
    encoder, decoder = trainer.crosscoder.encoder, trainer.crosscoder.decoder
    dead, x = torch.rand(12) < 0.4, tokens(pair, 1)
    assume(0 < int(dead.sum()) < 12)
    before = [weight.to_dense().detach().clone() for weight in (encoder.weight, decoder.weight)]
    cosine = resample(trainer, x, dead)
    asked = x[0] - decoder.bias.detach()
    for weight, old, share in ((encoder.weight, before[0], 0.2), (decoder.weight, before[1], 1.0)):
        found, wanted = weight.to_dense().detach(), nearest(weight, asked)
        assert torch.equal(found[..., ~dead], old[..., ~dead])
        length = share * old.flatten(0, 1).norm(dim=0)[~dead].mean()
        assert_close(found[..., dead], (wanted / wanted.flatten(0, 1).norm(dim=0) * length)[..., dead])
    there = kept(decoder.weight) * asked.unsqueeze(-1)
    assert_close(cosine, torch.cosine_similarity(found.flatten(0, 1), there.flatten(0, 1), dim=0)[dead])
    if maker == "dense":
        assert_close(cosine, torch.ones(int(dead.sum())).double())


@pairs
@makers
def test_the_moments_of_what_is_drawn_are_forgotten_and_no_others(pair, maker):
    trainer, dead = trained(pair, maker), torch.arange(12) % 3 == 0
    state = trainer.optimizer.state
    before = {p: state[p]["exp_avg"].clone() for p in trainer.crosscoder.parameters()}
    old = [p.detach().clone() for p in trainer.crosscoder.parameters()]
    resample(trainer, tokens(pair, 1), dead)
    for parameter, values in zip(trainer.crosscoder.parameters(), old, strict=True):
        moment, changed = state[parameter]["exp_avg"], parameter != values
        assert (moment[changed] == 0).all()
        assert torch.equal(moment[~changed], before[parameter][~changed])
        nothing = (
            parameter is trainer.crosscoder.encoder.bias or pair == "ragged"
        )  # whose padding is stored, and never learns
        assert nothing or (before[parameter][changed] != 0).all()


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        (
            lambda: fx.ConcatWeight(
                fx.DenseWeight(3, 4, 5), fx.EinsumWeight("latents d_model, latents layers", **AXES | {"latents": 7})
            ),
            "EinsumWeight",
        ),
        (lambda: ragged(fx.SumWeight(fx.DenseWeight(**AXES))), "RaggedPart"),
        (
            lambda: fx.PlacedWeight(fx.SumWeight(fx.DenseWeight(2, 4, 12), fx.DenseWeight(2, 4, 12)), layers=3, at=0),
            "SumWeight",
        ),
    ],
)
def test_a_part_whose_rows_cannot_be_written_is_named(weight, name):
    coder = fx.Crosscoder(reader(fx.DenseWeight(3, 4, 12)), fx.CrossLayerDecoder(weight()))
    trainer = Trainer(coder, torch.optim.Adam(coder.parameters()))
    with pytest.raises(TypeError) as error:
        resample(trainer, torch.randn(5, 3, 4), torch.ones(12, dtype=torch.bool))
    assert str(error.value) == (
        f"resample writes rows of a table, and {name} has none or no stored_at(latents) to find them; "
        "take a factorised weight with latents in one term, or parts of such"
    )
