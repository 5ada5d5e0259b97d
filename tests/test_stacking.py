import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import named, randn, seeds
from torch.testing import assert_close

import fmxnn as fx


@st.composite
def dictionaries(draw, d_model):
    """A crosscoder that writes the layers it reads, with any gate, its threshold set."""
    weight = draw(named(d_model=d_model))
    latents = weight.latents
    gates = [fx.TopK(1), fx.BatchTopK(1), fx.JumpReLU(latents), torch.nn.ReLU()]
    encoder = fx.CrossLayerEncoder(weight, draw(st.sampled_from(gates)))
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
    with pytest.raises(ValueError, match="stack_layers puts crosscoders side by side, got none; pass one for each layer"):
        fx.stack_layers()
    with pytest.raises(TypeError, match="takes crosscoders, each with a CrossLayerDecoder, got SkipCrosscoder"):
        fx.stack_layers(fx.SkipCrosscoder(dictionary()))
    transcoder = fx.Crosscoder(fx.CrossLayerEncoder(fx.DenseWeight(1, 3, 6), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 3, 6)))
    with pytest.raises(fx.ShapeError, match=re.escape("got one that reads layers=1, d_model=3 and writes layers=2, d_model=3; place")):
        fx.stack_layers(dictionary(), transcoder)
    with pytest.raises(ValueError, match=re.escape("SplitGate takes one run of latents for each gate, got 1 gates and runs=(2, 3)")):
        fx.SplitGate(fx.TopK(1), runs=(2, 3))
