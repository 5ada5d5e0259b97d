import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, randn, weights

from fmxnn import ConcatWeight, DenseWeight, ShapeError, SumWeight

assert_close = torch.testing.assert_close


@st.composite
def parts(draw, latents=True):
    axes = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)))
    return [draw(weights(*axes[:2], axes[2] if latents else None)) for _ in range(draw(st.integers(1, 3)))]


@given(parts())
def test_a_sum_is_the_sum_of_dense_forms(some):
    assert_close(SumWeight(*some).to_dense(), sum(weight.to_dense() for weight in some))


@given(parts(latents=False))
def test_a_concatenation_stands_side_by_side(some):
    joined = ConcatWeight(*some)
    assert joined.latents == sum(weight.latents for weight in some)
    assert_close(joined.to_dense(), torch.cat([weight.to_dense() for weight in some], dim=-1))


@given(parts(), batches)
def test_both_read_and_write_with_their_dense_form(some, batch):
    for weight in (SumWeight(*some), ConcatWeight(*some)):
        x, z, w = randn(*batch, weight.layers, weight.d_model), randn(*batch, weight.latents), weight.to_dense()
        assert_close(weight.to_latents(x), torch.einsum("...ld,ldn->...n", x, w))
        assert_close(weight.to_layers(z), torch.einsum("...n,ldn->...ld", z, w))
        assert_close(weight.norms(), w.norm(dim=1))


def test_normal_gives_the_whole_the_asked_deviation():
    parts = [DenseWeight(4, 10, 500), DenseWeight(4, 10, 500)]
    for weight in (SumWeight(*parts), ConcatWeight(*parts)):
        assert weight.normal_(3.0) is weight
        torch.testing.assert_close(weight.to_dense().std().item(), 3.0, rtol=0.02, atol=0)


def test_a_weight_without_parts_is_refused():
    for make in (SumWeight, ConcatWeight):
        sentence = rf"{make.__name__} takes weights one by one, got a list; write {make.__name__}\(first, second\)"
        with pytest.raises(TypeError, match=f"^{sentence}$"):
            make([DenseWeight(2, 3, 5)])
        with pytest.raises(ValueError, match=f"^{make.__name__} needs at least one weight, got none$"):
            make()


def test_parts_of_other_sizes_are_refused():
    for make in (SumWeight, ConcatWeight):
        message = f"{make.__name__} joins weights of the same layers and d_model, got [(2, 3), (3, 2)]; make them equal"
        with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
            make(DenseWeight(2, 3, 4), DenseWeight(3, 2, 4))
    message = "SumWeight adds weights of the same latents, got [4, 5]; ConcatWeight joins them"
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        SumWeight(DenseWeight(2, 3, 4), DenseWeight(2, 3, 5))


@given(parts())
def test_codes_of_other_latents_are_refused(some):
    for weight in (SumWeight(*some), ConcatWeight(*some)):
        for other in (weight.latents + 1, weight.latents - 1):
            with pytest.raises(ShapeError):
                weight.to_layers(randn(2, other))
