"""Mean, deviation and norms against a second pass over all of the numbers in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sources import random_stream
from torch.testing import assert_close

import fmxnn as fx
from fmxnn.activations import Statistics, statistics, store


def check(moments, x):
    """Two passes over all tokens."""
    x = x.double()
    assert moments.tokens == len(x)
    mean = x.sum(0) / len(x)
    assert_close(moments.mean, mean, rtol=1e-12, atol=1e-12)
    assert_close(moments.deviation, ((x - mean).pow(2).sum(0) / len(x)).sqrt(), rtol=1e-7, atol=1e-12)
    norms = x.pow(2).sum(-1).sqrt()
    assert_close(moments.norm, norms.sum(0) / len(x), rtol=1e-12, atol=0)
    assert_close(moments.largest_norm, norms.amax(0), rtol=1e-12, atol=0)
    assert moments.mean.dtype == moments.deviation.dtype == moments.norm.dtype == torch.float64


@given(
    st.integers(0, 999),
    st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    st.sampled_from([0.0, 1.0, 1e6]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.booleans(),
)
def test_batches_of_any_size_and_dtype_give_what_two_passes_give(seed, sizes, mean, dtype, roles):
    draw = torch.Generator().manual_seed(seed)
    x = (torch.randn(sum(sizes), 2, 3, generator=draw) + mean).to(dtype)
    said = torch.randint(0, 3, (len(x),), generator=draw).to(torch.int8)
    measured = Statistics()
    for some, here in zip(x.split(sizes), said.split(sizes), strict=True):
        measured.update(some, here if roles else None)
    check(measured.all(), x)
    assert measured.tokens == len(x)
    assert list(measured.by_role()) == (sorted(set(said.tolist())) if roles else [])
    for role, moments in measured.by_role().items():
        check(moments, x[said == role])


def test_a_small_spread_beside_a_large_mean_is_found_where_one_pass_of_squares_loses_it():
    x = torch.tensor([1e8 - 1, 1e8, 1e8 + 1], dtype=torch.float64).view(3, 1, 1)
    measured = statistics(x.split(1))
    assert_close(measured.all().deviation, torch.full((1, 1), (2 / 3) ** 0.5, dtype=torch.float64), rtol=1e-12, atol=0)
    naive = (x.pow(2).mean() - x.mean().pow(2)).sqrt()
    assert abs(float(naive) - (2 / 3) ** 0.5) > 0.1


@given(st.integers(0, 99), st.booleans(), st.integers(1, 7), st.integers(1, 3))
def test_a_stream_is_measured_once_whatever_its_batches_and_epochs(draw, roles, block, epochs):
    stream = random_stream(draw=draw, roles=roles, pairs=True, block=block, batch=2, epochs=epochs)
    keep = stream.contexts.keep
    for side, x in enumerate((stream.source.x, stream.source.y)):
        measured = statistics(stream, side=side)
        check(measured.all(), x[keep])
        for role, moments in measured.by_role().items():
            check(moments, x[keep & (stream.contexts.roles == role)])
        assert bool(measured.by_role()) is roles


def test_a_store_has_the_statistics_of_its_stream(tmp_path):
    stream = random_stream(roles=True, count=40)
    one, other = statistics(stream), statistics(store(stream, tmp_path / "cache", shard_bytes=500))
    assert torch.equal(one.all().deviation, other.all().deviation)
    assert one.by_role().keys() == other.by_role().keys()


def test_what_has_no_statistics_is_said():
    with pytest.raises(ValueError, match="has seen no tokens; call update first"):
        Statistics().all()
    measured = Statistics()
    with pytest.raises(fx.ShapeError, match=r"reads \(tokens, layers, d_model\), got \(3, 4\); stack one"):
        measured.update(torch.zeros(3, 4))
    measured.update(torch.zeros(3, 2, 4))
    with pytest.raises(fx.ShapeError, match=r"reads \(tokens, 2, 4\), got \(3, 2, 5\)"):
        measured.update(torch.zeros(3, 2, 5))
    with pytest.raises(ValueError, match="roles with every batch or with none"):
        measured.update(torch.zeros(3, 2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="finite activations, got NaN or infinity after 3 tokens"):
        measured.update(torch.full((1, 2, 4), torch.inf))
