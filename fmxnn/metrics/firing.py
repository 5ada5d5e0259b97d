"""What a latent fires on: its top tokens, each in context."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmxnn.activations.own import POSITIONS, InOrder, Passage, in_text_order, lacking_tokens, passages, portions
from fmxnn.activations.text import Contexts
from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.inputs import check_activations
from fmxnn.core.modes import evaluating
from fmxnn.core.progress import Progress, silently
from fmxnn.metrics.asked import asked_latents
from fmxnn.metrics.excerpts import Excerpt, Excerpts, FiredToken, Pieces
from fmxnn.sparse.codes import to_csr
from fmxnn.sparse.row_sums import rows_of


@dataclass(frozen=True)
class TopToken:
    """A distinct token that a latent fires on, its largest activation, and contexts with the token in << >>.

    ```python
    from fmxnn.metrics import TopToken

    TopToken(" whale", 2.5, ("we saw the << whale>> again",))
    ```
    """

    token: str
    activation: float
    contexts: tuple[str, ...]


AT_ONCE = 32
"""Contexts that are read together."""
_SPARE = 4
_WAITING = 1 << 20
_NONE = torch.empty(0, dtype=torch.long)
_Entries = tuple[Tensor, Tensor, Tensor, Tensor]  # one row a code: which latent, word, place, activation


@torch.no_grad()
def top_tokens(
    crosscoder: Crosscoder,
    activations: Iterable[Any],
    tokenizer: Any,
    latents: Sequence[int] | None = None,
    *,
    tokens: int = 20,
    contexts: int = 2,
    characters: int = 80,
    progress: Progress = silently,
) -> dict[int, list[TopToken]]:
    """`-> latents`: the distinct tokens on which each latent's activation is largest, each in its contexts.

    - `activations`: what `harvest` gives, or an iterable of batches (x, ids, positions); see `OwnActivations`
    - `latents`: which ones, None for all; a latent that never fires has an empty list
    - `tokens`, `contexts`: at most so many tokens a latent, and contexts a token
    - `characters`: how much text of the token's own document a context has on each side
    - `progress`: `tqdm` shows how far it is

    The text is read once, in eval mode; give held-out activations. Tokens that are parts of one UTF-8 character count
    as that character. Raises ValueError for a latent that is not there and for activations without tokens, and
    ShapeError for activations of other layers. (fmxcoders, appendix E)
    """
    chosen = asked_latents(crosscoder, range(crosscoder.encoder.weight.latents) if latents is None else latents)
    read = in_text_order(activations)
    check_activations(crosscoder, (len(read.layers), read.d_model), read.layers)
    pieces, like = Pieces(tokenizer), crosscoder.encoder.bias
    kept = TopTokens(chosen, tokens=tokens, contexts=contexts)
    read_now = progress(whole_contexts(read, pieces), desc="top tokens", total=portions(read, AT_ONCE))
    with evaluating(crosscoder):
        for x, words, places in read_now:
            kept.update(crosscoder.encode(x.to(like.device, like.dtype), layout=torch.sparse_csr), words, places)
    return as_text(kept.compute(pieces, read.contexts, characters=characters))


def as_text(found: dict[int, list[FiredToken]]) -> dict[int, list[TopToken]]:
    """The same with each context as a string."""
    return {
        latent: [TopToken(one.token, one.activation, tuple(map(str, one.excerpts))) for one in fired]
        for latent, fired in found.items()
    }


class TopTokens:
    """`tokens latents`: keeps the strongest positive codes of each of `latents` while a stream of codes passes.

    For each latent it has `tokens` words by their largest activation, each with its `contexts` strongest places. Batch
    boundaries do not matter. `fired` (`latents`) says which latents had a code that is not 0, of whatever sign.

    Memory grows with latents x tokens x contexts alone. It holds four times as many words as asked, and of each the
    places at least as strong as the weakest of these words. A weaker place may be lost, if it passed before its word
    was known to matter. `width` is what a context's number is multiplied with in a place. With `trails`, everything a
    latent fires on in the contexts of its entries is held too, and a context comes in one batch.

    ```python
    from fmxnn.metrics.firing import TopTokens

    top = TopTokens([0, 1], width=4, tokens=2)
    top.update(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), words=torch.tensor([7, 8]), places=torch.tensor([1, 2]))
    top.fired  # tensor([True, True])
    ```
    """

    def __init__(
        self,
        latents: Sequence[int],
        width: int = POSITIONS,
        *,
        tokens: int = 20,
        contexts: int = 2,
        trails: bool = False,
    ):
        if tokens < 1 or contexts < 1:
            raise ValueError(f"top tokens need tokens >= 1 and contexts >= 1, got tokens={tokens}, contexts={contexts}")
        self.latents, self.width, self.tokens, self.contexts, self.trails = latents, width, tokens, contexts, trails
        self._chosen = ChosenCodes(latents)
        self._floor = torch.zeros(len(latents), dtype=torch.float64)
        self.fired = torch.zeros(len(latents), dtype=torch.bool)
        none = torch.empty(0, dtype=torch.long)
        self._kept: _Entries = (none, none, none, none.double())
        self._waiting = list[_Entries]()
        self._counted = torch.empty(0, dtype=torch.bool)

    def update(self, z: Tensor, words: Tensor, places: Tensor) -> None:
        """`tokens latents, tokens, tokens -> `: adds codes, dense or torch.sparse_csr, with their words and places.

        A word is a number that stands for a text. A place is context * width + position; tokens of one place count as
        one.
        """
        row, latent, activation = self._chosen(z)
        self.fired[latent] = True
        strong = activation >= self._floor[latent]
        row, latent, activation = row[strong], latent[strong], activation[strong]
        self._waiting.append((latent, words[row], places[row], activation))
        if sum(len(entries[0]) for entries in self._waiting) > max(_WAITING, len(self._kept[0])):
            self._settle()

    def compute(self, pieces: Pieces, text: Contexts, *, characters: int) -> dict[int, list[FiredToken]]:
        """What was found so far, strongest first, as text; a latent that never fired has an empty list."""
        found = self.found(Excerpts(pieces, text, characters=characters))
        return {latent: found.of(i) for i, latent in enumerate(self.latents)}

    def found(self, excerpts: Excerpts) -> "Found":
        """What was found so far, each latent's part made when it is asked for."""
        self._settle()
        return Found(self, self._kept, self._counted, excerpts)

    def _settle(self) -> None:
        """Drops what can no longer be shown, whatever comes."""
        latent, word, place, activation = (
            torch.cat(columns) for columns in zip(self._kept, *self._waiting, strict=True)
        )
        self._waiting = []
        if not len(latent):
            return
        order = place.argsort()
        order = order[activation[order].argsort(descending=True, stable=True)]
        order = order[
            _earlier(latent[order] * (int(place.max()) + 1) + place[order]) == 0
        ]  # the strongest of one place
        latent, word, place, activation = (column[order] for column in (latent, word, place, activation))
        among = _earlier(latent * (int(word.max()) + 1) + word)
        firsts = (among == 0).nonzero().squeeze(1)
        lasts = firsts[_earlier(latent[firsts]) == self.tokens * _SPARE - 1]
        limit = torch.full((len(self.latents),), len(latent)).index_put((latent[lasts],), lasts)
        counted = (among < self.contexts) & (torch.arange(len(latent)) <= limit[latent])
        stay = counted
        if self.trails:
            pair = latent * (int(place.max()) // self.width + 1) + place // self.width
            stay = torch.isin(pair, pair[counted])
        else:
            self._floor[latent[lasts]] = activation[lasts]
        stay = stay.nonzero().squeeze(1)
        stay = stay[latent[stay].argsort(stable=True)]  # a latent's entries together, strongest first
        self._kept, self._counted = (latent[stay], word[stay], place[stay], activation[stay]), counted[stay]


class Found:
    """`latents`: the top tokens of each latent as text, made when they are asked for; see `TopTokens.found`.

    ```python
    from fmxnn.activations import Contexts
    from fmxnn.activations.models import open_tokenizer
    from fmxnn.metrics.excerpts import Excerpts, Pieces
    from fmxnn.metrics.firing import TopTokens

    pieces, text = Pieces(open_tokenizer("examples/tiny-lm")), Contexts(torch.tensor([[0, 40]]), torch.ones(1, 2) > 0)
    words = torch.tensor([piece.word for piece in pieces.split([0, 40])])
    top = TopTokens([5], width=2, tokens=1)
    top.update(torch.tensor([[0.0] * 6, [1.0] * 6]), words, places=torch.arange(2))
    top.found(Excerpts(pieces, text, characters=80)).of(0)[0].activation  # 1.0
    ```
    """

    def __init__(self, top: TopTokens, kept: _Entries, counted: Tensor, excerpts: Excerpts):
        self.top, self.excerpts = top, excerpts
        self._kept, self._counted = kept, counted
        self._bounds = torch.searchsorted(kept[0], torch.arange(len(top.latents) + 1)).tolist()

    def of(self, number: int) -> list[FiredToken]:
        """What the latent at this place of `TopTokens.latents` fires on, strongest first."""
        rows = slice(*self._bounds[number : number + 2])
        _, words, places, activations = (column[rows].tolist() for column in self._kept)
        trails: dict[int, dict[int, float]] = {}
        found: dict[int, list[tuple[float, int]]] = {}
        for word, place, activation, counted in zip(
            words, places, activations, self._counted[rows].tolist(), strict=True
        ):
            if self.top.trails:
                trails.setdefault(place // self.top.width, {})[place % self.top.width] = activation
            if counted and (word in found or len(found) < self.top.tokens):
                found.setdefault(word, []).append((activation, place))

        def show(place: int) -> Excerpt:
            context, position = divmod(place, self.top.width)
            return self.excerpts.at(context, position, trails.get(context, {}))

        return [
            FiredToken(self.excerpts.texts[word], there[0][0], tuple(show(place) for _, place in there))
            for word, there in found.items()
        ]


class ChosenCodes:
    """`tokens latents`: the codes of some latents that are not 0, one by one.

    Each is a token, which of `latents` it is, and the activation in float64 on the CPU.

    ```python
    from fmxnn.metrics.firing import ChosenCodes

    token, which, activation = ChosenCodes([3, 1])(torch.tensor([[0.0, 2.0, 9.0, 1.0]]))
    which, activation  # tensor([1, 0]), tensor([2., 1.])
    ```
    """

    def __init__(self, latents: Sequence[int]):
        self._columns, self._which = torch.tensor(latents, dtype=torch.long).sort()

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`tokens latents -> entries, entries, entries`: from codes dense or torch.sparse_csr."""
        z = to_csr(z.detach())
        column, activation = z.col_indices().cpu(), z.values().double().cpu()
        at = torch.searchsorted(self._columns, column).clamp(max=len(self._columns) - 1)
        chosen = (self._columns[at] == column) & (activation != 0)
        return rows_of(z.crow_indices().cpu(), len(column))[chosen], self._which[at[chosen]], activation[chosen]


def whole_contexts(
    activations: InOrder, pieces: Pieces | None, at_once: int = AT_ONCE
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`tokens layers d_model, tokens, tokens`: every kept token in the order of the text, with its word and place.

    So many contexts come at once. A place is the number of its context times `POSITIONS`, plus the position there.
    Without `pieces`, words and places are empty. Raises ValueError for pieces of activations without tokens.
    """
    for passage in passages(activations, at_once):
        yield passage.sides[0], *words_of(passage, pieces)


def words_of(passage: Passage, pieces: Pieces | None) -> tuple[Tensor, Tensor]:
    """`-> tokens, tokens`: the word and the place of each token of a passage; see `whole_contexts`."""
    if pieces is None:
        return _NONE, _NONE
    if passage.text is None:
        raise ValueError(lacking_tokens())
    words, places = list[int](), list[int]()
    for context, line in enumerate(passage.text.ids.tolist(), passage.start):
        for piece in pieces.split(line):
            words += [piece.word] * piece.tokens
            places += [context * POSITIONS + piece.position] * piece.tokens
    keep = passage.text.keep.flatten().cpu()
    return torch.tensor(words)[keep], torch.tensor(places)[keep]


def _earlier(group: Tensor) -> Tensor:
    """`entries -> entries`: how many entries of the same group stand before each."""
    ordered, order = group.sort(stable=True)
    return torch.empty_like(order).index_put((order,), torch.arange(len(group)) - torch.searchsorted(ordered, ordered))
