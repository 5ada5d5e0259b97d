"""What `fmxnn harvest` runs."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from tqdm import tqdm

from fmxnn.activations import Conversations, Shuffle, conversations, harvest, store
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
    """Stores activations of one model, or of several on the same tokens, in `out`, and says what is there.

    A bar shows how far it is. The model runs in float32, but on a GPU in bfloat16 where that is stored. Raises
    ValueError unless there is either a text or a chat, and what `harvest` and `store` raise.
    """
    if bool(text) == bool(chat):
        raise ValueError("harvest reads either a text or conversations; give --text FILE or --chat FILE")
    source = text if chat is None else _conversations(chat, model[-1], read["context"], read["tokens"])
    runs = torch.bfloat16 if dtype == "bfloat16" and read["device"].startswith("cuda") else torch.float32
    stream = harvest(model[0] if len(model) == 1 else model, source, batch=1, dtype=runs, **read)
    stream.shuffle = replace(stream.shuffle, batch=min(Shuffle().batch, stream.rows))
    return store(stream, out, dtype=dtype, progress=partial(tqdm, unit="file")).summary()


def _conversations(chat: Path, model: str, context: int, tokens: int | None) -> Conversations:
    """The first conversations that hold at least `tokens` kept tokens; all where it is None."""
    read = conversations(chat, open_tokenizer(model), context=context)
    return read if tokens is None else read[: int((read.keep.sum(1).cumsum(0) < tokens).sum()) + 1]
