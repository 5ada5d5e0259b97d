"""What `python -m fmxnn evaluate` runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from tqdm import tqdm

from fmxnn.activations.models import open_tokenizer
from fmxnn.activations.text import contexts
from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.folding import fold
from fmxnn.coders.normalisation import Normalised
from fmxnn.core.excerpt import cut
from fmxnn.reports.evaluating import evaluate
from fmxnn.reports.reading import known
from fmxnn.saving.hub import from_pretrained


class Measures(TypedDict):
    """What `evaluate_saved` hands on to `evaluate`."""

    layers: Sequence[int] | None
    probes: Sequence[Path]
    latents: Sequence[int]
    parts: Sequence[str] | None
    batch: int
    device: str


def evaluate_saved(
    path: str,
    text: Sequence[Path],
    *,
    model: str | None,
    tokens: int,
    context: int,
    out: Path,
    **measures: Unpack[Measures],
) -> str:
    """Measures a saved crosscoder, writes the report into `out` and gives its table as text.

    A bar shows how far it is. Raises ValueError where `path` holds anything but a whole crosscoder, and what
    `from_pretrained` and `evaluate` raise.
    """
    crosscoder = from_pretrained(path, device=measures["device"])
    if isinstance(crosscoder, Normalised):  # in 16 bits a mean would drown in the biases that take it in
        crosscoder = fold(crosscoder.to(torch.promote_types(crosscoder.crosscoder.encoder.bias.dtype, torch.float32)))
    if not isinstance(crosscoder, Crosscoder):
        raise ValueError(
            f"evaluate measures a Crosscoder, and {path} holds a {type(crosscoder).__name__}; save the whole crosscoder"
        )
    name = _one_model(known(crosscoder, "model", model), path)
    read = contexts(text, open_tokenizer(name), context=context, tokens=tokens)
    report = evaluate(crosscoder, read, model=name, progress=tqdm, **measures)
    report.save(out)
    return f"{report.table(form='plain')}\n\nwrote {out}/report.html and its tables and figures"


def _one_model(name: str | list[str], path: str) -> str:
    if isinstance(name, str):
        return name
    raise ValueError(
        f"evaluate reads a text with one language model, and {path} was trained on {cut(', '.join(name))}; call "
        "fx.evaluate with what harvest or ActivationStore gives of them"
    )
