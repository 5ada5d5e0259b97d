"""Mean, deviation and norms of activations, by layer and by role, over any number of batches."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import length_hint
from typing import Any

from torch import Tensor

from fmxnn.activations.own import portions
from fmxnn.activations.own_batches import Sides, rows_of
from fmxnn.activations.stream import Stream
from fmxnn.core.errors import ShapeError
from fmxnn.core.progress import Progress, silently


@dataclass(frozen=True)
class Moments:
    """Mean, deviation and norms of some tokens, in float64.

    - `tokens`: how many there were
    - `mean`, `deviation`: `layers d_model`, of each coordinate; the deviation divides by the number of tokens
    - `norm`, `largest_norm`: `layers`, the mean and the largest Euclidean norm of a token

    ```python
    from fmxnn.activations import statistics

    statistics([torch.ones(4, 2, 9)]).all().norm  # 3 at both layers
    ```
    """

    tokens: int
    mean: Tensor
    deviation: Tensor
    norm: Tensor
    largest_norm: Tensor


@dataclass
class _Sums:
    """Sums that are merged batch by batch, which large means do not blur. (Chan et al. 1979)"""

    tokens: int
    mean: Tensor
    spread: Tensor
    norms: Tensor
    largest: Tensor

    def merged(self, other: "_Sums") -> "_Sums":
        tokens = self.tokens + other.tokens
        shift, share = other.mean - self.mean, other.tokens / tokens
        return _Sums(
            tokens,
            self.mean + shift * share,
            self.spread + other.spread + shift.pow(2) * (self.tokens * share),
            self.norms + other.norms,
            self.largest.maximum(other.largest),
        )

    def moments(self) -> Moments:
        return Moments(
            self.tokens, self.mean, (self.spread / self.tokens).sqrt(), self.norms / self.tokens, self.largest
        )


@dataclass
class Statistics:
    """`tokens layers d_model, tokens`: mean, deviation and norms of activations, and of those of each role.

    ```python
    from fmxnn.activations import Statistics

    measured = Statistics()
    for x in torch.randn(4, 64, 2, 3):
        measured.update(x)
    measured.all().norm  # about 1.6 at both layers
    ```
    """

    _sums: dict[int | None, _Sums] = field(default_factory=dict[int | None, _Sums], init=False)

    def update(self, x: Tensor, roles: Tensor | None = None) -> None:
        """`tokens layers d_model, tokens`: adds a batch of any size and dtype; the numbers are summed in float64.

        Raises ShapeError for other axes than those before, ValueError for roles with some batches only, and for what
        is not finite.
        """
        known = next(iter(self._sums.values()), None)
        if x.ndim != 3 or (known is not None and x.shape[1:] != known.mean.shape):
            wanted = "layers, d_model" if known is None else ", ".join(map(str, known.mean.shape))
            raise ShapeError(
                f"Statistics reads (tokens, {wanted}), got {tuple(x.shape)}; stack one activation per layer: "
                "torch.stack(hidden, dim=-2)"
            )
        if known is not None and (roles is None) != (None in self._sums):
            raise ValueError("Statistics needs roles with every batch or with none; give them to each update")
        if not x.isfinite().all():
            raise ValueError(
                f"Statistics needs finite activations, got NaN or infinity after {self.tokens:,} tokens; harvest in "
                "float32 or bfloat16, or leave those tokens out"
            )
        kinds: list[int | None] = [None] if roles is None else [int(role) for role in roles.unique()]
        for role in kinds:
            some = x if roles is None else x[(roles == role).to(x.device)]
            if len(some):
                sums = _sums_of(some.detach().double())
                self._sums[role] = self._sums[role].merged(sums) if role in self._sums else sums

    @property
    def tokens(self) -> int:
        """How many tokens were added."""
        return sum(each.tokens for each in self._sums.values())

    def all(self) -> Moments:
        """Of every token that was added. Raises ValueError before the first."""
        if not self._sums:
            raise ValueError("Statistics has seen no tokens; call update first")
        whole, *more = self._sums.values()
        for each in more:
            whole = whole.merged(each)
        return whole.moments()

    def by_role(self) -> dict[int, Moments]:
        """Of the tokens of each role, by its number; empty where no roles were given."""
        found = {role: sums.moments() for role, sums in self._sums.items() if role is not None}
        return dict(sorted(found.items()))


def statistics(batches: Stream[Any] | Iterable[Any], *, side: int = 0, progress: Progress = silently) -> Statistics:
    """`tokens layers d_model`: mean, deviation and norms of every kept token of a stream, or of your own batches.

    A stream is read once in the order of the text, whatever its epochs, and its roles are told apart. A batch of your
    own is x, (x, ids, positions), or has a pair (x, y) in the place of x; of pairs x is measured, and with `side=1` y.
    `progress`: `tqdm` shows how far it is.

    Raises ValueError for what is not finite, and for a side that is not there. Raises TypeError for what is no batch.
    """
    measured = Statistics()
    if not isinstance(batches, Stream):
        total = length_hint(batches) or None
        for number, batch in enumerate(progress(batches, desc="statistics", total=total)):
            measured.update(_side(rows_of(batch, number).sides, side))
        return measured
    text, at_once = batches.contexts, batches.shuffle.block
    total = portions(batches, at_once)
    for sides, start, stop in progress(batches.in_order(at_once), desc="statistics", total=total):
        some = text[start:stop]
        measured.update(_side(sides, side), None if some.roles is None else some.roles[some.keep])
    return measured


def _side(sides: Sides, side: int) -> Tensor:
    if side not in range(len(sides)):
        raise ValueError(
            f"statistics measures x (side=0), and of pairs y (side=1), got side={side} of {len(sides)}; read targets "
            "with harvest(..., to=...)"
        )
    return sides[side]


def _sums_of(x: Tensor) -> _Sums:
    norms, mean = x.norm(dim=-1), x.mean(0)
    return _Sums(len(x), mean, (x - mean).pow(2).sum(0), norms.sum(0), norms.amax(0))
