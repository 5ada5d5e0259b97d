"""The threshold of BatchTopK set from activations, at the end of a run."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.inputs import blocks
from fmxnn.core.modes import evaluating
from fmxnn.core.sharding import is_sharded
from fmxnn.gates.questions import is_unset
from fmxnn.gates.thresholds import set_thresholds


class Calibration(NamedTuple):
    """The latents that fire a token in eval mode, on the tokens that were given.

    ```python
    encoder = fx.CrossLayerEncoder(fx.DenseWeight(2, 4, 16), fx.BatchTopK(2))
    crosscoder = fx.Crosscoder(encoder, fx.CrossLayerDecoder(fx.DenseWeight(2, 4, 16)))
    l0 = fx.training.calibrate(crosscoder, [torch.randn(200, 2, 4)])
    l0.after  # about 2.0
    ```
    """

    before: float
    """NaN where a threshold was never set."""
    after: float


@torch.no_grad()
def calibrate(crosscoder: Crosscoder, batches: Iterable[Tensor]) -> Calibration:
    """`... layers d_model`: sets the threshold so that in eval mode these tokens keep k latents each on average.

    Call it at the end of training, before measuring and saving: until then the threshold follows the weights at some
    distance, and with masked layers. Give activations as in training (scaled, where those were), of some thousand
    tokens. They are held together, and pre-activations a block at a time. The result follows from weights and tokens
    alone. It is for BatchTopK, alone or within Scored, Decoupled (k for each layer) or SplitGate. Gives L0 before and
    after. Raises TypeError for a gate without such a threshold, ShapeError for other layers or d_model, and ValueError
    for no tokens and for NaN; no threshold is moved then.
    """
    if not isinstance(crosscoder, Crosscoder):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"calibrate takes a Crosscoder, got {type(crosscoder).__name__}; give the crosscoder inside it")
    encoder, held = crosscoder.encoder, list(batches)
    if not hasattr(encoder, "pre_activations"):
        raise TypeError(
            f"calibrate needs an encoder with pre_activations(x), what its gate chooses from, and "
            f"{type(encoder).__name__} lacks it; add it"
        )
    if any(map(is_sharded, crosscoder.parameters())):
        raise TypeError(
            "calibrate takes whole parameters, and these are sharded; gather them first, as docs/frameworks.md does "
            "for saving, and calibrate the crosscoder that holds them"
        )
    tokens = sum(x.shape[:-2].numel() for x in held)
    if not tokens:
        raise ValueError("calibrate needs activations of at least one token, got none; give some training batches")

    def pre_activations() -> Iterator[Tensor]:
        for x in held:
            for block in blocks(crosscoder, x, whole=False):
                yield encoder.pre_activations(block)

    def l0() -> float:
        return sum(float((encoder.sparsifier(pre) != 0).sum()) for pre in pre_activations()) / tokens

    with evaluating(crosscoder):
        unset = any(map(is_unset, encoder.sparsifier.modules()))
        before = torch.nan if unset else l0()
        set_thresholds(encoder.sparsifier, pre_activations(), tokens)
        return Calibration(before, l0())
