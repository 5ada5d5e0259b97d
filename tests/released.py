"""What the tests of released formats share: a folder to write in, tokens, and numbers that must be those of loops."""

from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from strategies import randn

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
small = st.integers(1, 4)


@contextmanager
def folder():
    with TemporaryDirectory() as name:
        yield Path(name) / "released"


def assert_same(module, x, expected, *, stacked=False):
    """Codes and reconstruction are those of the loops; the dtype says how nearly, relative to the largest number of
    each.
    """
    pre, codes, x_hat = expected
    rivals = torch.cat([pre.flatten(), _thresholds(module)]).sort().values
    assume(rivals.diff().min() > 1e-4 * rivals.abs().max())  # a tie may fall either way, folded or not
    dtype = next(module.parameters()).dtype
    given_x = (x if stacked else x.unsqueeze(-2)).to(dtype)
    with torch.no_grad():
        z, out = module.encode(given_x), module(given_x)
    assert z.dtype == out.dtype == dtype
    assert_near(z, codes, dtype)
    assert_near(out if stacked else out.squeeze(-2), x_hat, dtype)


def assert_near(got, expected, dtype):
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max() <= DTYPES[dtype] * (1 + expected.abs().max())


def _thresholds(module):
    """Zero and those of the gate, each once."""
    found = [buffer.double().flatten() for name, buffer in module.named_buffers() if name.endswith("threshold")]
    return torch.cat([torch.zeros(1, dtype=torch.float64), *found]).unique()


def plain(module):
    """The crosscoder itself, from under what is kept beside it."""
    return plain(module.crosscoder) if hasattr(module, "crosscoder") else module


def tokens(*axes):
    return randn(6, *axes).float().double()  # the same numbers in both dtypes
