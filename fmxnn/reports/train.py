"""What `fmxnn train` runs: a crosscoder from text to a saved and measured dictionary.

Read it top to bottom: every step is a part of fmxnn that you can call yourself.
"""

from collections.abc import Callable
from contextlib import closing
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import fmxnn as fx
from fmxnn.activations import Activations, ActivationStore, activation_scale, contexts, harvest
from fmxnn.activations.models import open_tokenizer
from fmxnn.core.files.locks import locked
from fmxnn.metrics import functional_coherence, measure_reconstruction, norm_coherence
from fmxnn.reports.train_arguments import Arguments
from fmxnn.reports.training_log import Log
from fmxnn.training import (
    AuxiliaryLoss,
    CheckpointError,
    StopSignals,
    Trainer,
    calibrate,
    fold_scale,
    list_checkpoints,
    load_checkpoint,
    overlapped,
    save_checkpoint,
)


def make_weight(kind: str, layers: int, d_model: int, latents: int, *, share: float = 1.0) -> fx.Weight:
    """`layers d_model latents` of the kind that was asked for."""
    sizes = layers, d_model, latents
    match kind:
        case "dense":
            return fx.DenseWeight(*sizes)
        case "tr":
            return fx.TensorRingWeight(*sizes, ranks=fx.tensor_ring_ranks(*sizes, share=share))
        case "tr-wide":
            return fx.TensorRingWeight(*sizes, ranks=fx.wide_tensor_ring_ranks(*sizes, share=share))
        case "cp":
            return fx.CPWeight(*sizes, rank=fx.cp_rank(*sizes, share=share))
        case pattern:
            terms, _, bonds = pattern.partition(";")
            given: dict[str, Any] = {
                name.strip(): int(size)
                for name, _, size in (bond.partition("=") for bond in bonds.split(",") if bond.strip())
            }
            return fx.EinsumWeight(terms, layers=layers, d_model=d_model, latents=latents, **given)


def make_crosscoder(arguments: Arguments, stream: Activations, scale: float) -> fx.Crosscoder:
    """The crosscoder, started; from data, on twice as many tokens as it has latents."""
    torch.manual_seed(arguments.seed)
    weight = partial(
        make_weight, arguments.weight, len(arguments.layers), stream.d_model, arguments.latents, share=arguments.share
    )
    encoder = fx.CrossLayerEncoder(weight(), fx.BatchTopK(arguments.k), mask=fx.LayerMask(arguments.mask_p))
    crosscoder = fx.Crosscoder(encoder, fx.CrossLayerDecoder(weight()))
    if arguments.start == "data":
        if arguments.to is not None:
            raise ValueError("--start data sets the decoder by x, and a transcoder rebuilds y; take another --start")
        tokens = torch.cat([x.cpu() for x in islice(stream, -(-2 * arguments.latents // arguments.batch))])
        return fx.data_start(crosscoder, scale * tokens).to(arguments.device)
    start = {"gaussian": fx.gaussian_start, "tied": fx.tied_start, "isometric": fx.isometric_start}[arguments.start]
    return start(crosscoder).to(arguments.device)


def open_text(names: tuple[str, ...]) -> Any:
    """What `contexts` reads: one name without a dot that is no file is a dataset of the Hub; else files."""
    files = [Path(name) for name in names]
    is_dataset = len(names) == 1 and not files[0].exists() and "." not in files[0].name
    return datasets.load_dataset(names[0], split="train", streaming=True) if is_dataset else files


def make_streams(arguments: Arguments) -> tuple[Any, Any]:
    """Activations to train on and held-out ones, `tokens layers d_model`, harvested while they are read or stored."""
    options: dict[str, Any] = dict(batch=arguments.batch, seed=arguments.seed)
    options |= dict(dtype=getattr(torch, arguments.dtype))  # of the language model and its activations
    if arguments.activations is not None:
        heldout, train = ActivationStore(arguments.activations, **options).split(arguments.heldout)
        return train, heldout
    options |= dict(layers=arguments.layers, at=arguments.at, to=arguments.to, device=arguments.device)
    tokenizer = open_tokenizer(arguments.model)
    text = contexts(
        open_text(arguments.text),
        tokenizer,
        context=arguments.context,
        tokens=arguments.tokens + arguments.heldout + arguments.context,
    )
    heldout, train = text.split(arguments.heldout)
    stream = harvest(arguments.model, train, **options)
    return stream, harvest(stream.model, heldout, **options)


def scaled(batch: Tensor | tuple[Tensor, Tensor], scale: float) -> tuple[Tensor, ...]:
    """`tokens layers d_model`: x alone, or x and the targets y, times the scale."""
    return (batch * scale,) if isinstance(batch, Tensor) else tuple(side * scale for side in batch)


def evaluate(crosscoder: fx.Crosscoder, heldout: Any, scale: float, *, coherence: bool = False) -> dict[str, float]:
    """The numbers of a crosscoder on held-out tokens, in the units that it was trained in."""
    numbers = measure_reconstruction(crosscoder, (scaled(batch, scale) for batch in heldout)).numbers()
    if coherence:
        read = (scaled(batch, scale)[0] for batch in islice(heldout, 8))
        numbers["norm_coherence"] = norm_coherence(crosscoder.decoder.weight).mean
        numbers["functional_coherence"] = functional_coherence(crosscoder, read).mean
    return numbers


class Run(NamedTuple):
    """All that a run works on: its trainer, what it reads, the scale, and what a checkpoint says of it."""

    arguments: Arguments
    trainer: Trainer
    stream: Any
    heldout: Any
    scale: float
    fixed: Callable[[], dict[str, object]]

    @property
    def crosscoder(self) -> fx.Crosscoder:
        """The crosscoder, which the trainer holds."""
        return self.trainer.crosscoder


def prepare(arguments: Arguments) -> Run:
    """Opens the language model and the text, and starts the crosscoder or loads it where the run stopped."""
    if arguments.device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"device {arguments.device!r} was asked for and torch sees no GPU; use --device cpu")
        torch.set_float32_matmul_precision("high")  # TF32; torch's default is 10 times slower on a GPU
    if list_checkpoints(arguments.out) and not arguments.resume:
        raise CheckpointError(f"{arguments.out} holds checkpoints; go on with --resume or choose another --out")
    arguments = arguments.completed()
    stream, heldout = make_streams(arguments)
    scale = activation_scale(scaled(batch, 1.0)[0] for batch in islice(stream, 8)) if arguments.scale else 1.0
    crosscoder = make_crosscoder(arguments, stream, scale)
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.999), fused=True)
    auxiliary = AuxiliaryLoss(k=stream.d_model // 2, after=arguments.dead_after) if arguments.auxiliary else None
    trainer = Trainer(
        crosscoder, optimizer, seed=arguments.seed, auxiliary=auxiliary, dtype=getattr(torch, arguments.dtype)
    )
    # The text may change where its name does not. To know all of it takes its end, which the first save waits for.
    fixed = cache(lambda: {**arguments.fixed(), "stream": stream.identity()})
    if arguments.resume:
        for sentence in load_checkpoint(arguments.out, trainer, fixed()):
            tqdm.write(sentence)
    return Run(arguments, trainer, stream, heldout, scale, fixed)


def train(arguments: Arguments) -> int:
    """Trains to the end or to a signal; gives the exit code."""
    run = prepare(arguments)
    arguments = run.arguments
    arguments.out.mkdir(parents=True, exist_ok=True)
    path, logger, config = arguments.out / "log.jsonl", arguments.logger, arguments.fixed()
    with locked(path), StopSignals() as stop, closing(Log(path, run.trainer.steps, logger, config)) as log:
        take_steps(run, stop, log)
        save_checkpoint(arguments.out, run.trainer, run.fixed())
        if stop.received:
            tqdm.write(f"stopped by signal {stop.received} and saved at step {run.trainer.steps}; go on with --resume")
            return stop.exit_code
        l0 = calibrate(run.crosscoder, [scaled(batch, run.scale)[0] for batch in islice(run.stream, 8)])
        tqdm.write(f"set the threshold on training tokens: L0 {l0.before:.4g} before, {l0.after:.4g} after")
        numbers = evaluate(run.crosscoder, run.heldout, run.scale, coherence=True)
        record = {f"heldout/{name}": value for name, value in numbers.items()}
        log.write(run.trainer.steps, {"l0_before_calibration": l0.before} | record)
    save(run, numbers)
    return 0


def take_steps(run: Run, stop: StopSignals, log: Log) -> None:
    """Every step that is left, up to a signal, with a checkpoint and an evaluation now and then."""
    arguments, trainer = run.arguments, run.trainer
    total = arguments.tokens // arguments.batch
    batches = islice(overlapped(run.stream.starting_at(trainer.steps), arguments.device), total - trainer.steps)
    with tqdm(total=total * arguments.batch, initial=trainer.tokens, unit="tok", unit_scale=True) as bar:
        for batch in batches:
            numbers = trainer.step(*scaled(batch, run.scale))
            bar.update(arguments.batch)
            if trainer.steps % 50 == 0:
                log.write(trainer.steps, {name: value.item() for name, value in numbers.items()})
                bar.set_postfix(loss=f"{numbers['loss'].item():.4g}", dead=f"{numbers['dead'].item():.1%}")
            if trainer.steps % arguments.evaluate_every == 0:
                measured = evaluate(run.crosscoder, run.heldout, run.scale)
                log.write(trainer.steps, {f"heldout/{name}": value for name, value in measured.items()})
            if stop.received:
                return
            if trainer.steps % arguments.checkpoint_every == 0:
                save_checkpoint(arguments.out, trainer, run.fixed())
    if trainer.steps < total:
        tqdm.write(f"the text ended after {trainer.tokens:,} of {arguments.tokens:,} tokens; give more for longer runs")


def save(run: Run, numbers: dict[str, float]) -> None:
    """Saves the crosscoder in the units of the language model, with what it was trained on and how well it does."""
    arguments, folder = run.arguments, run.arguments.out / "crosscoder"
    models = arguments.model.split(", ") if arguments.activations else [arguments.model]
    about: dict[str, object] = {"base_model": models if models[1:] else models[0], "layers": list(arguments.layers)}
    about |= {} if arguments.to is None and arguments.at == "block_out" else {"at": arguments.at, "to": arguments.to}
    about |= {"activations": arguments.activations.name} if arguments.activations else {"text": list(arguments.text)}
    about |= {"tokens": run.trainer.tokens}
    about["metrics (of activations times the scale)"] = {name: round(value, 5) for name, value in numbers.items()}
    fx.save_pretrained(fold_scale(run.crosscoder, run.scale), folder, about=about | {"scale": run.scale})
    tqdm.write(f"saved {folder}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))


def main(argv: list[str] | None = None) -> int:
    """Trains as the arguments say, and gives the exit code."""
    said = "Trains a crosscoder on a language model's layers. The defaults are the fmxcoders paper's for GPT2-Small."
    return train(tyro.cli(Arguments, prog="fmxnn train", description=said, args=argv))
