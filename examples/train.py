"""Train a crosscoder on a language model's layers, from text to a saved and measured dictionary.

python examples/train.py --model openai-community/gpt2 --text Skylion007/openwebtext --weight tr --mask-p 0.05 --out
runs/gpt2

The defaults are the fmxcoders paper's for GPT2-Small. Read it top to bottom: every step is a part of fmxnn that you can
call yourself.
"""

import importlib
import json
import os
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import datasets
import torch
import tyro
from tqdm import tqdm

import fmxnn as fx
from fmxnn.activations import Activations, activation_scale, contexts, harvest
from fmxnn.activations.models import open_tokenizer
from fmxnn.core.files.locks import locked
from fmxnn.metrics import functional_coherence, measure_reconstruction, norm_coherence
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


@dataclass
class Arguments:
    """What to train, on what, and where to put it."""

    model: str = "openai-community/gpt2"
    """A transformers causal language model: a folder or a Hub name."""
    text: tuple[str, ...] = ("Skylion007/openwebtext",)
    """Text or JSONL files, or the Hub name of one dataset with a "text" column."""
    layers: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 9)
    """The blocks whose outputs are read, from zero."""
    weight: str = "tr"
    """dense, tr, tr-wide (r1 r2 >= d_model), cp, or any pattern with its bonds' sizes: "latents r, d_model r, layers r;
    r=512".
    """
    share: float = 1.0
    """Parameters of a tr or cp weight as a share of the dense one's."""
    latents: int = 16384
    k: int = 64
    """Latents that fire a token, on average."""
    mask_p: float = 0.05
    """The probability that a layer is hidden from the encoder."""
    start: Literal["gaussian", "tied", "isometric", "data"] = "gaussian"
    """gaussian is the paper's; data, from activations, had the lowest error in our runs, then isometric."""
    scale: bool = True
    """Train on activations scaled to a mean norm of sqrt(d_model); folded into the weights before saving."""
    auxiliary: bool = False
    """Add the auxiliary loss that revives dead latents."""
    dead_after: int = 10_000_000
    """Tokens of silence after which the auxiliary loss takes a latent for dead."""
    tokens: int = 300_000_000
    heldout: int = 200_000
    """Tokens of the text, from its start, that are kept for evaluation."""
    context: int = 128
    batch: int = 4096
    """Tokens a step."""
    learning_rate: float = 3e-4
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["bfloat16", "float32"] = (
        "bfloat16"
        if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        else "float32"
    )
    """bfloat16 where the GPU has it: products under autocast; parameters, thresholds and the optimiser stay float32."""
    seed: int = 0
    out: Path = Path("runs/crosscoder")
    resume: bool = False
    """Go on from the newest whole checkpoint in `out`."""
    checkpoint_every: int = 1000
    evaluate_every: int = 5000
    logger: Literal["none", "trackio", "wandb"] = "none"
    """A JSONL log is always written to `out`."""

    def fixed(self) -> dict[str, object]:
        """What a resumed run must share with the run it resumes."""
        free = {"out", "resume", "logger", "device", "checkpoint_every", "evaluate_every"}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name not in free
        }


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
            given = {
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
        tokens = torch.cat([x.cpu() for x in islice(stream, -(-2 * arguments.latents // arguments.batch))])
        return fx.data_start(crosscoder, scale * tokens).to(arguments.device)
    start = {"gaussian": fx.gaussian_start, "tied": fx.tied_start, "isometric": fx.isometric_start}[arguments.start]
    return start(crosscoder).to(arguments.device)


def open_text(names: tuple[str, ...]):
    """What `contexts` reads: one name without a dot that is no file is a dataset of the Hub; else files."""
    files = [Path(name) for name in names]
    is_dataset = len(names) == 1 and not files[0].exists() and "." not in files[0].name
    return datasets.load_dataset(names[0], split="train", streaming=True) if is_dataset else files


def make_streams(arguments: Arguments):
    """Activations to train on and held-out ones, `tokens layers d_model`, harvested while they are read."""
    tokenizer = open_tokenizer(arguments.model)
    text = contexts(
        open_text(arguments.text),
        tokenizer,
        context=arguments.context,
        tokens=arguments.tokens + arguments.heldout + arguments.context,
    )
    heldout, train = text.split(arguments.heldout)
    options = dict(layers=arguments.layers, batch=arguments.batch, seed=arguments.seed)
    options |= dict(
        device=arguments.device, dtype=getattr(torch, arguments.dtype)
    )  # of the language model and its activations
    stream = harvest(arguments.model, train, **options)
    return stream, harvest(stream.model, heldout, **options)


def evaluate(crosscoder: fx.Crosscoder, heldout, scale: float, *, coherence: bool = False) -> dict[str, float]:
    """The numbers of a crosscoder on held-out tokens, in the units that it was trained in."""
    numbers = measure_reconstruction(crosscoder, (x * scale for x in heldout)).numbers()
    if coherence:
        numbers["norm_coherence"] = norm_coherence(crosscoder.decoder.weight).mean
        numbers["functional_coherence"] = functional_coherence(crosscoder, (x * scale for x in islice(heldout, 8))).mean
    return numbers


class Log:
    """A line of JSON a record in `out/log.jsonl`, and the same to trackio or wandb where asked."""

    def __init__(self, arguments: Arguments, step: int):
        self.path = arguments.out / "log.jsonl"
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []
        kept = [line for line in lines if self.stays(json.loads(line), step)]
        fresh = self.path.with_suffix(".new")  # renamed, so that a kill leaves the old lines or the new
        fresh.write_text("".join(line + "\n" for line in kept))
        fresh.replace(self.path)
        self.file = self.path.open("a", buffering=1)
        self.logger = None if arguments.logger == "none" else importlib.import_module(arguments.logger)
        if self.logger:
            self.logger.init(project="fmxnn", name=arguments.out.name, config=arguments.fixed())

    @staticmethod
    def stays(record: dict[str, float], step: int) -> bool:
        """Whether a resumed run keeps it: later records are made again, and so is the last evaluation."""
        return record["step"] <= step and "heldout/functional_coherence" not in record

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Adds a record."""
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")
        if self.logger:
            self.logger.log(numbers, step=step)

    def close(self) -> None:
        """Ends the log."""
        self.file.close()
        if self.logger:
            self.logger.finish()


def train(arguments: Arguments) -> int:
    """Trains to the end or to a signal; gives the exit code."""
    if arguments.device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"device {arguments.device!r} was asked for and torch sees no GPU; use --device cpu")
        torch.set_float32_matmul_precision("high")  # TF32; torch's default is 10 times slower on a GPU
    if list_checkpoints(arguments.out) and not arguments.resume:
        raise CheckpointError(f"{arguments.out} holds checkpoints; go on with --resume or choose another --out")
    stream, heldout = make_streams(arguments)
    scale = activation_scale(islice(stream, 8)) if arguments.scale else 1.0
    crosscoder = make_crosscoder(arguments, stream, scale)
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.999), fused=True)
    auxiliary = AuxiliaryLoss(k=stream.d_model // 2, after=arguments.dead_after) if arguments.auxiliary else None
    trainer = Trainer(
        crosscoder, optimizer, seed=arguments.seed, auxiliary=auxiliary, dtype=getattr(torch, arguments.dtype)
    )
    fixed = {**arguments.fixed(), "stream": stream.identity()}  # the text may change where its name does not
    if arguments.resume:
        for sentence in load_checkpoint(arguments.out, trainer, fixed):
            tqdm.write(sentence)
    arguments.out.mkdir(parents=True, exist_ok=True)

    batches, total = stream.starting_at(trainer.steps), min(len(stream), arguments.tokens // arguments.batch)
    bar = tqdm(total=total * arguments.batch, initial=trainer.tokens, unit="tok", unit_scale=True)
    with locked(arguments.out / "log.jsonl"), StopSignals() as stop, closing(Log(arguments, trainer.steps)) as log, bar:
        for x in islice(overlapped(batches, arguments.device), total - trainer.steps):
            numbers = trainer.step(x * scale)
            bar.update(arguments.batch)
            if trainer.steps % 50 == 0:
                log.write(trainer.steps, {name: value.item() for name, value in numbers.items()})
                bar.set_postfix(loss=f"{numbers['loss'].item():.4g}", dead=f"{numbers['dead'].item():.1%}")
            if trainer.steps % arguments.evaluate_every == 0:
                log.write(
                    trainer.steps,
                    {f"heldout/{name}": value for name, value in evaluate(crosscoder, heldout, scale).items()},
                )
            if stop.received or trainer.steps % arguments.checkpoint_every == 0:
                save_checkpoint(arguments.out, trainer, fixed)
            if stop.received:
                tqdm.write(f"stopped by signal {stop.received} and saved at step {trainer.steps}; go on with --resume")
                return stop.exit_code
        save_checkpoint(arguments.out, trainer, fixed)
        l0 = calibrate(crosscoder, [x * scale for x in islice(stream, 8)])
        tqdm.write(f"set the threshold on training tokens: L0 {l0.before:.4g} before, {l0.after:.4g} after")
        numbers = evaluate(crosscoder, heldout, scale, coherence=True)
        record = {f"heldout/{name}": value for name, value in numbers.items()}
        log.write(trainer.steps, {"l0_before_calibration": l0.before} | record)
    about = {
        "base_model": arguments.model,
        "layers": list(arguments.layers),
        "text": list(arguments.text),
        "tokens": trainer.tokens,
    }
    about |= {
        "metrics (of activations times the scale)": {name: round(value, 5) for name, value in numbers.items()},
        "scale": scale,
    }
    fx.save_pretrained(fold_scale(crosscoder, scale), arguments.out / "crosscoder", about=about)
    tqdm.write(
        f"saved {arguments.out / 'crosscoder'}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; a mistake of the caller's is one sentence, not a traceback."""
    arguments = tyro.cli(Arguments, args=argv)
    try:
        return train(arguments)
    except (ValueError, ArithmeticError, OSError) as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
