import re
from itertools import combinations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import batches, randn, seeds, weights
from torch.testing import assert_close

import fmxnn as fx
from fmxnn.metrics import norm_coherence
from fmxnn.metrics.interactions import interaction, interaction_strengths, top_interactions
from fmxnn.training import AuxiliaryLoss, Trainer, load_checkpoint, save_checkpoint


@st.composite
def decoders(draw, degrees=((2,), (3,), (2, 3), (3, 2, 4))):
    """Any linear part, terms of any weight over any of a projection's first columns; everything random."""
    weight = draw(weights())
    rank = draw(st.integers(1, weight.latents))
    terms = [
        fx.PowerTerm(
            draw(weights(weight.layers, weight.d_model, draw(st.integers(1, rank)))),
            degree=degree,
            start=draw(st.floats(-2, 2)),
        )
        for degree in draw(st.sampled_from(degrees))
    ]
    decoder = fx.PolynomialDecoder(*terms, weight=weight, projection=fx.Projection(weight.latents, rank)).double()
    torch.nn.init.normal_(decoder.bias)
    return decoder


def published(d_model, latents, ranks, layers=1):
    return fx.polysae_decoder(d_model, latents, layers=layers, ranks=ranks).double()


def crosscoder(decoder, gate=None):
    weight = decoder.weight
    reader = fx.DenseWeight(weight.layers, weight.d_model, weight.latents)
    return fx.Crosscoder(fx.CrossLayerEncoder(reader, gate or fx.TopK(2)), decoder).to(decoder.bias.dtype)


def assert_orthonormal(projection):
    assert_close(projection.table.T @ projection.table, torch.eye(projection.rank, dtype=projection.table.dtype))


@given(decoders(), st.integers(1, 3))
def test_a_polynomial_decoder_is_its_sum(decoder, tokens):
    z = randn(tokens, decoder.weight.latents)
    terms = [(term.degree, term.coefficient.item(), term.weight.to_dense()) for term in decoder.terms]
    expected = reference.polynomial(z, decoder.weight.to_dense(), decoder.bias, decoder.projection.table, terms)
    assert_close(decoder(z), expected)


@given(st.integers(1, 4), st.integers(1, 3), seeds, st.data())
def test_the_published_decoder_is_its_formula(d_model, layers, seed, data):
    torch.manual_seed(seed)
    latents = data.draw(st.integers(1, 6))
    r1 = data.draw(st.integers(1, latents))
    r2, r3 = data.draw(st.integers(1, r1)), data.draw(st.integers(1, r1))
    decoder = published(d_model, latents, (r1, r2, r3), layers)
    u, b = decoder.projection.table, torch.nn.init.normal_(decoder.bias).flatten()
    c1, c2, c3 = (part.weight.factors[0].flatten(1).T for part in (decoder.weight, *decoder.terms))
    z = randn(5, latents)
    a = z @ u
    x_hat = b + a @ c1.T - 0.5 * a[:, :r2].pow(2) @ c2.T + 0.5 * a[:, :r3].pow(3) @ c3.T
    assert_close(decoder(z).flatten(1), x_hat)
    assert_close(decoder.weight.to_dense().flatten(0, 1), c1 @ u.T)


def by_hand():
    decoder = published(2, 3, (2, 1, 1))
    with torch.no_grad():
        decoder.projection.table.copy_(torch.tensor([[0.6, 0], [0.8, 0], [0, 1]]))
        decoder.weight.weight.factors[0].copy_(torch.eye(2).unsqueeze(1))
        decoder.terms[0].weight.factors[0].copy_(torch.tensor([[[1.0, -1]]]))
        decoder.terms[1].weight.factors[0].copy_(torch.tensor([[[0.0, 2]]]))
        decoder.bias.copy_(torch.tensor([[1.0, 0]]))
    return decoder


def test_a_vector_by_hand():
    x_hat = by_hand()(torch.tensor([1.0, 2, 3]).double())  # a = (2.2, 3)
    assert_close(
        x_hat,
        torch.tensor([[1 + 2.2 - 0.5 * 4.84, 3 + 0.5 * 4.84 + 10.648]]).double(),
        check_dtype=False,
        rtol=1e-6,
        atol=1e-6,
    )


def test_interactions_by_hand():
    decoder = by_hand()
    assert_close(
        interaction(decoder, 0, 1), torch.tensor([[-0.48, 0.48]]).double(), rtol=1e-6, atol=1e-6
    )  # the table is set from float32
    top = top_interactions(decoder, 5)
    assert (top.first[0].item(), top.second[0].item()) == (0, 1)
    assert_close(top.strengths, torch.tensor([0.48 * 2**0.5, 0, 0]).double(), rtol=1e-6, atol=1e-6)


@given(st.integers(1, 5), st.integers(0, 9), seeds)
def test_the_published_start(rank, more, seed):
    torch.manual_seed(seed)
    decoder = fx.polysae_decoder(64, rank + more, ranks=(rank, rank, 1))
    assert_orthonormal(decoder.projection)
    assert [(term.degree, term.coefficient.item()) for term in decoder.terms] == [(2, -0.5), (3, 0.5)]
    for part, fan_in in ((decoder.weight, rank), (decoder.terms[0], rank), (decoder.terms[1], 1)):
        entries, bound = part.weight.factors[0].abs(), (6 / fan_in) ** 0.5
        assert 0.8 * bound < entries.max() <= bound
    assert not decoder.bias.any()


def test_the_default_ranks_are_those_for_gpt2():
    with torch.device("meta"):
        decoder = fx.polysae_decoder(768, 16384)
    assert [part.latents for part in (decoder.weight.weight, decoder.terms[0].weight, decoder.terms[1].weight)] == [
        768,
        64,
        64,
    ]
    assert decoder.weight.projection is decoder.projection
    assert decoder.projection.table.shape == (16384, 768)


@given(decoders(), batches)
def test_batch_axes_pass_through(decoder, batch):
    z = randn(*batch, decoder.weight.latents)
    one_by_one = [decoder(row) for row in z.reshape(-1, z.shape[-1])]
    assert_close(decoder(z), torch.stack(one_by_one).view(*batch, *decoder.bias.shape))


@given(decoders())
def test_codes_of_zero_write_the_bias_with_finite_gradients(decoder):
    z = torch.zeros(3, decoder.weight.latents, dtype=torch.float64, requires_grad=True)
    x_hat = decoder(z)
    assert torch.equal(x_hat, decoder.bias.expand_as(x_hat))
    x_hat.pow(2).sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (z, *decoder.parameters()))


@given(decoders())
def test_gradients_are_those_of_differences(decoder):
    z = randn(2, decoder.weight.latents).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, *_: decoder(z), (z, *decoder.parameters()))


@given(decoders())
def test_csr_codes_write_what_dense_ones_do_and_so_do_their_gradients(decoder):
    z = randn(4, decoder.weight.latents).relu().requires_grad_()
    results = []
    for form in (torch.Tensor.clone, fx.to_csr):
        x_hat = decoder(form(z))
        on_z, *on_parameters = torch.autograd.grad(x_hat.pow(2).sum(), [z, *decoder.parameters()])
        results.append([x_hat, on_z * (z > 0), *on_parameters])
    for dense, sparse in zip(*results):
        assert_close(sparse, dense)


def makers():
    quadratic, cubic = (
        fx.PowerTerm(fx.CPWeight(2, 3, 4, rank=2), degree=2, start=-0.5),
        fx.PowerTerm(fx.DenseWeight(2, 3, 3), degree=3, start=0.5),
    )
    return {
        "published": published(3, 6, (4, 3, 2), layers=2),
        "ring": fx.PolynomialDecoder(
            quadratic, cubic, weight=fx.TensorRingWeight(2, 3, 6), projection=fx.Projection(6, 4)
        ).double(),
    }


@pytest.mark.parametrize("gate", [fx.TopK(2), fx.BatchTopK(2), fx.JumpReLU(6)], ids=lambda gate: type(gate).__name__)
@pytest.mark.parametrize("name", makers())
def test_the_sparse_backend_is_the_dense_one(name, gate):
    coder = crosscoder(makers()[name], gate)
    x, results = randn(5, 2, 3), []
    for backend in ("dense", "sparse"):
        coder.backend = backend
        x_hat = coder(x)
        results.append([x_hat, *torch.autograd.grad(x_hat.pow(2).sum(), list(coder.parameters()))])
    for dense, sparse in zip(*results):
        assert_close(sparse, dense)


@pytest.mark.parametrize("backend", ["dense", "sparse"])
@pytest.mark.parametrize("name", makers())
def test_it_compiles_as_one_graph(name, backend):
    torch.compiler.reset()
    coder, x = crosscoder(makers()[name]), randn(5, 2, 3)
    coder.backend = backend
    results = []
    for run in (coder, torch.compile(coder, fullgraph=True, backend="aot_eager")):
        x_hat = run(x)
        results.append([x_hat, *torch.autograd.grad(x_hat.pow(2).sum(), list(coder.parameters()))])
    for eager, compiled in zip(*results):
        assert_close(compiled, eager)


def test_a_linear_part_without_a_table_runs_dense_and_says_so():
    weight = fx.EinsumWeight("latents d_model, latents layers", layers=2, d_model=3, latents=6)
    coder = crosscoder(
        fx.PolynomialDecoder(
            fx.PowerTerm(fx.DenseWeight(2, 3, 4), degree=2, start=1.0), weight=weight, projection=fx.Projection(6, 4)
        )
    )
    assert "dense: EinsumWeight has no table" in repr(coder)
    assert coder(torch.randn(4, 2, 3)).shape == (4, 2, 3)


@given(st.integers(1, 5), st.integers(0, 4), seeds)
def test_a_retraction_is_gram_schmidt(rank, more, seed):
    torch.manual_seed(seed)
    projection = fx.Projection(rank + more, rank).double().retract_()
    assert_orthonormal(projection)
    before = projection.table.clone()
    assert_close(projection.retract_().table, before)  # nothing to do
    moved = before + 0.1 * randn(rank + more, rank)
    with torch.no_grad():
        projection.table.copy_(moved)
    assert_close(projection.retract_().table, reference.gram_schmidt(moved))
    assert_orthonormal(projection)


def test_a_retraction_by_hand_and_of_columns_that_vanished():
    projection = fx.Projection(2, 2)
    with torch.no_grad():
        projection.table.copy_(torch.tensor([[3.0, 0], [4, 5]]))
    assert_close(projection.retract_().table, torch.tensor([[0.6, -0.8], [0.8, 0.6]]))
    assert_orthonormal(fx.Projection(4, 3).double().apply(lambda part: torch.nn.init.zeros_(part.table)).retract_())
    half = fx.Projection(8, 3).bfloat16().retract_().table.float()
    assert_close(half.T @ half, torch.eye(3), rtol=0, atol=0.02)  # three digits of bfloat16


def trainer(fused=True, auxiliary=None, dtype=torch.float32):
    torch.manual_seed(0)
    coder = crosscoder(fx.polysae_decoder(8, 16, layers=3, ranks=(6, 4, 2)), fx.BatchTopK(3))
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-2, fused=fused)
    return Trainer(coder, optimizer, auxiliary=auxiliary, dtype=dtype), fx.retract_after(optimizer, coder)


def batch(step):
    torch.manual_seed(step)
    return torch.randn(32, 3, 2) @ torch.eye(2, 8)


@pytest.mark.parametrize("backend", ["dense", "sparse"])
@pytest.mark.parametrize("fused", [True, False])
def test_training_lowers_the_loss_on_orthonormal_columns(fused, backend):
    run, _ = trainer(fused)
    run.crosscoder.backend = backend
    start = run.crosscoder.decoder.projection.table.clone()
    losses = []
    for step in range(40):
        losses.append(run.step(batch(step))["loss"].item())
        assert_orthonormal(run.crosscoder.decoder.projection)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert not torch.allclose(run.crosscoder.decoder.projection.table, start, atol=0.05)
    assert all(term.coefficient.item() != term.start for term in run.crosscoder.decoder.terms)


def test_without_the_hook_columns_leave_orthonormality():
    run, handle = trainer()
    handle.remove()
    for step in range(5):
        run.step(batch(step))
    table = run.crosscoder.decoder.projection.table
    assert not torch.allclose(table.T @ table, torch.eye(6), atol=1e-3)


@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_dead_latents_revive_through_the_linear_part(backend):
    run, _ = trainer(auxiliary=AuxiliaryLoss(k=4, after=1))
    run.crosscoder.backend = backend
    with torch.no_grad():
        run.crosscoder.encoder.bias[:4] = -9.0
    numbers = [run.step(batch(step)) for step in range(3)]
    assert numbers[-1]["loss"] > numbers[-1]["error"]


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    whole, _ = trainer()
    first, _ = trainer()
    for step in range(4):
        whole.step(batch(step))
    for step in range(2):
        first.step(batch(step))
    save_checkpoint(tmp_path, first, {})
    second, _ = trainer()
    load_checkpoint(tmp_path, second, {})
    for step in range(2, 4):
        second.step(batch(step))
    assert whole.optimizer.state_dict().keys() == torch.optim.Adam(whole.crosscoder.parameters()).state_dict().keys()
    for name, tensor in whole.crosscoder.state_dict().items():
        assert torch.equal(second.crosscoder.state_dict()[name], tensor), name


@given(decoders(degrees=((2,), (2, 4))))
def test_interactions_are_mixed_second_differences(decoder):
    for term in list(decoder.terms)[1:]:
        torch.nn.init.zeros_(term.coefficient)
    z = torch.eye(decoder.weight.latents, dtype=torch.float64)
    nothing = decoder(z[0] * 0)
    for i, j in combinations(range(len(z)), 2):
        mixed = decoder(2 * z[i] + 3 * z[j]) - decoder(2 * z[i]) - decoder(3 * z[j]) + nothing
        assert_close(6 * interaction(decoder, i, j), mixed)


@given(decoders(degrees=((2,), (3, 2))), st.integers(1, 12), st.integers(1, 4))
def test_top_interactions_are_the_largest_of_all_pairs(decoder, count, block):
    pairs = list(combinations(range(decoder.weight.latents), 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fmxnn.metrics.interactions._BLOCK", block)
        top = top_interactions(decoder, count)
    assert len(top.strengths) == min(count, len(pairs))
    assert len({*zip(top.first.tolist(), top.second.tolist())}) == len(top.strengths)
    assert {*zip(top.first.tolist(), top.second.tolist())} <= {*pairs}
    every = sorted((interaction(decoder, i, j).pow(2).sum().sqrt().item() for i, j in pairs), reverse=True)
    assert_close(top.strengths, torch.tensor(every[:count]).double())
    assert_close(interaction_strengths(decoder, top.first, top.second), top.strengths)
    assert interaction(decoder, top.first, top.second).shape == (
        len(top.first),
        decoder.weight.layers,
        decoder.weight.d_model,
    )


@given(decoders())
def test_weight_is_the_linear_part(decoder):
    assert_close(norm_coherence(decoder.weight).per_layer, reference.norms(decoder.weight.to_dense().detach()))


@given(decoders(), st.floats(0.1, 10))
def test_a_scale_multiplies_all_that_is_written(decoder, factor):
    z = randn(3, decoder.weight.latents)
    expected = factor * decoder(z)
    assert_close(decoder.scale_(factor)(z), expected)


@settings(max_examples=4)  # each writes a folder to the disk
@given(decoders())
def test_a_saved_decoder_is_the_same_bits(tmp_path_factory, decoder):
    folder, coder = tmp_path_factory.mktemp("saved"), crosscoder(decoder, fx.TopK(1))
    fx.save_pretrained(coder, folder)
    again = fx.from_pretrained(folder)
    assert fx.describe(again) == fx.describe(coder)
    assert list(again.state_dict()) == list(coder.state_dict())
    assert all(
        torch.equal(mine, theirs) for mine, theirs in zip(again.state_dict().values(), coder.state_dict().values())
    )


def test_a_projection_that_is_shared_stays_shared(tmp_path):
    run, _ = trainer()
    fx.save_pretrained(run.crosscoder, tmp_path)
    again = fx.from_pretrained(tmp_path)
    assert again.decoder.weight.projection is again.decoder.projection
    x = batch(0)
    assert torch.equal(again(x), run.crosscoder.eval()(x))


@given(st.floats(0.01, 9.0), seeds)
def test_a_projected_weight_starts_with_the_asked_spread(std, seed):
    torch.manual_seed(seed)
    weight = fx.ProjectedWeight(fx.Projection(96, 48), fx.DenseWeight(2, 64, 48)).normal_(std)
    assert_close(
        weight.to_dense().std().item(), std, rtol=0.08, atol=0.0
    )  # 6,144 independent entries: three standard errors are 3 %


dense, projection = fx.DenseWeight(2, 3, 5), fx.Projection(5, 4)
term = fx.PowerTerm(fx.DenseWeight(2, 3, 4), degree=2, start=1.0)


def polynomial(*terms, weight=dense):
    return fx.PolynomialDecoder(*terms, weight=weight, projection=projection)


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (
            lambda: fx.Projection(5, 6),
            ValueError,
            "Projection has orthonormal columns, at most one a latent, got latents=5 and rank=6; take rank <= 5",
        ),
        (
            lambda: fx.polysae_decoder(3, 5),
            ValueError,
            "Projection has orthonormal columns, at most one a latent, got latents=5 and rank=768; take rank <= 5",
        ),
        (
            lambda: fx.polysae_decoder(3, 5, ranks=(2, 4, 2)),
            fx.ShapeError,
            "the term of degree 2 reads 4 columns, and the projection has rank=2; take a term with latents <= 2",
        ),
        (
            lambda: fx.polysae_decoder(3, 5, ranks=(2, 2, 3)),
            fx.ShapeError,
            "the term of degree 3 reads 3 columns, and the projection has rank=2; take a term with latents <= 2",
        ),
        (
            lambda: fx.ProjectedWeight(projection, dense),
            fx.ShapeError,
            "ProjectedWeight writes from the columns of a projection of rank=4, got a weight of latents=5; "
            "make them equal",
        ),
        (
            lambda: fx.PowerTerm(dense, degree=1, start=1.0),
            ValueError,
            "PowerTerm needs a whole degree >= 2, got degree=1; degree 1 is the decoder's weight",
        ),
        (
            lambda: fx.PowerTerm(dense, degree=2.5, start=1.0),
            ValueError,
            "PowerTerm needs a whole degree >= 2, got degree=2.5; degree 1 is the decoder's weight",
        ),
        (
            lambda: polynomial(),
            ValueError,
            "PolynomialDecoder needs at least one term, got none; without one it is a CrossLayerDecoder",
        ),
        (
            lambda: polynomial(term, term),
            ValueError,
            "PolynomialDecoder takes one term a degree, got degrees [2, 2]; one term of a SumWeight adds two",
        ),
        (
            lambda: polynomial(term, weight=fx.DenseWeight(2, 3, 6)),
            fx.ShapeError,
            "the weight has latents=6 and the projection latents=5; make them equal",
        ),
        (
            lambda: polynomial(term, weight=fx.DenseWeight(1, 3, 5)),
            fx.ShapeError,
            "the weight writes layers=1, d_model=3, got a term of degree 2 with layers=2, d_model=3; make them equal",
        ),
        (
            lambda: polynomial(term)(torch.zeros(4, 6)),
            fx.ShapeError,
            "the decoder reads codes of (..., latents=5), got (4, 6)",
        ),
        (
            lambda: crosscoder(polynomial(term)).materialize(),
            TypeError,
            "materialize takes a Crosscoder of a CrossLayerEncoder and a CrossLayerDecoder, "
            "got PolynomialDecoder for the CrossLayerDecoder; make one of its weights",
        ),
        (
            lambda: fx.retract_after(torch.optim.SGD(dense.parameters()), dense),
            ValueError,
            "retract_after keeps projections orthonormal, got DenseWeight without one; pass a PolynomialDecoder",
        ),
        (
            lambda: top_interactions(polynomial(term), 0),
            ValueError,
            "top_interactions needs count >= 1, got count=0",
        ),
        (
            lambda: interaction(polynomial(fx.PowerTerm(fx.DenseWeight(2, 3, 4), degree=3, start=1.0)), 0, 1),
            ValueError,
            "two latents interact by the term of degree 2, and the decoder has none; "
            "give it a PowerTerm(..., degree=2)",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(act, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        act()


def test_a_linear_part_that_is_a_sum_runs_on_sparse_codes():
    torch.manual_seed(0)
    linear = fx.SumWeight(fx.DenseWeight(2, 3, 12), fx.CPWeight(2, 3, 12, rank=2))
    term = fx.PowerTerm(fx.DenseWeight(2, 3, 4), degree=2, start=0.5)
    decoder = fx.PolynomialDecoder(term, weight=linear, projection=fx.Projection(12, 4))
    coder, x = fx.Crosscoder(fx.CrossLayerEncoder(linear, fx.TopK(3)), decoder).double(), randn(6, 2, 3)
    assert "dense:" not in repr(coder)
    expected = coder.train()(x)
    coder.backend = "sparse"
    assert_close(coder(x), expected)
