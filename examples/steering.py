"""Steer a small real language model by one latent in three ways, and see what it does to the text and to the loss.

python examples/steering.py --out runs/steering --figure docs/images/steering.png

It trains a crosscoder on the Python standard library's own sources (a minute on one core), takes the latent that spends
most of its codes on one token, and writes the table, the texts and the figure of docs/steering.md.
"""

import os
import platform
import random
import sysconfig
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
import transformers
import tyro
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fmxnn as fx
from fmxnn.activations import Contexts, activation_scale, attach, contexts, harvest
from fmxnn.activations.models import open_model
from fmxnn.activations.places import residual_blocks
from fmxnn.coders.atoms import raw_atoms
from fmxnn.training import Trainer, calibrate, fold_scale

LAYERS = tuple(range(2, 10))
ONE = 6
LATENTS, K, BATCH = 512, 16, 512
WAYS: dict[str, dict[str, Any]] = {
    "telescoped": {"way": "telescoped"},
    "each": {"way": "each"},
    f"only layer {ONE}": {"only": ONE},
}
COLOURS = ("#0072b2", "#d55e00", "#009e73")


@dataclass
class Arguments:
    """How long to train, and where results go."""

    steps: int = 600
    """Batches of 512 tokens."""
    heldout: int = 8_000
    """Tokens that are measured on."""
    word: str = ":"
    """The latent that spends most of its codes on this token is steered."""
    strengths: tuple[float, ...] = (0, 0.5, 1, 2, 3, 4)
    """In multiples of its mean code where it fires; the figure shows the one in the middle."""
    prompt: str = "The old man said"
    out: Path = Path("runs/steering")
    figure: Path = Path("docs/images/steering.png")


class Latent(NamedTuple):
    """The latent that is steered, and its mean code where it fires."""

    number: int
    code: float
    share: float
    tokens: list[str]


def texts(tokenizer: Any, heldout: int, tokens: int) -> tuple[Contexts, Contexts]:
    """Held-out text, and text to train on."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted([*library.glob("*.py"), *library.glob("asyncio/*.py")])
    random.Random(0).shuffle(files)
    return contexts(files, tokenizer, context=128, tokens=heldout + tokens + 1024).split(heldout)


def trained(model: nn.Module, text: Contexts, steps: int) -> fx.Crosscoder:
    """A crosscoder of the model's own residual stream, with thresholds set."""
    torch.manual_seed(0)
    stream = harvest(model, text, layers=LAYERS, batch=BATCH)
    scale = activation_scale(islice(stream, 8))
    encoder = fx.CrossLayerEncoder(fx.DenseWeight(len(LAYERS), stream.d_model, LATENTS), fx.BatchTopK(K))
    decoder = fx.CrossLayerDecoder(fx.DenseWeight(len(LAYERS), stream.d_model, LATENTS))
    crosscoder = fx.tied_start(fx.Crosscoder(encoder, decoder))
    trainer = Trainer(crosscoder, torch.optim.Adam(crosscoder.parameters(), lr=1e-3, fused=True))
    for x in tqdm(islice(stream, steps), total=steps, desc="training"):
        trainer.step(x * scale)
    calibrate(crosscoder, [x * scale for x in islice(stream, 16)])
    return fold_scale(crosscoder, scale).eval()


@torch.no_grad()
def choose(crosscoder: fx.Crosscoder, model: nn.Module, text: Contexts, tokenizer: Any, word: str) -> Latent:
    """The latent with the largest share of its codes on one token."""
    total, on_word, count = torch.zeros(LATENTS), torch.zeros(LATENTS), torch.zeros(LATENTS)
    by_token = torch.zeros(LATENTS, len(tokenizer))
    wanted = tokenizer(word).input_ids[-1]
    stream = harvest(model, text, layers=LAYERS, batch=BATCH)
    for x, context, position in stream.with_tokens():
        z, ids = crosscoder.encode(x), text.ids[context, position].long()
        total, count, on_word = total + z.sum(0), count + (z > 0).sum(0), on_word + z[ids == wanted].sum(0)
        by_token.index_add_(1, ids, z.T)
    share = torch.where(total > 0, on_word / total, 0.0)
    number = int((share * on_word.clamp(min=0).sqrt()).argmax())
    tokens = [tokenizer.decode([token]) for token in by_token[number].topk(5).indices.tolist()]
    return Latent(number, float(total[number] / count[number]), float(share[number]), tokens)


@torch.no_grad()
def loss(model: nn.Module, text: Contexts) -> float:
    """Cross-entropy in nats a predicted token."""
    total, count = 0.0, 0
    for ids, keep in zip(text.ids.split(16), text.keep.split(16), strict=True):
        counted = keep[:, :-1] & keep[:, 1:]
        logits = model(input_ids=ids.long(), use_cache=False).logits[:, :-1][counted]
        total += float(nn.functional.cross_entropy(logits, ids[:, 1:].long()[counted], reduction="sum"))
        count += int(counted.sum())
    return total / count


@torch.no_grad()
def residuals(model: nn.Module, text: Contexts) -> Tensor:
    """`-> blocks tokens d_model`: the residual stream after every block."""
    seen: list[Tensor] = []
    with ExitStack() as hooks:
        for block in residual_blocks(model):
            hooks.enter_context(
                block.register_forward_hook(lambda _m, _a, h: seen.append(h if isinstance(h, Tensor) else h[0]))
            )
        model(input_ids=text.ids.long(), use_cache=False)
    return torch.stack([h[text.keep] for h in seen])


def written(atom: Tensor, way: str, strength: float) -> list[float]:
    """The norm of what stands after each block from the edits alone."""
    stands, blocks = torch.zeros(atom.shape[-1]), list[float]()
    for block in range(12):
        place = LAYERS.index(block) if block in LAYERS else None
        if place is not None and (way == "each" or (way.startswith("only") and block == ONE)):
            stands = stands + strength * atom[place]
        if place is not None and way == "telescoped":
            stands = strength * atom[place]
        blocks.append(float(stands.norm()))
    return blocks


def draw(losses: Mapping[str, list[float]], stands: Mapping[str, tuple[list[float], list[float]]]) -> Figure:
    """Loss against strength; and how far the residual stream has moved after each block."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    right.axvspan(LAYERS[0], LAYERS[-1], color="#eeeeee", zorder=0)
    for way, colour in zip(WAYS, COLOURS, strict=True):
        left.plot(losses["strength"], losses[way], "o-", color=colour, label=way, markersize=4)
        moved, alone = stands[way]
        right.plot(range(12), moved, "-", color=colour, label=way)
        right.plot(range(12), alone, "--", color=colour, linewidth=1)
    left.set(xlabel="strength, in mean codes of the latent", ylabel="nats a token", title="loss on held-out text")
    right.set(xlabel="after block", ylabel="norm", title="how far the residual stream has moved")
    right.plot([], [], "--", color="#555555", linewidth=1, label="from the edits alone")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
        axes.legend(frameon=False, fontsize=9)
    return figure


def steer(
    crosscoder: fx.Crosscoder, opened: tuple[nn.Module, Any], heldout: Contexts, latent: Latent, arguments: Arguments
) -> tuple[dict[str, list[float]], dict[str, tuple[list[float], list[float]]]]:
    """Losses by way and strength, and of the strength in the middle what stands after each block; prints texts."""
    model, tokenizer = opened
    prompt = tokenizer(tokenizer.eos_token + arguments.prompt, return_tensors="pt")
    atom = raw_atoms(crosscoder, [latent.number])[0]
    some, shown = heldout[:8], arguments.strengths[len(arguments.strengths) // 2]
    clean = residuals(model, some)
    losses: dict[str, list[float]] = {"strength": list(arguments.strengths)}
    stands: dict[str, tuple[list[float], list[float]]] = {}
    for way, options in WAYS.items():
        losses[way] = []
        for strength in arguments.strengths:
            with attach(crosscoder, model, LAYERS, **options) as run:
                run.steer(latent.number, strength * latent.code)
                losses[way].append(loss(model, heldout))
                if strength == shown:
                    moved = (residuals(model, some) - clean).norm(dim=-1).mean(1).tolist()
                    stands[way] = moved, written(atom, way, strength * latent.code)
                made = model.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
            text = tokenizer.decode(made[0, prompt.input_ids.shape[1] :])
            print(f"{way:<14} {strength:<4g} {arguments.prompt}{text!r}")
    return losses, stands


def main(argv: list[str] | None = None) -> None:
    """Trains, steers, measures and draws."""
    arguments = tyro.cli(Arguments, args=argv)
    model, tokenizer = open_model(Path(__file__).parent / "tiny-lm", dtype=torch.float32)
    model.eval()
    heldout, text = texts(tokenizer, arguments.heldout, arguments.steps * BATCH)
    crosscoder = trained(model, text, arguments.steps)
    latent = choose(crosscoder, model, heldout, tokenizer, arguments.word)
    print(
        f"latent {latent.number}: {latent.share:.0%} of its codes on {arguments.word!r}, mean code {latent.code:.2f}, "
        f"most on {latent.tokens}"
    )
    losses, stands = steer(crosscoder, (model, tokenizer), heldout, latent, arguments)
    scaled: dict[str, float] = {}
    for factor in (0.0, 1.0, 2.0):
        with attach(crosscoder, model, LAYERS) as run:
            run.scale(latent.number, factor)
            scaled[f"codes times {factor:g}"] = round(loss(model, heldout), 3)
    about = {"base_model": "tiny-lm", "layers": list(LAYERS)}
    fx.save_pretrained(crosscoder, arguments.out / "crosscoder", about=about)
    arguments.figure.parent.mkdir(parents=True, exist_ok=True)
    draw(losses, stands).savefig(arguments.figure, dpi=140)
    print(tabulate(losses, headers="keys", tablefmt="github", floatfmt=("g", ".3f", ".3f", ".3f")), scaled, sep="\n")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}")


if __name__ == "__main__":
    main()
