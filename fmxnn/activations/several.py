"""Activations of several language models on the same text, as one axis of layers."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fmxnn.activations.aligned import Aligned, Count, same_for_all
from fmxnn.activations.places import Layer
from fmxnn.activations.source import Sides, Source
from fmxnn.activations.text import Contexts
from fmxnn.weights.ragged import pad_layers


class SeveralSource:
    """`tokens models*layers d_model`: the layers of the first model, then those of the next.

    - `sources`: what each model gives, under the model's name; row for row they keep the same tokens of the text
    - `aligned`: the rows and positions, and what was dropped; by default all models read the contexts of the first

    A layer is called "model:layer". Models of smaller d_model end in zeros, as `RaggedWeight` reads them with
    `widths=source.widths`. The models run one after another, each where it is; x is on the device of the first.

    ```python
    from fmxnn.activations import harvest

    models = ["examples/tiny-lm", "examples/tiny-lm-chat"]
    pair = harvest(models, ["The whale was seen again. " * 20], layers=[6], context=32, batch=32)
    pair.layers  # ("tiny-lm:6", "tiny-lm-chat:6")
    ```
    """

    def __init__(self, sources: Mapping[str, Source], aligned: Aligned | None = None):
        self.sources = dict(sources)
        if not self.sources:
            raise ValueError(
                "SeveralSource reads at least one source, got none; give one for each model, under its name"
            )
        first = next(iter(self.sources.values()))
        self.aligned = same_for_all(first.contexts, len(self.sources)) if aligned is None else aligned
        for name, source in self.sources.items():
            read, kept = source.contexts, self.contexts
            if read is not kept and not torch.equal(read.keep.sum(1), kept.keep.sum(1)):
                raise ValueError(
                    f"all models read the same tokens of the text, and {name} keeps {read.tokens:,} of them where "
                    f"{kept.tokens:,} are read; give them contexts that are aligned"
                )

    @property
    def name(self) -> str:
        """The names of all models."""
        return ", ".join(self.sources)

    @property
    def contexts(self) -> Contexts:
        """The rows and positions of the kept tokens: those of the first model, or contexts that were given."""
        return self.aligned.contexts

    @property
    def counts(self) -> dict[str, Count]:
        """How many tokens of the text each model has, how many are pairs, and how many were dropped."""
        every = (Count(self.contexts.tokens, self.contexts.tokens),) * len(self.sources)
        return dict(zip(self.sources, self.aligned.counts or every, strict=True))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of x as "model:layer", model by model."""
        return tuple(f"{name}:{layer}" for name, source in self.sources.items() for layer in source.layers)

    @property
    def widths(self) -> tuple[int, ...]:
        """The d_model of each layer, as `RaggedWeight` takes them."""
        return tuple(source.d_model for source in self.sources.values() for _ in source.layers)

    @property
    def d_model(self) -> int:
        """The width of x: that of the widest model."""
        return max(self.widths)

    @property
    def device(self) -> torch.device:
        """That of the first model."""
        return next(iter(self.sources.values())).device

    def read(self, start: int, stop: int) -> Sides:
        """`tokens layers d_model`, each: the kept tokens of the contexts from `start` to before `stop`, in order."""
        each = list[Sides]()
        for name, source in self.sources.items():
            with naming(name):
                each.append(source.read(start, stop))
        return tuple(self._together(side) for side in zip(*each, strict=True))

    def identity(self) -> dict[str, Any]:
        """A digest of the tokens that each model reads, the layers with the models' names, and the places."""
        each = [source.identity() for source in self.sources.values()]
        texts = [said["text"] for said in each]
        return {**each[0], "text": texts[0] if len(set(texts)) == 1 else texts, "layers": list(self.layers)}

    def _together(self, side: Sequence[Tensor]) -> Tensor:
        return pad_layers([row.to(self.device) for x in side for row in x.unbind(-2)])


@contextmanager
def naming(model: str) -> Generator[None]:
    """Puts the name of a model before a ValueError that is raised inside, and does not begin with it."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(f"{model} "):
            raise
        raise ValueError(f"{model}: {error}") from error
