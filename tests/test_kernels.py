"""The Triton kernels, run by Triton's interpreter on a CPU, against loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds

from fmxnn import bags, kernels

assert_close = torch.testing.assert_close
pytest.importorskip("triton", reason="Triton has no build for this machine")
DTYPES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def drawn(seed, rows, latents, bonds, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, latents, generator=g) < torch.rand(rows, 1, generator=g)
    starts = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    columns = kept.nonzero()[:, 1]
    return (
        torch.randn(len(columns), generator=g, dtype=torch.float64).to(dtype),
        columns,
        starts,
        torch.randn(latents, bonds, generator=g, dtype=torch.float64).to(dtype),
        torch.randn(rows, bonds, generator=g, dtype=torch.float64).to(dtype),
    )


@settings(max_examples=25)
@given(seeds, st.integers(1, 5), st.integers(1, 40), st.sampled_from([1, 5, 127, 128, 129, 300]), st.sampled_from(list(DTYPES)))
def test_a_bag_is_a_loop_over_its_entries(seed, rows, latents, bonds, dtype):
    values, columns, starts, table, _ = drawn(seed, rows, latents, bonds, dtype)
    expected = torch.zeros(rows, bonds, dtype=torch.float64)
    for row in range(rows):
        for entry in range(int(starts[row]), int(starts[row + 1])):
            expected[row] += values[entry].double() * table[columns[entry]].double()
    found = kernels.bag(values, columns, starts, table)
    assert found.dtype == dtype
    assert_close(found.double(), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype] * 10)  # one rounding of the sum to its dtype
    assert torch.equal(kernels.bag(values, columns.int(), starts.int(), table.T.contiguous().T), found)


@settings(max_examples=25)
@given(seeds, st.integers(1, 5), st.integers(1, 40), st.sampled_from([1, 5, 127, 128, 129, 300]), st.sampled_from(list(DTYPES)))
def test_dots_are_a_loop_over_entries_summed_in_float32(seed, rows, latents, bonds, dtype):
    _, columns, starts, table, grad = drawn(seed, rows, latents, bonds, dtype)
    named = bags.rows_of(starts, len(columns))
    expected = [(grad[r].double() * table[c].double()).sum() for r, c in zip(named, columns, strict=True)]
    found = kernels.dots(grad, named, table, columns)
    assert found.dtype == kernels.sum_dtype(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4  # float32 sums of up to 300 products of size 1
    assert_close(found.double(), torch.stack(expected) if expected else found.double(), rtol=tolerance, atol=tolerance)


def test_kernels_and_stock_operators_agree_on_the_transposed_bag():
    values, columns, starts, _, grad = drawn(0, 7, 33, 140)
    order, rows, firsts = bags.transpose(columns, starts, 33)
    assert_close(kernels.bag(values[order], rows, firsts, grad), bags.bag(values[order], rows, firsts, grad))


def test_without_triton_the_error_says_the_way_out(monkeypatch):
    monkeypatch.setattr(kernels, "_FOUND", False)
    assert not kernels.available()
    with pytest.raises(ImportError) as error:
        kernels.bag(*drawn(0, 2, 3, 4)[:4])
    assert str(error.value) == (
        "fmxnn.kernels needs Triton, which is not installed; pip install triton, or leave the stock operators to it"
    )
