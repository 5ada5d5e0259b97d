"""Train a crosscoder on planted features, whose truth is known, and count how many of them it finds.

python examples/planted.py --preset seconds --weight dense --start tied
"""

import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from tqdm import tqdm

import fmxnn as fx
from fmxnn.harvest import activation_scale
from fmxnn.metrics.planted import PRESETS, Preset
from fmxnn.metrics.recovery import recovery
from fmxnn.training import Trainer, fold_scale


@dataclass
class Arguments:
    """Which truth, and what is trained on it."""

    preset: Literal["seconds", "minutes", "gpu"] = "seconds"
    weight: Literal["dense", "tr-wide", "cp"] = "dense"
    start: Literal["gaussian", "tied", "isometric"] = "tied"
    mask_p: float = 0.0
    """The probability that a layer is hidden from the encoder."""
    learning_rate: float = 3e-3
    steps: int | None = None
    """None takes the preset's."""
    seed: int = 0
    """Of the truth and of the start."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def make_crosscoder(arguments: Arguments, preset: Preset) -> fx.Crosscoder:
    """A crosscoder of the preset's sizes, started; ring and CP have as many parameters as the dense weight."""
    sizes = preset.layers, preset.d_model, preset.latents
    make = {
        "dense": lambda: fx.DenseWeight(*sizes),
        "tr-wide": lambda: fx.TensorRingWeight(*sizes, ranks=fx.wide_tensor_ring_ranks(*sizes)),
        "cp": lambda: fx.CPWeight(*sizes),
    }[arguments.weight]
    start = {"gaussian": fx.gaussian_start, "tied": fx.tied_start, "isometric": fx.isometric_start}[arguments.start]
    torch.manual_seed(arguments.seed)
    encoder = fx.CrossLayerEncoder(make(), fx.BatchTopK(preset.k), mask=fx.LayerMask(arguments.mask_p))
    return start(fx.Crosscoder(encoder, fx.CrossLayerDecoder(make()))).to(arguments.device)


def main(argv: list[str] | None = None) -> int:
    """Trains, and prints what was found of each kind of feature."""
    arguments = tyro.cli(Arguments, args=argv)
    preset = PRESETS[arguments.preset]
    truth = preset.truth(seed=arguments.seed).to(arguments.device)
    batches = (truth.batch(number, preset.tokens)[0] for number in range(arguments.steps or preset.steps))
    scale = activation_scale(truth.batch(number, preset.tokens)[0] for number in range(4))
    crosscoder = make_crosscoder(arguments, preset)
    trainer = Trainer(crosscoder, torch.optim.Adam(crosscoder.parameters(), lr=arguments.learning_rate, fused=True), seed=arguments.seed)
    started = time.perf_counter()
    for x in tqdm(batches, total=arguments.steps or preset.steps, unit="step"):
        trainer.step(x * scale)
    seconds = time.perf_counter() - started
    print(recovery(fold_scale(crosscoder, scale), truth).table())
    print(
        f"{arguments.weight}, {arguments.start} start, {trainer.steps:,} steps of {preset.tokens:,} tokens in {seconds:.1f} s on {arguments.device}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
