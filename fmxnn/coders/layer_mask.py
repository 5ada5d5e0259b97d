"""Stochastic layer masking."""

from collections.abc import Sequence
from math import nan
from numbers import Real
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.core.errors import ShapeError
from fmxnn.core.excerpt import excerpt


class LayerMask(nn.Module):
    """`... layers d_model -> ... layers d_model`: zeroes whole layers at random while training.

    Each token and layer is dropped by a draw of its own. In eval mode it is the identity. Nothing is rescaled by
    1 / (1 - p), and the loss targets the unmasked activations. A dropped layer is 0 whatever it held, NaN too.
    (fmxcoders, section 3.3)

    - `p`: the probability that a layer is dropped, one number, or one for each layer.
    - `keep_one`: whether a token always keeps a layer. The draws are then those of `keep_one=False`, given that not
      all layers are dropped: with P the product of all probabilities, a set of layers that is kept has 1 / (1 - P)
      times its probability. Layer l is dropped with probability (p_l - P) / (1 - P), a little less than p_l.

    Raises ValueError for a probability outside [0, 1), ShapeError for other layers than there are probabilities.

    ```python
    exits = torch.randn(100, 4, 8)  # tokens layers d_model
    some = fx.LayerMask(0.5, keep_one=True)(exits)
    assert (some != 0).any(-1).any(-1).all()
    fx.LayerMask((0.0, 0.1, 0.2, 0.3))(exits)  # later layers are dropped more often
    ```
    """

    added_later: ClassVar[tuple[str, ...]] = ("keep_one",)

    def __init__(self, p: float | Sequence[float], *, keep_one: bool = False):
        super().__init__()
        p = getattr(p, "tolist", lambda: p)()  # of numpy and torch
        self.p = tuple(p) if isinstance(p, Sequence) and not isinstance(p, str) else p
        self.keep_one = keep_one
        self._probabilities()

    @override
    def extra_repr(self) -> str:
        """How likely a layer is to be dropped."""
        return f"p={self.p}" + (", keep_one=True" if self.keep_one else "")

    @override
    def forward(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... layers d_model`"""
        if not self.training or self.p == 0:
            return x
        drawn = torch.rand(x.shape[:-1], device=x.device)
        if isinstance(self.p, (int, float)) and not self.keep_one:
            return torch.where((drawn >= self.p).unsqueeze(-1), x, 0.0)  # a product would leave NaN where it is
        p = self._of_layers(x)
        keep = drawn >= p
        if self.keep_one:
            first = _first_kept(p, x).unsqueeze(-1)
            place = torch.arange(x.shape[-2], device=x.device)
            keep = (place == first) | ((place > first) & keep)
        return torch.where(keep.unsqueeze(-1), x, 0.0)

    def _of_layers(self, x: Tensor) -> Tensor:
        """`-> layers`: the probability of each layer of `x`."""
        probabilities = self._probabilities()
        if isinstance(self.p, (tuple, list)) and len(probabilities) != x.shape[-2]:
            raise ShapeError(
                f"LayerMask has a probability for each of layers={len(probabilities)}, got (..., layers, d_model) of "
                f"{tuple(x.shape)}; give as many as there are layers, or one for all"
            )
        return torch.tensor(probabilities, device=x.device).expand(x.shape[-2])

    def _probabilities(self) -> tuple[float, ...]:
        given = cast("Sequence[object]", self.p if isinstance(self.p, (tuple, list)) else (self.p,))
        found = tuple(float(cast("float", p)) if isinstance(p, Real) else nan for p in given)
        if not found or not all(0 <= p < 1 for p in found):
            raise ValueError(
                "LayerMask needs 0 <= p < 1, the probability that a layer is dropped (or one for each layer), "
                f"got p={excerpt(self.p)}"
            )
        return found


def _first_kept(p: Tensor, x: Tensor) -> Tensor:
    """`layers, ... layers d_model -> ...`: the first layer that each token keeps, given that it keeps one."""
    some_before = 1 - p.cumprod(0)  # the probability that one of the first layers is kept, up to each
    drawn = torch.rand(x.shape[:-2], device=x.device) * some_before[-1]
    return torch.searchsorted(some_before, drawn, right=True).clamp(max=len(p) - 1)
