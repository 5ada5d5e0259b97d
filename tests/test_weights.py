import re

import pytest
import reference
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import CLASSES, KNOWN, batches, factorized, named, randn, seeds, sizes, weights

from fmxnn import (
    CPWeight,
    DenseWeight,
    EinsumWeight,
    FactorizedWeight,
    PatternError,
    ShapeError,
    TensorRingWeight,
    Weight,
    check_weight,
    to_csr,
)

assert_close = torch.testing.assert_close


@given(factorized())
def test_the_dense_form_is_the_sum_over_the_pattern(weight):
    assert_close(weight.to_dense(), reference.dense(weight))


@given(st.one_of(factorized(), named()), batches)
def test_reading_and_writing_are_sums_over_the_dense_form(weight, batch):
    w, x, z = reference.dense(weight), randn(*batch, weight.layers, weight.d_model), randn(*batch, weight.latents)
    assert_close(weight.to_latents(x), reference.read(x, w))
    assert_close(weight.to_layers(z), reference.write(z, w))


@given(weights(), batches)
def test_writing_is_the_adjoint_of_reading(weight, batch):
    x, z = randn(*batch, weight.layers, weight.d_model), randn(*batch, weight.latents)
    assert_close((weight.to_latents(x) * z).sum(), (x * weight.to_layers(z)).sum())


@given(weights())
def test_every_weight_obeys_the_shipped_laws(weight):
    check_weight(weight, classes=CLASSES)


@given(st.one_of(factorized(), named()), batches)
def test_a_table_splits_the_weight_in_two(weight, batch):
    assume(weight.table is not None)
    x, z = randn(*batch, weight.layers, weight.d_model), randn(*batch, weight.latents)
    bonds = weight.table.shape[1]
    assert weight.to_bonds(x).shape == (*batch, bonds)
    h = randn(*batch, bonds)
    assert_close(weight.to_bonds(x) @ weight.table.T, weight.to_latents(x))
    assert_close(weight.from_bonds(z @ weight.table), weight.to_layers(z))
    assert_close((weight.to_bonds(x) * h).sum(), (x * weight.from_bonds(h)).sum())


@given(st.one_of(factorized(), named()), st.integers(1, 3))
def test_atoms_and_norms_are_those_of_the_dense_form(weight, count):
    w, index = reference.dense(weight), torch.randint(weight.latents, (count,))
    assert_close(weight.atoms(index), w[..., index])
    assert_close(weight.atoms(index.tolist()), w[..., index])
    assert_close(weight.atoms(0), w[..., 0])
    assert_close(weight.atoms(slice(1, None)), w[..., 1:])
    assert_close(weight.norms(), reference.norms(w))


@given(sizes, sizes, sizes, st.tuples(sizes, sizes, sizes), seeds)
def test_a_ring_is_the_trace_of_its_cores(layers, d_model, latents, ranks, seed):
    torch.manual_seed(seed)
    weight = TensorRingWeight(layers, d_model, latents, ranks=ranks).double()
    table, g1, g3 = weight.factors
    assert_close(weight.to_dense(), reference.ring(g1, table.permute(1, 0, 2), g3))


@given(sizes, sizes, sizes, sizes, seeds)
def test_cp_is_a_sum_of_products(layers, d_model, latents, rank, seed):
    torch.manual_seed(seed)
    weight = CPWeight(layers, d_model, latents, rank=rank).double()
    u, a, v = weight.factors
    assert_close(weight.to_dense(), reference.cp(a, u, v))


@given(sizes, sizes, sizes, st.tuples(sizes, sizes, sizes), seeds)
def test_tucker_is_a_core_and_a_matrix_for_each_axis(layers, d_model, latents, pqr, seed):
    torch.manual_seed(seed)
    weight = EinsumWeight(KNOWN[5], layers=layers, d_model=d_model, latents=latents, **dict(zip("pqr", pqr))).double()
    assert_close(weight.to_dense(), reference.tucker(*weight.factors))


@given(st.tuples(sizes, sizes, sizes), st.tuples(sizes, sizes, sizes), seeds)
def test_a_ring_may_be_turned_and_its_bonds_may_be_rotated(axes, ranks, seed):
    torch.manual_seed(seed)
    (layers, d_model, latents), (r1, r2, r3) = axes, ranks
    weight = TensorRingWeight(layers, d_model, latents, ranks=ranks).double()
    dense = weight.to_dense().detach().clone()
    turned = TensorRingWeight(latents, layers, d_model, ranks=(r3, r1, r2)).double()
    with torch.no_grad():
        table, g1, g3 = weight.factors
        for factor, value in zip(turned.factors, (g1.permute(1, 2, 0).permute(0, 2, 1), g3, table.permute(1, 0, 2))):
            factor.copy_(value)
        assert_close(turned.to_dense().permute(1, 2, 0), dense)
        gauge = torch.eye(r2, dtype=torch.float64) + 0.1 * randn(r2, r2)
        g1.copy_(torch.einsum("adb,bc->adc", g1, gauge))
        table.copy_(torch.einsum("bc,ncr->nbr", torch.linalg.inv(gauge), table))
    assert_close(weight.to_dense(), dense)


@given(st.one_of(factorized(), named()), batches)
def test_gradients_are_those_through_the_dense_form(weight, batch):
    x, z = randn(*batch, weight.layers, weight.d_model).requires_grad_(), randn(*batch, weight.latents).requires_grad_()
    g, h = randn(*batch, weight.latents), randn(*batch, weight.layers, weight.d_model)
    direct = (weight.to_latents(x) * g).sum() + (weight.to_layers(z) * h).sum()
    w = weight.to_dense()
    through = (torch.einsum("...ld,ldn->...n", x, w) * g).sum() + (torch.einsum("...n,ldn->...ld", z, w) * h).sum()
    inputs = [x, z, *weight.parameters()]
    for ours, theirs in zip(torch.autograd.grad(direct, inputs), torch.autograd.grad(through, inputs), strict=True):
        assert_close(ours, theirs)


@given(st.one_of(factorized(), named()))
def test_norms_by_gram_and_by_atoms_have_the_same_values_and_gradients(weight):
    by_atoms = Weight.norms(weight)
    assert_close(weight.norms(), by_atoms)
    scale = randn(*by_atoms.shape)
    for ours, theirs in zip(
        *(torch.autograd.grad((n * scale).sum(), list(weight.parameters())) for n in (weight.norms(), by_atoms)),
        strict=True,
    ):
        assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("weight", "gram"), [(CPWeight(3, 64, 1030, rank=2), True), (TensorRingWeight(2, 3, 1030, ranks=(2, 2, 2)), False)]
)
def test_norms_cross_the_block_boundary_on_both_paths(weight, gram):
    weight = weight.double()
    assert (weight._maps.gram is not None) == gram
    assert_close(weight.norms(), weight.to_dense().norm(dim=1))


@pytest.mark.parametrize(
    "weight", [CPWeight(3, 64, 5, rank=2), TensorRingWeight(2, 3, 5, ranks=(2, 2, 2)), DenseWeight(2, 3, 5)], ids=repr
)
def test_a_zero_atom_has_zero_norm_and_a_finite_gradient(weight):
    with torch.no_grad():
        weight.factors[0][1] = 0
    norms = weight.norms()
    assert (norms[:, 1] == 0).all()
    assert (norms[:, 0] > 0).all()
    norms.sum().backward()
    assert all(factor.grad.isfinite().all() for factor in weight.factors)


@given(st.sampled_from(KNOWN), st.sampled_from([0.01, 1.0, 5.0]))
@example(KNOWN[4], 0.1)
def test_normal_gives_every_entry_the_asked_deviation(pattern, std):
    torch.manual_seed(0)
    words = dict.fromkeys(pattern.replace(",", " ").split())
    axes = {"layers": 4, "d_model": 4, "latents": 4}
    draw = EinsumWeight(pattern, **{word: axes.get(word, 3) for word in words})
    entries = torch.stack([draw.normal_(std).to_dense().detach().clone() for _ in range(400)])
    # a product of Gaussians has heavy tails: the spread of the estimate itself is known from the sample
    squares = (entries / std).pow(2).mean((1, 2, 3))
    assert abs(squares.mean() - 1) < 5 * squares.std() / 20
    assert squares.std() / 20 < 0.2


def test_fresh_factors_have_the_variance_of_nn_linear():
    weight = DenseWeight(4, 50, 200)
    torch.testing.assert_close(weight.to_dense().std().item(), (1 / 150) ** 0.5, rtol=0.02, atol=0)


@given(weights(), st.sampled_from([0.1, 1.0, 7.0]))
def test_scale_multiplies_the_dense_form(weight, factor):
    before = weight.to_dense().detach().clone()
    assert weight.scale_(factor) is weight
    assert_close(weight.to_dense(), factor * before)


@pytest.mark.parametrize("factor", [0, -1.0, float("inf"), float("nan")])
def test_scale_needs_a_finite_positive_factor(factor):
    with pytest.raises(ValueError, match=f"^{re.escape(f'scale_ needs a finite factor > 0, got {factor}')}$"):
        DenseWeight(1, 2, 3).scale_(factor)


def test_the_adjoint_law_holds_at_full_size():
    weight = TensorRingWeight(8, 256, 4096, ranks=(8, 32, 7)).double()
    x, z = randn(4, 8, 256), randn(4, 4096)
    assert_close((weight.to_latents(x) * z).sum(), (x * weight.to_layers(z)).sum())


def test_the_repr_prints_pattern_sizes_and_parameters():
    assert (
        repr(CPWeight(2, 3, 5, rank=4))
        == "CPWeight('latents r, d_model r, layers r', layers=2, d_model=3, latents=5, r=4; 40 parameters)"
    )


def test_the_chosen_ranks_are_kept():
    assert CPWeight(8, 32, 64).rank == round(8 * 32 * 64 / 104)
    assert TensorRingWeight(8, 1024, 16, ranks=(1, 2, 3)).ranks == (1, 2, 3)


def test_latents_may_stand_alone_in_a_term():
    check_weight(EinsumWeight("latents, layers d_model", layers=2, d_model=3, latents=4).double())


BAD = [
    (
        "... layers d_model latents",
        {},
        "a weight's pattern names its factors alone, without '...' or '->', got '... layers d_model latents'",
    ),
    (
        "layers d_model r",
        {},
        "a weight has the axes layers, d_model and latents, and 'layers d_model r' has no latents",
    ),
    ("latents d_model", {}, "a weight has the axes layers, d_model and latents, and 'latents d_model' has no layers"),
    (
        "latents layers d_model r",
        {"layers": 1, "d_model": 1, "latents": 1, "r": 2},
        "the bond 'r' of 'latents layers d_model r' stands in one term only and joins nothing; "
        "name it in a second term or drop it",
    ),
    (
        "latents layers d_model",
        {"layers": 2, "latents": 3},
        "the pattern 'latents layers d_model' needs a size for the axis 'd_model', "
        "got sizes for latents, layers; pass d_model=...",
    ),
    (
        "latents layers d_model",
        {"layers": 1, "d_model": 1, "latents": 0},
        "the pattern 'latents layers d_model' needs whole sizes of 1 or more, got latents=0",
    ),
]


@pytest.mark.parametrize(("pattern", "sizes", "message"), BAD)
def test_a_pattern_that_makes_no_weight_says_why(pattern, sizes, message):
    with pytest.raises(PatternError) as error:
        FactorizedWeight(pattern, **sizes)
    assert str(error.value) == message


@given(st.one_of(factorized(), named()))
def test_tensors_of_other_sizes_are_refused(weight):
    reads = (
        f"the weight reads (..., layers={weight.layers}, d_model={weight.d_model}), "
        f"got (5, {weight.layers}, {weight.d_model + 1}); "
    )
    with pytest.raises(
        ShapeError, match=f"^{re.escape(reads + 'stack one activation per layer: torch.stack(hidden, dim=-2)')}$"
    ):
        weight.to_latents(randn(5, weight.layers, weight.d_model + 1))
    writes = f"the weight writes codes of (..., latents={weight.latents}), got (2, {weight.latents + 1})"
    with pytest.raises(ShapeError, match=f"^{re.escape(writes)}$"):
        weight.to_layers(randn(2, weight.latents + 1))


def test_bonds_need_a_table():
    weight = EinsumWeight("latents d_model, latents layers", layers=2, d_model=3, latents=4)
    tail = (
        "needs a table, and in 'latents d_model, latents layers' latents stands in more than one term; "
        "use to_latents and to_layers"
    )
    for name in ("to_bonds", "from_bonds"):
        with pytest.raises(PatternError, match=f"^{re.escape(f'{name} {tail}')}$"):
            getattr(weight, name)(torch.zeros(2, 3))
    assert weight.table is None


@given(weights(), st.integers(1, 4))
def test_sparse_codes_write_what_dense_codes_write(weight, tokens):
    z = randn(tokens, weight.latents).relu()
    assert_close(weight.to_layers(to_csr(z)), weight.to_layers(z))
