"""Stored activations as a stream: the batches of the stream that was stored, or others of the same tokens."""

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.activations.batches import Mixing, Shuffle
from fmxnn.activations.configs import model_name
from fmxnn.activations.source import Sides
from fmxnn.activations.storing.ahead import Ahead
from fmxnn.activations.storing.source import Damaged, StoreSource, Verify
from fmxnn.activations.stream import Stream
from fmxnn.activations.text import Contexts


class ActivationStore(Stream[Any]):
    """`tokens layers d_model`: batches from a folder that `store` wrote, without the language model.

    A batch is x, or a pair (x, y) where pairs were stored. It is a stream as `harvest` gives one: the same order,
    `starting_at`, `with_tokens`, `in_order` and `rank`.

    - `folder`: what `store` wrote
    - `batch`, `block`, `seed`, `epochs`: how tokens are mixed; each is that of the stream that was stored unless given
    - `dtype`: of the batches; that of the stream that was stored unless given, whatever they are stored as
    - `verify`: when the sha256 of a file is compared: "first" (once, before it is first read), "all" (now) or "never"
    - `damaged`: "skip" compares all files now, and leaves the tokens of damaged shards out; `damaged` and `left_out`
      say which and how many

    A thread reads the next block while a batch is made. Memory holds about three blocks as they are stored.

    Raises FileNotFoundError for no folder, FormatError for one that is no store. Raises IntegrityError for a store that
    is not finished, and for a file that is missing, cut or changed.

    ```python
    from fmxnn.activations import ActivationStore, harvest, store

    text = ["The whale was seen off the coast again. " * 20]
    store(harvest("examples/tiny-lm", text, layers=[1, 2], context=32, batch=64), "cache", dtype="bfloat16")
    for x in ActivationStore("cache", batch=32, seed=3):
        x.shape  # 32, 2, d_model
    ```
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        verify: Verify = "first",
        damaged: Damaged = "raise",
        **mixing: Unpack[Mixing],
    ):
        stored = StoreSource(folder, dtype=dtype, verify=verify, damaged=damaged)
        shuffle = replace(Shuffle(**stored.about["shuffle"]), **mixing)
        super().__init__(stored, shuffle, dtype=stored.dtype)

    @property
    def stored(self) -> StoreSource:
        """What is in the folder, or a part of it."""
        return cast("StoreSource", self.source)

    @property
    def folder(self) -> Path:
        """What `store` wrote."""
        return self.stored.folder

    @property
    def rows(self) -> int:
        """Tokens of one epoch."""
        return self.stored.rows

    def summary(self) -> str:
        """What is in the folder, in one line."""
        about, source = self.stored.about, self.stored.about["source"]
        places = [source[name] for name in ("at", "to") if name in source]
        where = f" ({' to '.join(places)})" if places else ""
        layers = ", ".join(map(str, self.layers))
        return f"{self.folder} holds {self.rows:,} tokens of {self.name} at {layers}{where} in {about['dtype']}"

    @property
    def damaged(self) -> tuple[str, ...]:
        """The files whose tokens are left out."""
        return tuple(map(self.stored.file_of, self.stored.damaged))

    @property
    def left_out(self) -> int:
        """How many tokens lie in damaged files."""
        return self.stored.left_out

    def with_tokens(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Each batch, and for each of its tokens the index of its context and its position there."""
        planned = copy(self)
        planned.source, planned.dtype = _Numbers(self.stored), None
        plan = super(ActivationStore, planned).with_tokens()
        for sides, context, position in Ahead(self.stored, self.shuffle.block, self.shuffle.batch).batches(plan):
            yield self._batch(sides), context, position

    @override
    def _holds(self, tokens: int) -> bool:
        return self.rows >= tokens  # without reading the text

    def _part(self, contexts: Contexts, start: int) -> StoreSource:
        return self.stored.part(contexts, start)  # of the same kind, so that its blocks are read ahead as well

    def check(self, *, model: str | nn.Module | None = None, text: Contexts | None = None) -> None:
        """Raises ValueError where these are surely activations of another language model, or of another text.

        A model is known by the last part of its name, and by the commit of the Hub that it was loaded from. A module
        without a name, and a store of several models, are not compared.
        """
        about = self.stored.about
        if model is not None:
            name = model if isinstance(model, str) else model_name(model)
            commit = getattr(getattr(model, "config", None), "_commit_hash", None)
            moved = commit and about["revision"] and commit != about["revision"]
            if moved or not _may_be_one(name, type(model).__name__, about["model"]):
                raise ValueError(
                    f"{self.folder} holds activations of {_named(about['model'], about['revision'])}, got "
                    f"{_named(name, commit)}; give that model, or store the activations of this one in another folder"
                )
        if text is not None and text.digest != self.contexts.digest:
            raise ValueError(
                f"{self.folder} holds activations of another text, {len(self.contexts):,} contexts with "
                f"{self.contexts.tokens:,} kept tokens, got {len(text):,} with {text.tokens:,}; give that text, or "
                "store the activations of this one in another folder"
            )


class _Numbers:
    """`tokens`: the numbers of the rows of a store, in place of its rows; mixed as these are."""

    def __init__(self, stored: StoreSource):
        self.stored, self.contexts = stored, stored.contexts
        kept = stored.contexts.keep.sum(1)
        self.before = torch.cat([kept.new_zeros(1), kept.cumsum(0)])

    def read(self, start: int, stop: int) -> Sides:
        """`tokens`: the numbers of the kept tokens of some contexts."""
        return (torch.arange(int(self.before[start]), int(self.before[stop])),)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stored, name)


def _may_be_one(name: str, kind: str, stored: str) -> bool:
    """Whether a model of this name and class may be the one that was stored."""
    is_known = name != kind and stored != kind and ", " not in stored
    return not is_known or Path(name.partition("@")[0]).name == Path(stored).name


def _named(name: str, commit: str | None) -> str:
    return name if commit is None else f"{name} at {commit[:12]}"
