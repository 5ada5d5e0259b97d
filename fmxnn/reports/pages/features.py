"""Everything that a page shows of a latent, collected in one pass over the text."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmxnn.activations.own import POSITIONS, InOrder, in_text_order, portions
from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.inputs import check_activations
from fmxnn.core.modes import evaluating
from fmxnn.metrics.asked import asked_latents
from fmxnn.metrics.coherence import Coherence, FunctionalCoherence, norm_coherence
from fmxnn.metrics.excerpts import Excerpts, Pieces
from fmxnn.metrics.firing import Found, TopTokens, whole_contexts
from fmxnn.metrics.logits import LogitWeights
from fmxnn.metrics.progress import Progress, silently
from fmxnn.reports.pages.feature import Feature, LazyFeatures
from fmxnn.reports.pages.histogram import Histograms
from fmxnn.reports.pages.intervals import INTERVALS, FoundIntervals, IntervalExamples
from fmxnn.reports.pages.nearest import nearest_latents
from fmxnn.reports.pages.page import FeaturePage


class Most(NamedTuple):
    """How much is kept of a latent: its tokens, the contexts of each, and examples of each interval.

    ```python
    from fmxnn.reports.pages.features import Most

    Most(tokens=10, contexts=1)
    ```
    """

    tokens: int = 20
    contexts: int = 2
    examples: int = 2


class Shown(NamedTuple):
    """What a page shows beside numbers: characters to each side of a token, nearest latents, promoted tokens.

    ```python
    from fmxnn.reports.pages.features import Shown

    Shown(characters=40)
    ```
    """

    characters: int = 80
    neighbours: int = 5
    promoted: LogitWeights | None = None


_MOST, _SHOWN = Most(), Shown()
_AT_ONCE = 32  # contexts


def feature_page(
    crosscoder: Crosscoder,
    activations: Iterable[Any],
    tokenizer: Any,
    latents: Sequence[int] | None = None,
    *,
    tokens: int = 20,
    contexts: int = 2,
    examples: int = 2,
    characters: int = 80,
    neighbours: int = 5,
    promoted: LogitWeights | None = None,
    title: str | None = None,
    progress: Progress = silently,
) -> FeaturePage:
    """`-> latents`: what each of `latents` fires on, how often and how strongly, and where it reads and writes.

    - `latents`: which ones, None for all; save many as a folder: `page.save("features/")`
    - `tokens`, `contexts`, `characters`: those of `top_tokens`
    - `examples`: contexts from each interval of a latent's activation, not the strongest but a uniform sample
    - `neighbours`: how many latents that write most like it are named
    - `promoted`: what `logit_weights(crosscoder, model)` found, to show which tokens a latent promotes and demotes
    - `progress`: `tqdm` shows how far it is

    The text is read once; give held-out activations. Functional dependence has the defaults of `functional_coherence`.
    Raises ValueError for a latent that is not there or not in `promoted`, and ShapeError for activations of other
    layers. (fmxcoders, table 1 and appendix E)
    """
    read = in_text_order(activations)
    chosen = range(crosscoder.encoder.weight.latents) if latents is None else latents
    most = Most(tokens, contexts, examples)
    seen = FeatureStream(crosscoder, read, Pieces(tokenizer), chosen, most=most)
    missing = sorted({*seen.latents} - {*promoted.latents}) if promoted else []
    if missing:
        raise ValueError(
            f"feature_page shows the tokens that each of {len(seen.latents)} latents promotes, and `promoted` lacks "
            f"latent {missing[0]}; give logit_weights(crosscoder, model) of all of them"
        )
    check_activations(crosscoder, (len(read.layers), read.d_model), read.layers)
    dependence = FunctionalCoherence(crosscoder)
    parts = whole_contexts(read, seen.pieces, _AT_ONCE)
    for x, words, places in progress(parts, desc="activations", total=portions(read, _AT_ONCE)):
        seen.update(x, words, places)
        dependence.update(x)
    return seen.page(dependence.compute(), Shown(characters, neighbours, promoted), title=title, progress=progress)


class FeatureStream:
    """`tokens layers d_model, tokens, tokens`: keeps what a page shows of `latents` while activations pass.

    Raises ValueError for a latent that is not there.

    ```python
    from fmxnn.activations import harvest
    from fmxnn.activations.models import open_tokenizer
    from fmxnn.metrics.excerpts import Pieces
    from fmxnn.reports.pages.features import FeatureStream

    text = ["The whale was seen off the coast again. " * 20]
    stream = harvest("examples/tiny-lm", text, layers=[1, 2], context=32, batch=64)
    dense = fx.DenseWeight(2, stream.d_model, 16)
    crosscoder = fx.Crosscoder(fx.CrossLayerEncoder(dense, fx.TopK(2)), fx.CrossLayerDecoder(dense))
    kept = FeatureStream(crosscoder, stream, Pieces(open_tokenizer("examples/tiny-lm")), latents=[3, 7])
    ```
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        activations: InOrder,
        pieces: Pieces,
        latents: Sequence[int],
        *,
        most: Most = _MOST,
    ):
        self.crosscoder, self.activations, self.pieces, self.most = crosscoder, activations, pieces, most
        self.latents = asked_latents(crosscoder, latents)
        self._top = TopTokens(self.latents, tokens=most.tokens, contexts=most.contexts, trails=True)
        self._intervals = IntervalExamples(self.latents, POSITIONS, examples=most.examples)
        self._histograms = Histograms(self.latents)

    @torch.no_grad()
    def update(self, x: Tensor, words: Tensor, places: Tensor) -> None:
        """`tokens layers d_model, tokens, tokens -> `: adds whole contexts, with each token's word and place.

        See `TopTokens` for both.
        """
        like = self.crosscoder.encoder.bias
        with evaluating(self.crosscoder):
            z = self.crosscoder.encode(x.to(like.device, like.dtype), layout=torch.sparse_csr)
        self._top.update(z, words, places)
        self._intervals.update(z, places)
        self._histograms.update(z)

    def page(
        self,
        dependence: Coherence,
        shown: Shown = _SHOWN,
        *,
        title: str | None = None,
        progress: Progress = silently,
    ) -> FeaturePage:
        """The page of what was seen so far, with the functional coherence of the same tokens."""
        weight, seen, name = self.crosscoder.decoder.weight, self._histograms, self.activations.name
        excerpts = Excerpts(self.pieces, self.activations.contexts, characters=shown.characters)
        made = _Made(
            self.latents,
            _Numbers(seen.densities, seen.largest, seen.widths, seen.counts),
            (norm_coherence(weight), dependence),
            nearest_latents(weight, self.latents, count=shown.neighbours, progress=progress),
            _Texts(self._top.found(excerpts), self._intervals.found(excerpts), shown.promoted, self.pieces),
        )
        return FeaturePage(
            title or f"Latents of a crosscoder on {name}",
            name,
            self.activations.layers,
            seen.tokens,
            LazyFeatures(self.latents, made.feature),
        )


class _Numbers(NamedTuple):
    """`latents`, and `latents bins`: what a histogram has counted."""

    densities: Tensor
    largest: Tensor
    widths: Tensor
    counts: Tensor


class _Texts(NamedTuple):
    """What is made into text when a latent is looked at."""

    top: Found
    intervals: FoundIntervals
    promoted: LogitWeights | None
    pieces: Pieces


class _Made(NamedTuple):
    """Makes the feature of the latent at a place, from all that was found of all."""

    latents: list[int]
    numbers: _Numbers
    coherence: tuple[Coherence, Coherence]
    nearest: tuple[Tensor, Tensor]
    texts: _Texts

    def feature(self, i: int) -> Feature:
        """Of the latent at place `i`."""
        latent, seen, (norm, dependence) = self.latents[i], self.numbers, self.coherence
        cosines, others = self.nearest
        texts = self.texts
        promoted, demoted = texts.promoted.of(latent, texts.pieces) if texts.promoted else ((), ())
        return Feature(
            latent=latent,
            density=float(seen.densities[i]),
            largest=float(seen.largest[i]),
            bin_width=float(seen.widths[i]),
            bins=_without_last_zeros(seen.counts[i]),
            norms=_floats(norm.per_layer[:, latent]),
            dependence=_floats(dependence.per_layer[:, latent]),
            norm_coherence=float(norm.values[latent]),
            functional_coherence=float(dependence.values[latent]),
            nearest=tuple(zip(others[i].tolist(), cosines[i].tolist(), strict=True)),
            top=tuple(texts.top.of(i)),
            intervals=texts.intervals.of(i, seen.counts[i].view(INTERVALS, -1).sum(1)),
            promoted=promoted,
            demoted=demoted,
        )


def _without_last_zeros(counts: Tensor) -> tuple[int, ...]:
    filled = counts.nonzero()
    return tuple(counts[: int(filled[-1]) + 1].tolist()) if len(filled) else ()


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.double().tolist())
