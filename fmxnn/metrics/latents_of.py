"""Which latents fire on which token of a text; needs transformers (`pip install 'fmxnn[harvest]'`)."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from shutil import get_terminal_size
from typing import Any, TextIO
from unicodedata import category, east_asian_width

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.activations.configs import check_layers_of, check_vocabulary, longest_context
from fmxnn.activations.layer_reader import Forward, LayerReader, call_language_model
from fmxnn.activations.models import Model, open_config, open_model
from fmxnn.activations.places import Layer
from fmxnn.activations.text import Contexts, separate_contexts
from fmxnn.activations.trained_on import trained_on
from fmxnn.coders.crosscoder import Crosscoder, crosscoder_in
from fmxnn.coders.inputs import check_activations
from fmxnn.coders.normalisation import Normalised
from fmxnn.coders.skip import SkipCrosscoder
from fmxnn.core.cells import visible
from fmxnn.core.modes import evaluating
from fmxnn.metrics.asked import check_latents
from fmxnn.metrics.excerpts import Pieces
from fmxnn.sparse.codes import to_csr

LONGEST = 1 << 20
"""So many tokens of a text are looked at where the model does not say how many it reads."""
_GOES_ON = "⋯"  # stands for a token whose character began in an earlier one
_NAMED = 12  # latents below a text in a notebook
_HUES = 137.5  # degrees between the colours of neighbouring latents, so that no two of them look alike


@dataclass(frozen=True)
class LatentsOf:
    """`tokens latents`: the codes of a text, sparse, beside its tokens; see `latents_of`.

    Tokens that make one character together have its text at the first of them, and nothing at the others, so that the
    tokens add up to the text.

    ```python
    from fmxnn.metrics.latents_of import LatentsOf

    found = LatentsOf(("the", " whale"), fx.to_csr(torch.tensor([[0.0, 2.5, 1.0], [0.0, 0.0, 3.0]])))
    found.of_token(0)  # [(1, 2.5), (2, 1.0)]
    found.top(2)  # [(1, ' whale', 3.0), (0, 'the', 1.0)]
    ```
    """

    tokens: tuple[str, ...]
    codes: Tensor
    shown: int = 5

    def of_token(self, token: int) -> list[tuple[int, float]]:
        """The latents that fire on a token of the text, the strongest first, each with its activation."""
        if not -len(self.tokens) <= token < len(self.tokens):
            raise IndexError(f"the text has the tokens 0 to {len(self.tokens) - 1}, got {token}")
        token %= len(self.tokens)
        start, stop = self.codes.crow_indices()[token : token + 2].tolist()
        latents, activations = self.codes.col_indices()[start:stop].tolist(), self.codes.values()[start:stop].tolist()
        fired = [pair for pair in zip(latents, activations, strict=True) if pair[1] != 0]
        return sorted(fired, key=lambda pair: -abs(pair[1]))

    def top(self, latent: int) -> list[tuple[int, str, float]]:
        """The tokens on which a latent fires, the strongest first: which of the text, as text, and the activation.

        Raises ValueError for a latent that is not there.
        """
        check_latents(self.codes.shape[1], [latent])
        fired = [(token, dict(self.of_token(token)).get(int(latent), 0.0)) for token in range(len(self.tokens))]
        there = [(token, self.tokens[token], activation) for token, activation in fired if activation != 0]
        return sorted(there, key=lambda one: -abs(one[2]))

    @override
    def __repr__(self) -> str:
        """How much it holds."""
        tokens, latents = self.codes.shape
        return f"<{len(self.codes.values())} codes of {latents} latents on {tokens} tokens; show() writes them>"

    @override
    def __str__(self) -> str:
        """A line for each token, with its strongest latents and their activations."""
        return "\n".join(self._lines())

    def show(self, stream: TextIO | None = None) -> None:
        """Writes the table into a stream; None is the standard output.

        In a terminal a line has as many latents as fit.
        """
        out = sys.stdout if stream is None else stream
        columns = get_terminal_size().columns if out.isatty() else None
        out.write("\n".join([*self._lines(columns), ""]))

    def _lines(self, columns: int | None = None) -> list[str]:
        names = [visible(token) or _GOES_ON for token in self.tokens]
        width = max(map(_width, names), default=0)
        said = [[f"{latent} {value:.3g}" for latent, value in self._strongest(i)] for i in range(len(names))]
        wide = max((len(one) for line in said for one in line), default=0)
        fit = self.shown if columns is None else max(1, (columns - width) // (wide + 2))
        return [
            "  ".join([name + " " * (width - _width(name)), *(f"{one:>{wide}}" for one in line[:fit])])
            for name, line in zip(names, said, strict=True)
        ]

    def _repr_html_(self) -> str:
        """The text for a notebook: each token in the colour of its strongest latent, and all it shows on pointing.

        Below it stand these latents in their colours, the strongest first.
        """
        strongest = [self._strongest(i)[:1] for i in range(len(self.tokens))]
        most = max((abs(value) for one in strongest for _, value in one), default=0.0) or 1.0
        spans = [self._span(i, most) for i in range(len(self.tokens))]
        largest = dict[int, float]()
        for latent, value in (pair for one in strongest for pair in one):
            largest[latent] = max(largest.get(latent, 0.0), abs(value))
        ranked = sorted(largest, key=lambda latent: -largest[latent])[:_NAMED]
        legend = " ".join(
            f'<span style="{_colour(latent, largest[latent] / most)}">{latent}</span>' for latent in ranked
        )
        return (
            f'<div style="white-space: pre-wrap; line-height: 1.8">{"".join(spans)}</div>'
            f'<div style="font-size: 85%">strongest latents: {legend or "none"}</div>'
        )

    def _strongest(self, token: int) -> list[tuple[int, float]]:
        return self.of_token(token)[: self.shown]

    def _span(self, token: int, most: float) -> str:
        latents, text = self._strongest(token), self.tokens[token]
        said = escape(", ".join(f"{latent}: {value:.3g}" for latent, value in latents) or "no latent fires")
        style = _colour(latents[0][0], abs(latents[0][1]) / most) if latents else ""
        end = "\n" * text.count("\n")
        return f'<span title="{said}" style="{style}">{escape(visible(text))}</span>{end}'


@torch.no_grad()
def latents_of(
    crosscoder: Crosscoder | Normalised | SkipCrosscoder,
    model: Model,
    tokenizer: Any,
    text: str,
    *,
    layers: Sequence[Layer] | None = None,
    at: str | None = None,
    top: int = 5,
    path: str | None = None,
    call: Forward = call_language_model,
) -> LatentsOf:
    """`-> tokens latents`: which latents fire on which token of one text; `.show()` writes it as a table.

    - `model`: a causal language model: a folder, a Hub name, or the module; `tokenizer`: None is the model's own
    - `layers`, `at`: those of `harvest`; None are those that the crosscoder was saved with (`about`)
    - `top`: how many latents are shown for each token; all are kept
    - `path`, `call`: those of `harvest`, for models of an unknown family

    The text stands alone behind BOS (EOS where there is no BOS); BOS, EOS and padding are left out. Crosscoder and
    model run in eval mode, and then have the modes that they had. Activations are the model's own: fold a training
    scale into the crosscoder first (`fold_scale`).

    Raises ValueError for layers that are not known, layers of several models, a text without tokens, and one longer
    than the model reads. Raises ShapeError for a crosscoder of other layers or d_model.
    """
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"latents_of looks at one text, got {type(text).__name__}; give a string")
    if top < 1:
        raise ValueError(f"latents_of shows top >= 1 latents a token, got top={top!r:.200}")
    instead = "give its encode what harvest([...], text, layers=...) reads of them"
    layers, place, _ = trained_on(crosscoder, "latents_of", layers=layers, at=at, to=None, instead=instead)
    layers = check_layers_of(None if path else open_config(model), layers, place)
    opened, tokenizer = open_model(model, tokenizer)
    if tokenizer is None:
        raise ValueError("latents_of needs the tokenizer of a model that is given as a module; pass tokenizer")
    inner, reader = crosscoder_in(crosscoder), LayerReader(opened, layers, at=place, path=path, call=call)
    read = _read(opened, text, tokenizer)
    like, device = inner.encoder.bias, next(opened.parameters()).device
    with evaluating(crosscoder, opened):
        x = reader(read.ids.long().to(device))
        check_activations(inner, x.shape[-2:], tuple(layers))
        z = crosscoder.encode(x[read.keep.to(device)].to(like.device, like.dtype), layout=torch.sparse_csr)
    return LatentsOf(_texts(Pieces(tokenizer), read.ids[0].tolist(), read.keep[0].tolist()), to_csr(z.cpu()), top)


def _read(model: nn.Module, text: str, tokenizer: Any) -> Contexts:
    """`-> contexts context`: one context, which the model can read."""
    if not {*tokenizer(text, add_special_tokens=False)["input_ids"]} - {*tokenizer.all_special_ids}:
        raise ValueError(
            f"latents_of looks at the tokens of a text, and {text!r:.200} has none but BOS, EOS or padding"
        )
    read, _ = separate_contexts([text], tokenizer, context=LONGEST)
    tokens, most = read.ids.shape[1], longest_context(model)
    if most is not None and tokens > most:
        raise ValueError(
            f"latents_of looks at one text behind BOS at once, and {type(model).__name__} reads at most {most} tokens, "
            f"got {tokens}; give a part of it"
        )
    check_vocabulary(model, read.ids)
    return read


def _texts(pieces: Pieces, ids: list[int], keep: list[bool]) -> tuple[str, ...]:
    texts = [""] * len(ids)
    for piece in pieces.split(ids):
        texts[piece.position] = piece.text
    return tuple(text for text, kept in zip(texts, keep, strict=True) if kept)


def _colour(latent: int, share: float) -> str:
    return f"background: hsla({latent * _HUES % 360:.0f}, 80%, 60%, {0.7 * share:.2f})"


def _width(text: str) -> int:
    """How many columns a terminal gives it."""
    return sum(2 if east_asian_width(one) in "WF" else category(one) not in ("Mn", "Me", "Cf") for one in text)
