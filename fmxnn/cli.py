"""The command line: `python -m fmxnn evaluate PATH --text FILE`, `python -m fmxnn inspect PATH`; needs `pip install 'fmxnn[evaluate]'`."""

import sys
import warnings
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer
from tyro.conf import Positional
from tyro.extras import SubcommandApp

from fmxnn.coders import Crosscoder
from fmxnn.evaluation.evaluate import PARTS, evaluate, known
from fmxnn.folding import Normalised, fold
from fmxnn.hub import from_pretrained
from fmxnn.inspection import summary
from fmxnn.text import contexts

app = SubcommandApp()


@app.command(name="evaluate")
def _evaluate(
    path: Positional[str],
    text: tuple[str, ...],
    model: str | None = None,
    layers: tuple[int, ...] | None = None,
    probes: tuple[Path, ...] = (),
    latents: tuple[int, ...] = (),
    parts: tuple[str, ...] = PARTS[:-1],
    tokens: int = 100_000,
    context: int = 128,
    batch: int = 8,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    out: Path = Path("report"),
) -> None:
    """Measures a crosscoder on held-out text and writes JSON, Markdown, PNG and HTML.

    Args:
        path: A folder that fx.save_pretrained or another library wrote, or a Hub name.
        text: Held-out text: text or JSONL files.
        model: The language model: a folder or a Hub name. Left out: the one it was saved with.
        layers: The blocks whose outputs it reads, from zero. Left out: those it was saved with.
        probes: Folders with train.jsonl and test.jsonl of {"text", "label"}, or folders of such.
        latents: Latents to show in features.html.
        parts: What to measure; a part with nothing to work on is left out; the judge is for Python.
        tokens: How much of the text is read.
        context: Tokens that the model reads at once.
        batch: Contexts at once.
        device: cpu or cuda.
        out: Where the report goes.
    """
    crosscoder = from_pretrained(path, device=device)
    crosscoder = fold(crosscoder) if isinstance(crosscoder, Normalised) else crosscoder
    if not isinstance(crosscoder, Crosscoder):
        raise ValueError(f"evaluate measures a Crosscoder, and {path} holds a {type(crosscoder).__name__}; save the whole crosscoder")
    name = known(crosscoder, "model", model)
    read = contexts([Path(each) for each in text], AutoTokenizer.from_pretrained(name), context=context, tokens=tokens)
    report = evaluate(
        crosscoder, read, model=name, layers=layers, probes=probes, latents=latents, parts=parts, batch=batch, device=device, progress=tqdm
    )
    report.save(out)
    tqdm.write(f"{report.table(form='plain')}\n\nwrote {out}/report.html and its tables and figures")


@app.command(name="inspect")
def _inspect(path: Positional[str], subfolder: str = "", format: str | None = None, revision: str | None = None) -> None:
    """Says what a folder or Hub repository holds: recipe, sizes, gate and what was folded. Of a local folder only headers are read.

    Args:
        path: A folder that fx.save_pretrained or another library wrote, or a Hub name.
        subfolder: The folder inside it.
        format: The format, where its files do not say.
        revision: A commit, branch or tag of a Hub repository.
    """
    with warnings.catch_warnings(record=True, action="always") as notes:
        module = from_pretrained(path, subfolder=subfolder, format=format, revision=revision, device="meta")
    tqdm.write("\n".join([summary(module), *(f"note: {note.message}" for note in notes)]))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; a mistake of the caller's is one sentence, not a traceback."""
    try:
        app.cli(args=argv, prog="fmxnn")
    except (ValueError, OSError, MemoryError) as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
        return 1
    return 0
