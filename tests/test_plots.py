import re
from io import BytesIO

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fmxnn as fx
from fmxnn.metrics import Coherence, norm_coherence
from fmxnn.reports.plots import compare_coherence, layer_heatmap, layer_lines

NONE = Coherence("functional, active", torch.full((5,), torch.nan), torch.zeros(3, 5))


def some(layers=3, latents=40):
    norm = norm_coherence(fx.DenseWeight(layers, 4, latents))
    return norm, Coherence("functional, active", norm.values, norm.per_layer)


def drawn(figure):
    figure.savefig(BytesIO(), dpi=40)
    return figure


def test_every_dictionary_has_a_row_with_both_medians_and_one_scale():
    pairs = {"dense": some(), "ring, eight layers": some(8), "dead": (some()[0], NONE)}
    figure = drawn(compare_coherence(pairs))
    rows = list(zip(figure.axes[::2], figure.axes[1::2]))
    assert [left.get_ylabel() for left, _ in rows] == list(pairs)
    assert {axis.get_xlim() for axis in figure.axes} == {figure.axes[0].get_xlim()}
    for row, pair in zip(rows, pairs.values()):
        for axis, coherence in zip(row, pair):
            assert axis.get_title(loc="left") == f"median {coherence.median:.2f}, {coherence.alive:,} latents"
            assert sum(patch.get_height() > 0 for patch in axis.patches) <= coherence.alive
    assert figure.get_supxlabel() == "functional, active"


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 700))
def test_the_heat_map_is_sorted_by_the_largest_layer(seed, layers, latents):
    torch.manual_seed(seed)
    coherence = some(layers, latents)[0]
    coherence.values[torch.rand(latents) < 0.3] = torch.nan
    figure = layer_heatmap({"dense": coherence}, [str(i) for i in range(layers)])
    rows = [
        [float(v / max(profile)) for v in profile]
        for profile in coherence.per_layer[:, ~coherence.values.isnan()].T.tolist()
    ]
    rows.sort(key=lambda row: (row.index(1.0), sum(i * v for i, v in enumerate(row)) / sum(row)))
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (min(max(len(rows), 1), 256), layers)
    if 0 < len(rows) <= 256:
        torch.testing.assert_close(torch.tensor(image.filled()), torch.tensor(rows, dtype=torch.float64))
    elif rows:  # neighbours share a band
        torch.testing.assert_close(
            torch.tensor(image.filled()[0]), torch.tensor(rows[: -(-len(rows) // 256)]).double().mean(0)
        )


def test_a_dictionary_without_any_value_leaves_its_panel_empty():
    figure = drawn(layer_heatmap({"none": NONE, "dense": some()[0]}, ["0", "1", "2"]))
    assert figure.axes[0].images[0].get_array().mask.all()
    assert figure.axes[0].get_title() == "none\n0 latents"


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(ValueError, match="^compare_coherence draws at least one dictionary, got none$"):
        compare_coherence({})
    with pytest.raises(ValueError, match="^layer_heatmap draws at least one dictionary, got none$"):
        layer_heatmap({}, [])
    with pytest.raises(
        ValueError, match=re.escape("layer_heatmap needs a name for each of the 3 layers of 'dense', got 2")
    ):
        layer_heatmap({"dense": some()[0]}, ["0", "1"])


def test_each_measure_has_a_panel_with_its_values_over_the_layers():
    values = {"ev": torch.rand(3), "kl": torch.rand(3)}
    axes = layer_lines(values, ["4", "5", "6"]).axes
    assert [axis.get_title(loc="left") for axis in axes] == ["ev", "kl"]
    for axis, expected in zip(axes, values.values()):
        assert axis.lines[0].get_ydata() == pytest.approx(expected.tolist())
        assert [label.get_text() for label in axis.get_xticklabels()] == ["4", "5", "6"]


def test_lines_over_layers_need_a_name_for_each():
    with pytest.raises(ValueError, match=r"^layer_lines needs a name for each of the 3 layers of 'ev', got 2$"):
        layer_lines({"ev": torch.rand(3)}, ["4", "5"])
    with pytest.raises(ValueError, match=r"^layer_lines draws at least one dictionary, got none$"):
        layer_lines({}, [])
