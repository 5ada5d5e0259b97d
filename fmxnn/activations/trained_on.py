"""What a crosscoder was trained on, as far as it was said or saved with it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import nn

from fmxnn.activations.places import BESIDE_BLOCKS, IN_BLOCKS, Layer

_OF_ONE_OF_SEVERAL = re.compile(rf".+:(-?\d+|({'|'.join(IN_BLOCKS)})\.\d+|{'|'.join(BESIDE_BLOCKS)})")


class TrainedOn(NamedTuple):
    """The layers and places of one model that a crosscoder reads and writes.

    ```python
    from fmxnn.activations.trained_on import TrainedOn

    TrainedOn((3, 4, 5), at="mlp_in", to="mlp_out")
    ```
    """

    layers: Sequence[Layer]
    at: str
    to: str


def trained_on(
    crosscoder: nn.Module, who: str, *, layers: Sequence[Layer] | None, at: str | None, to: str | None, instead: str
) -> TrainedOn:
    """What was given, and for what is None what the crosscoder was saved with (`about`).

    Raises ValueError where the layers are not known, and, naming what to do `instead`, where they are of several
    models.
    """
    about = cast("Mapping[str, Any]", getattr(crosscoder, "about", {}))
    layers = about.get("layers") if layers is None else layers
    if layers is None:
        raise ValueError(
            f"{who} needs the layers that the crosscoder was trained on, and it was not saved with them; pass "
            "layers=range(2, 10)"
        )
    several = [] if isinstance(layers, (str, int)) else [str(layer) for layer in layers if _of_one_of_several(layer)]
    if several:
        raise ValueError(
            f"{who} reads one model, and the crosscoder reads several: its layers are {', '.join(several):.200}; "
            f"{instead}"
        )
    read: str = at or about.get("at") or "block_out"
    written: str = to or about.get("to") or read
    return TrainedOn(layers, read, written)


def _of_one_of_several(layer: object) -> bool:
    """Whether it is a layer as `harvest` names those of a list of models."""
    return isinstance(layer, str) and _OF_ONE_OF_SEVERAL.fullmatch(layer) is not None
