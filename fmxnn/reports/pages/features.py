"""Everything that a page shows of a latent, collected in one pass over the text."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmxnn.activations.own import InOrder, in_text_order
from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.inputs import check_activations
from fmxnn.core.modes import evaluating
from fmxnn.metrics.coherence import Coherence, FunctionalCoherence, norm_coherence
from fmxnn.metrics.excerpts import Pieces
from fmxnn.metrics.firing import TopTokens, asked_latents, whole_contexts
from fmxnn.reports.pages.feature import Feature
from fmxnn.reports.pages.histogram import Histograms
from fmxnn.reports.pages.nearest import nearest_latents
from fmxnn.reports.pages.page import FeaturePage


def feature_page(
    crosscoder: Crosscoder,
    activations: Iterable[Any],
    tokenizer: Any,
    latents: Sequence[int],
    *,
    tokens: int = 20,
    contexts: int = 2,
    characters: int = 80,
    neighbours: int = 5,
    title: str | None = None,
) -> FeaturePage:
    """`-> latents`: what each of `latents` fires on, how often and how strongly, and where it reads and writes.

    The latents that write most like it are shown too. The text is read once; give held-out activations. `tokens`,
    `contexts` and `characters` are those of `top_tokens`; functional dependence has the defaults of
    `functional_coherence`. Raises ValueError for a latent that is not there, and ShapeError for activations of other
    layers. (fmxcoders, table 1 and appendix E)
    """
    read = in_text_order(activations)
    seen = FeatureStream(crosscoder, read, Pieces(tokenizer), latents, most=(tokens, contexts))
    check_activations(crosscoder, (len(read.layers), read.d_model), read.layers)
    dependence = FunctionalCoherence(crosscoder)
    for x, words, places in whole_contexts(read, seen.pieces):
        seen.update(x, words, places)
        dependence.update(x)
    return seen.page(dependence.compute(), characters=characters, neighbours=neighbours, title=title)


class FeatureStream:
    """`tokens layers d_model, tokens, tokens`: keeps what a page shows of `latents` while activations pass.

    `most` are the tokens of a latent and the contexts of a token. Raises ValueError for a latent that is not there.

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
        most: tuple[int, int] = (20, 2),
    ):
        self.crosscoder, self.activations, self.pieces, self.most = crosscoder, activations, pieces, most
        self.latents = asked_latents(crosscoder, latents)
        self._top = TopTokens(self.latents, tokens=most[0], contexts=most[1], trails=True)
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
        self._histograms.update(z)

    def page(
        self, dependence: Coherence, *, characters: int = 80, neighbours: int = 5, title: str | None = None
    ) -> FeaturePage:
        """The page of what was seen so far, with the functional coherence of the same tokens."""
        weight, seen, name = self.crosscoder.decoder.weight, self._histograms, self.activations.name
        fired = self._top.compute(self.pieces, self.activations.contexts, characters=characters)
        norms, (cosines, others) = norm_coherence(weight), nearest_latents(weight, self.latents, count=neighbours)
        densities, widths = seen.densities, seen.widths
        features = [
            Feature(
                latent=latent,
                density=float(densities[i]),
                largest=float(seen.largest[i]),
                bin_width=float(widths[i]),
                bins=_without_last_zeros(seen.counts[i]),
                norms=_numbers(norms.per_layer[:, latent]),
                dependence=_numbers(dependence.per_layer[:, latent]),
                norm_coherence=float(norms.values[latent]),
                functional_coherence=float(dependence.values[latent]),
                nearest=tuple(zip(others[i].tolist(), cosines[i].tolist(), strict=True)),
                top=tuple(fired[latent]),
            )
            for i, latent in enumerate(self.latents)
        ]
        return FeaturePage(
            title or f"Latents of a crosscoder on {name}", name, self.activations.layers, seen.tokens, tuple(features)
        )


def _without_last_zeros(counts: Tensor) -> tuple[int, ...]:
    filled = counts.nonzero()
    return tuple(counts[: int(filled[-1]) + 1].tolist()) if len(filled) else ()


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(values.double().tolist())
