"""Steps of an Einstein sum: the same numbers whichever way they are written, and no copy of a whole batch where none is
needed.
"""

from math import prod

import opt_einsum
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from fmxnn.core import memory_order as layout
from fmxnn.core.contraction import Contraction
from fmxnn.weights.factorized import TensorRingWeight

WORDS = ("a", "b", "c", "d")


@st.composite
def sums(draw):
    """Two to four terms over a few axes, some with batch axes, and an output of any of the words in any order."""
    size = {word: draw(st.integers(1, 4)) for word in WORDS}
    terms = draw(
        st.lists(
            st.permutations(WORDS).flatmap(lambda p: st.integers(1, 4).map(lambda n: tuple(p[:n]))),
            min_size=2,
            max_size=4,
        )
    )
    used = [word for word in WORDS if any(word in term for term in terms)]
    output = draw(st.permutations(used))[: draw(st.integers(0, len(used)))]
    batched = draw(st.lists(st.booleans(), min_size=len(terms), max_size=len(terms)))
    return size, [("...", *term) if b else term for term, b in zip(terms, batched, strict=True)], tuple(output)


@given(sums(), st.lists(st.integers(1, 3), max_size=2), seeds)
def test_a_planned_sum_is_the_sum(drawn, batch, seed):
    size, terms, output = drawn
    generator = torch.Generator().manual_seed(seed)
    shapes = [[*(batch if "..." in term else []), *(size[word] for word in term if word != "...")] for term in terms]
    operands = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    output = ("...", *output) if any("..." in term for term in terms) else output
    used = {word: size[word] for term in terms for word in term if word != "..."}
    made = Contraction(", ".join(" ".join(term) for term in terms) + " -> " + " ".join(output), **used)(*operands)
    plain = torch.einsum(",".join("".join(term) for term in terms) + "->" + "".join(output), *operands)
    torch.testing.assert_close(made, plain)
    weights = torch.randn(made.shape, dtype=torch.float64, generator=generator)
    pairs = zip(*(torch.autograd.grad(total, operands, weights) for total in (made, plain)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("ranks", [(3, 107, 19), (2, 5, 7)])
def test_a_ring_moves_nothing_that_grows_with_the_batch_but_the_gradient_of_its_smallest_core(ranks):
    weight = TensorRingWeight(8, 256, 512, ranks=ranks)
    core, other = prod(weight.factors[2].shape), prod(weight.factors[1].shape)
    for contraction in (weight._maps.to_bonds, weight._maps.from_bonds):
        size = {**contraction.sizes, "...": 1024}
        shapes = [tuple(size[word] for word in term) for term in contraction.terms]
        assert moved(contraction.terms, contraction.output, size, shapes) <= 1024 * core + other


def moved(terms, output, size, shapes):
    """What `arrange` says of the order that opt_einsum takes."""
    letters = {word: opt_einsum.get_symbol(i) for i, word in enumerate(size)}
    words = {letter: word for word, letter in letters.items()}
    equation = (
        ",".join("".join(letters[word] for word in term) for term in terms)
        + "->"
        + "".join(letters[word] for word in output)
    )
    _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="auto-hq")
    pairs = [
        (tuple(step[0]), tuple(words[letter] for letter in step[2].partition("->")[2]))
        for step in info.contraction_list
    ]
    return layout.arrange(terms, pairs, size)[0]


def test_many_terms_are_planned_one_after_the_other():
    pattern = ", ".join(f"... w{i} w{i + 1}" if i == 0 else f"w{i} w{i + 1}" for i in range(12)) + " -> ... w0 w12"
    chain = [torch.randn(2, 2, 2, dtype=torch.float64), *torch.randn(11, 2, 2, dtype=torch.float64)]
    made = Contraction(pattern, **{f"w{i}": 2 for i in range(13)})(*chain)
    expected = chain[0]
    for factor in chain[1:]:
        expected = expected @ factor
    torch.testing.assert_close(made, expected)
