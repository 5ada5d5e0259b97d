import re

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import named, randn, seeds
from torch.testing import assert_close

import fmxnn as fx
from fmxnn.training import fold_scale


@st.composite
def decoders(draw):
    """A linear part, up to three terms over products of up to three projections, some of them shared."""
    weight = draw(named())
    held = [fx.Projection(weight.latents, draw(st.integers(1, weight.latents))) for _ in range(3)]
    terms = []
    for _ in range(draw(st.integers(0, 3))):
        factors = draw(st.lists(st.sampled_from(held), min_size=1, max_size=3))
        columns = draw(st.integers(1, min(factor.rank for factor in factors)))
        part = draw(named(weight.layers, weight.d_model, columns))
        terms.append(fx.ProductTerm(*factors, weight=part, start=draw(st.floats(-2, 2))))
    decoder = fx.MultilinearDecoder(*terms, weight=weight).double()
    torch.nn.init.normal_(decoder.bias)
    return decoder


def crosscoder(decoder):
    weight = decoder.weight
    reader = fx.DenseWeight(weight.layers, weight.d_model, weight.latents)
    return fx.Crosscoder(fx.CrossLayerEncoder(reader, torch.nn.ReLU()), decoder).double()


@given(decoders(), st.integers(1, 3))
def test_a_multilinear_decoder_is_its_sum(decoder, tokens):
    z = randn(tokens, decoder.weight.latents)
    terms = [
        (t.coefficient.item(), t.weight.to_dense(), [projection.table for projection in t.projections])
        for t in decoder.terms
    ]
    expected = reference.multilinear(z, decoder.weight.to_dense(), decoder.bias, terms)
    assert_close(decoder(z), expected)
    assert_close(decoder(fx.to_csr(z)), expected)


@given(st.integers(1, 4), st.integers(1, 2), st.integers(1, 5), seeds)
def test_products_of_one_projection_with_itself_are_powers(d_model, layers, latents, seed):
    torch.manual_seed(seed)
    shared = fx.polysae_decoder(d_model, latents, layers=layers, ranks=(latents, 1, 1)).double()
    u, (second, third) = shared.projection, shared.terms
    terms = [
        fx.ProductTerm(u, u, weight=second.weight, start=-0.5),
        fx.ProductTerm(u, u, u, weight=third.weight, start=0.5),
    ]
    z = randn(4, latents)
    assert_close(fx.MultilinearDecoder(*terms, weight=shared.weight).double()(z), shared(z))


@given(decoders(), st.floats(0.1, 100), seeds)
def test_scales_fold_into_it(decoder, scale, seed):
    torch.manual_seed(seed)
    coder = crosscoder(decoder)
    weight = decoder.weight
    x = randn(5, weight.layers, weight.d_model)
    expected = coder(scale * x) / scale
    normalisation = fx.Normalisation.of(
        torch.full((weight.layers,), scale).double(), torch.zeros(weight.layers, weight.d_model).double()
    )
    wrapped = fx.Normalised(coder, normalisation)
    assert_close(wrapped(x), coder(normalisation(x)) / normalisation.scale[0])
    assert_close(fx.fold(wrapped)(x), wrapped(x))
    assert_close(fold_scale(coder, scale)(x), expected)


@given(decoders())
def test_it_is_saved_with_its_projections_shared(tmp_path_factory, decoder):
    folder = tmp_path_factory.mktemp("saved") / "decoder"
    fx.save_pretrained(decoder, folder)
    again, z = fx.from_pretrained(folder), randn(3, decoder.weight.latents)
    assert torch.equal(again(z), decoder(z))
    assert len(list(again.parameters())) == len(list(decoder.parameters()))


def test_a_step_leaves_every_projection_orthonormal():
    u, v = fx.Projection(6, 4), fx.Projection(6, 3)
    term = fx.ProductTerm(u, v, weight=fx.DenseWeight(1, 3, 2), start=-0.5)
    decoder = fx.MultilinearDecoder(term, weight=fx.ProjectedWeight(u, fx.DenseWeight(1, 3, 4)))
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.1)
    fx.retract_after(optimizer, decoder)
    decoder(torch.randn(8, 6)).pow(2).mean().backward()
    optimizer.step()
    for projection in (u, v):
        assert_close(projection.table.T @ projection.table, torch.eye(projection.rank))


def test_parts_that_do_not_fit_are_refused():
    u, weight = fx.Projection(5, 2), fx.DenseWeight(1, 3, 2)
    with pytest.raises(
        ValueError, match="ProductTerm multiplies projections of the codes, got none; pass one for each factor"
    ):
        fx.ProductTerm(weight=weight, start=1.0)
    message = "ProductTerm reads 2 columns of projections of latents=5, got one of rank=1 and latents=5"
    with pytest.raises(fx.ShapeError, match=re.escape(message)):
        fx.ProductTerm(u, fx.Projection(5, 1), weight=weight, start=1.0)
    message = (
        "the weight has layers=1, d_model=3, latents=4, got a term with layers=1, d_model=3, latents=5; make them equal"
    )
    with pytest.raises(fx.ShapeError, match=re.escape(message)):
        fx.MultilinearDecoder(fx.ProductTerm(u, weight=weight, start=1.0), weight=fx.DenseWeight(1, 3, 4))
