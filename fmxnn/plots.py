"""Figures of a dictionary; needs matplotlib (`pip install 'fmxnn[plots]'`)."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from torch import Tensor

from fmxnn.metrics import Coherence


def coherence_histograms(dictionaries: Mapping[str, Coherence]) -> Figure:
    """One histogram of coherence over latents for each dictionary, above each other on one axis, with medians. (fmxcoders, figure 2)"""
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
            f"{name}: median {coherence.median:.2f}, {coherence.alive:,} latents, {coherence.excluded:,} excluded", fontsize=9, loc="left"
        )
    variant = next(iter(dictionaries.values())).variant
    axes[-1].set_xlabel(f"coherence: effective layers of a latent\n({variant})", fontsize=9)
    return figure


def layer_profile(norms: Tensor, dependence: Tensor, names: Sequence[str], *, title: str) -> Figure:
    """`layers, layers -> `: one latent's decoder norms and functional dependence, layer by layer, each as a share of its largest."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    places = range(len(names))
    for offset, values, label, colour in ((-0.2, norms, "decoder norm", "#4c72b0"), (0.2, dependence, "functional dependence", "#dd8452")):
        axis.bar([place + offset for place in places], (values / values.max()).tolist(), width=0.4, label=label, color=colour)
    axis.set_xticks(list(places), list(names))
    axis.set_xlabel("layer")
    axis.set_ylim(0, 1.25)
    axis.set_ylabel("share of the largest")
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=2, fontsize=9, loc="upper right")
    return figure
