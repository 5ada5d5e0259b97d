"""Everything that a page shows of a latent, collected in one pass over the text."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmxnn.coders import Crosscoder
from fmxnn.dashboard.feature import Feature
from fmxnn.dashboard.histogram import Histograms
from fmxnn.dashboard.nearest import nearest_latents
from fmxnn.dashboard.page import FeaturePage
from fmxnn.metrics.coherence import functional_coherence, norm_coherence
from fmxnn.metrics.excerpts import Pieces
from fmxnn.metrics.firing import TopTokens, check_latents, check_layers, whole_contexts

if TYPE_CHECKING:  # what it is called; importing it would need transformers
    from fmxnn.harvest import Activations


def feature_page(
    crosscoder: Crosscoder,
    activations: "Activations",
    tokenizer: Any,
    latents: Sequence[int],
    *,
    tokens: int = 20,
    contexts: int = 2,
    characters: int = 80,
    neighbours: int = 5,
    title: str | None = None,
) -> FeaturePage:
    """`-> latents`: what each of `latents` fires on, how often and how strongly, where it reads and writes, and which latents write alike.

    One pass over all of the text; give held-out activations. Functional dependence has the defaults of `functional_coherence`.
    `tokens`, `contexts` and `characters` are those of `top_tokens`. Raises ValueError for a latent that is not there, ShapeError for
    activations of other layers. (fmxcoders, table 1 and appendix E)
    """
    chosen = check_latents(crosscoder, latents)
    check_layers(crosscoder, activations)
    seen = _Seen(crosscoder, activations, Pieces(tokenizer), chosen, (tokens, contexts))
    dependence, norms = functional_coherence(crosscoder, seen.passing()), norm_coherence(crosscoder.decoder.weight)
    fired = seen.top.compute(seen.pieces, activations.contexts, characters=characters)
    cosines, others = nearest_latents(crosscoder.decoder.weight, chosen, count=neighbours)
    densities, widths = seen.histograms.densities, seen.histograms.widths
    features = [
        Feature(
            latent=latent,
            density=float(densities[i]),
            largest=float(seen.histograms.largest[i]),
            bin_width=float(widths[i]),
            bins=_without_last_zeros(seen.histograms.counts[i]),
            norms=_numbers(norms.per_layer[:, latent]),
            dependence=_numbers(dependence.per_layer[:, latent]),
            norm_coherence=float(norms.values[latent]),
            functional_coherence=float(dependence.values[latent]),
            nearest=tuple(zip(others[i].tolist(), cosines[i].tolist(), strict=True)),
            top=tuple(fired[latent]),
        )
        for i, latent in enumerate(chosen)
    ]
    name = model_name(activations.model)
    return FeaturePage(title or f"Latents of a crosscoder on {name}", name, activations.layers, seen.histograms.tokens, tuple(features))


class _Seen:
    """The codes of the latents shown, collected while the activations pass on to someone else."""

    def __init__(self, crosscoder: Crosscoder, activations: "Activations", pieces: Pieces, latents: list[int], most: tuple[int, int]):
        width = activations.contexts.ids.shape[1]
        self.crosscoder, self.activations, self.pieces = crosscoder, activations, pieces
        self.top = TopTokens(latents, width, tokens=most[0], contexts=most[1], trails=True)
        self.histograms = Histograms(latents)

    def passing(self) -> Iterator[Tensor]:
        """`tokens layers d_model`: the activations, in the crosscoder's dtype and on its device."""
        like = self.crosscoder.encoder.bias
        for batch, words, places in whole_contexts(self.activations, self.pieces):
            x = batch.to(like.device, like.dtype)
            z = self.crosscoder.encode(x, layout=torch.sparse_csr)
            self.top.update(z, words, places)
            self.histograms.update(z)
            yield x


def _without_last_zeros(counts: Tensor) -> tuple[int, ...]:
    filled = counts.nonzero()
    return tuple(counts[: int(filled[-1]) + 1].tolist()) if len(filled) else ()


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(values.double().tolist())


def model_name(model: Any) -> str:
    """A Hub name as it is, a folder's name without the way to it: a page is for others."""
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    return Path(name).name if Path(name).exists() else name
