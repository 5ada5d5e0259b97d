"""A small trainer that keeps every part of training busy, and whether two of them are the same to the last bit."""

import torch

import fmxnn as fx
from fmxnn.training import Trainer


def make_trainer(seed=0, auxiliary=None, dtype=torch.float32):
    torch.manual_seed(seed)
    weights = [fx.TensorRingWeight(3, 8, 16, ranks=(2, 4, 6)) for _ in range(2)]
    crosscoder = fx.Crosscoder(
        fx.CrossLayerEncoder(weights[0], fx.BatchTopK(3), mask=fx.LayerMask(0.3)), fx.CrossLayerDecoder(weights[1])
    )
    fx.tied_start(crosscoder)
    with torch.no_grad():
        crosscoder.encoder.bias[:4] = -9.0  # four latents that never fire
    return Trainer(
        crosscoder,
        torch.optim.Adam(crosscoder.parameters(), lr=1e-2, fused=True),
        seed=seed,
        auxiliary=auxiliary,
        dtype=dtype,
    )


def batch(step):
    return torch.randn(32, 3, 8, generator=torch.Generator().manual_seed(step))


def bits(trainer):
    tensors, numbers = trainer.state()
    return {**trainer.crosscoder.state_dict(), **tensors}, {key: numbers[key] for key in ("steps", "tokens", "seed")}


def assert_same(one, other):
    for mine, theirs in zip(
        sorted(bits(one)[0].items(), key=lambda pair: pair[0]),
        sorted(bits(other)[0].items(), key=lambda pair: pair[0]),
        strict=True,
    ):
        assert mine[0] == theirs[0]
        assert torch.equal(mine[1], theirs[1]), mine[0]
    assert bits(one)[1] == bits(other)[1]
