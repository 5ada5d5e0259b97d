"""The contract of an encoder, and the encoder."""

from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from fmxnn.coders.layer_mask import LayerMask
from fmxnn.core.errors import ShapeError
from fmxnn.core.outputs import checked
from fmxnn.core.shortcuts import Shortcuts, why_overridden, why_watched
from fmxnn.gates.gate import Chooser
from fmxnn.gates.questions import axis_of, k_of, latents_of, why_dense, why_one_table
from fmxnn.sparse.codes import Codes
from fmxnn.sparse.tables import Tables
from fmxnn.weights.weight import Tabled, Weight, check_layers, why_untabled

ENCODER: Shortcuts = {"pre_activations": ("read",), "forward": ("read", "choose"), "__call__": ("read", "choose")}
"""Each slow method of an encoder with the fast ones that stand for it where codes are sparse."""


class Encoder(Protocol):
    """`... layers d_model -> ... latents`: a module that reads all layers, adds a bias and lets a gate choose.

    CrossLayerEncoder is one. One of your own runs sparse where it is a TableReader too.

    ```python
    class Gained(fx.CrossLayerEncoder):
        def forward(self, x):
            return 2 * super().forward(x)

    encoder = Gained(fx.DenseWeight(2, 8, 32), fx.TopK(4))
    coder = fx.Crosscoder(encoder, fx.CrossLayerDecoder(fx.DenseWeight(2, 8, 32)))
    coder.obstacle  # "Gained overrides forward and not read"
    ```
    """

    @property
    def weight(self) -> Weight:
        """What reads the layers."""
        ...

    @property
    def bias(self) -> nn.Parameter:
        """`latents`: added to what the weight read."""
        ...

    @property
    def sparsifier(self) -> nn.Module:
        """The gate, which chooses the codes from the pre-activations."""
        ...

    def pre_activations(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`: what the gate chooses from."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`: the codes."""
        ...


@runtime_checkable
class TableReader(Protocol):
    """An encoder that finds its codes at the table of its weight, without the pre-activations.

    ```python
    encoder = fx.CrossLayerEncoder(fx.DenseWeight(2, 8, 32), fx.TopK(4))
    x = torch.randn(5, 2, 8)
    z = encoder.choose(encoder.read(x))
    torch.testing.assert_close(fx.sparse.to_dense_codes(z), encoder(x))
    ```
    """

    def read(self, x: Tensor) -> Tensor:
        """`... layers d_model -> tokens bonds`: the input as the rows of the table read it, batch axes in one."""
        ...

    def choose(self, read: Tensor, *, propose: bool = False) -> Codes:
        """`tokens bonds -> tokens latents`: the codes of what `read` gave."""
        ...


class CrossLayerEncoder(nn.Module):
    """`... layers d_model -> ... latents`: one sparse code from all layers.

    - `weight` reads the layers; a bias over latents that starts at zero is added.
    - `sparsifier` is the gate: it chooses which latents are kept.
    - `mask` drops layers of the input in training; None is LayerMask(0), which drops none.

    Codes have the dtype of the encoder's parameters, dense and sparse ones, under autocast too. (fmxcoders, equation 1)
    Raises ValueError where the gate keeps more latents than there are.

    ```python
    encoder = fx.CrossLayerEncoder(fx.DenseWeight(8, 64, 512), fx.BatchTopK(16), mask=fx.LayerMask(0.05))
    encoder(torch.randn(5, 8, 64)).shape  # (5, 512)
    ```
    """

    def __init__(self, weight: Weight, sparsifier: nn.Module, *, mask: nn.Module | None = None):
        super().__init__()
        for part in (sparsifier, mask):
            if part is not None and not isinstance(part, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"the encoder's sparsifier and mask are modules, got {part!r:.200}; "
                    "pass BatchTopK(k=64) or LayerMask(p=0.05)"
                )
        k, latents = k_of(sparsifier), latents_of(sparsifier)
        if k is not None and k > weight.latents:
            raise ValueError(
                f"the sparsifier keeps k={k} latents a token, and the weight has latents={weight.latents}; "
                f"take k <= {weight.latents}"
            )
        if latents not in (None, weight.latents):
            raise ValueError(
                f"the sparsifier is made for latents={latents}, and the weight has latents={weight.latents}; "
                "make them equal"
            )
        if axis_of(sparsifier) != -1:
            raise ValueError(
                f"an encoder's latents lie along the last axis, and the sparsifier takes them along "
                f"dim={axis_of(sparsifier)}; leave its dim at -1"
            )
        self.weight = weight
        self.sparsifier = sparsifier
        self.mask = LayerMask(0.0) if mask is None else mask
        self.bias = nn.Parameter(torch.zeros(weight.latents))

    def pre_activations(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`: what the gate chooses from.

        Raises ShapeError for other layers or d_model.
        """
        weight = self.weight
        read = weight.to_latents(self._masked(x, weight))
        return checked(read, (*x.shape[:-2], weight.latents), weight, "to_latents") + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`"""
        gate, shape = self.sparsifier, (*x.shape[:-2], self.weight.latents)
        pre = checked(self.pre_activations(x), shape, self, "pre_activations")
        return checked(gate(pre), shape, gate)

    def read(self, x: Tensor) -> Tensor:
        """`... layers d_model -> tokens bonds`: the masked input at the weight's table, batch axes in one.

        Raises ShapeError for other layers or d_model.
        """
        bonds = cast("object", _tabled(self.weight).to_bonds(self._masked(x, self.weight)))
        if not isinstance(bonds, Tensor) or bonds.shape[:-1] != x.shape[:-2]:
            bonds = checked(bonds, (*x.shape[:-2], "bonds"), self.weight, "to_bonds")
        return bonds.reshape(x.shape[:-2].numel(), bonds.shape[-1])

    def choose(self, read: Tensor, *, propose: bool = False) -> Codes:
        """`tokens bonds -> tokens latents`: sparse codes of what `read` gave, without the pre-activations."""
        gate, table = self.sparsifier, _tabled(self.weight).table
        if not isinstance(gate, Chooser):
            raise TypeError(
                f"sparse codes need a gate with choose, got {type(gate).__name__}; use TopK, BatchTopK or JumpReLU"
            )
        if table is None:
            raise TypeError(
                f"sparse codes need a weight with a table, got {type(self.weight).__name__} without one; "
                "use the dense codes"
            )
        if read.shape[-1] != table.shape[1]:
            raise ShapeError(
                f"{type(self.weight).__name__}.to_bonds must give the {table.shape[1]} bonds of its table, "
                f"got {read.shape[-1]}; make them equal"
            )
        z = gate.choose(read, cast("Tensor", table), self.bias, propose=propose)  # several tables stand for one
        return _checked_codes(z, (len(read), self.weight.latents), gate)

    def _masked(self, x: Tensor, weight: Weight) -> Tensor:
        check_layers("encoder", weight, x)
        mask = self.mask
        return checked(mask(x), x.shape, mask)


def why_not_chosen(encoder: Encoder) -> str:
    """Why an encoder cannot choose sparse codes, if it cannot."""
    module, gate, weight = cast("nn.Module", encoder), encoder.sparsifier, encoder.weight
    return (
        why_untabled(weight)
        or why_dense(gate)
        or (why_one_table(gate) if isinstance(cast("Tabled", weight).table, Tables) else "")
        or why_overridden(module, ENCODER)
        or why_watched([module, *weight.modules(), *gate.modules()])
    )


def _tabled(weight: Weight) -> Tabled:
    if not isinstance(weight, Tabled):
        raise TypeError(f"sparse codes need a weight with a table, got {type(weight).__name__}; use the dense codes")
    return weight


def _checked_codes(z: object, shape: tuple[int, int], gate: nn.Module) -> Codes:
    """Raises TypeError for anything but Codes and ShapeError for those of other tokens or latents."""
    if isinstance(z, Codes) and z.shape == shape:
        return z
    wanted = f"{type(gate).__name__}.choose must give fmxnn.sparse.Codes of {shape}"
    if not isinstance(z, Codes):
        raise TypeError(f"{wanted}, got {type(z).__name__}; return what fmxnn.sparse.choose gives")
    raise ShapeError(f"{wanted}, got {z.shape}; choose from all rows of read and table")
