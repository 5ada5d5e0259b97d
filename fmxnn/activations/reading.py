"""What `harvest` reads of each language model, and where."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fmxnn.activations.adapters import without_wrapper
from fmxnn.activations.configs import check_layers_of
from fmxnn.activations.layer_reader import Forward, LayerReader, call_language_model
from fmxnn.activations.models import Model, open_config, open_model
from fmxnn.activations.places import Layer


@dataclass(frozen=True)
class ModelReading:
    """The layers of a language model, the places in them (of x, and of the targets), and the device.

    ```python
    from fmxnn.activations.reading import ModelReading

    (x, y), tokenizer = ModelReading([1, 2], ("mlp_in", "mlp_out")).open("examples/tiny-lm")
    ```
    """

    layers: Sequence[Layer]
    places: Sequence[str] = ("block_out",)
    path: str | None = None
    call: Forward = call_language_model
    device: str | torch.device | None = None
    dtype: torch.dtype = torch.float32

    def known(self, model: Model) -> "ModelReading":
        """The same with its layers and places checked, without the weights of a model that is given by its name."""
        return replace(
            self, layers=check_layers_of(None if self.path else open_config(model), self.layers, *self.places)
        )

    def open(self, model: Model, tokenizer: Any = None) -> tuple[list[LayerReader], Any]:
        """One reader for each place, and the tokenizer as `open_model` finds it.

        The model is put on the device and into eval mode. Raises ValueError for a layer or a place that it lacks.
        """
        opened, tokenizer = open_model(model, tokenizer, dtype=self.dtype)
        opened = without_wrapper(opened)
        if self.device is not None:
            nn.Module.to(opened, self.device)  # transformers wraps its own `to` in an untyped decorator
        readers = [
            LayerReader(opened.eval(), self.layers, at=place, path=self.path, call=self.call) for place in self.places
        ]
        return readers, tokenizer
