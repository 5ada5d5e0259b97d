"""Some contexts of a source, as a source of their own."""

from typing import Any, cast

import torch
from torch import nn

from fmxnn.activations.layer_reader import LayerReader
from fmxnn.activations.places import Layer
from fmxnn.activations.source import ModelSource, Sides, Source
from fmxnn.activations.tokens import Contexts


class PartSource:
    """`tokens layers d_model`, each: what another source gives on some of its contexts, from number `start` on.

    It is what `Stream.split` makes. `contexts` may still grow, so nobody waits for the end of a text.

    ```python
    from fmxnn.activations import harvest

    text = ["The whale was seen off the coast again. " * 20]
    stream = harvest("examples/tiny-lm", text, layers=[1, 2], context=32, batch=16)
    heldout, train = stream.split(64)
    train.source.start  # 3 contexts are held out
    ```
    """

    def __init__(self, whole: Source, contexts: Contexts, start: int):
        if isinstance(whole, PartSource):  # so that the part of a part is named as one of the whole
            whole, start = whole.whole, whole.start + start
        self.whole, self.contexts, self.start = whole, contexts, start

    @property
    def name(self) -> str:
        """The language model, as a report names it."""
        return self.whole.name

    @property
    def model(self) -> nn.Module:
        """The language model that is read; AttributeError where the whole has none."""
        return cast("ModelSource", self.whole).model

    @property
    def reader(self) -> LayerReader:
        """The reader of x; AttributeError where the whole has none."""
        return cast("ModelSource", self.whole).reader

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of x, in the order of the axis."""
        return self.whole.layers

    @property
    def d_model(self) -> int:
        """The width of x."""
        return self.whole.d_model

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.whole.device

    def read(self, start: int, stop: int) -> Sides:
        """`tokens layers d_model`, each: the kept tokens of the contexts from `start` to before `stop`, in order."""
        return self.whole.read(self.start + start, self.start + stop)

    def identity(self) -> dict[str, Any]:
        """That of the whole, and which of its contexts these are."""
        return {**self.whole.identity(), "contexts": [self.start, self.start + len(self.contexts)]}
