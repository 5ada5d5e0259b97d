"""`weight.at(layer)`: one layer of a weight is that layer of its dense form, and costs that layer alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, randn, seeds, weights
from torch.utils._python_dispatch import TorchDispatchMode

from fmxnn import (
    ConcatWeight,
    CPWeight,
    DenseWeight,
    EinsumWeight,
    PlacedWeight,
    ShapeError,
    TensorRingWeight,
    Weight,
    build,
    describe,
    sae_stack_weight,
    to_csr,
)


class OwnWeight(Weight):
    """A weight that gives what it must and nothing else."""

    def __init__(self, layers, d_model, latents):
        super().__init__()
        self.layers, self.d_model, self.latents = layers, d_model, latents
        self.full = torch.nn.Parameter(randn(layers, d_model, latents))

    def to_latents(self, x):
        return torch.einsum("...ld,ldn->...n", x, self.full)

    def to_layers(self, z):
        return torch.einsum("...n,ldn->...ld", z.to_dense() if z.layout == torch.sparse_csr else z, self.full)


@st.composite
def placed(draw):
    weight = draw(st.one_of(weights(), st.builds(OwnWeight, *[st.integers(1, 3)] * 3)))
    return weight, draw(st.integers(-weight.layers, weight.layers - 1))


@given(placed(), batches, seeds)
def test_a_layer_is_that_layer_of_the_dense_form(drawn, batch, seed):
    weight, layer = drawn
    torch.manual_seed(seed)
    one, dense = weight.at(layer), weight.to_dense()[layer]
    x, z = randn(*batch, weight.d_model), randn(*batch, weight.latents)
    index = torch.randint(weight.latents, batch)
    assert (one.d_model, one.latents, one.layer) == (weight.d_model, weight.latents, layer % weight.layers)
    torch.testing.assert_close(one.to_dense(), dense)
    torch.testing.assert_close(one.to_latents(x), x @ dense)
    torch.testing.assert_close(one.to_layers(z), z @ dense.T)
    torch.testing.assert_close(one.rows(index), dense.T[index])
    codes = randn(4, weight.latents).relu()
    torch.testing.assert_close(one.to_layers(to_csr(codes)), codes @ dense.T)


@given(placed(), seeds)
def test_gradients_of_a_layer_reach_the_shared_parameters(drawn, seed):
    weight, layer = drawn
    torch.manual_seed(seed)
    x, by = randn(3, weight.d_model), randn(3, weight.latents)
    parameters = list(weight.parameters())

    def gradients(y):
        total = (y * by).sum() + sum(parameter.sum() * 0 for parameter in parameters)  # no part may have this layer
        return torch.autograd.grad(total, parameters)

    expected = gradients(x @ weight.to_dense()[layer])
    torch.testing.assert_close(gradients(weight.at(layer).to_latents(x)), expected)
    torch.testing.assert_close(gradients(x @ weight.at(layer).to_dense()), expected)


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out._is_view():
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize(
    "weight",
    [
        TensorRingWeight(8, 6, 40, ranks=(2, 3, 2)),
        CPWeight(8, 6, 40, rank=3),
        DenseWeight(8, 6, 40),
        sae_stack_weight(DenseWeight, layers=8, d_model=6, latents=40),
    ],
    ids=lambda weight: type(weight).__name__,
)
def test_nothing_of_the_other_layers_is_computed(weight):
    with Largest() as whole:
        weight.to_dense()
    with Largest() as one:
        weight.at(3).to_dense()
    assert whole.numel >= 8 * 6 * 40
    assert one.numel <= 6 * 40


@pytest.mark.parametrize("layer", [3, -4, 10**30])
def test_a_layer_outside_is_one_sentence(layer):
    for weight in (DenseWeight(3, 2, 4), OwnWeight(3, 2, 4), ConcatWeight(DenseWeight(3, 2, 4))):
        with pytest.raises(IndexError) as error:
            weight.at(layer)
        said = str(error.value)
        assert "range(3)" in said
        assert "-3" in said
        assert str(layer) in said


@pytest.mark.parametrize("layer", [1.0, None, slice(1), True, [0, 1]])
def test_a_layer_is_one_whole_number(layer):
    with pytest.raises(TypeError, match=r"at takes the number of one layer, got .*torch\.stack"):
        DenseWeight(3, 2, 4).at(layer)


def test_other_sizes_and_dtypes_are_named():
    for weight in (CPWeight(3, 2, 4, rank=2), OwnWeight(3, 2, 4).float(), ConcatWeight(DenseWeight(3, 2, 4))):
        with pytest.raises(ShapeError, match=r"reads \(\.\.\., d_model=2\), got \(5, 3\)"):
            weight.at(0).to_latents(torch.zeros(5, 3))
        with pytest.raises(ShapeError, match=r"writes codes of \(\.\.\., latents=4\), got \(5, 3\)"):
            weight.at(0).to_layers(torch.zeros(5, 3))
    with pytest.raises(TypeError, match=r"float32.*got torch\.float64; cast them"):
        CPWeight(3, 2, 4, rank=2).at(0).to_latents(randn(5, 2))


@pytest.mark.parametrize("make", [DenseWeight, lambda *sizes: ConcatWeight(DenseWeight(*sizes))])
def test_a_method_of_the_users_own_is_not_passed_by(make):
    weight = make(3, 2, 4)
    before = weight.to_latents
    weight.to_latents = lambda x: 2 * before(x)
    x = torch.randn(5, 2)
    torch.testing.assert_close(weight.at(1).to_latents(x), 2 * x @ weight.to_dense()[1])


def test_tokens_outside_are_no_rows():
    twice = EinsumWeight("latents r, layers r, d_model r, latents d_model", layers=3, d_model=2, latents=4, r=2)
    for weight in (CPWeight(3, 2, 4, rank=2), OwnWeight(3, 2, 4), twice):
        for outside in (-1, 4):
            with pytest.raises(IndexError):
                weight.at(0).rows(torch.tensor([0, outside]))


def test_a_layer_compiles_as_one_graph():
    weight, x = TensorRingWeight(3, 4, 6), torch.randn(5, 4)
    compiled = torch.compile(lambda x: weight.at(1).to_latents(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), weight.at(1).to_latents(x))


def test_an_argument_whose_name_is_a_method_is_kept_and_saved():
    placed = PlacedWeight(DenseWeight(2, 3, 5), layers=4, at=1)
    recipe = describe(placed)
    assert recipe["PlacedWeight"]["at"] == 1
    again = build(recipe, [PlacedWeight, DenseWeight])
    assert describe(again) == recipe
    again.load_state_dict(placed.state_dict())
    torch.testing.assert_close(again.at(2).to_dense(), placed.to_dense()[2])


@pytest.mark.parametrize(
    "weight",
    [
        CPWeight(2, 4, 5, rank=9),
        EinsumWeight("latents r, d_model r, layers r, latents layers", layers=2, d_model=4, latents=5, r=9),
    ],
    ids=["table", "none"],
)
def test_few_tokens_go_through_the_factors_and_many_through_their_product(weight):
    weight, maps = weight.double(), weight._layer_maps
    assert not maps.is_denser(1)
    assert maps.is_denser(5000)
    for tokens in (1, 5000):
        x, bias = randn(tokens, 4), randn(5)
        torch.testing.assert_close(weight.at(1).to_latents(x, bias), x @ weight.to_dense()[1] + bias)
