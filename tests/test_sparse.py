import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, randn, seeds

from fmxnn import ShapeError, to_csr
from fmxnn.sparse.codes import is_sparse, sum_rows, to_dense_codes

assert_close = torch.testing.assert_close


@st.composite
def codes(draw):
    torch.manual_seed(draw(seeds))
    z = randn(draw(st.integers(1, 5)), draw(st.integers(1, 6)))
    return z.relu() * (torch.rand(z.shape) < draw(st.sampled_from([0.0, 0.3, 1.0])))


@given(codes())
def test_csr_holds_the_same_codes_and_only_those_that_fire(z):
    csr = to_csr(z)
    assert is_sparse(csr)
    assert not is_sparse(z)
    assert to_csr(csr) is csr
    assert len(csr.values()) == (z != 0).sum()
    assert torch.equal(to_dense_codes(csr), z)
    assert to_dense_codes(z) is z


@given(codes(), st.integers(1, 3))
def test_rows_are_summed_by_their_codes(z, bonds):
    table = randn(z.shape[1], bonds)
    expected = torch.zeros(len(z), bonds, dtype=torch.float64)
    for t, row in enumerate(z):
        for n, value in enumerate(row):
            expected[t] += value * table[n]
    assert_close(sum_rows(z, table), expected)
    assert_close(sum_rows(to_csr(z), table), expected)


@given(batches, st.integers(1, 4), st.integers(1, 3))
def test_dense_codes_may_have_any_batch(batch, latents, bonds):
    z, table = randn(*batch, latents), randn(latents, bonds)
    assert_close(sum_rows(z, table), torch.einsum("...n,nb->...b", z, table))


@given(codes(), st.integers(1, 3))
def test_the_sparse_path_has_the_gradients_of_the_dense_path(z, bonds):
    table, scale = randn(z.shape[1], bonds).requires_grad_(), randn(len(z), bonds)
    z = z.requires_grad_()
    sparse = torch.autograd.grad((sum_rows(to_csr(z), table) * scale).sum(), [z, table])
    dense = torch.autograd.grad((sum_rows(z, table) * scale).sum(), [z, table])
    assert_close(sparse[0], dense[0] * (z > 0))
    assert_close(sparse[1], dense[1])


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_csr_needs_one_batch_axis(shape):
    message = f"CSR codes are (tokens, latents), got {shape}; flatten the batch axes first: z.flatten(0, -2)"
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        to_csr(torch.zeros(shape))
