"""What `python -m fmxnn evaluate` runs."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from fmxnn.activations.text import contexts
from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.folding import fold
from fmxnn.coders.normalisation import Normalised
from fmxnn.reports.evaluating import PARTS, evaluate, known
from fmxnn.saving.hub import from_pretrained


def evaluate_saved(
    path: str,
    text: Sequence[Path],
    *,
    model: str | None,
    layers: Sequence[int] | None,
    probes: Sequence[Path],
    latents: Sequence[int],
    parts: Sequence[str] | None,
    tokens: int,
    context: int,
    batch: int,
    device: str,
    out: Path,
) -> str:
    """Measures a saved crosscoder with a bar for what is under way, writes the report into `out` and gives its table as text.

    Raises ValueError where `path` holds anything but a whole crosscoder, and what `from_pretrained` and `evaluate` raise.
    """
    crosscoder = from_pretrained(path, device=device)
    if isinstance(crosscoder, Normalised):  # in 16 bits a mean would drown in the biases that take it in
        crosscoder = fold(crosscoder.to(torch.promote_types(crosscoder.crosscoder.encoder.bias.dtype, torch.float32)))
    if not isinstance(crosscoder, Crosscoder):
        raise ValueError(
            f"evaluate measures a Crosscoder, and {path} holds a {type(crosscoder).__name__}; save the whole crosscoder"
        )
    name = known(crosscoder, "model", model)
    read = contexts(text, AutoTokenizer.from_pretrained(name), context=context, tokens=tokens)
    report = evaluate(
        crosscoder,
        read,
        model=name,
        layers=layers,
        probes=probes,
        latents=latents,
        parts=parts or PARTS,
        batch=batch,
        device=device,
        progress=tqdm,
    )
    report.save(out)
    return f"{report.table(form='plain')}\n\nwrote {out}/report.html and its tables and figures"
