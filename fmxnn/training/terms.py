"""Terms of a loss that need more than one line: each is called with the pass and gives one number to be added."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from fmxnn.gates.questions import scores_of
from fmxnn.training.losses import dead_latent_loss, matryoshka_loss
from fmxnn.training.passes import Pass
from fmxnn.weights.weight import Tabled

Term = Callable[[Pass], Tensor]
"""A function or a small module that is called with the `Pass` and gives one number, its weight included."""


@dataclass(frozen=True)
class AuxiliaryLoss:
    """Revives dead latents: the `k` most active of them rebuild what the others left. (chat-tuning crosscoders, A.1)

    A latent is dead that was silent for `after` tokens. The loss is a share of the residual's variance, times `weight`.
    Beside a `Scored` gate the most active are those of the largest score, as the gate itself chooses.

    ```python
    crosscoder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(2, 4, 16), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 4, 16))
    )
    objective = fx.Objective(crosscoder, {"auxiliary": fx.training.AuxiliaryLoss(k=4, after=1_000)})
    ```
    """

    k: int = 512
    weight: float = 1 / 32
    after: int = 10_000_000

    def __call__(self, run: Pass) -> Tensor:
        """`-> `: the loss of one pass, 0 where no latent is dead."""
        return self.weight * self._share(run)

    def _share(self, run: Pass) -> Tensor:
        """After sparse codes, only the dead latents' pre-activations are computed."""
        encoder, weight = run.coder.encoder, run.coder.decoder.weight
        dead, residual = run.silent >= self.after, run.y - run.x_hat
        gate, read = encoder.sparsifier, run.inside.read
        if read is None:
            score = scores_of(gate, run.x)
            return dead_latent_loss(residual, run.pre, dead, weight.to_layers, self.k, score=score)
        index, reader, writer = dead.nonzero().flatten(), cast("Tabled", encoder.weight), cast("Tabled", weight)
        if not len(index):
            return residual.new_zeros(())
        rows, written = cast("Tensor", reader.table)[index], cast("Tensor", writer.table)[index]
        share = min(1.0, len(index) / min(self.k, len(dead)))
        # the norms of the whole decoder are asked for only where some latent is dead
        score = scores_of(gate, run.x)
        score = None if score is None else score[index]
        pre = read @ rows.T + encoder.bias[index]
        return share * dead_latent_loss(
            residual, pre, dead[index], lambda z: writer.from_bonds(z @ written), self.k, score=score
        )


@dataclass(frozen=True)
class Matryoshka:
    """The first latents alone rebuild as much as they can: `matryoshka_loss` of these `prefixes`, times `weight`.

    The objective's own error is that of all latents, so list only the shorter prefixes. (Bussmann et al. 2025)

    ```python
    crosscoder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(2, 4, 16), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 4, 16))
    )
    objective = fx.Objective(crosscoder, {"matryoshka": fx.training.Matryoshka((4, 8))})
    ```
    """

    prefixes: Sequence[int]
    weight: float = 1.0

    def __call__(self, run: Pass) -> Tensor:
        """`-> `: in squared units of the activations. Raises ValueError for prefixes that do not rise to latents."""
        return self.weight * matryoshka_loss(run.y, run.codes, run.coder.decoder, self.prefixes)
