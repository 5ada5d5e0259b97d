"""A cross-layer transcoder of a language model's MLPs, from one call of `harvest` to a page of its latents.

It reads what goes into the MLPs of some layers and rebuilds what comes out. A latent that reads layer l writes to l and
to every later layer. (Ameisen et al. 2025)

    python examples/transcoder.py --out runs/transcoder
"""

import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
import tyro
from tqdm import tqdm

import fmxnn as fx
from fmxnn.activations import contexts, harvest
from fmxnn.activations.models import open_tokenizer
from fmxnn.training import Trainer, calibrate

TINY = Path(__file__).parent / "tiny-lm"


@dataclass(frozen=True)
class Arguments:
    """What to train on, how long, and where to put it."""

    text: tuple[Path, ...] = ()
    """Text or JSONL files; without any, sources of the Python standard library."""
    layers: tuple[int, ...] = (3, 4, 5, 6)
    latents: int = 256
    """Latents that read each layer."""
    steps: int = 600
    batch: int = 512
    out: Path = Path("runs/transcoder")


def make_transcoder(layers: int, d_model: int, latents: int) -> fx.Crosscoder:
    """Latents that read one layer each, and write to it and to those after it."""
    sizes = dict(layers=layers, d_model=d_model, latents=layers * latents)
    torch.manual_seed(0)
    encoder = fx.CrossLayerEncoder(fx.sae_stack_weight(fx.DenseWeight, **sizes), fx.BatchTopK(8 * layers))
    return fx.gaussian_start(fx.Crosscoder(encoder, fx.CrossLayerDecoder(fx.causal_weight(fx.DenseWeight, **sizes))))


def main(argv: list[str] | None = None) -> None:
    """Trains, saves, loads, measures and draws."""
    arguments = tyro.cli(Arguments, args=argv)
    files = arguments.text or sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-m]*.py"))
    tokenizer, heldout = open_tokenizer(TINY), 16 * arguments.batch
    text = contexts(files, tokenizer, context=128, tokens=arguments.steps * arguments.batch + heldout + 128)
    measured, trained = text.split(heldout)
    places = dict(layers=arguments.layers, at="mlp_in", to="mlp_out", batch=arguments.batch)
    stream = harvest(TINY, trained, **places)

    transcoder = make_transcoder(len(arguments.layers), stream.d_model, arguments.latents)
    trainer = Trainer(transcoder, torch.optim.Adam(transcoder.parameters(), lr=1e-3, fused=True))
    for _, (x, y) in zip(tqdm(range(arguments.steps)), stream, strict=False):
        trainer.step(x, y)
    calibrate(transcoder, [x for _, (x, _) in zip(range(8), stream, strict=False)])

    about = dict(base_model="examples/tiny-lm", layers=list(arguments.layers), at="mlp_in", to="mlp_out")
    fx.save_pretrained(transcoder, arguments.out / "transcoder", about=about)
    again = fx.from_pretrained(arguments.out / "transcoder")
    fired = range(0, again.encoder.weight.latents, again.encoder.weight.latents // 16)
    report = fx.evaluate(again, harvest(stream.model, measured, **places), tokenizer=tokenizer, latents=fired)
    report.save(arguments.out / "report")
    print(report.table(form="plain"))
    print(f"wrote {arguments.out}/transcoder and {arguments.out}/report")


if __name__ == "__main__":
    main()
