"""What `fmxnn harvest` runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from tqdm import tqdm

from fmxnn.activations import conversations, harvest, store
from fmxnn.activations.models import open_tokenizer
from fmxnn.activations.places import Layer


class Read(TypedDict):
    """What `harvest_to_disk` hands on to `harvest`."""

    layers: Sequence[Layer]
    at: str
    to: str | None
    context: int
    tokens: int | None
    device: str


def harvest_to_disk(
    model: Sequence[str],
    *,
    text: Sequence[Path],
    chat: Path | None,
    dtype: str,
    out: Path,
    **read: Unpack[Read],
) -> str:
    """Reads activations of one model, or of several on the same tokens, into the folder `out`, and says what it holds.

    A bar shows how far it is. Raises ValueError unless there is either a text or a chat, and what `harvest` and `store`
    raise.
    """
    if bool(text) == bool(chat):
        raise ValueError("harvest reads either a text or conversations; give --text FILE or --chat FILE")
    source = conversations(chat, open_tokenizer(model[-1]), context=read["context"]) if chat else text
    kept = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    stream = harvest(model[0] if len(model) == 1 else model, source, batch=1, dtype=kept, **read)
    made = store(stream, out, dtype=dtype, progress=tqdm)
    return f"{out} holds {made.rows:,} tokens at {', '.join(map(str, made.layers))} in {dtype}"
