import re

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, randn, seeds

from fmxnn import Contraction, PatternError, ShapeError
from fmxnn.core import contraction


@st.composite
def sums(draw):
    sizes = {
        word: draw(st.integers(1, 3))
        for word in draw(st.sets(st.sampled_from(["layers", "d_model", "latents", "r1", "_r"]), min_size=1))
    }
    term = st.lists(st.sampled_from(sorted(sizes)), min_size=1, max_size=3, unique=True)
    terms = draw(st.lists(term, min_size=1, max_size=4))
    used = sorted({word for words in terms for word in words})
    output = draw(st.lists(st.sampled_from(used), unique=True))
    batched = draw(st.lists(st.booleans(), min_size=len(terms), max_size=len(terms)))
    left = ", ".join(" ".join((["..."] if has else []) + words) for has, words in zip(batched, terms))
    pattern = f"{left} -> {' '.join((['...'] if any(batched) else []) + output)}"
    batch = draw(batches)
    shapes = [(batch if has else ()) + tuple(sizes[word] for word in words) for has, words in zip(batched, terms)]
    return pattern, {word: sizes[word] for word in used}, shapes


@given(sums(), seeds)
def test_a_contraction_is_the_sum_over_its_indices(drawn, seed):
    pattern, sizes, shapes = drawn
    torch.manual_seed(seed)
    operands = [randn(*shape) for shape in shapes]
    torch.testing.assert_close(Contraction(pattern, **sizes)(*operands), reference.einsum(pattern, sizes, operands))


@given(sums(), seeds)
def test_a_contraction_is_linear_in_each_operand(drawn, seed):
    pattern, sizes, shapes = drawn
    torch.manual_seed(seed)
    operands, other, run = [randn(*shape) for shape in shapes], randn(*shapes[-1]), Contraction(pattern, **sizes)
    torch.testing.assert_close(
        run(*operands[:-1], operands[-1] + 2 * other), run(*operands) + 2 * run(*operands[:-1], other)
    )


def test_the_plan_needs_far_fewer_flops_than_the_whole_sum():
    ring = Contraction(
        "... layers d_model, r1 d_model r2, r3 layers r1 -> ... r2 r3", layers=8, d_model=64, r1=4, r2=16, r3=8
    )
    assert 0 < ring.flops < 1024 * 8 * 64 * 4 * 16 * 8


def test_a_lone_transposition_costs_its_entries():
    assert Contraction("layers d_model -> d_model layers", layers=3, d_model=5).flops == 15


def test_the_repr_prints_pattern_sizes_plan_and_flops():
    text = repr(Contraction("... r, latents r -> ... latents", r=3, latents=5))
    plan = "plan: latents r, ... r -> ... latents; 0.03072 MFLOP at 1,024 tokens"
    assert text == f"Contraction('... r, latents r -> ... latents', r=3, latents=5; {plan})"


@pytest.mark.parametrize(
    ("pattern", "sizes", "message"),
    [
        ("a,, b -> a", {"a": 1}, "the pattern 'a,, b ' has an empty term; write terms as 'latents r, d_model r'"),
        ("", {}, "the pattern '' has no '->'; write 'inputs -> output'"),
        ("-> a", {}, "the pattern '' has an empty term; write terms as 'latents r, d_model r'"),
        ("a 2b -> a", {"a": 1}, "the pattern 'a 2b ' has '2b' where an axis stands; an axis is one word like d_model"),
        (
            "a -> b -> c",
            {"a": 1},
            "the pattern ' b -> c' has '->' where an axis stands; an axis is one word like d_model",
        ),
        (
            "a a -> a",
            {"a": 1},
            "the pattern 'a a ' repeats the axis 'a' in the term 'a a'; give the second one a name of its own",
        ),
        ("a ... -> a", {"a": 1}, "the pattern 'a ... ' has '...' inside the term 'a ...'; batch axes come first"),
        ("a b -> a", {"a": 1}, "the pattern 'a b -> a' needs a size for the axis 'b', got sizes for a; pass b=..."),
        ("a -> a", {}, "the pattern 'a -> a' needs a size for the axis 'a', got sizes for none; pass a=..."),
        ("b a -> a", {"a": 1, "b": 2, "c": 3}, "the pattern 'b a -> a' has no axis 'c'; its axes are a, b"),
        ("a -> a", {"a": 0}, "the pattern 'a -> a' needs whole sizes of 1 or more, got a=0"),
        ("a -> a", {"a": -1}, "the pattern 'a -> a' needs whole sizes of 1 or more, got a=-1"),
        ("a -> a", {"a": 2.0}, "the pattern 'a -> a' needs whole sizes of 1 or more, got a=2.0"),
        ("a -> a", {"a": True}, "the pattern 'a -> a' needs whole sizes of 1 or more, got a=True"),
        ("a -> a", {"a": "3"}, "the pattern 'a -> a' needs whole sizes of 1 or more, got a='3'"),
        ("a b", {"a": 1}, "the pattern 'a b' has no '->'; write 'inputs -> output'"),
        ("a -> b", {"a": 1}, "the pattern 'a -> b' has 'b' in its output and in no input"),
        ("a -> ... a", {"a": 1}, "the pattern 'a -> ... a' has '...' in its output and in no input"),
        (
            " ".join(f"a{i}" for i in range(52)) + " -> ",
            {f"a{i}": 1 for i in range(52)},
            "a pattern has at most 51 axes, got 52",
        ),
    ],
)
def test_a_bad_pattern_says_what_is_wrong(pattern, sizes, message):
    with pytest.raises(PatternError) as error:
        Contraction(pattern, **sizes)
    assert str(error.value) == message


@given(st.text(alphabet="ab ,.->2\n", max_size=12))
def test_no_text_raises_anything_but_a_pattern_error(text):
    try:
        run = Contraction(text, a=2, b=3)
    except PatternError:
        return
    assert run.pattern == text


def test_an_output_of_two_terms_is_a_pattern_error():
    with pytest.raises(PatternError):
        Contraction("a b -> a, b", a=2, b=3)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(4, 3)], "'... r, latents r -> ... latents' sums 2 tensors, got 1"),
        ([(4, 2), (5, 3)], "'... r, latents r -> ... latents' reads (..., r=3), got (4, 2)"),
        ([(4, 3), (3, 5)], "'... r, latents r -> ... latents' reads (latents=5, r=3), got (3, 5)"),
        ([(4, 3), (1, 5, 3)], "'... r, latents r -> ... latents' reads (latents=5, r=3), got (1, 5, 3)"),
        ([(), (5, 3)], "'... r, latents r -> ... latents' reads (..., r=3), got ()"),
    ],
)
def test_operands_that_do_not_fit_are_named(shapes, message):
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        Contraction("... r, latents r -> ... latents", r=3, latents=5)(*(torch.zeros(shape) for shape in shapes))


def test_fifty_one_axes_are_summed():
    words = [f"a{i}" for i in range(51)]
    run = Contraction(" ".join(words) + " -> a50", **dict.fromkeys(words[:-1], 1), a50=2)
    torch.testing.assert_close(run(torch.tensor([1.0, 2.0]).reshape([1] * 50 + [2])), torch.tensor([1.0, 2.0]))


@given(sums(), seeds, st.sampled_from([8, 24, 80]))
def test_parts_give_the_same_sum_and_the_same_gradients(drawn, seed, budget):
    pattern, sizes, shapes = drawn
    torch.manual_seed(seed)
    operands, run = [randn(*shape).requires_grad_() for shape in shapes], Contraction(pattern, **sizes)
    whole = run(*operands)
    weights = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weights).sum(), operands)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contraction, "BUDGET", budget)
        parted = run(*operands)
        torch.testing.assert_close(parted, whole)
        torch.testing.assert_close(torch.autograd.grad((parted * weights).sum(), operands), expected)
        with torch.no_grad():
            torch.testing.assert_close(run(*operands), whole)


RING = "... layers d_model, r1 d_model r2, r3 layers r1 -> ... r2 r3"
KHATRI_RAO = "... layers d_model, d_model r, layers r -> ... r"


@pytest.mark.parametrize(
    ("pattern", "budget", "sizes"),
    [
        (RING, 1024, {"layers": 4, "d_model": 16, "r1": 2, "r2": 6, "r3": 4}),
        (KHATRI_RAO, 1024, {"layers": 4, "d_model": 8, "r": 9}),
    ],
)
def test_an_intermediate_beyond_the_budget_is_not_kept_for_the_gradient(pattern, budget, sizes, monkeypatch):
    run = Contraction(pattern, **sizes)
    operands = [
        randn(*((30,) if term[0] == "..." else ()), *(sizes[w] for w in term if w != "...")).requires_grad_()
        for term in run.terms
    ]

    def kept():
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), id
        ):
            run(*operands)
        for operand in operands:
            found.pop(operand.untyped_storage().data_ptr(), None)
        return sum(found.values())

    before = kept()
    monkeypatch.setattr(contraction, "BUDGET", budget)
    assert kept() == 0 < before


def test_parts_differentiate_twice_and_leave_torch_func_alone(monkeypatch):
    run = Contraction(RING, layers=2, d_model=3, r1=4, r2=3, r3=2)
    x, ring, small = randn(7, 2, 3), randn(4, 3, 3), randn(2, 2, 4)

    def second():
        inputs = [tensor.clone().requires_grad_() for tensor in (x, ring, small)]
        (slope,) = torch.autograd.grad(run(*inputs).pow(3).sum(), inputs[1], create_graph=True)
        return torch.autograd.grad(slope.pow(2).sum(), inputs)

    def jacobian():
        return torch.func.jacrev(lambda ring: run(x, ring, small))(ring)

    def each():
        return torch.func.vmap(torch.func.grad(lambda row: run(row, ring, small).pow(2).sum()))(x)

    expected = second(), jacobian(), each()
    monkeypatch.setattr(contraction, "BUDGET", 64)
    torch.testing.assert_close((second(), jacobian(), each()), expected)


def test_two_batches_that_broadcast_are_not_cut(monkeypatch):
    run = Contraction("... r, ... s, r s t -> ... t", r=2, s=3, t=2)
    operands = randn(4, 2), randn(5, 1, 3), randn(2, 3, 2)
    whole = run(*operands)
    monkeypatch.setattr(contraction, "BUDGET", 8)
    torch.testing.assert_close(run(*operands), whole)
