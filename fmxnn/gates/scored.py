"""Gates that choose codes by how much they write: the pre-activation times a norm of the latent's decoder atom."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.core.errors import ShapeError
from fmxnn.gates.gate import Chooser, HasK, HasThreshold, Selector
from fmxnn.gates.jump_relu import JumpReLU
from fmxnn.gates.questions import latents_of, set_k, threshold_of, why_dense
from fmxnn.gates.thresholds import Calibrated, ranked
from fmxnn.sparse import codes as sparse
from fmxnn.weights.weight import Weight


class Score(nn.Module, ABC):
    """`-> latents`: what a unit of each latent's code counts for when codes are chosen.

    `weight` is the decoder's own weight: training moves it, and it is saved once. No gradient goes through a score,
    so no latent lengthens its atom in order to be chosen. (chat-tuning crosscoders, A.1)

    A score of your own says how the norms at each layer become one number:

    ```python
    class LargestNorm(fx.Score):
        def combine(self, norms):
            return norms.amax(0)

    LargestNorm(fx.DenseWeight(2, 8, 16))().shape  # (16,)
    ```
    """

    def __init__(self, weight: Weight):
        super().__init__()
        self.weight = weight

    @abstractmethod
    def combine(self, norms: Tensor) -> Tensor:
        """`layers latents -> latents`: from the norms of the atoms at each layer."""

    @torch.no_grad()
    def forward(self) -> Tensor:
        """`-> latents`: in float32 or wider, from the weight as it is now."""
        norms = self.weight.norms()
        return self.combine(norms.to(torch.promote_types(norms.dtype, torch.float32)))


class SumNorm(Score):
    """`-> latents`: the atom's norms summed over layers, as for crosscoders.

    (chat-tuning crosscoders, A.1; Lindsey et al. 2024)

    ```python
    weight = fx.DenseWeight(2, 8, 16)
    gate = fx.Scored(fx.BatchTopK(4), fx.SumNorm(weight))
    ```
    """

    @override
    def combine(self, norms: Tensor) -> Tensor:
        """`layers latents -> latents`"""
        return norms.sum(0)


class ConcatNorm(Score):
    """`-> latents`: the norm of the atom over all layers together, as for one autoencoder of stacked activations.

    (chat-tuning crosscoders, A.1)

    ```python
    weight = fx.DenseWeight(2, 8, 16)
    gate = fx.Scored(fx.BatchTopK(4), fx.ConcatNorm(weight))
    ```
    """

    @override
    def combine(self, norms: Tensor) -> Tensor:
        """`layers latents -> latents`"""
        return norms.norm(dim=0)


class MixedNorm(Score):
    """`-> latents`: `concat` times the norm over all layers together plus `sum` times the norms summed over layers.

    The defaults are those of the dictionary_learning forks that train such crosscoders.

    ```python
    weight = fx.DenseWeight(2, 8, 16)
    gate = fx.Scored(fx.BatchTopK(4), fx.MixedNorm(weight, sum=0.2))
    ```
    """

    def __init__(self, weight: Weight, *, concat: float = 1.0, sum: float = 0.1):
        super().__init__(weight)
        if not (0 <= concat < float("inf") and 0 <= sum < float("inf") and concat + sum > 0):
            raise ValueError(
                f"MixedNorm needs finite weights >= 0 that are not both 0, got concat={concat} and sum={sum}"
            )
        self.concat, self.sum = concat, sum

    @override
    def extra_repr(self) -> str:
        """What each of the two norms counts for."""
        return f"concat={self.concat}, sum={self.sum}"

    @override
    def combine(self, norms: Tensor) -> Tensor:
        """`layers latents -> latents`"""
        return self.concat * norms.norm(dim=0) + self.sum * norms.sum(0)


class Scored(Calibrated):
    """`... latents -> ... latents`: `sparsifier` chooses by `pre * score`; codes are the pre-activations it keeps.

    Its threshold is in units of the score, and a latent whose score is 0 is never kept. Scores are computed at every
    pass from the whole weight; `frozen` gives a gate for inference that needs none.
    Raises ShapeError where sparsifier and score have different latents.

    ```python
    weight = fx.DenseWeight(2, 8, 16)
    gate = fx.Scored(fx.BatchTopK(4), fx.SumNorm(weight))
    coder = fx.Crosscoder(fx.CrossLayerEncoder(fx.DenseWeight(2, 8, 16), gate), fx.CrossLayerDecoder(weight))
    ```
    """

    takes_tables = True

    def __init__(self, sparsifier: nn.Module, score: Score):
        super().__init__()
        if not isinstance(score, Score):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"Scored takes a score that holds the decoder's weight, got {type(score).__name__}; "
                "pass SumNorm(weight)"
            )
        self.sparsifier, self.score = sparsifier, score
        self.latents = score.weight.latents
        inside = latents_of(sparsifier)
        if inside is not None and inside != self.latents:
            raise ShapeError(
                f"the sparsifier is made for latents={inside}, and the score has latents={self.latents}; "
                "make them equal"
            )

    @property
    def k(self) -> int:
        """The sparsifier's, where it has one."""
        return cast("HasK", self.sparsifier).k

    @k.setter
    def k(self, k: int) -> None:
        """Sets the sparsifier's.

        Raises ValueError for anything but a whole number from 1, and TypeError where it has no k.
        """
        set_k(self.sparsifier, k)

    @property
    def threshold(self) -> Tensor:
        """The sparsifier's, where it has one, in units of the score."""
        return cast("HasThreshold", self.sparsifier).threshold

    @property
    def obstacle(self) -> str:
        """Why codes cannot be sparse, if they cannot."""
        return why_dense(self.sparsifier)

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        return self._codes(pre, self.sparsifier)

    @property
    def select(self) -> Callable[[Tensor], Tensor]:
        """`... latents -> ... latents`: what `forward` gives in training, in any mode, and no threshold moves.

        It is there where the sparsifier has it, such as BatchTopK.
        """
        inside = cast("Selector", self.sparsifier).select
        return lambda pre: self._codes(pre, inside)

    def _codes(self, pre: Tensor, choice: Callable[[Tensor], Tensor]) -> Tensor:
        score = self.scores(pre)
        chosen = choice(pre * score)
        z = chosen / _divisor(score)
        rounding = torch.where(chosen != 0, pre, 0.0) - z
        return (z + rounding.detach()).to(pre.dtype)

    def choose(self, read: Tensor, table: Tensor, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`: the same codes, from a table of scored rows."""
        score = self.scores(read)
        rows, shift = (table * score.unsqueeze(-1)).to(table.dtype), (bias * score).to(bias.dtype)
        z = cast("Chooser", self.sparsifier).choose(read, rows, shift, propose=propose)
        return z._replace(values=(z.values / _divisor(score)[z.columns]).to(z.values.dtype))

    def ranked(self, pre: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """`... latents -> `: what the sparsifier ranks, with the scores of now."""
        return ranked(self.sparsifier, pre * self.scores(pre))

    @torch.no_grad()
    def frozen(self) -> JumpReLU:
        """The choice of eval mode with the scores of now, as a threshold for each latent; it holds no weight."""
        threshold = threshold_of(self.sparsifier)
        if threshold is None:
            raise TypeError(
                f"frozen needs a sparsifier with a threshold, got {type(self.sparsifier).__name__}; "
                "use BatchTopK or JumpReLU"
            )
        score = self.score()
        made = JumpReLU(self.latents).to(score.device, score.dtype)
        made.threshold.copy_(torch.where(score > 0, threshold.clamp(min=0) / score, torch.inf))
        return made.train(self.training)

    def scores(self, like: Tensor) -> Tensor:
        """What each latent's code counts for now (`latents`), outside autocast, on the device of `like`."""
        with torch.autocast(like.device.type, enabled=False):  # a norm in bf16 would reorder neighbours
            return self.score()


def _divisor(score: Tensor) -> Tensor:
    return torch.where(score > 0, score, 1.0)
