"""What is measured of activations, all of it from one pass over the text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fmxnn.activations.editing.ways import STREAMS
from fmxnn.activations.own import InOrder, Passage, passages, portions
from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.core.modes import evaluating
from fmxnn.core.progress import Progress
from fmxnn.metrics.coherence import FunctionalCoherence, norm_coherence
from fmxnn.metrics.excerpts import Pieces
from fmxnn.metrics.firing import TopTokens, as_text, words_of
from fmxnn.metrics.hiding import Switching
from fmxnn.metrics.judge import Judge, summarise
from fmxnn.metrics.logits import LogitWeights, logit_weights, unembedding
from fmxnn.metrics.probing.tasks import ProbeTask
from fmxnn.metrics.reconstruction import Reconstruction, rebuilt
from fmxnn.reports.pages.features import FeatureStream, Shown


class Wanted(NamedTuple):
    """What is looked at beside the activations: probing tasks, latents with a page each, and a judge."""

    tasks: tuple[ProbeTask, ...]
    latents: tuple[int, ...]
    judge: Judge | None


class Language(NamedTuple):
    """The language model and its tokenizer, None where they are not known.

    `at` and `to` say where in it is read and rebuilt, and `context` how many tokens it reads at once.
    """

    model: nn.Module | None
    tokenizer: Any
    at: str
    to: str | None
    context: int


class Run(NamedTuple):
    """How many contexts run at once, and what shows how far it is."""

    batch: int
    progress: Progress


class Call(NamedTuple):
    """What every part works on."""

    crosscoder: Crosscoder
    activations: InOrder
    language: Language
    wanted: Wanted
    run: Run


class Streams:
    """`tokens layers d_model`: a stream of activations, from which each part takes what it needs."""

    def __init__(self, call: Call, parts: Sequence[str]):
        self.call, self.parts = call, parts
        crosscoder, pages, judged = (
            call.crosscoder,
            "features" in parts and bool(call.wanted.latents),
            "judge" in parts and call.wanted.judge is not None,
        )
        self.pieces = Pieces(call.language.tokenizer) if pages or judged else None
        self._rebuilt = Reconstruction() if "reconstruction" in parts else None
        self._functional = FunctionalCoherence(crosscoder) if "coherence" in parts or pages else None
        self._switching = Switching(crosscoder) if "coherence" in parts else None
        self._pages = (
            FeatureStream(crosscoder, call.activations, self.pieces, call.wanted.latents)
            if pages and self.pieces
            else None
        )
        self._top = TopTokens(range(crosscoder.encoder.weight.latents)) if judged else None

    def read(self) -> dict[str, Any]:
        """What an `Evaluation` holds of all but the judge's part, from one pass over the text, if anything needs it."""
        if any(part is not None for part in (self._rebuilt, self._functional, self._top)):
            activations, run = self.call.activations, self.call.run
            total = portions(activations, run.batch)
            for passage in run.progress(passages(activations, run.batch), desc="activations", total=total):
                self.update(passage)
        return self._found()

    @torch.no_grad()
    def update(self, passage: Passage) -> None:
        """`tokens layers d_model`: adds whole contexts."""
        crosscoder, like = self.call.crosscoder, self.call.crosscoder.encoder.bias
        x, words, places = passage.sides[0].to(like.device, like.dtype), *words_of(passage, self.pieces)
        with evaluating(crosscoder):
            if self._rebuilt:
                self._rebuilt.update(*rebuilt(crosscoder, x, *passage.sides[1:]))
            if self._functional:
                self._functional.update(x)
            if self._switching:
                self._switching.update(x)
            if self._pages:
                self._pages.update(x, words, places)
            if self._top:
                self._top.update(crosscoder.encode(x, layout=torch.sparse_csr), words, places)

    def judged(self) -> dict[str, Any]:
        """The judge's part: what the endpoint is asked about, it is asked here."""
        if not (self._top and self.pieces and self.call.wanted.judge):
            return {}
        found = as_text(self._top.compute(self.pieces, self.call.activations.contexts, characters=80))
        return {"judged": summarise(self.call.wanted.judge.score(found), alive=int(self._top.fired.sum()))}

    def _found(self) -> dict[str, Any]:
        found: dict[str, Any] = {"reconstruction": self._rebuilt.compute()} if self._rebuilt else {}
        functional = self._functional.compute() if self._functional else None
        if self._switching:
            norm = norm_coherence(self.call.crosscoder.decoder.weight)
            found |= {"norm": norm, "functional": functional, "switching": self._switching.compute()}
        if self._pages and functional:
            shown, progress = Shown(promoted=_promoted(self.call)), self.call.run.progress
            found["page"] = self._pages.page(functional, shown, progress=progress)
        return found


def _promoted(call: Call) -> LogitWeights | None:
    """The tokens that the latents shown promote, where what they write stands in one model's residual stream."""
    model, _, at, to, _ = call.language
    numbered = all(isinstance(layer, int) for layer in call.activations.layers)
    if model is None or not numbered or (to or at) not in STREAMS or not _unembeds(model):
        return None
    return logit_weights(call.crosscoder, model, call.wanted.latents, progress=call.run.progress)


def _unembeds(model: nn.Module) -> bool:
    try:
        unembedding(model)
    except ValueError:
        return False
    return True
