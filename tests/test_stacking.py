import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import named, randn, seeds
from torch.testing import assert_close

import fmxnn as fx


@st.composite
def dictionaries(draw, d_model, gates=(fx.TopK, fx.BatchTopK, fx.JumpReLU, torch.nn.ReLU)):
    """A crosscoder that writes the layers it reads, with any of the gates, its threshold set."""
    weight = draw(named(d_model=d_model))
    latents, gate = weight.latents, draw(st.sampled_from(gates))
    encoder = fx.CrossLayerEncoder(
        weight, gate() if gate is torch.nn.ReLU else gate(latents if gate is fx.JumpReLU else 1)
    )
    made = fx.Crosscoder(encoder, fx.CrossLayerDecoder(draw(named(weight.layers, d_model, latents)))).double()
    for bias in (made.encoder.bias, made.decoder.bias):
        torch.nn.init.normal_(bias)
    threshold = getattr(encoder.sparsifier, "threshold", torch.zeros(()))
    threshold.copy_(torch.rand_like(threshold))
    return made


@given(st.integers(1, 3), seeds, st.data())
def test_each_does_in_the_stack_what_it_does_alone(d_model, seed, data):
    torch.manual_seed(seed)
    alone = [data.draw(dictionaries(d_model)).eval() for _ in range(data.draw(st.integers(1, 3)))]
    together = fx.stack_layers(*alone)
    sizes = [each.encoder.weight.layers for each in alone]
    x = randn(5, sum(sizes), d_model)
    parts = list(zip(alone, x.split(sizes, dim=-2), strict=True))
    assert_close(together.encode(x), torch.cat([each.encode(part) for each, part in parts], dim=-1))
    assert_close(together(x), torch.cat([each(part) for each, part in parts], dim=-2))
    own = sum(p.numel() for each in alone for p in each.parameters())
    assert sum(p.numel() for p in together.parameters()) == own


@given(
    st.integers(1, 3), seeds, st.lists(st.sampled_from(["plain", "same", "other"]), min_size=1, max_size=3), st.data()
)
def test_what_is_kept_beside_each_is_kept_beside_the_stack(d_model, seed, kinds, data):
    torch.manual_seed(seed)

    def beside(layers):
        return fx.Normalisation.of(torch.rand(layers) + 0.5, torch.randn(layers, d_model)).double()

    alone = []
    for kind in kinds:
        coder = data.draw(dictionaries(d_model)).eval()
        layers = coder.encoder.weight.layers
        output = beside(layers) if kind == "other" else None
        alone.append(coder if kind == "plain" else fx.Normalised(coder, beside(layers), output=output).eval())
    together = fx.stack_layers(*alone)
    assert isinstance(together, fx.Crosscoder if set(kinds) == {"plain"} else fx.Normalised)
    sizes = [getattr(each, "crosscoder", each).encoder.weight.layers for each in alone]
    x = randn(5, sum(sizes), d_model)
    parts = list(zip(alone, x.split(sizes, dim=-2), strict=True))
    assert_close(together.encode(x), torch.cat([each.encode(part) for each, part in parts], dim=-1))
    assert_close(together(x), torch.cat([each(part) for each, part in parts], dim=-2))


@given(st.integers(1, 3), seeds, st.booleans(), st.integers(0, 6), st.data())
def test_a_stack_on_sparse_codes_is_the_stack_on_dense_ones(d_model, seed, training, tokens, data):
    torch.manual_seed(seed)
    alone = [
        data.draw(dictionaries(d_model, [fx.TopK, fx.BatchTopK, fx.JumpReLU]))
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    stack = fx.stack_layers(*alone).train(training)
    x, found = randn(tokens, stack.encoder.weight.layers, d_model), []
    for backend in ("dense", "sparse"):
        twin = copy.deepcopy(stack)
        twin.backend = backend
        own = x.clone().requires_grad_()
        x_hat = twin(own)
        x_hat.pow(2).sum().backward()
        found.append([x_hat, own.grad, *(p.grad for p in twin.parameters()), *twin.buffers()])
    assert_close(*found)
    assert_close(stack.eval().encode(x, layout=torch.sparse_csr).to_dense(), stack.encode(x))


@given(seeds, st.lists(st.integers(1, 4), min_size=1, max_size=3), st.booleans())
def test_a_gate_for_each_run_of_one_table_or_of_tables_cut_elsewhere(seed, lengths, several):
    torch.manual_seed(seed)
    latents = sum(lengths)
    cut = latents // 2
    axes = {"layers": 2, "d_model": 3}
    whole = fx.DenseWeight(**axes, latents=latents)
    weight = (
        fx.ConcatWeight(fx.DenseWeight(**axes, latents=cut), fx.CPWeight(**axes, latents=latents - cut, rank=2))
        if several and cut
        else whole
    )
    gate = fx.SplitGate(*(fx.TopK(1 + length // 2) for length in lengths), runs=tuple(lengths))
    coder = fx.Crosscoder(fx.CrossLayerEncoder(weight, gate), fx.CrossLayerDecoder(whole)).double()
    x = randn(5, 2, 3)
    assert gate.k == sum(1 + length // 2 for length in lengths)
    assert not hasattr(gate, "threshold")
    assert_close(coder.encode(x, layout=torch.sparse_csr).to_dense(), coder.encode(x))


def test_a_stack_is_planned_by_what_its_gates_keep_together():
    stack = fx.stack_layers(dictionary(), dictionary())
    assert stack.plan(64).sizes.k == 4
    assert "dense:" not in repr(stack)
    stack.encoder.sparsifier.gates[0].threshold.fill_(1.0)
    stack.eval()
    assert stack.encoder.sparsifier.threshold == -1  # that of the other, not set
    stack.encoder.sparsifier.gates[1].threshold.fill_(0.5)
    assert stack.encoder.sparsifier.threshold == 0.5
    mixed = fx.SplitGate(fx.TopK(1), torch.nn.ReLU(), runs=(2, 3))
    assert mixed.obstacle == "ReLU has no choose"
    assert not hasattr(mixed, "k")


def test_one_gate_for_each_layer_compiles_as_one_graph():
    torch.compiler.reset()
    stack = fx.stack_layers(dictionary(), dictionary()).double()
    stack.backend = "sparse"
    x = randn(6, 2, 3)
    assert_close(torch.compile(stack, fullgraph=True, backend="aot_eager")(x), stack(x))


def test_weights_are_shared_and_train():
    torch.manual_seed(0)
    alone = [dictionary() for _ in range(2)]
    together = fx.stack_layers(*alone).train()
    assert together.encoder.weight.weights[1].weight is alone[1].encoder.weight
    x = torch.randn(16, 2, 3)
    losses = []
    optimizer = torch.optim.Adam(together.parameters(), lr=1e-2)
    for _ in range(30):
        loss = (together(x) - x).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(gate.threshold > 0 for gate in together.encoder.sparsifier.gates)


def dictionary(layers=1):
    weights = [fx.DenseWeight(layers, 3, 6) for _ in range(2)]
    return fx.Crosscoder(fx.CrossLayerEncoder(weights[0], fx.BatchTopK(2)), fx.CrossLayerDecoder(weights[1]))


def test_what_cannot_be_stacked_is_refused():
    with pytest.raises(
        ValueError, match="stack_layers puts crosscoders side by side, got none; pass one for each layer"
    ):
        fx.stack_layers()
    with pytest.raises(TypeError, match="takes crosscoders, each with a CrossLayerDecoder, got SkipCrosscoder"):
        fx.stack_layers(fx.SkipCrosscoder(dictionary()))
    transcoder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(1, 3, 6), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 3, 6))
    )
    with pytest.raises(
        fx.ShapeError, match=re.escape("got one that reads layers=1, d_model=3 and writes layers=2, d_model=3; place")
    ):
        fx.stack_layers(dictionary(), transcoder)
    with pytest.raises(
        ValueError, match=re.escape("SplitGate takes one run of latents for each gate, got 1 gates and runs=(2, 3)")
    ):
        fx.SplitGate(fx.TopK(1), runs=(2, 3))
