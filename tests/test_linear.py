"""FactorizedLinear and FactorizedEmbedding are nn.Linear and nn.Embedding, and survive what those survive."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, randn, seeds, sizes, weights
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from fmxnn import (
    CPWeight,
    DenseWeight,
    EinsumWeight,
    FactorizedEmbedding,
    FactorizedLinear,
    RecipeError,
    ShapeError,
    SumWeight,
    TensorRingWeight,
    Weight,
    build,
    describe,
    from_pretrained,
    relative_error,
    save_pretrained,
)

assert_close = torch.testing.assert_close


def ring(layers=3, d_model=5, latents=7):
    return TensorRingWeight(layers, d_model, latents, ranks=(2, 3, 2))


class Gated(nn.Module):
    """Two linears and an embedding over two shared tensors; its arguments are its modules, so that it can be saved."""

    def __init__(self, embed, gate, up):
        super().__init__()
        self.embed, self.gate, self.up = embed, gate, up

    def forward(self, index):
        x = self.embed(index)
        return self.gate(x).relu() * self.up(x)


def gated():
    stack = ring()
    embed = FactorizedEmbedding(CPWeight(1, 5, 9, rank=4), padding_idx=0)
    return Gated(embed, FactorizedLinear(stack, 0), FactorizedLinear(stack, -1, bias=False))


tokens = torch.tensor([[0, 3, 8], [1, 1, 4]])


@given(weights(), st.integers(0, 2), st.booleans(), batches, seeds)
def test_a_linear_is_its_matrix(stack, layer, bias, batch, seed):
    torch.manual_seed(seed)
    linear = FactorizedLinear(stack, layer % stack.layers, bias=bias).double()
    x = randn(*batch, linear.in_features)
    assert linear.weight.shape == (linear.out_features, linear.in_features)
    assert_close(linear.weight, stack.to_dense()[linear.layer].T)
    assert_close(linear(x), functional.linear(x, linear.weight, linear.bias))


@given(weights(), st.one_of(st.none(), st.integers(0, 2)), batches, seeds)
def test_an_embedding_is_its_table(stack, padding, batch, seed):
    torch.manual_seed(seed)
    padding = None if padding is None else padding % stack.latents
    embed = FactorizedEmbedding(stack, padding_idx=padding)
    index = torch.randint(embed.num_embeddings, batch)
    assert embed.weight.shape == (embed.num_embeddings, embed.embedding_dim)
    assert_close(embed(index), functional.embedding(index, embed.weight))
    if padding is not None:
        rows = embed(torch.full((2,), padding))
        assert torch.equal(rows, torch.zeros_like(rows))
        (rows.sum() + 0 * sum(p.sum() for p in stack.parameters())).backward()
        assert not any(p.grad.any() for p in stack.parameters())
    else:
        assert_close(embed.weight, stack.to_dense()[0].T)


def test_gradients_are_those_of_the_formula():
    linear = FactorizedLinear(ring().double(), 1).double()
    x = randn(4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: linear(x), (x, *linear.parameters()))


@given(sizes, st.integers(1, 4), st.integers(1, 4), st.booleans(), seeds)
def test_linears_are_stood_in_for_exactly_where_the_rank_is_full(layers, inputs, outputs, bias, seed):
    torch.manual_seed(seed)
    linears = [nn.Linear(inputs, outputs, bias=bias).double().eval() for _ in range(layers)]
    made = FactorizedLinear.from_linears(linears, DenseWeight)
    assert len({id(module.stack) for module in made}) == 1
    x = randn(6, inputs)
    for module, linear in zip(made, linears, strict=True):
        assert not module.training
        assert_close(module(x), linear(x))
        assert module.has_bias == bias


def test_a_fit_of_several_layers_is_one_tensor_and_says_how_good_it_is():
    shared = CPWeight(4, 6, 10, rank=2)
    linears = [nn.Linear(6, 10) for _ in range(4)]
    for layer, linear in enumerate(linears):
        linear.weight.data = shared.to_dense()[layer].detach().T + 1e-3 * torch.randn(10, 6)
    made = FactorizedLinear.from_linears(linears, lambda *axes: CPWeight(*axes, rank=2), sweeps=200, tries=3)
    kept = sum(p.numel() for p in nn.ModuleList(made).parameters()) - 4 * 10
    assert kept == 2 * (4 + 6 + 10)
    for module, linear in zip(made, linears, strict=True):
        assert (module.weight - linear.weight).norm() < 0.1 * linear.weight.norm()
        assert torch.equal(module.bias, linear.bias)
    one = FactorizedLinear.from_linear(linears[0], lambda *axes: CPWeight(*axes, rank=2))
    assert one.stack.layers == 1
    assert relative_error(_dense(linears[0]), one.stack) < 0.1


def _dense(linear):
    dense = DenseWeight(1, linear.in_features, linear.out_features)
    dense.factors[0].data = linear.weight.detach().unsqueeze(1)
    return dense


def test_embeddings_are_stood_in_for_with_their_padding():
    embeddings = [nn.Embedding(7, 3, padding_idx=2), nn.Embedding(7, 3)]
    made = FactorizedEmbedding.from_embeddings(embeddings, DenseWeight)
    assert made[0].stack is made[1].stack
    assert [module.padding_idx for module in made] == [2, None]
    for module, embedding in zip(made, embeddings, strict=True):
        assert_close(module(torch.arange(7)), embedding(torch.arange(7)))
    one = FactorizedEmbedding.from_embedding(embeddings[1], lambda *axes: CPWeight(*axes, rank=3))
    assert_close(one.weight, embeddings[1].weight)


def test_an_output_layer_may_share_the_table_of_an_embedding():
    embed = FactorizedEmbedding(CPWeight(1, 5, 9, rank=4))
    head = FactorizedLinear(embed.stack, bias=False)
    h = torch.randn(2, 5)
    assert_close(head(h), h @ embed.weight.T)
    assert len(list(nn.ModuleList([embed, head]).parameters())) == 3


@pytest.mark.parametrize("make", [DenseWeight, CPWeight, TensorRingWeight])
def test_a_module_is_drawn_as_torch_draws(make):
    linear, embed = FactorizedLinear(make(2, 30, 40)), FactorizedEmbedding(make(2, 30, 40))
    linear.stack.scale_(3.0)
    drawn, looked_up, biases = [], [], []
    for _ in range(100):  # the entries of one draw share factors, so that its spread varies
        linear.reset_parameters()
        embed.reset_parameters()
        drawn.append(linear.weight.detach().square().mean())
        looked_up.append(embed.weight.detach().square().mean())
        biases.append(linear.bias.detach().clone())
    assert abs(torch.stack(drawn).mean() * 3 * 30 - 1) < 0.15
    assert abs(torch.stack(looked_up).mean() - 1) < 0.15
    assert 0.99 * 30**-0.5 < torch.stack(biases).abs().max() <= 30**-0.5
    assert 0 < FactorizedLinear(linear.stack).bias.abs().max() <= 30**-0.5


def test_a_module_is_made_on_meta_and_drawn_later():
    with torch.device("meta"):
        linear = FactorizedLinear(ring())
    linear.to_empty(device="cpu").reset_parameters()
    assert linear(torch.randn(2, 5)).isfinite().all()


def test_a_state_goes_round_and_stays_shared():
    model, other = gated(), gated()
    assert not torch.equal(model(tokens), other(tokens))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(model(tokens), other(tokens))
    copied = copy.deepcopy(model)
    assert copied.gate.stack is copied.up.stack
    assert copied.gate.stack is not model.gate.stack
    assert torch.equal(model(tokens), copied(tokens))
    model.gate.stack.scale_(2.0)
    assert not torch.equal(model(tokens), copied(tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_module_gives_its_dtype(dtype):
    model = gated()
    exact = model.double()(tokens)
    y = model.to(dtype)(tokens)
    assert y.dtype == dtype
    assert_close(
        y.double(), exact, rtol=0, atol=20 * torch.finfo(dtype).eps * exact.detach().abs().max().item() + 1e-12
    )


def test_autocast_is_followed_as_by_nn_linear():
    model, x = gated(), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.gate(x).dtype == nn.Linear(5, 7)(x).dtype == torch.bfloat16
    model.gate(x).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.gate.parameters())


def test_a_module_compiles_as_one_graph_forward_and_backward():
    model = gated()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, got = model(tokens), compiled(tokens)
    assert_close(got, expected)
    parameters = list(model.parameters())
    assert_close(
        torch.autograd.grad(got.square().sum(), parameters), torch.autograd.grad(expected.square().sum(), parameters)
    )


def test_hooks_are_called():
    linear, x = FactorizedLinear(ring()), torch.randn(2, 5)
    y = linear(x)
    linear.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    linear.register_forward_hook(lambda module, inputs, output: output - module.bias)
    assert_close(linear(x), 2 * (y - linear.bias))


def test_torch_func_differentiates_and_stacks():
    models, x = [gated() for _ in range(3)], tokens
    state, _ = torch.func.stack_module_state(models)
    before = dict(models[0].named_parameters())

    def call(state, x):  # with tie_weights torch leaves its own tensors in any module that stands in two places
        return torch.func.functional_call(models[0], state, (x,), tie_weights=False)

    y = torch.func.vmap(call, in_dims=(0, None))(state, x)
    assert all(parameter is before[name] for name, parameter in models[0].named_parameters())
    assert_close(y, torch.stack([model(x) for model in models]))
    state = dict(models[0].named_parameters())
    slopes = torch.func.grad(lambda state: call(state, x).square().sum())(state)
    models[0](x).square().sum().backward()
    assert_close(slopes, {name: parameter.grad for name, parameter in models[0].named_parameters()})


def test_a_module_is_saved_by_its_recipe_and_stays_shared(tmp_path):
    model = gated().eval()
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path, classes=[Gated])
    assert again.gate.stack is again.up.stack
    assert torch.equal(again(tokens), model(tokens))
    assert repr(again) == repr(model)
    save_pretrained(model.up, tmp_path / "one")
    one = from_pretrained(tmp_path / "one")
    assert torch.equal(one(torch.ones(2, 3, 5)), model.up(torch.ones(2, 3, 5)))


def test_a_recipe_that_names_a_layer_outside_is_refused():
    recipe = describe(gated().up)
    assert recipe["FactorizedLinear"]["layer"] == 2
    recipe["FactorizedLinear"]["layer"] = 9
    with pytest.raises(RecipeError, match=r"FactorizedLinear at the top cannot be built: .*range\(3\).*got 9"):
        build(recipe, [FactorizedLinear, TensorRingWeight])


def test_torchs_own_transformer_layer_takes_it_also_on_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.linear1, layer.linear2 = FactorizedLinear(CPWeight(1, 8, 16)), FactorizedLinear(CPWeight(1, 16, 8))
    x, y = torch.randn(2, 4, 8), layer.eval()(torch.zeros(2, 4, 8))
    with torch.no_grad():
        fast = layer(x)
    assert y.requires_grad
    assert_close(fast, layer(x))


def test_a_rank_of_several_has_the_gradients_of_the_module(tmp_path):
    """Of one rank, which is enough to try what DDP asks of a module: that every parameter comes once, and is used."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = gated().double()
        alone = copy.deepcopy(model)
        wrapped = DistributedDataParallel(model)
        for each in (wrapped, alone):
            for _ in range(2):
                each(tokens).square().mean().backward()
        assert_close([p.grad for p in model.parameters()], [p.grad for p in alone.parameters()])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: FactorizedLinear(ring(), 3), IndexError, ["range(3)", "got 3"]),
        (lambda: FactorizedLinear(ring())(torch.zeros(2, 4)), ShapeError, ["in_features=5", "(2, 4)", "last axis"]),
        (lambda: FactorizedLinear(ring())(torch.zeros(())), ShapeError, ["in_features=5", "()"]),
        (lambda: FactorizedLinear(ring())(randn(2, 5)), TypeError, ["float32", "float64", "cast"]),
        (lambda: FactorizedEmbedding(ring())(torch.tensor([7])), IndexError, ["range"]),
        (lambda: FactorizedEmbedding(ring())(torch.tensor([-1])), IndexError, ["range"]),
        (lambda: FactorizedEmbedding(ring(), padding_idx=7), ValueError, ["padding_idx", "num_embeddings=7", "7"]),
        (lambda: FactorizedEmbedding(ring(), padding_idx=0.5), ValueError, ["padding_idx", "0.5"]),
        (
            lambda: FactorizedLinear.from_linears([nn.Linear(3, 5), nn.Linear(3, 4)], DenseWeight),
            ShapeError,
            ["from_linears", "(5, 3)", "(4, 3)", "each size"],
        ),
        (lambda: FactorizedLinear.from_linears([], DenseWeight), ShapeError, ["from_linears", "[]"]),
        (lambda: FactorizedLinear.from_linear(nn.Embedding(3, 5), DenseWeight), TypeError, ["Linear", "Embedding"]),
        (
            lambda: FactorizedLinear.from_linear(nn.Linear(3, 5), lambda *axes: CPWeight(2, 3, 5)),
            ShapeError,
            ["(1, 3, 5)", "(2, 3, 5)"],
        ),
        (
            lambda: FactorizedLinear.from_linear(nn.Linear(3, 5), lambda *axes: SumWeight(DenseWeight(*axes))),
            TypeError,
            ["pattern", "SumWeight"],
        ),
        (lambda: FactorizedEmbedding.from_embedding(nn.Linear(3, 5), DenseWeight), TypeError, ["Embedding", "Linear"]),
        (
            lambda: FactorizedEmbedding.from_embedding(nn.Embedding(3, 5, max_norm=1.0), DenseWeight),
            ValueError,
            ["max_norm", "without"],
        ),
        (
            lambda: FactorizedEmbedding.from_embedding(
                nn.Embedding.from_pretrained(torch.ones(3, 5), padding_idx=1), DenseWeight
            ),
            ValueError,
            ["padding_idx=1", "zero"],
        ),
    ],
)
def test_bad_input_is_one_sentence(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_weight_that_cannot_be_drawn_says_what_it_lacks():
    class Fixed(Weight):
        def __init__(self):
            super().__init__()
            self.layers, self.d_model, self.latents = 1, 2, 3
            self.full = nn.Parameter(torch.ones(1, 2, 3))

        def to_latents(self, x):
            return torch.einsum("...ld,ldn->...n", x, self.full)

        def to_layers(self, z):
            return torch.einsum("...n,ldn->...ld", z, self.full)

    linear = FactorizedLinear(Fixed())
    assert_close(linear(torch.ones(2)), 2 + linear.bias)
    with pytest.raises(TypeError, match=r"normal_\(std\).*Fixed"):
        linear.reset_parameters()


def test_the_repr_says_the_sizes_and_the_place():
    linear = FactorizedLinear(ring(), 1)
    assert "in_features=5, out_features=7, bias=True, layer=1 of 3" in repr(linear)
    assert "7, 5, padding_idx=6, layer=0 of 3" in repr(FactorizedEmbedding(ring(), padding_idx=-1))
    assert "TensorRingWeight(...).at(1): d_model=5, latents=7" in repr(ring().at(1))


def test_a_matrix_of_more_axes_is_a_pattern_too():
    """The tensor-train matrix of the literature: inputs and outputs are each a product of axes."""
    sizes = {"layers": 1, "i": 4, "j": 3, "latents": 6, "r": 12, "s": 3}
    tensor_train = EinsumWeight("layers i r, r j s, s latents", reads="layers i j", **sizes)
    linear = FactorizedLinear.from_linear(nn.Linear(12, 6), lambda *_: tensor_train, sweeps=50)
    assert linear.in_features == 12
    x = torch.randn(5, 12)
    assert_close(linear(x), functional.linear(x, linear.weight, linear.bias))
