"""Codes with one layer at a time hidden from the encoder, and the latents that switch on when it is."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from fmxnn.activations.own_batches import sides_of
from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.encoder import ENCODER, CrossLayerEncoder
from fmxnn.coders.inputs import blocks
from fmxnn.coders.layer_mask import LayerMask
from fmxnn.core.modes import evaluating
from fmxnn.core.shortcuts import why_overridden, why_watched
from fmxnn.gates.questions import select_of
from fmxnn.weights.questions import why_not_its_dense_form
from fmxnn.weights.weight import Weight

Selection = Literal["threshold", "batch"]
Select = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OffToOn:
    """How often a latent that is off switches on because a layer is hidden from the encoder.

    - `switched` (`layers latents`): at how many tokens z = 0 and z(M_l x) is not
    - `off` (`latents`): at how many tokens z = 0

    The `active` and `ratio` coherence leave these tokens out; they rule the `paper` one.

    ```python
    from fmxnn.metrics import off_to_on

    dense = fx.DenseWeight(2, 3, 8)
    crosscoder = fx.Crosscoder(fx.CrossLayerEncoder(dense, fx.TopK(2)), fx.CrossLayerDecoder(dense))
    off_to_on(crosscoder, [torch.randn(64, 2, 3)]).rate
    ```
    """

    tokens: int
    switched: Tensor
    off: Tensor

    @property
    def rate(self) -> float:
        """The share of all (token, latent, layer) with z = 0 that switch on when that layer is hidden."""
        return float(self.per_layer.mean())

    @property
    def per_layer(self) -> Tensor:
        """`-> layers`: the share of all (token, latent) with z = 0 that switch on when the layer is hidden."""
        return self.switched.sum(1).double() / self.off.sum()

    @property
    def per_token(self) -> Tensor:
        """`-> layers`: latents of a token that switch on when the layer is hidden, to be set beside the L0."""
        return self.switched.sum(1).double() / self.tokens


class Switching:
    """`... layers d_model`: counts, over a stream, the tokens at which latents switch on when a layer is hidden.

    See `off_to_on`. The encoder is measured as it is when this is made, and run in eval mode.

    ```python
    from fmxnn.metrics.hiding import Switching

    dense = fx.DenseWeight(2, 3, 8)
    crosscoder = fx.Crosscoder(fx.CrossLayerEncoder(dense, fx.TopK(2)), fx.CrossLayerDecoder(dense))
    counted = Switching(crosscoder)
    counted.update(torch.randn(64, 2, 3))
    counted.compute().per_layer
    ```
    """

    def __init__(self, crosscoder: Crosscoder, *, selection: Selection = "threshold"):
        self.crosscoder = crosscoder
        self.selection: Selection = selection
        weight, device = crosscoder.encoder.weight, crosscoder.encoder.bias.device
        with evaluating(crosscoder), torch.no_grad():
            self._codes = hidden_codes(crosscoder.encoder, selector(crosscoder, selection, "off_to_on"))
        self._switched = torch.zeros(weight.layers, weight.latents, dtype=torch.long, device=device)
        self._off, self.tokens = torch.zeros(weight.latents, dtype=torch.long, device=device), 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """`... layers d_model`: adds a batch. Raises ShapeError for other layers or d_model."""
        with evaluating(self.crosscoder):
            for block in blocks(self.crosscoder, x, whole=self.selection == "batch"):
                found = self._codes(block)
                is_off = next(found) == 0
                for layer, z in enumerate(found):
                    self._switched[layer] += (is_off & (z != 0)).sum(0)
                self._off += is_off.sum(0)
                self.tokens += len(block)

    def compute(self) -> OffToOn:
        """The counts so far. Raises ValueError before the first token."""
        check_seen(self.tokens, "off_to_on")
        return OffToOn(self.tokens, self._switched.clone(), self._off.clone())


def off_to_on(crosscoder: Crosscoder, batches: Iterable[Any], *, selection: Selection = "threshold") -> OffToOn:
    """`... layers d_model -> layers latents`: at how many tokens latents switch on when a layer is hidden.

    Hiding a layer may take away what held a latent down. Functional coherence sees only what it takes from latents that
    are on. Counts do not depend on the scale of the codes, nor on batch boundaries, except for `selection="batch"` (see
    `functional_coherence`, also for the errors). Of a batch (x, y) or (x, ids, positions) x is measured.

    Pre-activations are made layers + 1 times, in blocks of tokens. Beside the batch and the encoder's dense weight
    about four times 4,194,304 of them are held, or one token's where there are more latents. `selection="batch"`
    compares all tokens of a batch and holds those of all. It runs in eval mode, which is put back.
    """
    measured = Switching(crosscoder, selection=selection)
    for batch in batches:
        measured.update(sides_of(batch)[0])
    return measured.compute()


def selector(crosscoder: Crosscoder, selection: str, who: str) -> Select | None:
    """`tokens latents -> tokens latents`: how codes are chosen from pre-activations; None: as the encoder chooses.

    Raises ValueError for an unknown selection, and for one that the gate does not have.
    """
    if selection not in get_args(Selection):
        raise ValueError(f"{who} knows selection {', '.join(get_args(Selection))}, got {selection!r}")
    sparsifier = crosscoder.encoder.sparsifier
    if selection == "threshold":
        return None
    select = select_of(sparsifier)
    if select is None:
        raise ValueError(
            f"selection='batch' needs a gate with select, such as BatchTopK, got {type(sparsifier).__name__}; "
            "use selection='threshold'"
        )
    return select


def check_seen(tokens: int, who: str) -> None:
    """Raises ValueError where there was no token at all."""
    if not tokens:
        raise ValueError(f"{who} has seen no tokens; give it batches of (tokens, layers, d_model)")


def hidden_codes(encoder: CrossLayerEncoder, select: Select | None) -> Callable[[Tensor], Iterator[Tensor]]:
    """`tokens layers d_model`: gives the codes `tokens latents`, then those with each layer hidden in turn.

    `select` chooses from pre-activations; None is the encoder's own choice. Where nothing but the weight reads the
    input, pre(M_l x) = pre(x) - x_l . E_l by linearity. Otherwise the whole encoder is run again.
    """
    if not is_linear(encoder):
        return lambda x: _encoded(x, encoder, select)
    table, choose = by_latents(encoder.weight), encoder.sparsifier if select is None else select
    return lambda x: _subtracted(x, table, encoder.bias, choose)


def is_linear(encoder: CrossLayerEncoder) -> bool:
    """Whether pre-activations are known to be linear in the input, by a weight that has a dense form."""
    if type(encoder) is not CrossLayerEncoder:
        return False
    weight, mask = encoder.weight, encoder.mask
    if type(mask) is not LayerMask or not hasattr(weight, "to_dense"):
        return False
    if why_overridden(encoder, ENCODER) or why_watched([encoder, mask, *weight.modules()]):
        return False
    return not any(why_not_its_dense_form(part) for part in weight.modules() if isinstance(part, Weight))


def by_latents(weight: Weight) -> Tensor:
    """`-> latents layers d_model`: the dense form, laid out for reading its rows whole and layer by layer."""
    return rearrange(weight.to_dense(), "layers d_model latents -> latents layers d_model").contiguous()


def _subtracted(x: Tensor, table: Tensor, bias: Tensor, select: Select) -> Iterator[Tensor]:
    pre = torch.addmm(bias, x.flatten(1), table.flatten(1).T)
    yield select(pre)
    for layer in range(
        x.shape[1]
    ):  # the product once more, not kept from above: that would hold layers x tokens x latents
        yield select(torch.addmm(pre, x[:, layer], table[:, layer].T, alpha=-1))


def _encoded(x: Tensor, encoder: CrossLayerEncoder, select: Select | None) -> Iterator[Tensor]:
    yield encoder(x) if select is None else select(encoder.pre_activations(x))
    for layer in range(x.shape[1]):
        masked = x.clone()
        masked[:, layer] = 0
        yield encoder(masked) if select is None else select(encoder.pre_activations(masked))
