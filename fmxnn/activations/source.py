"""Where a stream gets its activations: a language model that runs, or files."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fmxnn.activations.batches import bunches
from fmxnn.activations.configs import check_vocabulary, model_name
from fmxnn.activations.layer_reader import LayerReader, read_together
from fmxnn.activations.own_batches import Sides
from fmxnn.activations.places import Layer
from fmxnn.activations.tokens import Contexts

__all__ = ["ModelSource", "OfText", "Sides", "Source"]


class OfText(Protocol):
    """What is known of activations of a text before they are read."""

    @property
    def name(self) -> str:
        """The language model, as a report names it."""
        ...

    @property
    def contexts(self) -> Contexts:
        """The tokens that were read, which are kept, and their roles; of `OwnActivations` those that came so far."""
        ...

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of x, in the order of the axis."""
        ...

    @property
    def d_model(self) -> int:
        """The width of x."""
        ...


class Source(OfText, Protocol):
    """Activations of the kept tokens of a text, context by context."""

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

    All `readers` are of one model. As many tokens run together as `at_once` whole contexts have: contexts of unequal
    lengths are sorted by length and cut after their last kept token, so that padding costs little. A causal model gives
    the same there.

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
        return self._sides(self.contexts[:1].ids)[0].shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the language model runs."""
        return next(self.model.parameters()).device

    def read(self, start: int, stop: int) -> Sides:
        """`tokens layers d_model`, each: the kept tokens of the contexts from `start` to before `stop`, in order.

        Raises ValueError for token ids that the model does not know.
        """
        text = self.contexts[start:stop]
        check_vocabulary(self.model, text.ids)
        place = torch.full(text.keep.shape, -1)
        place[text.keep] = torch.arange(text.tokens)  # where each kept token goes
        found: list[Tensor] = []
        for rows, longest in bunches(text.keep, self.at_once * text.context) if text.tokens else [(slice(1), None)]:
            sides = self._sides(text.ids[rows, :longest])
            there = place[rows, :longest].flatten()
            kept = there >= 0
            found = found or [side.new_empty(text.tokens, *side.shape[2:]) for side in sides]
            for side, whole in zip(sides, found, strict=True):
                _move(side.flatten(0, 1), kept.nonzero().squeeze(1), whole, there[kept])
        return tuple(found)

    def identity(self) -> dict[str, Any]:
        """A digest of the token ids, the layers, and the places where they are not block outputs."""
        places = {name: reader.at for name, reader in zip(("at", "to"), self.readers, strict=False)}
        given = {} if places == {"at": "block_out"} else places
        return {"text": self.contexts.digest, "layers": list(self.layers), **given}

    def _sides(self, ids: Tensor) -> Sides:
        return read_together(self.readers, ids.to(self.device).long())


def _move(x: Tensor, rows: Tensor, whole: Tensor, places: Tensor) -> None:
    """Some rows of `x` to their places in `whole`, with one copy where these lie side by side."""
    rows, count = rows.to(x.device), len(places)
    first = int(places[0]) if count else 0
    if count and int(places[-1]) - first == count - 1 and bool((places.diff() == 1).all()):
        torch.index_select(x, 0, rows, out=whole[first : first + count])
    else:
        whole[places.to(x.device)] = x[rows]
