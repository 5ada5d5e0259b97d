"""The exact choice of codes, block by block, against a loop over sorted entries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch.testing import assert_close

from fmxnn import BatchTopK
from fmxnn.sparse import pre_activations as products
from fmxnn.sparse import selection
from fmxnn.sparse.pre_activations import Given, Products
from fmxnn.sparse.tables import Tables

tokens = st.integers(1, 9)
latents = st.integers(1, 150)


@pytest.fixture(params=[8 * 2**20, 4096, 1], ids=["one block", "few blocks", "a group at a time"], autouse=True)
def budget(request, monkeypatch):
    monkeypatch.setattr(products, "BUDGET", request.param)


def drawn(seed, tokens, latents, dtype=torch.float64, bonds=4):
    g = torch.Generator().manual_seed(seed)
    read, table, bias = (
        torch.randn(size, generator=g, dtype=dtype) for size in ((tokens, bonds), (latents, bonds), (latents,))
    )
    return Products(read, table, bias), read @ table.T + bias


def best(pre, count):
    """The keys of the largest positives: a loop over all entries, the earlier of equals first."""
    entries = [(-value, key) for key, value in enumerate(pre.flatten().tolist()) if value > 0]
    return sorted(key for _, key in sorted(entries)[:count])


@given(seeds, tokens, latents, st.integers(1, 12))
def test_the_largest_of_all_tokens_are_exact_and_in_order(seed, tokens, latents, k):
    source, pre = drawn(seed, tokens, latents)
    for given_or_made in (source, Given(pre)):
        found = selection.largest(given_or_made, tokens * k)
        assert found.keys.tolist() == best(pre, tokens * k)
        assert_close(found.values, pre.flatten()[found.keys])


@given(seeds, tokens, latents, st.integers(1, 12))
def test_the_largest_of_each_token_are_exact_and_in_order(seed, tokens, latents, k):
    source, pre = drawn(seed, tokens, latents)
    for given_or_made in (source, Given(pre)):
        found = selection.largest_of_each(given_or_made, k)
        assert found.keys.tolist() == [row * latents + key for row in range(tokens) for key in best(pre[row], k)]
        assert_close(found.values, pre.flatten()[found.keys])


@given(seeds, tokens, latents, st.booleans())
def test_all_above_a_threshold_are_found(seed, tokens, latents, one):
    source, pre = drawn(seed, tokens, latents)
    threshold = torch.randn((1,) if one else (latents,), dtype=torch.float64)
    threshold = threshold[0] if one else threshold
    found = selection.above(source, threshold)
    assert found.keys.tolist() == (pre > threshold.clamp(min=0)).flatten().nonzero().flatten().tolist()


@given(seeds, tokens, latents, st.integers(1, 12), st.integers(1, 3))
def test_of_equals_the_earlier_are_kept(seed, tokens, latents, k, levels):
    pre = torch.randint(-1, levels + 1, (tokens, latents), generator=torch.Generator().manual_seed(seed)).double()
    one = torch.ones(tokens, 1, dtype=torch.float64)
    source = Products(
        torch.eye(tokens, dtype=torch.float64), pre.T.contiguous(), torch.zeros(latents, dtype=torch.float64)
    )
    assert selection.largest(source, tokens * k).keys.tolist() == best(pre, tokens * k)
    assert selection.largest(Given(pre), tokens * k).keys.tolist() == best(pre, tokens * k)
    assert len(selection.largest_of_each(source, k).keys) == int((pre > 0).sum(1).clamp(max=k).sum())
    flat = Products(one, torch.ones(latents, 1, dtype=torch.float64), torch.zeros(latents, dtype=torch.float64))
    assert selection.largest(flat, tokens * k).keys.tolist() == list(range(min(tokens * k, tokens * latents)))


def test_a_first_block_that_misleads_is_found_out():
    pre = 1 + torch.rand(64, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pre[:, 0] += 10  # in the first block of any stride, and nowhere else: a threshold that leaves far too few
    source = Products(torch.eye(64, dtype=torch.float64), pre.T.contiguous(), torch.zeros(128, dtype=torch.float64))
    for count in (32, 64, 128, 512):
        assert selection.largest(source, count).keys.tolist() == best(pre, count)
        proposed = selection.largest_proposed(
            Products(source.read.float(), source.table.float(), source.bias.float()), count
        )
        assert proposed is None or proposed.keys.tolist() == best(pre.float(), count)


@given(seeds, st.integers(1, 40), st.integers(32, 400), st.integers(1, 20))
def test_a_proposal_in_bf16_never_changes_the_choice(seed, tokens, latents, k):
    source, _ = drawn(seed, tokens, latents, torch.float32, bonds=64)
    exact = selection._recomputed(source, torch.arange(tokens * latents)).view(tokens, latents)
    found = selection.largest_proposed(source, tokens * k)
    if found is not None:
        assert found.keys.tolist() == best(exact, tokens * k)
        assert torch.equal(found.values, exact.flatten()[found.keys])


@given(seeds, st.integers(1, 40), st.integers(32, 400), st.floats(-1, 20))
def test_a_proposal_in_bf16_finds_all_above_a_threshold(seed, tokens, latents, threshold):
    source, _ = drawn(seed, tokens, latents, torch.float32, bonds=64)
    exact = selection._recomputed(source, torch.arange(tokens * latents)).view(tokens, latents)
    found = selection.above_proposed(source, torch.tensor(threshold))
    if found is not None:
        assert found.keys.tolist() == (exact > max(torch.tensor(threshold), 0)).flatten().nonzero().flatten().tolist()


def test_a_proposal_is_made_where_there_are_many_latents_and_refused_where_the_bound_is_loose():
    source, _ = drawn(0, 64, 2048, torch.float32, bonds=16)
    assert selection.largest_proposed(source, 64 * 8) is not None
    assert selection.above_proposed(source, torch.tensor(12.0)) is not None
    assert selection.above_proposed(source, torch.tensor(0.0)) is None
    assert selection.largest_proposed(Products(source.read, source.table, source.bias - 100), 64) is None
    loose = Products(source.read, torch.cat([source.table[1:], 1e4 * source.table[:1]]), source.bias)
    assert selection.largest_proposed(loose, 64 * 8) is None


def test_a_proposal_finds_what_rounding_hides():
    just_below = 1 + 0.99 * 2**-8  # bf16 rounds it to 1, so the best latent loses twice and the others gain
    table = torch.zeros(64, 36)
    table[0], table[2], table[34] = just_below, 1, 1
    table[[2, 34], :17] += 2**-7
    source = Products(torch.full((64, 36), just_below), table, torch.zeros(64))
    exact, halved = source.read @ table.T, source.read.bfloat16() @ table.T.bfloat16()
    assert (exact[:, :1] > exact[:, [2, 34]]).all()
    assert (halved[:, :1] < halved[:, [2, 34]]).all()
    found = selection.largest_proposed(source, 64)
    assert found is not None
    assert found.keys.tolist() == [64 * row for row in range(64)]


@pytest.mark.parametrize(
    "choose", [lambda s: selection.largest(s, 4), lambda s: selection.largest_of_each(s, 2)], ids=["batch", "each"]
)
def test_nan_is_kept_so_that_the_loss_shows_it(choose):
    source, _ = drawn(0, 2, 40)
    source.table[33, 0] = torch.nan
    assert choose(source).values.isnan().any()


def test_nan_everywhere_takes_no_more_places_than_there_are():
    read, table = torch.full((3, 2), torch.nan), torch.ones(100, 2)
    z = BatchTopK(2).choose(read, table, torch.zeros(100))
    assert z.values.isnan().tolist() == [True] * 6
    assert z.columns.tolist() == [0, 1, 2, 3, 4, 5]
    assert (~(BatchTopK(2)(read @ table.T) <= 0)).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4, 5]


def test_nothing_is_found_where_nothing_is_positive():
    source, _ = drawn(0, 3, 40)
    negative = Products(source.read, source.table, source.bias - 1e3)
    found = [
        selection.largest(negative, 6),
        selection.largest_of_each(negative, 2),
        selection.above(negative, torch.tensor(0.0)),
    ]
    assert [len(one.keys) for one in found] == [0, 0, 0]


@pytest.mark.slow
def test_keys_beyond_int32_are_right(budget):
    if products.BUDGET < 2**20:
        pytest.skip("every budget means a group at a time at this size")
    tokens, latents = 70_000, 40_000  # 2.8e9 entries, of which a block at a time is held
    read = torch.arange(tokens, dtype=torch.float32).unsqueeze(1)
    table = torch.zeros(latents, 1)
    table[-1] = 1.0
    source = Products(read, table, torch.zeros(latents))
    expected = [row * latents + latents - 1 for row in range(tokens - 5, tokens)]
    assert expected[0] > 2**31
    found = selection.largest(source, 5)
    assert found.keys.tolist() == expected
    assert found.values.tolist() == [float(row) for row in range(tokens - 5, tokens)]


@given(
    seeds,
    tokens,
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 4)), min_size=1, max_size=4),
    st.integers(1, 12),
)
def test_several_tables_give_the_codes_of_their_diagonal(seed, tokens, sizes, k):
    g = torch.Generator().manual_seed(seed)
    blocks = [torch.randn(size, generator=g) for size in sizes]
    diagonal = torch.block_diag(*blocks)
    read, bias = torch.randn(tokens, diagonal.shape[1], generator=g), torch.randn(len(diagonal), generator=g)
    ours, theirs = Products(read, Tables(tuple(blocks)), bias), Products(read, diagonal, bias)
    assert ours.shape == theirs.shape
    limit = torch.tensor(0.3)
    for find in (
        lambda source: selection.largest(source, tokens * k),
        lambda source: selection.largest_of_each(source, k),
        lambda source: selection.above(source, limit),
    ):
        assert find(ours).keys.tolist() == find(theirs).keys.tolist()
        assert_close(find(ours).values, find(theirs).values)
    exact = {"largest": selection.largest(theirs, tokens * k), "above": selection.above(theirs, limit)}
    for name, found in {
        "largest": selection.largest_proposed(ours, tokens * k),
        "above": selection.above_proposed(ours, limit),
    }.items():
        assert found is None or found.keys.tolist() == exact[name].keys.tolist()
