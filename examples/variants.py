"""Train every variant that the documentation composes on a real language model's activations, and check each.

python examples/variants.py --seconds 60 python examples/variants.py --only "ring CLT" PolySAE --steps 200

A row of the table is a variant: which backend its training took, and, of held-out tokens, its error before and after
(the loss without penalties, in training mode), explained variance and L0; whether what comes back from a folder is the
same bit for bit, and the largest relative difference between the sparse and the dense path in float64, of output and
gradients, or why there is no sparse one. The exit code is 1 where an error did not fall, a bit differs or the paths do.
"""

import os
import sys
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
import tyro
from every_variant import BATCH, LAYERS, VARIANTS, Variant, pair, train
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import fmxnn as fx
from fmxnn.activations import activation_scale, harvest
from fmxnn.metrics import Reconstruction

HELDOUT = 8  # batches
SAME = 1e-9  # of float64 products in another order, summed over a batch


@dataclass
class Arguments:
    """How long, on what, and which."""

    seconds: float = 60.0
    """Training of each variant."""
    steps: int | None = None
    """Training of each variant in place of seconds."""
    only: tuple[str, ...] = ()
    """Names of variants; none stands for all."""
    text: tuple[Path, ...] = ()
    """Text or JSONL files; without any, Python's own help topics."""
    tokens: int = 40_000
    """Activations that are kept, read again and again."""


def activations(arguments: Arguments) -> tuple[list[Tensor], list[Tensor]]:
    """`tokens layers d_model`: batches to train on and held-out ones, at a mean norm of sqrt(d_model)."""
    text = arguments.text or topics.values()
    stream = harvest(
        Path(__file__).parent / "tiny-lm", text, layers=range(2, 2 + LAYERS), batch=BATCH, tokens=arguments.tokens
    )
    batches = list(stream)
    if len(batches) <= HELDOUT:
        raise ValueError(
            f"{HELDOUT} batches of {BATCH} tokens are held out, and the text gives {len(batches)}; give more text or "
            "tokens"
        )
    scale = activation_scale(batches)
    batches = [x * scale for x in batches]
    return batches[HELDOUT:], batches[:HELDOUT]


@torch.no_grad()
def error(variant: Variant, x: Tensor) -> float:
    """Of a batch, chosen as in training; it moves no threshold."""
    read, rebuilt = pair(variant, x)
    return fx.reconstruction_loss(rebuilt, deepcopy(variant.crosscoder).train()(read)).item()


@torch.no_grad()
def measure(variant: Variant, batches: Iterable[Tensor]) -> dict[str, float]:
    """Explained variance and L0 on held-out tokens."""
    measured, crosscoder = Reconstruction(), variant.crosscoder.eval()
    for x in batches:
        read, rebuilt = pair(variant, x)
        z = crosscoder.encode(read)
        measured.update(rebuilt, crosscoder.decode(z), z)
    return measured.compute().numbers()


@torch.no_grad()
def comes_back(variant: Variant, x: Tensor) -> bool:
    """Whether what was saved has the same recipe, the same tensors and the same output, bit for bit."""
    module = variant.crosscoder
    if variant.normalisation is not None:
        module = fx.Normalised(module, variant.normalisation)
    else:
        x = variant.reads(x)
    with TemporaryDirectory() as folder:
        fx.save_pretrained(module, Path(folder) / "variant")
        again = fx.from_pretrained(Path(folder) / "variant")
    mine, theirs = module.state_dict(), again.state_dict()
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    return same and fx.describe(module) == fx.describe(again) and torch.equal(module.eval()(x), again(x))


def difference(variant: Variant, x: Tensor) -> float | str:
    """The largest relative difference between the two paths, of output and gradients in float64; or why there is only
    one.
    """
    twin, (read, rebuilt) = deepcopy(variant.crosscoder).double().train(), pair(variant, x)
    reason = twin.extra_repr().partition(", dense: ")[2]
    if reason:
        return reason
    found: list[list[Tensor]] = []
    for twin.backend in ("dense", "sparse"):
        torch.manual_seed(0)  # of the mask
        twin.zero_grad()
        x_hat = twin(read.double())
        fx.reconstruction_loss(rebuilt.double(), x_hat).backward()
        found.append([x_hat.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters())])
    return max(
        ((one - other).abs().max() / one.abs().max().clamp(min=1e-300)).item()
        for one, other in zip(*found, strict=True)
    )


def check(name: str, batches: list[Tensor], heldout: list[Tensor], arguments: Arguments) -> tuple[list[object], bool]:
    """The row of a variant, and whether all is as it should be."""
    torch.manual_seed(0)
    variant = VARIANTS[name](batches)
    backend = variant.crosscoder.train().plan(BATCH).taken.backend
    before = error(variant, heldout[0])
    steps = train(variant, batches, steps=arguments.steps, seconds=arguments.seconds)
    after = error(variant, heldout[0])
    numbers, same, apart = (
        measure(variant, heldout),
        comes_back(variant, heldout[0]),
        difference(variant, heldout[0][:64]),
    )
    row = [
        name,
        backend,
        steps,
        f"{before:.1f}",
        f"{after:.1f}",
        f"{numbers['ev']:.3f}",
        f"{numbers['l0']:.1f}",
        "yes" if same else "NO",
    ]
    return [*row, apart if isinstance(apart, str) else f"{apart:.0e}"], after < before and same and (
        isinstance(apart, str) or apart < SAME
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; a mistake of the caller's is one sentence, not a traceback."""
    arguments = tyro.cli(Arguments, args=argv)
    try:
        unknown = [name for name in arguments.only if name not in VARIANTS]
        if unknown:
            raise ValueError(
                f"there is no variant {', '.join(map(repr, unknown))}; take from {', '.join(map(repr, VARIANTS))}"
            )
        if arguments.seconds <= 0 or (arguments.steps is not None and arguments.steps < 1):
            got = f"steps={arguments.steps} and seconds={arguments.seconds}"
            raise ValueError(f"a variant trains for at least one step and some seconds, got {got}")
        batches, heldout = activations(arguments)
        names = arguments.only or tuple(VARIANTS)
        found = [check(name, batches, heldout, arguments) for name in tqdm(names, unit="variant")]
    except (ValueError, ArithmeticError, OSError) as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
        return 1
    columns = ["variant", "backend", "steps", "error: before", "after", "EV", "L0", "reloaded", "sparse - dense"]
    tqdm.write(tabulate([row for row, _ in found], columns, tablefmt="github", disable_numparse=True))
    failed = [name for name, (_, good) in zip(names, found, strict=True) if not good]
    if failed:
        tqdm.write(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
