"""Cards of latents as one HTML file that needs nothing else."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isnan
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from fmxnn.core.cells import visible, writable
from fmxnn.metrics.excerpts import Excerpt
from fmxnn.reports.pages.export import records
from fmxnn.reports.pages.feature import Feature

_AT_FIRST = 6


@dataclass(frozen=True)
class FeaturePage:
    """Latents of a crosscoder on `layers` of `model`, seen on `tokens` tokens of text; see `feature_page`.

    ```python
    from fmxnn.reports.pages import FeaturePage

    page = FeaturePage("My latents", "tiny-lm", layers=(1, 2), tokens=1000, features=())
    page.save("features.html")
    ```
    """

    title: str
    model: str
    layers: tuple[int | str, ...]
    tokens: int
    features: tuple[Feature, ...]

    def html(self) -> str:
        """The page: text, style and script in one, nothing fetched from anywhere."""
        shown = frozenset(feature.latent for feature in self.features)
        return _TEMPLATES.get_template("page.html").render(_SPOKEN, page=self, shown=shown, at_first=_AT_FIRST)

    def save(self, path: str | Path) -> None:
        """Writes the page as one HTML file. Raises OSError, saying why, where it cannot be written."""
        _write(Path(path), self.html())

    def export(self, path: str | Path) -> None:
        """Writes the latents as JSON in the shape of neuronpedia.org; see `export.records` for its fields.

        Raises OSError as `save` does.
        """
        made = records(self.features, model=self.model, layers=self.layers, tokens=self.tokens)
        _write(Path(path), json.dumps(made, ensure_ascii=False, allow_nan=False))


class _Run(NamedTuple):
    """A stretch of a context: silent text, or one piece that the latent fires on, as a share of its largest."""

    text: str
    share: float
    activation: float
    token: bool


def _runs(excerpt: Excerpt, largest: float) -> list[_Run]:
    """An excerpt with silent pieces joined."""
    places = range(len(excerpt.pieces))
    made = list[_Run]()
    for silent, group in groupby(places, key=lambda i: excerpt.activations[i] == 0):
        if silent:
            made.append(_Run(visible("".join(excerpt.pieces[i] for i in group)), 0.0, 0.0, False))
        else:
            made += [
                _Run(
                    visible(excerpt.pieces[i]),
                    excerpt.activations[i] / largest,
                    excerpt.activations[i],
                    i == excerpt.at,
                )
                for i in group
            ]
    return made


def _chip(token: str) -> str:
    return visible(token).replace(" ", "␣") or "(no text)"


def _number(value: float) -> str:
    return "–" if isnan(value) else f"{value:.2f}"


def _shares(values: Sequence[float]) -> list[float]:
    """Each value as a share of the largest; 0 where there is none."""
    known = [0.0 if isnan(value) else value for value in values]
    return [value / (max(known) or 1.0) for value in known]


def _outline(bins: tuple[int, ...]) -> str:
    """A histogram as one SVG path over 300 x 76."""
    steps = [f"V{76 - 72 * share:.1f}H{300 * (i + 1) / len(bins):.1f}" for i, share in enumerate(_shares(bins))]
    return f"M0 76{''.join(steps)}V76Z"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(writable(text), encoding="utf-8")  # of JSON, too, that is the escape
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error.strerror}; give the path of a file in a folder that exists"
        ) from error


_TEMPLATES = Environment(
    loader=PackageLoader("fmxnn", "reports/pages"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_SPOKEN: dict[str, object] = dict(chip=_chip, number=_number, outline=_outline, runs=_runs, shares=_shares)
