"""Figures of a dictionary; needs matplotlib (`pip install 'fmxnn[plots]'`)."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from fmxnn.metrics import Coherence

BANDS = 256


def coherence_histograms(dictionaries: Mapping[str, Coherence]) -> Figure:
    """One histogram of coherence over latents for each dictionary, above each other on one axis, with medians.
    (fmxcoders, figure 2)
    """
    figure = Figure(figsize=(7, 1.1 * len(dictionaries) + 1.2), layout="constrained")
    axes = figure.subplots(len(dictionaries), 1, sharex=True, squeeze=False)[:, 0]
    layers = max(coherence.per_layer.shape[0] for coherence in dictionaries.values())
    for axis, (name, coherence) in zip(axes, dictionaries.items(), strict=True):
        values = coherence.values[~coherence.values.isnan()].tolist()
        axis.hist(values, bins=40, range=(1, layers), density=True, color="#4c72b0")
        axis.axvline(coherence.median, color="#c44e52", linewidth=1.5)
        axis.set_yticks([])
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.set_title(
            f"{name}: median {coherence.median:.2f}, {coherence.alive:,} latents, {coherence.excluded:,} excluded",
            fontsize=9,
            loc="left",
        )
    variant = next(iter(dictionaries.values())).variant
    axes[-1].set_xlabel(f"coherence: effective layers of a latent\n({variant})", fontsize=9)
    return figure


def compare_coherence(dictionaries: Mapping[str, tuple[Coherence, Coherence]]) -> Figure:
    """Norm coherence and functional coherence side by side, a row for each dictionary. (fmxcoders, figure 2)

    Every row has the same axes and shows medians. Each entry is what `norm_coherence` and `functional_coherence` gave.
    Raises ValueError where there is none.
    """
    _check_some("compare_coherence", dictionaries)
    rows = len(dictionaries)
    figure = Figure(figsize=(8, 0.85 * rows + 1.3), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True, squeeze=False)
    layers = max(len(coherence.per_layer) for pair in dictionaries.values() for coherence in pair)
    for row, (name, pair) in zip(axes, dictionaries.items(), strict=True):
        for axis, coherence, colour in zip(row, pair, ("#0072b2", "#009e73"), strict=True):
            if coherence.alive:
                axis.hist(
                    coherence.values[~coherence.values.isnan()].tolist(),
                    bins=40,
                    range=(1, layers),
                    density=True,
                    color=colour,
                )
                axis.axvline(coherence.median, color="black", linewidth=1.2, linestyle="--")
            axis.set_title(f"median {coherence.median:.2f}, {coherence.alive:,} latents", fontsize=8, loc="left", pad=4)
            axis.set_yticks([])
            axis.spines[["top", "right", "left"]].set_visible(False)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axis, column in zip(axes[-1], ("norm", "functional"), strict=True):
        axis.set_xlabel(f"{column} coherence: effective layers", fontsize=9)
        axis.set_xticks(range(1, layers + 1, -(-layers // 12)))
    variants = dict.fromkeys(coherence.variant for _, coherence in dictionaries.values())
    figure.supxlabel("\n".join(variants), fontsize=8, color="dimgray")
    return figure


def layer_heatmap(dictionaries: Mapping[str, Coherence], names: Sequence[str]) -> Figure:
    """Every latent's share of its largest layer, latents down and layers across, one panel for each dictionary.

    Latents are sorted by their largest layer and, within it, by the centre of their profile; those without a value are
    left out. Raises ValueError where `names` are not the layers, or there is no dictionary.
    """
    _check_some("layer_heatmap", dictionaries)
    figure = Figure(figsize=(1.6 + 2.4 * len(dictionaries), 4.2), layout="constrained")
    axes = figure.subplots(1, len(dictionaries), squeeze=False)[0]
    for axis, (name, coherence) in zip(axes, dictionaries.items(), strict=True):
        if len(names) != len(coherence.per_layer):
            raise ValueError(
                f"layer_heatmap needs a name for each of the {len(coherence.per_layer)} layers of {name!r}, got "
                f"{len(names)}"
            )
        axis.imshow(
            _sorted_profiles(coherence).T.tolist(),
            aspect="auto",
            cmap="viridis",
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        axis.set_title(f"{name}\n{coherence.alive:,} latents", fontsize=9)
        axis.set_xticks(range(len(names)), list(names), fontsize=8)
        axis.set_yticks([])
        axis.set_xlabel("layer", fontsize=9)
    axes[0].set_ylabel("latents, by their largest layer", fontsize=9)
    figure.colorbar(
        ScalarMappable(Normalize(0, 1), "viridis"), ax=list(axes), label="share of the latent's largest layer"
    )
    return figure


def layer_lines(measures: Mapping[str, Tensor], names: Sequence[str]) -> Figure:
    """One panel for each measure of axis `layers`, side by side, with its own scale.

    Raises ValueError where there is none, or `names` are not the layers.
    """
    _check_some("layer_lines", measures)
    figure = Figure(figsize=(1.2 + 2.7 * len(measures), 2.7), layout="constrained")
    for axis, (measure, values) in zip(
        figure.subplots(1, len(measures), squeeze=False)[0], measures.items(), strict=True
    ):
        if len(names) != len(values):
            raise ValueError(
                f"layer_lines needs a name for each of the {len(values)} layers of {measure!r}, got {len(names)}"
            )
        axis.plot(range(len(names)), values.tolist(), marker="o", markersize=4, color="#0072b2")
        axis.set_xticks(range(len(names)), list(names), fontsize=8)
        axis.set_title(measure, fontsize=9, loc="left")
        axis.set_xlabel("layer", fontsize=9)
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def layer_profile(norms: Tensor, dependence: Tensor, names: Sequence[str], *, title: str) -> Figure:
    """`layers, layers -> `: one latent's decoder norms and functional dependence, layer by layer.

    Each is a share of its largest.
    """
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    places = range(len(names))
    for offset, values, label, colour in (
        (-0.2, norms, "decoder norm", "#4c72b0"),
        (0.2, dependence, "functional dependence", "#dd8452"),
    ):
        axis.bar(
            [place + offset for place in places], (values / values.max()).tolist(), width=0.4, label=label, color=colour
        )
    axis.set_xticks(list(places), list(names))
    axis.set_xlabel("layer")
    axis.set_ylim(0, 1.25)
    axis.set_ylabel("share of the largest")
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=2, fontsize=9, loc="upper right")
    return figure


def _sorted_profiles(coherence: Coherence) -> Tensor:
    """`-> layers bands`: shares of each latent's largest layer, sorted; neighbours are averaged to no more bands than
    can be seen.
    """
    shares = coherence.per_layer[:, ~coherence.values.isnan()]
    if not coherence.alive:
        return shares.new_full((len(shares), 1), torch.nan)
    shares = shares / shares.amax(0)
    centres = (shares * torch.arange(len(shares), device=shares.device).unsqueeze(1)).sum(0) / shares.sum(0)
    order = (shares.argmax(0) * len(shares) + centres).argsort()
    return functional.adaptive_avg_pool1d(shares[:, order], min(coherence.alive, BANDS))


def _check_some(who: str, dictionaries: Mapping[str, object]) -> None:
    if not dictionaries:
        raise ValueError(f"{who} draws at least one dictionary, got none")
