"""How a latent is shown: the parts of a card as HTML."""

from collections.abc import Sequence
from itertools import groupby
from math import isnan
from typing import cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from fmxnn.core.cells import visible
from fmxnn.metrics.excerpts import Excerpt


def _context(excerpt: Excerpt, largest: float) -> Markup:
    """An excerpt, each piece that fires in its colour, the pieces between joined; a page has thousands of them."""
    made = list[str]()
    for silent, group in groupby(range(len(excerpt.pieces)), key=[one == 0 for one in excerpt.activations].__getitem__):
        if silent:
            made.append(escape(visible("".join([excerpt.pieces[i] for i in group]))))
            continue
        for i in group:
            kind, activation = ' class="it"' if i == excerpt.at else "", excerpt.activations[i]
            style = f'style="--a:{activation / largest:.2f}" title="{activation:.2f}"'
            made.append(f"<b{kind} {style}>{escape(visible(excerpt.pieces[i]))}</b>")
    return Markup(f'<p class="context"><bdi dir="auto">{"".join(made)}</bdi></p>')


def chip(token: str) -> str:
    """A token on one line, its spaces as ␣."""
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


TEMPLATES = Environment(
    loader=PackageLoader("fmxnn", "reports/pages"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
"""The pages, which escape whatever is put into them."""
cast("dict[str, object]", TEMPLATES.globals).update(
    chip=chip, number=_number, outline=_outline, context=_context, shares=_shares, at_first=6
)
