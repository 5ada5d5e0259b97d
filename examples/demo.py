"""`make demo`: harvest a small real language model, train six dictionaries on the same tokens, measure and draw them,
save and reload the best fmxcoder.

The path is the one that GPT2-Small or Gemma2-2B takes with a GPU (fmxnn train); only the sizes are small.
"""

import os
import platform
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
import tyro
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import fmxnn as fx
from fmxnn.activations import Activations, activation_scale, contexts, harvest
from fmxnn.activations.models import open_tokenizer
from fmxnn.metrics import Coherence, functional_coherence, measure_reconstruction, norm_coherence
from fmxnn.reports.plots import coherence_histograms, layer_profile
from fmxnn.training import Trainer, calibrate, fold_scale

LAYERS = tuple(range(2, 10))
LATENTS, K, BATCH, HELDOUT = 1024, 16, 512, 20_000
NOTE = """One seed, a 3M-parameter language model, 0.4 million tokens. It shows that the whole path works and how the
pieces behave side by side at equal parameters and K; it is no evidence about large models, and differences of a few
per cent between rows are not to be read from one seed. MSE is of activations scaled to a mean norm of sqrt(d_model).
Coherence is in layers, of 8; functional coherence is the `active` estimator over latents active on at least 10
held-out tokens, so rows with many dead latents average over a choice of few."""


@dataclass
class Arguments:
    """Where the text comes from and how long to train."""

    text: tuple[Path, ...] = ()
    """Text or JSONL files; without any, the Python standard library's own sources and help topics."""
    steps: int = 800
    """Batches of 512 tokens."""
    out: Path = Path("demo")


@dataclass
class Row:
    """One dictionary of the table."""

    name: str
    trainer: Trainer
    seconds: float = 0.0
    numbers: dict[str, float] | None = None
    norm: Coherence | None = None
    functional: Coherence | None = None


def rows(d_model: int) -> list[Row]:
    """The standard crosscoder with both starts, and both fmxcoders with their best start, without and with layer
    masking.
    """
    sizes = len(LAYERS), d_model, LATENTS
    ring = partial(fx.TensorRingWeight, *sizes, ranks=fx.wide_tensor_ring_ranks(*sizes))
    table: list[tuple[str, Callable[[], fx.Weight], Callable[[fx.Crosscoder], fx.Crosscoder], float]] = [
        ("dense, paper start", partial(fx.DenseWeight, *sizes), fx.gaussian_start, 0.0),
        ("dense, tied start", partial(fx.DenseWeight, *sizes), fx.tied_start, 0.0),
        ("tensor ring", ring, fx.isometric_start, 0.0),
        ("tensor ring, p=0.05", ring, fx.isometric_start, 0.05),
        ("CP", partial(fx.CPWeight, *sizes), fx.isometric_start, 0.0),
        ("CP, p=0.05", partial(fx.CPWeight, *sizes), fx.isometric_start, 0.05),
    ]
    made: list[Row] = []
    for name, weight, start, p in table:
        torch.manual_seed(0)
        encoder = fx.CrossLayerEncoder(weight(), fx.BatchTopK(K), mask=fx.LayerMask(p))
        crosscoder = start(fx.Crosscoder(encoder, fx.CrossLayerDecoder(weight())))
        made.append(Row(name, Trainer(crosscoder, torch.optim.Adam(crosscoder.parameters(), lr=1e-3, fused=True))))
    return made


def streams(arguments: Arguments, folder: Path) -> tuple[Activations, Activations]:
    """Activations to train on, and held-out ones."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = list(arguments.text) or sorted(
        [*library.glob("*.py"), *library.glob("pydoc_data/*.py"), *library.glob("asyncio/*.py")]
    )
    random.Random(0).shuffle(files)  # so that held-out text is like the rest
    tokenizer = open_tokenizer(folder)
    text = contexts(files, tokenizer, context=128, tokens=arguments.steps * BATCH + HELDOUT + 128)
    heldout, train = text.split(HELDOUT)
    train_stream = harvest(folder, train, layers=LAYERS, batch=BATCH)
    return train_stream, harvest(train_stream.model, heldout, layers=LAYERS, batch=BATCH)


def scaled(stream: Activations, scale: float) -> Iterator[Tensor]:
    """The stream at a mean norm of sqrt(d_model)."""
    return (x * scale for x in stream)


def train(table: list[Row], stream: Activations, scale: float, steps: int) -> None:
    """Every dictionary sees the same batches; the language model runs once for all. At the end thresholds are set."""
    bar = tqdm(total=steps * BATCH, unit="tok", unit_scale=True, desc=f"training {len(table)} dictionaries")
    for step, x in enumerate(stream):
        if step == steps:
            break
        for row in table:
            began = time.perf_counter()
            row.trainer.step(x * scale)
            row.seconds += time.perf_counter() - began
        bar.update(BATCH)
    bar.close()
    first = list(islice(scaled(stream, scale), 16))
    for row in table:
        l0 = calibrate(row.trainer.crosscoder, first)
        print(f"{row.name}: threshold set on training tokens, L0 {l0.before:.2f} before and {l0.after:.2f} after")


def measure(table: list[Row], heldout: list[Tensor]) -> None:
    """Reconstruction and both coherences on held-out tokens."""
    for row in tqdm(table, desc="measuring"):
        crosscoder = row.trainer.crosscoder
        row.numbers = measure_reconstruction(crosscoder, heldout).numbers()
        row.norm = norm_coherence(crosscoder.decoder.weight)
        row.functional = functional_coherence(crosscoder, heldout[:20])


def print_table(table: list[Row]) -> str:
    """The comparison as a Markdown table."""
    lines: list[dict[str, object]] = []
    for row in table:
        numbers, parameters = row.numbers or {}, sum(p.numel() for p in row.trainer.crosscoder.parameters())
        lines.append(
            {
                "dictionary": row.name,
                "parameters": f"{parameters:,}",
                "MSE": f"{numbers['mse']:.4f}",
                "EV": f"{numbers['ev']:.4f}",
                "CS": f"{numbers['cos']:.4f}",
                "L0": f"{numbers['l0']:.1f}",
                "dead": f"{numbers['dead']:.1%}",
                "c_norm": f"{row.norm.mean:.2f}" if row.norm else "",
                "c_func": f"{row.functional.mean:.2f} ({row.functional.alive})" if row.functional else "",
                "seconds": f"{row.seconds:.0f}",
            }
        )
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def top_tokens(
    crosscoder: fx.Crosscoder,
    latents: list[int],
    heldout: Activations,
    tokenizer: PreTrainedTokenizerBase,
    scale: float,
) -> list[str]:
    """For each latent its strongest distinct tokens in context, as the paper's Table 1."""
    crosscoder.eval()
    best: list[dict[str, tuple[float, str]]] = [{} for _ in latents]
    for x, context, position in heldout.with_tokens():
        with torch.no_grad():
            codes = crosscoder.encode(x * scale)[:, latents]
        for found, column in zip(best, codes.T, strict=True):
            for token in column.topk(8).indices.tolist():
                ids, at = heldout.contexts.ids[context[token]].tolist(), int(position[token])
                word, value = tokenizer.decode([ids[at]]), float(column[token])
                if value > found.get(word, (0.0, ""))[0]:
                    left, right = tokenizer.decode(ids[1:at])[-30:], tokenizer.decode(ids[at + 1 :])[:20]
                    found[word] = (value, f"{left}<<{word}>>{right}".replace("\n", "\\n").replace("`", "'"))
    lines: list[str] = []
    for latent, found in zip(latents, best, strict=True):
        lines += [f"latent {latent}:"] + [
            f"    {value:6.2f}  {where}" for value, where in sorted(found.values(), reverse=True)[:5]
        ]
    return lines


def save_and_reload(row: Row, heldout: list[Tensor], scale: float, about: dict[str, object], folder: Path) -> None:
    """Folds the scale, saves, reloads, and raises unless every number is the same to the last bit."""
    raw = [x / scale for x in heldout]
    crosscoder = fold_scale(row.trainer.crosscoder, scale)
    before = measure_reconstruction(crosscoder, raw).numbers()
    fx.save_pretrained(crosscoder, folder, about={**about, "metrics (activations in the model's own units)": before})
    after = measure_reconstruction(fx.from_pretrained(folder), raw).numbers()
    if before != after:
        raise RuntimeError(f"the reloaded dictionary measures {after}, the saved one {before}")


def main(argv: list[str] | None = None) -> None:
    """Runs the demo."""
    arguments = tyro.cli(Arguments, args=argv)
    began, folder = time.perf_counter(), Path(__file__).parent / "tiny-lm"
    stream, test = streams(arguments, folder)
    scale = activation_scale(x for x, _ in zip(stream, range(8), strict=False))
    print(
        f"text: {stream.rows:,} tokens to train on, {test.rows:,} held out; layers {LAYERS} of {folder.name}, latents "
        f"{LATENTS}, K {K}, scale {scale:.4f}"
    )
    table = rows(stream.d_model)
    steps = min(arguments.steps, len(stream))
    train(table, stream, scale, steps)
    heldout = list(scaled(test, scale))
    measure(table, heldout)

    arguments.out.mkdir(parents=True, exist_ok=True)
    coherence_histograms({row.name: row.functional for row in table if row.functional}).savefig(
        arguments.out / "coherence.png", dpi=140
    )
    best = min(table[2:], key=lambda row: (row.numbers or {})["mse"])
    ranked = (
        [int(i) for i in best.functional.values.nan_to_num(-1).argsort(descending=True)[: best.functional.alive]]
        if best.functional
        else []
    )
    shown = ranked[:3] + ranked[-3:]
    names = [str(layer) for layer in LAYERS]
    if best.norm and best.functional:
        latent = shown[0]
        title = (
            f"{best.name}, latent {latent}: c_norm {best.norm.values[latent]:.2f}, c_func "
            f"{best.functional.values[latent]:.2f} of {len(LAYERS)}"
        )
        layer_profile(best.norm.per_layer[:, latent], best.functional.per_layer[:, latent], names, title=title).savefig(
            arguments.out / "profile.png", dpi=140
        )
    tokenizer = open_tokenizer(folder)
    listing = top_tokens(best.trainer.crosscoder, shown, test, tokenizer, scale)
    heading = (
        f"Top tokens of the fmxcoder of lowest MSE ({best.name}): three latents of highest, then three of "
        "lowest functional coherence"
    )
    comparison = print_table(table)
    about: dict[str, object] = {"base_model": "tiny-lm (examples/)", "layers": list(LAYERS), "tokens": steps * BATCH}
    save_and_reload(best, heldout, scale, about, arguments.out / "best")

    machine = (
        f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch "
        f"{torch.__version__}"
    )
    report = (
        f"# Six dictionaries on tiny-lm\n\n{comparison}\n\n{NOTE}\n\n{machine}.\n\n"
        "![coherence](coherence.png)\n\n![profile](profile.png)\n\n"
    )
    report += f"## {heading}\n\n```text\n" + "\n".join(listing) + "\n```\n"
    (arguments.out / "report.md").write_text(report)
    print("\n".join(["", comparison, "", NOTE, "", heading, *listing, ""]))
    print(
        f"saved the fmxcoder of lowest MSE ({best.name}) to {arguments.out / 'best'}, reloaded it, and found every "
        "number the same to the last bit"
    )
    print(
        f"figures and report: {arguments.out}/coherence.png, profile.png, report.md; "
        f"{time.perf_counter() - began:.0f} s on {machine}"
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
