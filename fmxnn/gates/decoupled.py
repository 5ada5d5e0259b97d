"""One code read by all layers, and for each layer a choice of its own of what is written there."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from fmxnn.core.errors import ShapeError
from fmxnn.gates.gate import HasK
from fmxnn.gates.questions import is_unset, latents_of, select_of, set_k
from fmxnn.gates.thresholds import Calibrated, ranked
from fmxnn.weights.weight import Weight


class Decoupled(Calibrated):
    """`... latents -> ... latents`: each layer's gate chooses among `pre * ||d_l||`; any layer's choice is kept.

    Give one sparsifier a layer: BatchTopK(k), whose threshold follows training, or JumpReLU with given thresholds. One
    module in several places is shared. Thresholds are in units of `pre * ||d_l||`. `weight` is the decoder's own, and
    no gradient goes through its norms. DecoupledDecoder repeats each layer's choice. (chat-tuning crosscoders, A.1)
    Raises ValueError and TypeError for sparsifiers that do not fit, and in eval mode ValueError where a threshold was
    never set.

    ```python
    weight = fx.DenseWeight(2, 8, 16)
    gate = fx.Decoupled(fx.BatchTopK(4), fx.BatchTopK(4), weight=weight)
    decoder = fx.DecoupledDecoder(weight, gate)
    coder = fx.Crosscoder(fx.CrossLayerEncoder(fx.DenseWeight(2, 8, 16), gate), decoder)
    ```
    """

    def __init__(self, *sparsifiers: nn.Module, weight: Weight):
        super().__init__()
        if len(sparsifiers) != weight.layers:
            raise ValueError(
                f"Decoupled takes one sparsifier a layer, got {len(sparsifiers)} for layers={weight.layers}; "
                "repeat one to share it"
            )
        for sparsifier in sparsifiers:
            if latents_of(sparsifier) not in (None, weight.latents):
                raise ShapeError(
                    f"Decoupled has a weight of latents={weight.latents}, got {sparsifier!r}; make them equal"
                )
            if next(sparsifier.parameters(), None) is not None:
                raise TypeError(
                    f"Decoupled passes no gradient to thresholds, got {type(sparsifier).__name__}; give its frozen()"
                )
        self.sparsifiers, self.weight = nn.ModuleList(sparsifiers), weight
        self.latents = weight.latents

    @property
    def k(self) -> int:
        """The largest of the sparsifiers', where they have one."""
        return max(cast("HasK", sparsifier).k for sparsifier in self.sparsifiers)

    @k.setter
    def k(self, k: int) -> None:
        """Sets that of every sparsifier.

        Raises ValueError for anything but a whole number from 1, and TypeError where one has no k.
        """
        for sparsifier in self.sparsifiers:
            set_k(sparsifier, k)

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`: what any layer keeps.

        Training moves each threshold once a pass, one that is shared once for each of its layers.
        """
        self._check_thresholds()
        kept = torch.zeros_like(pre, dtype=torch.bool)
        for sparsifier, norm in zip(self.sparsifiers, self._norms(pre), strict=True):
            kept = kept | _written(sparsifier(pre * norm))
        return torch.where(kept, pre, 0.0)

    def split(self, z: Tensor) -> list[Tensor]:
        """What each layer keeps of the codes that `forward` gave: one `... latents` a layer. No threshold moves.

        The codes are enough to know it: what a layer chose among all latents it also chooses among those that some
        layer chose. In training give the whole batch, as the choice was made among all of its tokens.
        """
        self._check_thresholds()
        codes: list[Tensor] = []
        for sparsifier, norm in zip(self.sparsifiers, self._norms(z), strict=True):
            again = (select_of(sparsifier) if self.training else None) or sparsifier
            codes.append(torch.where(_written(again(z * norm)), z, 0.0))
        return codes

    def ranked(self, pre: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """`... latents -> `: what each layer's sparsifier ranks; one that is shared ranks all its layers at once."""
        for sparsifier, norm in zip(self.sparsifiers, self._norms(pre), strict=True):
            yield from ranked(sparsifier, pre * norm)

    @torch.no_grad()
    def _norms(self, like: Tensor) -> Tensor:
        with torch.autocast(like.device.type, enabled=False):  # as for scores
            norms = self.weight.norms()
        return norms.to(torch.promote_types(norms.dtype, torch.float32))

    def _check_thresholds(self) -> None:
        if self.training or torch.compiler.is_compiling():
            return
        unset = [layer for layer, sparsifier in enumerate(self.sparsifiers) if is_unset(sparsifier)]
        if unset:
            raise ValueError(
                f"Decoupled chooses by a threshold for each layer, and those at layers axis {unset} were never set; "
                "train it, calibrate(pre), or fill sparsifiers[layer].threshold"
            )


def _written(code: Tensor) -> Tensor:
    """Where a layer is written to: at positive codes, and at NaN, so that it is seen."""
    return ~(code <= 0)
