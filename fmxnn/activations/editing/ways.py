"""How edits of several layers are written."""

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from fmxnn.activations.places import Layer

Way = Literal["telescoped", "each"]
"""`"each"` writes Delta_l at layer l; `"telescoped"` Delta_l - Delta_(l-1), in one residual stream."""
STREAMS = ("block_in", "block_out")
"""The places of the residual stream, in which what is written at one layer still stands at the next."""


class Writing:
    """At which layers something is written, and how much of it.

    - `layers`: in the order of the crosscoder; `place`: what is written in each
    - `keeps`: None adds to what stands there; else that is replaced, with the crosscoder's error (true) or without

    Raises ValueError where they do not fit.

    ```python
    from fmxnn.activations.editing.ways import Writing

    writing = Writing((2, 3), "block_out", way="telescoped", only=None, keeps=None)
    first, second = writing.shares(torch.tensor([[[1.0], [5.0]]]))  # 1.0 at layer 2, 4.0 more at layer 3
    ```
    """

    def __init__(self, layers: Sequence[Layer], place: str, *, way: Way | None, only: Layer | None, keeps: bool | None):
        self.layers, self.keeps = tuple(layers), keeps
        if way is not None and way not in get_args(Way):
            raise ValueError(f"attach knows the ways {', '.join(get_args(Way))}, got {way!r:.200}; choose one")
        if only is not None and only not in self.layers:
            raise ValueError(
                f"only is one of the layers {', '.join(map(str, self.layers))}, got {only!r:.200}; choose one"
            )
        if way is not None and (only is not None or keeps is not None):
            raise ValueError(
                f"way={way!r} says how edits of several layers add up, and with only= or reconstruct=True they do "
                "not; leave it out"
            )
        numbered = all(isinstance(layer, int) for layer in self.layers)
        if way == "telescoped" and not (place in STREAMS and numbered):
            raise ValueError(
                f"way='telescoped' is for numbered layers of the residual stream ({', '.join(STREAMS)}), got {place} "
                f"of {', '.join(map(str, self.layers))}; use way='each'"
            )
        self.written = tuple(number for number, layer in enumerate(self.layers) if only in (None, layer))
        accumulates = place in STREAMS and numbered and keeps is None
        self.way: Way = way or ("telescoped" if accumulates and only is None else "each")
        order = sorted(self.written, key=lambda number: self.layers[number]) if accumulates else self.written
        self._before = dict(zip(order[1:], order, strict=False)) if self.way == "telescoped" else {}

    @property
    def replaces(self) -> bool:
        """Whether what stands there is replaced."""
        return self.keeps is not None

    def shares(self, delta: Tensor) -> list[Tensor | None]:
        """`tokens layers d_model -> tokens d_model` for each layer: what is added there, None for nothing."""
        return [self._share(delta, number) for number in range(len(self.layers))]

    def _share(self, delta: Tensor, number: int) -> Tensor | None:
        if number not in self.written:
            return None
        before = self._before.get(number)
        return delta[:, number] if before is None else delta[:, number] - delta[:, before]
