"""The encoder."""

from typing import cast

import torch
from torch import Tensor, nn

from fmxnn.coders.layer_mask import LayerMask
from fmxnn.gates.gate import Chooser
from fmxnn.sparse.codes import Codes
from fmxnn.weights.weight import Tabled, Weight, check_layers


class CrossLayerEncoder(nn.Module):
    """`... layers d_model -> ... latents`: one sparse code from all layers.

    `mask` drops layers of the input while training (None: LayerMask(0)), `weight` reads them, a bias over
    latents that starts at zero is added, `sparsifier` chooses. (fmxcoders, equation 1)
    Raises ValueError where the sparsifier keeps more latents than there are.
    """

    def __init__(self, weight: Weight, sparsifier: nn.Module, *, mask: nn.Module | None = None):
        super().__init__()
        for part in (sparsifier, mask):
            if part is not None and not isinstance(part, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"the encoder's sparsifier and mask are modules, got {part!r}; pass BatchTopK(k=64) or LayerMask(p=0.05)"
                )
        k, latents = getattr(sparsifier, "k", 1), getattr(sparsifier, "latents", weight.latents)
        if k > weight.latents:
            raise ValueError(
                f"the sparsifier keeps k={k} latents a token, and the weight has latents={weight.latents}; take k <= {weight.latents}"
            )
        if latents != weight.latents:
            raise ValueError(
                f"the sparsifier is made for latents={latents}, and the weight has latents={weight.latents}; make them equal"
            )
        self.weight = weight
        self.sparsifier = sparsifier
        self.mask = LayerMask(0.0) if mask is None else mask
        self.bias = nn.Parameter(torch.zeros(weight.latents))

    def pre_activations(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`: what the sparsifier chooses from. Raises ShapeError for other layers or d_model."""
        check_layers("encoder", self.weight, x)
        return self.weight.to_latents(self.mask(x)) + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`"""
        return self.sparsifier(self.pre_activations(x))

    def read(self, x: Tensor) -> Tensor:
        """`... layers d_model -> tokens bonds`: the masked input at the weight's table, batch axes in one. Raises ShapeError as `pre_activations` does."""
        check_layers("encoder", self.weight, x)
        bonds = _tabled(self.weight).to_bonds(self.mask(x))
        return bonds.reshape(x.shape[:-2].numel(), bonds.shape[-1])

    def choose(self, read: Tensor, *, propose: bool = False) -> Codes:
        """`tokens bonds -> tokens latents`: sparse codes from what `read` gave; the pre-activations are never held whole."""
        if not isinstance(self.sparsifier, Chooser):
            raise TypeError(
                f"sparse codes need a sparsifier with choose, got {type(self.sparsifier).__name__}; use TopK, BatchTopK or JumpReLU"
            )
        table = _tabled(self.weight).table
        if table is None:
            raise TypeError(
                f"sparse codes need a weight with a table, got {type(self.weight).__name__} without one; use the dense codes"
            )
        return self.sparsifier.choose(
            read, cast("Tensor", table), self.bias, propose=propose
        )  # several tables stand for one


def _tabled(weight: Weight) -> Tabled:
    if not isinstance(weight, Tabled):
        raise TypeError(f"sparse codes need a weight with a table, got {type(weight).__name__}; use the dense codes")
    return weight
