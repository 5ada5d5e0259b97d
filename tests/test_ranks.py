import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmxnn import cp_rank, tensor_ring_ranks, wide_tensor_ring_ranks

MODELS = {"GPT2-Small": 768, "Pythia-410M": 1024, "Pythia-1.4B": 2048, "Gemma2-2B": 2304}
axes = st.tuples(st.integers(1, 16), st.integers(1, 256), st.integers(1, 4096))


def ring_size(axes, ranks):
    (layers, d_model, latents), (r1, r2, r3) = axes, ranks
    return r1 * d_model * r2 + r2 * latents * r3 + r3 * layers * r1


@pytest.mark.parametrize(
    ("model", "ranks", "rank"),
    [
        ("GPT2-Small", (5, 244, 25), 5866),
        ("Pythia-410M", (7, 302, 27), 7707),
        ("Pythia-1.4B", (11, 501, 31), 14557),
        ("Gemma2-2B", (12, 545, 32), 16153),
    ],
)
def test_the_rules_give_the_settings_of_the_paper(model, ranks, rank):
    assert tensor_ring_ranks(8, MODELS[model], 16384) == ranks
    assert cp_rank(8, MODELS[model], 16384) == rank


@pytest.mark.parametrize(("parts", "ranks"), [(2, (5, 214, 19)), (4, (3, 151, 13)), (8, (2, 107, 9))])
def test_the_rules_give_the_compressed_settings_of_the_paper(parts, ranks):
    assert tensor_ring_ranks(8, 1024, 16384, share=1 / parts) == ranks
    assert cp_rank(8, 1024, 16384, share=1 / parts) == 7707 // parts


@pytest.mark.parametrize(
    ("sizes", "share", "ranks"),
    [((8, 1024, 16384), 1 / 8, (8, 128, 7)), ((8, 128, 2048), 1, (5, 26, 39)), ((8, 128, 2048), 1 / 8, (7, 19, 6))],
)
def test_the_wide_rule_gives_its_settings(sizes, share, ranks):
    assert wide_tensor_ring_ranks(*sizes, share=share) == ranks


@given(axes, st.sampled_from([1.0, 0.5, 0.125]))
def test_a_wide_ring_spans_d_model_within_its_budget_and_none_is_wider(sizes, share):
    layers, d_model, latents = sizes
    budget = share * layers * d_model * latents
    fitting = [
        (r1, r2, r3)
        for r1 in range(1, layers + 1)
        for r2 in [-(-d_model // r1)]
        for r3 in [int((budget - r1 * d_model * r2) // (r2 * latents + layers * r1))]
        if r3 >= 1
    ]
    if not fitting:
        with pytest.raises(ValueError, match="finds no ring"):
            wide_tensor_ring_ranks(*sizes, share=share)
        return
    r1, r2, r3 = ranks = wide_tensor_ring_ranks(*sizes, share=share)
    assert r1 * r2 >= d_model
    assert r1 <= layers
    assert ring_size(sizes, ranks) <= budget
    assert r2 * r3 == max(b * c for _, b, c in fitting)


@given(axes)
def test_the_default_rank_has_as_many_parameters_as_the_dense_weight(sizes):
    layers, d_model, latents = sizes
    step = layers + d_model + latents
    rank = cp_rank(*sizes)
    assert rank == 1 or abs(rank * step - layers * d_model * latents) <= step / 2


@given(axes, st.floats(0.01, 2))
def test_ranks_are_whole_and_positive(sizes, share):
    ranks = (cp_rank(*sizes, share=share), *tensor_ring_ranks(*sizes, share=share))
    assert all(isinstance(rank, int) and rank >= 1 for rank in ranks)


@pytest.mark.parametrize("share", [0, -1, float("inf"), float("nan")])
@pytest.mark.parametrize("rule", [cp_rank, tensor_ring_ranks, wide_tensor_ring_ranks])
def test_a_share_is_finite_and_above_zero(rule, share):
    with pytest.raises(
        ValueError,
        match=f"^{re.escape(f'''a share of the dense weight's parameters is above 0, got share={share}''')}$",
    ):
        rule(2, 3, 4, share=share)


def test_a_share_too_small_for_a_wide_ring_is_refused():
    message = (
        "wide_tensor_ring_ranks finds no ring with r1 r2 >= d_model=128 in share=0.001 of the dense parameters; "
        "take a larger share, or tensor_ring_ranks"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        wide_tensor_ring_ranks(8, 128, 2048, share=0.001)
