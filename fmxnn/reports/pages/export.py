"""Latents as JSON in the shape of neuronpedia.org."""

from collections.abc import Sequence
from math import isnan
from typing import Any

from fmxnn.metrics.excerpts import Excerpt
from fmxnn.reports.pages.feature import Feature


def record(feature: Feature, *, model: str, layers: Sequence[int | str], tokens: int) -> dict[str, Any]:
    """One latent, with the names that neuronpedia.org gives its features.

    The names are those we know of; this was not tried against the site.

    - `modelId`; `layer`: "1-3-5-crosscoder", since a latent has all layers; `index` as text
    - `frac_nonzero`, `maxActApprox`; `freq_hist_data_bar_values` (middles of the bins) and `freq_hist_data_bar_heights`
      (tokens in each), equally long
    - `activations`: for each context `tokens`, `values`, `minValue`, `maxValue`, `maxValueTokenIndex`
    - `topkCosSimIndices`, `topkCosSimValues`: the nearest latents
    - `pos_str`, `pos_values`, `neg_str`, `neg_values`: the tokens that it promotes and demotes and their logit weights;
      empty where they were not asked for
    - `fmxnn`: what the site has no name for: `layers`, `tokens` seen, `norms`, `dependence`, both coherences,
      `topTokens`, and `intervals` with `low`, `high`, `tokens` and `activations` as above
    """
    site = "-".join(map(str, layers)) + "-crosscoder"
    top = (_activation(one) for token in feature.top for one in token.excerpts)
    return {
        "modelId": model,
        "layer": site,
        "index": str(feature.latent),
        **_numbers(feature),
        "pos_str": [one.token for one in feature.promoted],
        "pos_values": [one.weight for one in feature.promoted],
        "neg_str": [one.token for one in feature.demoted],
        "neg_values": [one.weight for one in feature.demoted],
        "activations": sorted(top, key=lambda one: -one["maxValue"]),
        "fmxnn": {"layers": list(layers), "tokens": tokens} | _of_crosscoders(feature),
    }


def _numbers(feature: Feature) -> dict[str, Any]:
    return {
        "frac_nonzero": feature.density,
        "maxActApprox": feature.largest,
        "freq_hist_data_bar_heights": list(feature.bins),
        "freq_hist_data_bar_values": [(i + 0.5) * feature.bin_width for i in range(len(feature.bins))],
        "topkCosSimIndices": [latent for latent, _ in feature.nearest],
        "topkCosSimValues": [cosine for _, cosine in feature.nearest],
    }


def _activation(one: Excerpt) -> dict[str, Any]:
    values = list(one.activations)
    largest = max(values)
    return {
        "tokens": list(one.pieces),
        "values": values,
        "minValue": min(values),
        "maxValue": largest,
        "maxValueTokenIndex": values.index(largest),
    }


def _of_crosscoders(feature: Feature) -> dict[str, Any]:
    """Numbers that do not exist are null."""
    return {
        "norms": [_known(value) for value in feature.norms],
        "dependence": [_known(value) for value in feature.dependence],
        "normCoherence": _known(feature.norm_coherence),
        "functionalCoherence": _known(feature.functional_coherence),
        "topTokens": [{"token": token.token, "activation": token.activation} for token in feature.top],
        "intervals": [
            {
                "low": one.low,
                "high": one.high,
                "tokens": one.tokens,
                "activations": list(map(_activation, one.excerpts)),
            }
            for one in feature.intervals
        ],
    }


def _known(value: float) -> float | None:
    return None if isnan(value) else value
