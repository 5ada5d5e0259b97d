"""Examples of latents as a table."""

from collections.abc import Mapping
from math import isnan

from tabulate import tabulate

from fmxnn.core.cells import literal, visible
from fmxnn.reports.pages.page import FeaturePage


def feature_table(dictionaries: Mapping[str, FeaturePage], *, tokens: int = 8, form: str = "github") -> str:
    """Latents of each dictionary, a row each, with their coherences, density and top tokens. (fmxcoders, table 1)

    It is Markdown, in which tokens and names are escaped, or another of tabulate's formats, such as "plain". `tokens`
    are shown of each latent; the leading space of a token shows as ␣.
    """
    written = literal if form in ("github", "pipe") else visible
    rows = [
        [
            written(name),
            feature.latent,
            _number(feature.norm_coherence),
            _number(feature.functional_coherence),
            f"{feature.density:.3%}",
            f"{feature.largest:.2f}" if feature.density else "never fires",
            ", ".join(written(token.token).replace(" ", "␣") for token in feature.top[:tokens]),
        ]
        for name, page in dictionaries.items()
        for feature in page.features
    ]
    headers = ["dictionary", "latent", "c_n", "c_f", "density", "largest", "top tokens"]
    return tabulate(rows, headers, tablefmt=form, disable_numparse=True)


def _number(value: float) -> str:
    return "" if isnan(value) else f"{value:.2f}"
