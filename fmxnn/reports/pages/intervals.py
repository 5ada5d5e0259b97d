"""Examples of a latent at every strength: a uniform sample from each interval of its activations, in one pass."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fmxnn.metrics.excerpts import Excerpt, Excerpts
from fmxnn.metrics.firing import ChosenCodes

INTERVALS = 8
"""From 0 to the smallest power of two above the largest activation; four to eight of them then hold something."""
_WAITING = 1 << 20
_KEY = 0x7FFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Interval:
    """Where a latent's activation lies between `low` and `high`: on how many tokens, and some of them in context.

    ```python
    from fmxnn.metrics.excerpts import Excerpt
    from fmxnn.reports.pages import Interval

    Interval(low=2.0, high=2.5, tokens=120, excerpts=(Excerpt((" the", " whale"), (0.0, 2.3), at=1),))
    ```
    """

    low: float
    high: float
    tokens: int
    excerpts: tuple[Excerpt, ...]


class _Entries(NamedTuple):
    """Positive codes: which latent, where, how strong; and which of them are examples of their interval."""

    latent: Tensor
    place: Tensor
    activation: Tensor
    example: Tensor


class IntervalExamples:
    """`tokens latents`: a uniform sample of `examples` places from each interval of a latent's activations.

    Activations above 0 count. The sample depends on `seed`, the latents and the text alone, and not on how batches are
    cut or in which order they come: each place has a random number of its own, and the smallest are kept. When a
    larger activation comes, intervals merge in pairs, and the sample of both is taken from their samples. What a
    latent fires on elsewhere in the contexts of its examples is held, too. Memory grows with latents x intervals x
    examples alone. `width` is the length of a context, and a context comes in one batch.

    ```python
    from fmxnn.reports.pages.intervals import IntervalExamples

    kept = IntervalExamples([0, 1], width=4, examples=1)
    kept.update(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), places=torch.tensor([1, 2]))
    ```
    """

    def __init__(self, latents: list[int], width: int, *, examples: int = 2, seed: int = 0):
        if examples < 0:
            raise ValueError(f"examples of an interval are 0 or more, got examples={examples!r:.200}")
        self.width, self.examples = width, examples
        self._chosen = ChosenCodes(latents)
        self._salts = _mixed(torch.tensor(latents) + _mixed(torch.tensor(seed)))
        self._largest = torch.zeros(len(latents), dtype=torch.float64)
        none = torch.empty(0, dtype=torch.long)
        self._kept = _Entries(none, none, none.double(), none.bool())
        self._waiting: list[_Entries] = []

    def update(self, z: Tensor, places: Tensor) -> None:
        """`tokens latents, tokens -> `: adds codes, dense or torch.sparse_csr, with their places.

        A place is context * width + position; tokens of one place count as one, with the largest of their activations.
        """
        if not self.examples:
            return
        row, latent, activation = self._chosen(z)
        row, latent, activation = (column[activation > 0] for column in (row, latent, activation))
        self._largest = self._largest.scatter_reduce(0, latent, activation, "amax")
        self._waiting.append(_Entries(latent, places[row], activation, torch.zeros_like(latent, dtype=torch.bool)))
        if sum(len(entries.latent) for entries in self._waiting) > max(_WAITING, len(self._kept.latent)):
            self._settle()

    def found(self, excerpts: Excerpts) -> "FoundIntervals":
        """What was found so far, each latent's part made when it is asked for."""
        self._settle()
        return FoundIntervals(self._kept, interval_widths(self._largest), self.width, excerpts)

    def _settle(self) -> None:
        """Keeps the examples, and what is around them."""
        entries = _Entries(*(torch.cat(columns) for columns in zip(self._kept, *self._waiting, strict=True)))
        self._waiting = []
        if not len(entries.latent):
            return
        span = int(entries.place.max()) + 1
        pair, at = (entries.latent * span + entries.place).unique(return_inverse=True)
        activation = torch.zeros(len(pair), dtype=torch.float64).scatter_reduce(0, at, entries.activation, "amax")
        latent, place = pair // span, pair % span
        interval = latent * INTERVALS + (activation / interval_widths(self._largest)[latent]).long()
        order = (_mixed(self._salts[latent] ^ place) & _KEY).argsort()
        order = order[interval[order].argsort(stable=True)]
        ordered = interval[order]
        first = torch.arange(len(order)) - torch.searchsorted(ordered, ordered) < self.examples
        example = torch.zeros_like(first).index_put((order[first],), torch.tensor(True))
        context = latent * (span // self.width + 1) + place // self.width
        stay = torch.isin(context, context[example])
        self._kept = _Entries(*(column[stay] for column in (latent, place, activation, example)))


class FoundIntervals:
    """`latents`: examples from each latent's intervals, made when they are asked for; see `IntervalExamples.found`.

    ```python
    from fmxnn.activations import Contexts
    from fmxnn.activations.models import open_tokenizer
    from fmxnn.metrics.excerpts import Excerpts, Pieces
    from fmxnn.reports.pages.intervals import IntervalExamples

    text = Contexts(torch.tensor([[0, 40]]), torch.ones(1, 2) > 0)
    kept = IntervalExamples([5], width=2)
    kept.update(torch.tensor([[0.0] * 6, [1.0] * 6]), places=torch.arange(2))
    excerpts = Excerpts(Pieces(open_tokenizer("examples/tiny-lm")), text, characters=80)
    kept.found(excerpts).of(0, torch.tensor([0, 0, 0, 0, 1]))[0].low  # 1.0
    ```
    """

    def __init__(self, kept: _Entries, widths: Tensor, width: int, excerpts: Excerpts):
        self.width, self.excerpts = width, excerpts
        self._kept, self._widths = kept, widths
        self._bounds = torch.searchsorted(kept.latent, torch.arange(len(widths) + 1)).tolist()

    def of(self, number: int, tokens: Tensor) -> tuple[Interval, ...]:
        """`intervals`: those of one latent that have an example, strongest first; `tokens` counts what lies in each."""
        rows, width = slice(*self._bounds[number : number + 2]), float(self._widths[number])
        _, places, activations, examples = (column[rows].tolist() for column in self._kept)
        trails: dict[int, dict[int, float]] = {}
        chosen: dict[int, list[tuple[float, int]]] = {}
        for place, activation, example in zip(places, activations, examples, strict=True):
            trails.setdefault(place // self.width, {})[place % self.width] = activation
            if example:
                chosen.setdefault(int(activation / width), []).append((activation, place))

        def show(place: int) -> Excerpt:
            context, position = divmod(place, self.width)
            return self.excerpts.at(context, position, trails[context])

        return tuple(
            Interval(
                low=i * width,
                high=(i + 1) * width,
                tokens=int(tokens[i]),
                excerpts=tuple(show(place) for _, place in sorted(chosen[i], reverse=True)),
            )
            for i in sorted(chosen, reverse=True)
        )


def interval_widths(largest: Tensor) -> Tensor:
    """`latents -> latents`: how wide each one's intervals are; 0 where it has not fired."""
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent), 0) / INTERVALS


def _mixed(numbers: Tensor) -> Tensor:
    """Numbers as random ones of 64 bits, the same for the same. (splitmix64)"""
    numbers = numbers - 0x61C8864680B583EB
    numbers = (numbers ^ _shifted(numbers, 30)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ _shifted(numbers, 27)) * -0x6B2FB644ECCEEE15
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """To the right, filled with zeros."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
