"""The order of a sum's products: as opt_einsum searches for where that is quick, found in bounded work everywhere."""

import random

import opt_einsum
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import randn, seeds

from fmxnn import Contraction, EinsumWeight, PatternError
from fmxnn.core import ordering
from fmxnn.core.contraction import MAX_AXES, MAX_TERMS


@st.composite
def entangled(draw, terms, axes, sizes):
    """Letters of each term, of the output, and the size of each letter."""
    letters = [opt_einsum.get_symbol(i) for i in range(draw(axes))]
    term = st.lists(st.sampled_from(letters), min_size=1, unique=True).map("".join)
    held = draw(st.lists(term, min_size=(count := draw(terms)), max_size=count))
    used = sorted({letter for term in held for letter in term})
    output = "".join(draw(st.lists(st.sampled_from(used), unique=True, max_size=3)))
    return held, output, {letter: draw(sizes) for letter in used}


def order(held, output, size, optimize):
    shapes = [tuple(size[letter] for letter in term) for term in held]
    return opt_einsum.contract_path(",".join(held) + "->" + output, *shapes, shapes=True, optimize=optimize)[0]


@given(entangled(st.integers(2, 6), st.integers(1, 12), st.sampled_from([1, 2, 8, 64, 1000])))
def test_up_to_six_terms_are_ordered_as_opt_einsum_orders_them(drawn):
    assert order(*drawn, ordering.BoundedOrder()) == order(*drawn, "auto-hq")


@given(entangled(st.integers(7, 20), st.integers(1, 6), st.integers(1, 2)), seeds)
def test_a_sum_of_many_terms_is_the_sum(drawn, seed):
    held, output, size = drawn
    torch.manual_seed(seed)
    operands = [randn(*(size[letter] for letter in term)) for term in held]
    pattern = ", ".join(" ".join(term) for term in held) + " -> " + " ".join(output)
    torch.testing.assert_close(
        Contraction(pattern, **size)(*operands), torch.einsum(",".join(held) + "->" + output, *operands)
    )


@given(entangled(st.integers(7, MAX_TERMS), st.integers(1, MAX_AXES), st.sampled_from([1, 2, 512, 2**31])))
def test_the_work_is_bounded_and_the_process_keeps_its_random_numbers(drawn):
    looked, tried = [], []
    with pytest.MonkeyPatch.context() as patch:
        compare, seed = ordering.compare_flops, opt_einsum.path_random.random_seed
        patch.setattr(ordering, "compare_flops", lambda *pair: [looked.append(len(pair[2])), compare(*pair)])
        patch.setattr(opt_einsum.path_random, "random_seed", lambda number: [tried.append(number), seed(number)])
        before = random.getstate()
        found = order(*drawn, ordering.BoundedOrder())
        assert random.getstate() == before
    assert sum(looked) <= ordering.WORK
    assert len(tried) * len(drawn[0]) <= max(ordering.TRIES, len(drawn[0]))  # one try at the least
    random.seed(0)
    assert order(*drawn, ordering.BoundedOrder()) == found


def test_a_search_beyond_the_work_is_given_up_for_greedy_tries(monkeypatch):
    letters = [opt_einsum.get_symbol(i) for i in range(24)]
    rng = random.Random(0)
    drawn = ["".join(rng.sample(letters, 18)) for _ in range(16)], "", dict.fromkeys(letters, 64)
    asked = []
    greedy = ordering._greedy
    monkeypatch.setattr(ordering, "_greedy", lambda *sum: [asked.append(1), greedy(*sum)][1])
    order(*drawn, ordering.BoundedOrder())
    assert asked


def test_a_weight_of_51_axes_in_51_terms_has_no_gram_and_works():
    """Norms without atoms would need each bond twice, for which there are no letters."""
    bonds = [f"r{i}" for i in range(48)]
    pairs = [f"{bonds[i - 1]} {bonds[i]}" for i in range(48)]
    pattern = ", ".join(["layers " + pairs[0], "d_model " + pairs[1], "latents " + pairs[2], *pairs[3:]])
    weight = EinsumWeight(pattern, layers=2, d_model=3, latents=4, **dict.fromkeys(bonds, 1))
    assert weight.norms().shape == (2, 4)
    assert weight.to_latents(torch.ones(2, 3)).shape == (4,)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (" ".join(f"a{i}" for i in range(20_000)) + " -> ", "characters"),
        (" ".join(f"a{i}" for i in range(10_000)) + " -> ", "at most 51 axes, got 10000"),
        ("a, " * 53 + "a -> a", "has 54 terms, and a pattern has at most 52"),
        ("x" * 1_000_000, "has no '->'"),
        (", ".join(["a"] * 60_000) + " -> a", "has 179,999 characters, and a pattern has at most 100,000"),
    ],
)
def test_a_pattern_too_large_is_refused_in_a_short_sentence(pattern, words):
    with pytest.raises(PatternError, match=words) as error:
        Contraction(pattern)
    assert len(str(error.value)) < 500


def test_a_weights_pattern_too_long_says_so():
    with pytest.raises(PatternError, match="at most 20,000 characters, got 20,001"):
        EinsumWeight("a" * 20_001, layers=1, d_model=1, latents=1)
