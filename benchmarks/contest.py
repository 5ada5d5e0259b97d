"""What is timed: one training step of every contender, on the same random activations, and the alternation that times
it.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from peers import PEERS, Built
from torch import Tensor, nn

import fmxnn
from fmxnn.training.losses import reconstruction_loss
from fmxnn.weights.ranks import tensor_ring_ranks

SHARES = {"dense": 1.0, "TR": 1.0, "CP": 1.0, "TR 1/2": 1 / 2, "TR 1/4": 1 / 4, "TR 1/8": 1 / 8}


@dataclass(frozen=True)
class Shape:
    """The sizes that every contender shares."""

    tokens: int = 1024
    layers: int = 8
    d_model: int = 256
    latents: int = 8192
    k: int = 32

    @property
    def axes(self) -> tuple[int, int, int]:
        """What a weight is made from."""
        return self.layers, self.d_model, self.latents

    def activations(self) -> Tensor:
        """`tokens layers d_model`: random, the same ones in every process."""
        return torch.randn(self.tokens, self.layers, self.d_model, generator=torch.Generator().manual_seed(0))

    def numbers(self) -> dict[str, int]:
        """To write down."""
        return asdict(self)


@dataclass(frozen=True)
class Contender:
    """A loss, what it trains, and perhaps an optimiser."""

    loss: Callable[[], Tensor]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer | None = None

    def clear(self) -> None:
        """Gradients to None."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        """Forward, backward, and the update where there is an optimiser."""
        self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()

    def gradient_bytes(self) -> int:
        """What the gradients hold."""
        return sum(p.grad.untyped_storage().nbytes() for p in self.parameters if p.grad is not None)


def make_weight(shape: Shape, name: str) -> fmxnn.Weight:
    """dense, TR, CP or TR at a share of the dense weight's parameters; the ranks are the paper's rule."""
    if name == "dense":
        return fmxnn.DenseWeight(*shape.axes)
    if name == "CP":
        return fmxnn.CPWeight(*shape.axes)
    return fmxnn.TensorRingWeight(*shape.axes, ranks=tensor_ring_ranks(*shape.axes, share=SHARES[name]))


def make_crosscoder(shape: Shape, name: str, sparsifier: nn.Module | None = None) -> fmxnn.Crosscoder:
    """A crosscoder in training, BatchTopK if nothing else is asked for."""
    torch.manual_seed(0)
    sparsifier = fmxnn.BatchTopK(shape.k) if sparsifier is None else sparsifier
    encoder = fmxnn.CrossLayerEncoder(make_weight(shape, name), sparsifier)
    return fmxnn.Crosscoder(encoder, fmxnn.CrossLayerDecoder(make_weight(shape, name))).train()


class PlainBatchTopK(nn.Module):
    """BatchTopK as it is usually written: torch.topk over the flattened batch, scattered into zeros."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, pre: Tensor) -> Tensor:
        """`tokens latents -> tokens latents`"""
        flat = pre.relu().flatten()
        top = flat.topk(len(pre) * self.k, sorted=False)
        return torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(pre)


def ours(x: Tensor, shape: Shape, name: str) -> Built:
    """fmxnn as a user calls it."""
    crosscoder = make_crosscoder(shape, name)
    return lambda: reconstruction_loss(x, crosscoder(x)), list(crosscoder.parameters())


def contracted(x: Tensor, shape: Shape, name: str, sparsifier: nn.Module | None = None) -> Built:
    """The same modules held to dense codes: contracted autograd."""
    crosscoder = make_crosscoder(shape, name, sparsifier)
    encoder = crosscoder.encoder
    return lambda: reconstruction_loss(x, crosscoder.decoder(encoder.sparsifier(encoder.pre_activations(x)))), list(
        crosscoder.parameters()
    )


def makers(x: Tensor, shape: Shape) -> dict[str, Callable[[], Built]]:
    """Every contender by name, to be built when it is wanted."""
    made: dict[str, Callable[[], Built]] = {
        name: lambda peer=peer: peer(x, shape.latents, shape.k) for name, peer in PEERS.items()
    }
    made |= {f"fmxnn {name}": lambda name=name: ours(x, shape, name) for name in SHARES}
    made |= {
        f"contracted {name}": lambda name=name: contracted(x, shape, name) for name in ("dense", "TR", "CP", "TR 1/8")
    }
    plain = {f"all-dense torch.topk {name}": name for name in ("dense", "TR", "CP")}
    return made | {
        label: lambda name=name: contracted(x, shape, name, PlainBatchTopK(shape.k)) for label, name in plain.items()
    }


def contender(built: Built, *, optimizer: bool = False) -> Contender:
    """With or without torch's fused Adam, the same for all."""
    loss, parameters = built
    return Contender(loss, parameters, torch.optim.Adam(parameters, lr=1e-5, fused=True) if optimizer else None)


def nothing() -> None:
    """What happens before a call that needs no preparation."""


def alternate(
    calls: dict[str, Callable[[], object]], rounds: int, before: Callable[[], None] = nothing, *, collect: bool = True
) -> dict[str, list[float]]:
    """Milliseconds of every call, one after the other, `rounds` times round, after one round that is not counted;
    `collect`: garbage before each.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            before()
            if collect:
                gc.collect()
            start = time.perf_counter()
            call()
            spent = 1e3 * (time.perf_counter() - start)
            if turn:
                times[name].append(spent)
    return times
