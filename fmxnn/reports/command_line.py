"""The commands of `fmxnn`, which is `python -m fmxnn` as well.

`fmxnn inspect` works on a plain installation; the others need `pip install 'fmxnn[evaluate]'` or `'fmxnn[train]'`.
"""

import os
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fmxnn.activations.storing.layout import ABOUT, DTYPES
from fmxnn.activations.storing.reading import ActivationStore
from fmxnn.core.extras import from_extra
from fmxnn.core.version import __version__
from fmxnn.saving.hub import from_pretrained
from fmxnn.saving.inspection import summary

_FAILURES = (ValueError, ArithmeticError, OSError, MemoryError, ImportError)


def run() -> int:
    """The console script; `fmxnn train` begins again where threads would wait with a busy core.

    The OpenMP library reads OMP_WAIT_POLICY once, when torch loads it, which has happened by now. See "One busy core"
    in docs/performance.md.
    """
    if sys.argv[1:2] == ["train"] and "OMP_WAIT_POLICY" not in os.environ and os.name == "posix":
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, "-m", "fmxnn", *sys.argv[1:]])
    return main()


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; a mistake of the caller's is one sentence, not a traceback."""
    words = sys.argv[1:] if argv is None else argv
    try:
        if words[:1] == ["train"]:  # has a parser of its own, which is made from its arguments
            return from_extra("fmxnn.reports.train", who="train", extra="train").main(words[1:])
        given = vars(_parser().parse_args(words))
        sys.stdout.write(f"{_COMMANDS[given.pop('command')](**given)}\n")
    except _FAILURES as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _inspect(path: str, *, subfolder: str, format: str | None, revision: str | None) -> str:
    if (Path(path) / ABOUT).is_file():
        return ActivationStore(path).summary()
    with warnings.catch_warnings(record=True, action="always") as notes:
        module = from_pretrained(path, subfolder=subfolder, format=format, revision=revision, device="meta")
    return "\n".join([summary(module), *(f"note: {note.message}" for note in notes)])


def _evaluate(**given: Any) -> str:
    return from_extra("fmxnn.reports.evaluate_saved", who="evaluate", extra="evaluate").evaluate_saved(**given)


def _harvest(**given: Any) -> str:
    return from_extra("fmxnn.reports.harvest_to_disk", who="harvest", extra="train").harvest_to_disk(**given)


_COMMANDS: dict[str, Callable[..., str]] = {"inspect": _inspect, "harvest": _harvest, "evaluate": _evaluate}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="fmxnn", description="Trains crosscoders, looks at them and measures them.")
    parser.add_argument("--version", action="version", version=f"fmxnn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    said = "Says what a folder or Hub repository holds: recipe, sizes, gate and what was folded."
    inspect = commands.add_parser(
        "inspect", help=said, description=f"{said} Of a local folder only headers are read.", allow_abbrev=False
    )
    commands.add_parser("train", help="Trains a crosscoder on a language model's layers; fmxnn train --help.")
    said = "Reads a language model's activations once and keeps them on disk."
    _add_harvest(commands.add_parser("harvest", help=said, description=said, allow_abbrev=False))
    said = "Measures a crosscoder on held-out text and writes JSON, Markdown, PNG and HTML."
    evaluate = commands.add_parser("evaluate", help=said, description=said, allow_abbrev=False)
    for command in (inspect, evaluate):
        command.add_argument("path", help="a folder that fx.save_pretrained or another library wrote, or a Hub name")
    inspect.add_argument("--subfolder", default="", help="the folder inside it")
    inspect.add_argument("--format", help="the format, where its files do not say")
    inspect.add_argument("--revision", help="a commit, branch or tag of a Hub repository")
    _add_evaluate(evaluate)
    return parser


def _add_harvest(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="+", help="a folder or a Hub name; several read the same tokens, for model diffing")
    add("--text", type=Path, nargs="+", default=(), metavar="FILE", help="text or JSONL files")
    add("--chat", type=Path, metavar="FILE", help="JSONL of conversations, rendered by the last model's template")
    said = "blocks from zero, or places by name, such as embed"
    add("--layers", type=_layer, nargs="+", required=True, metavar="LAYER", help=said)
    add("--at", default="block_out", help="where in each block, such as mlp_in (%(default)s)")
    add("--to", help="where the targets of a transcoder are read, such as mlp_out")
    add("--tokens", type=int, help="how much of the text is read; left out: all")
    add("--context", type=int, default=128, help="tokens that the model reads at once (%(default)s)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="on disk (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (%(default)s)")
    add("--out", type=Path, default=Path("activations"), metavar="FOLDER", help="where they go (%(default)s)")


def _layer(word: str) -> int | str:
    return int(word) if word.lstrip("-").isdecimal() else word


def _add_evaluate(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--text", type=Path, nargs="+", required=True, metavar="FILE", help="held-out text: text or JSONL files")
    add("--model", help="the language model, a folder or a Hub name; left out: the one it was saved with")
    add(
        "--layers",
        type=_layer,
        nargs="+",
        metavar="LAYER",
        help="the blocks whose outputs it reads, from zero; left out: those it was saved with",
    )
    add(
        "--probes",
        type=Path,
        nargs="+",
        default=(),
        metavar="FOLDER",
        help='of train.jsonl and test.jsonl of {"text", "label"}, or of such folders',
    )
    add("--latents", type=int, nargs="+", default=(), metavar="LATENT", help="latents to show in features.html")
    add(
        "--parts",
        nargs="+",
        metavar="PART",
        help="reconstruction, splice, coherence, probing, features; left out: all that have something to work on",
    )
    add("--tokens", type=int, default=100_000, help="how much of the text is read (%(default)s)")
    add("--context", type=int, default=128, help="tokens that the model reads at once (%(default)s)")
    add("--batch", type=int, default=8, help="contexts at once (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (%(default)s)")
    add("--out", type=Path, default=Path("report"), metavar="FOLDER", help="where the report goes (%(default)s)")
