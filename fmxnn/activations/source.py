"""Where a stream gets its activations: a language model that runs, or files."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fmxnn.activations.configs import model_name
from fmxnn.activations.layer_reader import LayerReader, read_together
from fmxnn.activations.places import Layer
from fmxnn.activations.text import Contexts

Sides = tuple[Tensor, ...]
"""What is read of some tokens, `tokens layers d_model` each: x alone, or x and the targets y."""


class Source(Protocol):
    """Activations of the kept tokens of a text, context by context."""

    @property
    def name(self) -> str:
        """The language model, as a report names it."""
        ...

    @property
    def contexts(self) -> Contexts:
        """The tokens that were read, which are kept, and their roles."""
        ...

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of x, in the order of the axis."""
        ...

    @property
    def d_model(self) -> int:
        """The width of x."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        ...

    def read(self, start: int, stop: int) -> Sides:
        """`tokens layers d_model`, each: the kept tokens of the contexts from `start` to before `stop`, in order."""
        ...

    def identity(self) -> dict[str, Any]:
        """What its activations depend on, as plain values; the weights of a language model are not in it."""
        ...


class ModelSource:
    """`tokens layers d_model`, one or two sides: what a language model gives on a text, from one forward.

    `at_once` contexts run together. All `readers` are of one model.

    ```python
    from fmxnn.activations import contexts
    from fmxnn.activations.layer_reader import LayerReader
    from fmxnn.activations.models import open_model
    from fmxnn.activations.source import ModelSource

    model, tokenizer = open_model("examples/tiny-lm")
    text = contexts(["The whale was seen off the coast again. " * 20], tokenizer, context=32)
    (x,) = ModelSource([LayerReader(model, [1, 2])], text).read(0, 2)
    ```
    """

    def __init__(self, readers: Sequence[LayerReader], contexts: Contexts, *, at_once: int = 32):
        self.readers, self.contexts, self.at_once = tuple(readers), contexts, at_once

    @property
    def reader(self) -> LayerReader:
        """The reader of x."""
        return self.readers[0]

    @property
    def model(self) -> nn.Module:
        """The language model that is read."""
        return self.reader.model

    @property
    def name(self) -> str:
        """Of a Hub name or folder, or else of the class."""
        return model_name(self.model)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of x, in the order of the axis."""
        return self.reader.layers

    @property
    def d_model(self) -> int:
        """The width of x, learned from a forward over one context."""
        return self._width

    @cached_property
    def _width(self) -> int:
        return self._sides(self.contexts.ids[:1])[0].shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the language model runs."""
        return next(self.model.parameters()).device

    def read(self, start: int, stop: int) -> Sides:
        """`tokens layers d_model`, each: the kept tokens of the contexts from `start` to before `stop`, in order."""
        ids, keep = self.contexts.ids[start:stop], self.contexts.keep[start:stop].to(self.device)
        some = [self._sides(part) for part in ids.split(self.at_once)]
        return tuple(torch.cat(side)[keep] for side in zip(*some, strict=True))

    def identity(self) -> dict[str, Any]:
        """A digest of the token ids, the layers, and the places where they are not block outputs."""
        places = {name: reader.at for name, reader in zip(("at", "to"), self.readers, strict=False)}
        given = {} if places == {"at": "block_out"} else places
        return {"text": self.contexts.digest, "layers": list(self.layers), **given}

    def _sides(self, ids: Tensor) -> Sides:
        return read_together(self.readers, ids.to(self.device).long())
