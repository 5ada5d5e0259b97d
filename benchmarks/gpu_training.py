"""A whole run, as fmxnn train does it: harvest from a GPT2-Small-shaped random model that reads random tokens,
and train on it.
"""

import time
from collections.abc import Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import fmxnn as fx
from fmxnn.activations import Activations, Contexts, activation_scale, harvest
from fmxnn.training import Trainer, overlapped

PAPER_TOKENS = 300_000_000
SYNCHRONISED = 20
"""Steps between two looks at the clock, before which the GPU is waited for."""


def end_to_end(device: str, seconds: float, *, tiny: bool) -> dict[str, float]:
    """Tokens a second of harvest and training together, over `seconds`, and of the harvest alone."""
    stream, latents, k = make_stream(device, tiny=tiny)
    batch = stream.shuffle.batch
    scale = activation_scale(islice(stream, 2))
    trainer = make_trainer(stream, latents, k, device)
    batches, alone = overlapped(stream, device), iter(stream.starting_at(1))
    for x in islice(batches, 3):
        trainer.step(x * scale)  # compiles and allocates what is made once
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    steps, spent = train(trainer, batches, scale, 0.5 if tiny else seconds, device)
    in_turn, spent_in_turn = train(trainer, alone, scale, 0.5 if tiny else seconds / 3, device)
    rate = steps * batch / spent
    return {
        "tokens/s": rate,
        "seconds": spent,
        "tokens/s, harvest and step in turn": in_turn * batch / spent_in_turn,
        "minutes for 300M tokens, projected (goal: 15)": PAPER_TOKENS / rate / 60,
        "harvest alone, tokens/s": harvest_rate(batches, batch, device, 50 if tiny else 100),
        "peak GB": torch.cuda.max_memory_allocated(device) / 1e9 if device.startswith("cuda") else 0.0,
    }


def train(trainer: Trainer, batches: Iterator[Tensor], scale: float, seconds: float, device: str) -> tuple[int, float]:
    """Steps until the time is over: how many, and how long they took."""
    start, first = time.perf_counter(), trainer.steps
    while (spent := time.perf_counter() - start) < seconds:
        for x in islice(batches, SYNCHRONISED):
            trainer.step(x * scale)
        wait(device)
    return trainer.steps - first, spent


def harvest_rate(batches: Iterator[Tensor], batch: int, device: str, count: int) -> float:
    """Tokens a second of the language model and the shuffling alone."""
    wait(device)
    start = time.perf_counter()
    for _ in islice(batches, count):
        pass
    wait(device)
    return count * batch / (time.perf_counter() - start)


def wait(device: str) -> None:
    """Until a GPU has done what was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def make_stream(device: str, *, tiny: bool) -> tuple[Activations, int, int]:
    """Activations of layers 2 to 9 of a random model, and the dictionary's latents and K."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_head=2, vocab_size=512) if tiny else GPT2Config()
    ids = torch.randint(0, config.vocab_size, (64 if tiny else 8192, 128), dtype=torch.int32)
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[:, 0] = False
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = GPT2LMHeadModel(config).to(dtype)
    nn.Module.requires_grad_(model, False)
    options = dict(layers=range(2, 10), batch=256 if tiny else 4096, block=16 if tiny else 256, epochs=1_000_000)
    return (
        harvest(model, Contexts(ids, keep), device=device, dtype=dtype, **options),
        256 if tiny else 16_384,
        4 if tiny else 64,
    )


def make_trainer(stream: Activations, latents: int, k: int, device: str) -> Trainer:
    """A tensor ring at equal parameters with masked layers, the paper's fmxcoder."""
    weight = partial(fx.TensorRingWeight, len(stream.layers), stream.d_model, latents)
    encoder = fx.CrossLayerEncoder(weight(), fx.BatchTopK(k), mask=fx.LayerMask(p=0.05))
    crosscoder = fx.gaussian_start(fx.Crosscoder(encoder, fx.CrossLayerDecoder(weight()))).to(device)
    return Trainer(crosscoder, torch.optim.Adam(crosscoder.parameters(), lr=3e-4, fused=True), dtype=torch.bfloat16)
