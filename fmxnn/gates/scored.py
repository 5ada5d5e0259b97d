"""Gates that choose codes by how much they write: the pre-activation times a norm of the latent's decoder atom."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.core.errors import ShapeError
from fmxnn.gates.gate import Chooser, set_k, why_dense
from fmxnn.gates.jump_relu import JumpReLU
from fmxnn.gates.thresholds import Calibrated, ranked
from fmxnn.gates.top_k import BatchTopK
from fmxnn.sparse import codes as sparse
from fmxnn.weights.weight import Weight


class Score(nn.Module, ABC):
    """`-> latents`: what a unit of each latent's code counts for when codes are chosen.

    `weight` is the decoder's, as a part that the score shares: training moves it, and it is saved once. A score of your own says how norms
    `combine`. No gradient goes through a score: no latent lengthens its atom in order to be chosen. (chat-tuning crosscoders, A.1)
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
    """`-> latents`: the atom's norms summed over layers, the crosscoder's score. (chat-tuning crosscoders, A.1; Lindsey et al. 2024)"""

    @override
    def combine(self, norms: Tensor) -> Tensor:
        """`layers latents -> latents`"""
        return norms.sum(0)


class ConcatNorm(Score):
    """`-> latents`: the norm of the atom over all layers together, the score of one autoencoder of stacked activations. (chat-tuning crosscoders, A.1)"""

    @override
    def combine(self, norms: Tensor) -> Tensor:
        """`layers latents -> latents`"""
        return norms.norm(dim=0)


class MixedNorm(Score):
    """`-> latents`: `concat` times the norm over all layers together plus `sum` times the norms summed over layers.

    The default weights are those of the dictionary_learning forks that train such crosscoders.
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
        """The two weights."""
        return f"concat={self.concat}, sum={self.sum}"

    @override
    def combine(self, norms: Tensor) -> Tensor:
        """`layers latents -> latents`"""
        return self.concat * norms.norm(dim=0) + self.sum * norms.sum(0)


class Scored(Calibrated):
    """`... latents -> ... latents`: `sparsifier` chooses among `pre * score`, and the codes are the pre-activations of those it keeps.

    A threshold inside is in units of the score. A latent whose score is 0 is never kept. Scores are computed at every pass, from the whole weight;
    `frozen` gives the form for inference, without them. Raises ShapeError where sparsifier and score have different latents.
    """

    def __init__(self, sparsifier: nn.Module, score: Score):
        super().__init__()
        if not isinstance(score, Score):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"Scored takes a score that holds the decoder's weight, got {type(score).__name__}; pass SumNorm(weight)"
            )
        self.sparsifier, self.score = sparsifier, score
        self.latents = score.weight.latents
        if getattr(sparsifier, "latents", self.latents) != self.latents:
            raise ShapeError(
                f"the sparsifier is made for latents={sparsifier.latents}, and the score has latents={self.latents}; make them equal"
            )

    @property
    def k(self) -> int:
        """The sparsifier's, where it has one."""
        return cast("int", self.sparsifier.k)

    @k.setter
    def k(self, k: int) -> None:
        """Sets the sparsifier's. Raises ValueError for anything but a whole number from 1, and TypeError where it has no k."""
        set_k(self.sparsifier, k)

    @property
    def threshold(self) -> Tensor:
        """The sparsifier's, where it has one, in units of the score."""
        return cast("Tensor", self.sparsifier.threshold)

    @property
    def obstacle(self) -> str:
        """Why codes cannot be sparse, if they cannot."""
        return why_dense(self.sparsifier)

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        return self._codes(pre, self.sparsifier)

    def select(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`: the exact choice over these tokens by their scores, in any mode, the threshold untouched; for BatchTopK."""
        return self._codes(pre, cast("BatchTopK", self.sparsifier).select)

    def _codes(self, pre: Tensor, choice: Callable[[Tensor], Tensor]) -> Tensor:
        score = self.scores(pre)
        chosen = choice(pre * score)
        z = chosen / _divisor(score)
        rounding = torch.where(chosen != 0, pre, 0.0) - z
        return (z + rounding.detach()).to(pre.dtype)

    def choose(self, read: Tensor, table: Tensor, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`: sparse codes, the same ones, from a table whose rows are scored."""
        score = self.scores(read)
        rows, shift = (table * score.unsqueeze(-1)).to(table.dtype), (bias * score).to(bias.dtype)
        z = cast("Chooser", self.sparsifier).choose(read, rows, shift, propose=propose)
        return z._replace(values=(z.values / _divisor(score)[z.columns]).to(z.values.dtype))

    def ranked(self, pre: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """`... latents -> `: what the sparsifier ranks, with the scores of now."""
        return ranked(self.sparsifier, pre * self.scores(pre))

    @torch.no_grad()
    def frozen(self) -> JumpReLU:
        """The same choice as in eval mode, with the scores of now, from a threshold for each latent; it holds no weight."""
        if not hasattr(self.sparsifier, "threshold"):
            raise TypeError(
                f"frozen needs a sparsifier with a threshold, got {type(self.sparsifier).__name__}; use BatchTopK or JumpReLU"
            )
        score = self.score()
        made = JumpReLU(self.latents).to(score.device, score.dtype)
        made.threshold.copy_(torch.where(score > 0, self.threshold.clamp(min=0) / score, torch.inf))
        return made.train(self.training)

    def scores(self, like: Tensor) -> Tensor:
        """What each latent's code counts for now (`latents`), outside autocast, on the device of `like`."""
        with torch.autocast(like.device.type, enabled=False):  # a norm in bf16 would reorder neighbours
            return self.score()


def _divisor(score: Tensor) -> Tensor:
    return torch.where(score > 0, score, 1.0)
