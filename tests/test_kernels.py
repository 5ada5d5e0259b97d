"""The Triton kernels, run by Triton's interpreter on a CPU, against loops; and built for a GPU that may be absent."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from fmxnn.sparse import kernels, row_sums

assert_close = torch.testing.assert_close
needs_triton = pytest.mark.skipif(not kernels.available(), reason="Triton is not installed")
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
rows_drawn, latents_drawn = st.integers(1, 5), st.integers(1, 40)
bonds_drawn = st.one_of(st.integers(1, 300), st.sampled_from([1, 127, 128, 129, 256]))
dtypes_drawn = st.sampled_from(list(ROUNDING))
shares_drawn = st.sampled_from([0.0, 0.1, 0.5, 1.0])  # from no code at all to K = latents


def drawn(seed, rows, latents, bonds, share=0.5, dtype=torch.float64):
    """Values, columns, starts, a table and a gradient; some rows are empty."""
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, latents, generator=g) < share
    if 0 < share < 1:
        kept &= torch.rand(rows, 1, generator=g) < 0.7
    starts = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    columns = kept.nonzero()[:, 1]
    shapes = ((len(columns),), (latents, bonds), (rows, bonds))
    values, table, grad = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    return values, columns, starts, table, grad


def looped(values, columns, starts, table):
    out = torch.zeros(len(starts) - 1, table.shape[1], dtype=torch.float64)
    for row in range(len(starts) - 1):
        for entry in range(int(starts[row]), int(starts[row + 1])):
            out[row] += values[entry].double() * table[columns[entry]].double()
    return out


def assert_summed(found, expected, magnitudes, terms, dtype):
    """Within the bound of a sum of `terms` products in float32, whose addends are `magnitudes` together, rounded once
    to `dtype`.

    One rounding a product and one an addition, each half a spacing (2^-24); then half a spacing of `dtype`, and in
    float16 half of its least number (2^-25) where the sum is below its normal range. For bfloat16 it is a whole
    spacing: Triton's interpreter cuts where a GPU rounds to nearest, which the test of the built kernels sees to.
    """
    if dtype == torch.float64:
        assert_close(found, expected)
        return
    summing = (terms + 1) * 2.0**-24 * magnitudes
    rounding = 0 if found.dtype == torch.float64 else ROUNDING[found.dtype] * (expected.abs() + summing)
    assert ((found.double() - expected).abs() <= summing + rounding + 2.0**-25 * (found.dtype == torch.float16)).all()


def strided(x):
    """The same numbers, every second one in memory."""
    return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]


@needs_triton
@given(seeds, rows_drawn, latents_drawn, bonds_drawn, shares_drawn, dtypes_drawn)
def test_a_bag_is_a_loop_over_its_entries(seed, rows, latents, bonds, share, dtype):
    values, columns, starts, table, _ = drawn(seed, rows, latents, bonds, share, dtype)
    expected, magnitudes = looped(values, columns, starts, table), looped(values.abs(), columns, starts, table.abs())
    found = kernels.sums(values, columns, starts, table)
    assert found.dtype == dtype
    assert_summed(found, expected, magnitudes, latents, dtype)
    wide = kernels.sums(values, columns, starts, table, torch.float64)
    assert wide.dtype == torch.float64
    assert_summed(wide, expected, magnitudes, latents, dtype)


@needs_triton
@given(seeds, rows_drawn, latents_drawn, bonds_drawn, shares_drawn, dtypes_drawn)
def test_dots_are_a_loop_over_entries(seed, rows, latents, bonds, share, dtype):
    _, columns, starts, table, grad = drawn(seed, rows, latents, bonds, share, dtype)
    named = row_sums.rows_of(starts, len(columns))
    products = grad.double()[named] * table.double()[columns]
    found = kernels.dots(grad, named, table, columns)
    assert found.dtype == kernels.sum_dtype(dtype)
    assert_summed(found, products.sum(1), products.abs().sum(1), bonds, dtype)


@needs_triton
@given(seeds, rows_drawn, latents_drawn, bonds_drawn, dtypes_drawn)
def test_strides_and_index_types_change_no_bit_and_neither_does_a_second_run(seed, rows, latents, bonds, dtype):
    values, columns, starts, table, grad = drawn(seed, rows, latents, bonds, dtype=dtype)
    named = row_sums.rows_of(starts, len(columns))
    bag, dots = kernels.sums(values, columns, starts, table), kernels.dots(grad, named, table, columns)
    for given_as in (lambda x: x, strided, lambda x: x.int(), lambda x: strided(x.int())):
        i, r, c = given_as(starts), given_as(named), given_as(columns)
        assert torch.equal(kernels.sums(strided(values), c, i, strided(table)), bag)
        assert torch.equal(kernels.dots(strided(grad), r, strided(table), c), dots)


@needs_triton
@given(seeds, rows_drawn, latents_drawn, bonds_drawn, shares_drawn)
def test_bag_transposed_bag_and_dots_are_the_gradients_of_one_another(seed, rows, latents, bonds, share):
    values, columns, starts, table, grad = drawn(seed, rows, latents, bonds, share)
    order, named, firsts = row_sums.transpose(columns, starts, latents)
    written = (kernels.sums(values, columns, starts, table) * grad).sum()
    assert_close((kernels.sums(values[order], named, firsts, grad) * table).sum(), written)
    assert_close((kernels.dots(grad, row_sums.rows_of(starts, len(columns)), table, columns) * values).sum(), written)
    assert_close(kernels.sums(values, columns, starts, table), row_sums.sums(values, columns, starts, table))


@needs_triton
def test_a_latent_of_every_token_is_one_long_row():
    values, columns, starts, _, grad = drawn(0, 1001, 1, 5, share=1.0)
    order, named, firsts = row_sums.transpose(columns, starts, 1)
    assert_close(kernels.sums(values[order], named, firsts, grad), values[None] @ grad)


@needs_triton
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_nothing_to_sum_is_zero(dtype):
    none, no_values = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=dtype)
    table = torch.full((3, 5), torch.nan, dtype=dtype)
    assert torch.equal(kernels.sums(no_values, none, none.new_zeros(5), table), table.new_zeros(4, 5))
    assert kernels.sums(no_values, none, none.new_zeros(1), table).shape == (0, 5)
    assert kernels.dots(table, none, table, none).shape == (0,)
    assert torch.equal(
        kernels.dots(table[:, :0], none.new_zeros(2), table[:, :0], none.new_zeros(2)).double(), torch.zeros(2).double()
    )


@needs_triton
def test_a_row_that_no_entry_names_is_not_read():
    table = torch.tensor([[torch.nan], [2.0]])
    one = torch.tensor([1])
    assert kernels.sums(torch.tensor([3.0]), one, torch.tensor([0, 1]), table).item() == 6
    assert kernels.dots(table, one, table, one).item() == 4


BUILD = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fmxnn.sparse.kernels import row_sums
for dtype, total in (("bf16", "fp32"), ("fp64", "fp64")):
    given = {name: "*" + dtype for name in ("values", "table", "grad")}
    given |= {"columns": "*i64", "starts": "*i32", "rows": "*i64", "bonds": "i32", "count": "i32"}
    constants = {"tile": row_sums.TILE, "entries": 16, "dtype": getattr(tl, "float" + total[2:])}
    for kernel, out in ((row_sums._sums_kernel, dtype), (row_sums._dots_kernel, total)):
        signature = {name: ({"out": "*" + out} | given).get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
        text = built.asm["ptx"]
        assert built.asm["cubin"] and "atom." not in text and "red.global" not in text
        assert out != "bf16" or "cvt.rn.bf16" in text
        body = built.asm["ttgir"].split("scf.for", 1)
        assert len(body) == 1 or "tt.reduce" not in body[1].split("scf.yield")[0]
"""


def assert_runs(code, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


@needs_triton
def test_the_kernels_build_for_a_gpu_without_atomics_and_round_to_nearest(tmp_path):
    assert_runs(BUILD, TRITON_CACHE_DIR=str(tmp_path))


def test_importing_the_package_imports_no_triton():
    assert_runs(
        "import sys, fmxnn, fmxnn.sparse.kernels; assert 'triton' not in sys.modules and "
        "isinstance(fmxnn.sparse.kernels.available(), bool)"
    )


def test_without_triton_the_error_says_the_way_out(monkeypatch):
    monkeypatch.setattr(kernels, "_FOUND", False)
    assert not kernels.available()
    for call in (lambda *given: kernels.sums(*given[:4]), lambda v, c, s, table, grad: kernels.dots(grad, c, table, c)):
        with pytest.raises(ImportError) as error:
            call(*drawn(0, 2, 3, 4))
        assert str(error.value) == (
            "fmxnn.sparse.kernels needs Triton, which is not installed; pip install triton, or leave the stock "
            "operators to it"
        )
