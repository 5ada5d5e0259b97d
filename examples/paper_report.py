"""Tables and figures from what reproduce_paper.py or planted.py left in a folder: into `report.md` there, or into a
page that has places for them.

python examples/paper_report.py runs/paper --page docs/results.md
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paper_presets import PRESETS, Variant
from paper_tables import Record, Results, planted_tables, tables

from fmxnn.metrics import Coherence
from fmxnn.reports.plots import compare_coherence

COLOURS = {"dense": "black", "sae": "#e69f00", "tr": "#d55e00", "tr-wide": "#0072b2", "cp": "#009e73"}
MARKS = {"paper": "s", "tied": "o", "isometric": "D", "data": "^"}  # the paper's start is drawn paler as well


def distributions(results: Results) -> Figure | None:
    """Figure 2: both coherences over latents, of the first seed, for what was measured in full."""

    def restored(record: Record) -> Coherence:
        values = torch.tensor(
            [float("nan") if value is None else value for value in record["values"]], dtype=torch.float64
        )
        return Coherence(record["variant"], values, torch.empty(len(PRESETS[results.preset].layers), len(values)))

    rows = {
        variant.name: (restored(records[0]["c_n"]), restored(records[0]["c_f"]))
        for variant, records in sorted(results.records.items(), key=lambda pair: pair[0].slug)
        if variant.full and variant.faster == 1 and not variant.auxiliary and records and "c_n" in records[0]
    }
    return compare_coherence(rows) if rows else None


def curves(results: Results, along: str, label: str) -> Figure:
    """Figures 3 and 4: MSE and mean functional coherence along `p` or `share`, a line for each kind and start; bars are
    a standard deviation.
    """
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2)
    plain = [variant for variant in results.records if not variant.auxiliary and variant.faster == 1]
    lines: dict[tuple[str, str, float], list[Variant]] = {}
    for variant in plain if along == "share" else [variant for variant in plain if variant.share == 1]:
        lines.setdefault((variant.weight, variant.start, variant.p if along == "share" else 0.0), []).append(variant)
    for panel, (title, path) in zip(
        panels, (("MSE", ("numbers", "mse")), ("functional coherence", ("c_f", "mean"))), strict=True
    ):
        for (weight, start, p), variants in lines.items():
            points = [(getattr(each, along), values) for each in variants if (values := results.values(each, *path))]
            if len(points) < 2:
                continue
            points.sort()
            bars = [stdev(values) if len(values) > 1 else float("nan") for _, values in points]
            name = Variant(variants[0].weight, variants[0].start, p=p).name
            style = {
                "color": COLOURS[weight],
                "marker": MARKS[start],
                "linestyle": "--" if p else "-",
                "capsize": 3,
                "markersize": 4,
            }
            style["alpha"] = 0.5 if start == "paper" else 1.0
            panel.errorbar([x for x, _ in points], [mean(values) for _, values in points], bars, label=name, **style)
        panel.set(title=title, xlabel=label)
        panel.spines[["top", "right"]].set_visible(False)
        if along == "share":
            panel.set_xscale("log", base=2)
            panel.set_xticks([1 / 8, 1 / 4, 1 / 2, 1], ["1/8", "1/4", "1/2", "1"])
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(1, len(PRESETS[results.preset].layers))
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def report(folder: Path, page: Path | None = None) -> str:
    """Tables and figures into `folder/report.md`, or into a page; says what is missing.

    A page takes what it has places for: a table between `<!-- tiny: coherence -->` and `<!-- /tiny: coherence -->`, a
    figure by its name, in the `images` beside it. Raises ValueError where it has no place for any.
    """
    figures: dict[str, Figure | None] = {}
    if planted := planted_tables(folder):
        title, made, said = "planted", planted, "The tables are of " + " and ".join(planted) + "."
    else:
        results = Results.read(folder)
        title, made, said = results.preset, tables(results), results.missing
        figures["distributions"] = distributions(results)
        figures["masking"] = curves(results, "p", "probability that a layer is hidden, p")
        figures["compression"] = curves(results, "share", "parameters as a share of the dense weight's")
    text = None if page is None else page.read_text()
    for name, figure in figures.items():
        path = f"{title}-{name}.png"
        if figure is not None and (text is None or path in text):
            figure.savefig((folder if page is None else page.parent / "images") / path, dpi=140)
    if page is None or text is None:
        (folder / "report.md").write_text("\n\n".join(f"## {name}\n\n{table}" for name, table in made.items()) + "\n")
    else:
        page.write_text(filled(text, title, made, page))
    return said


def filled(text: str, title: str, made: dict[str, str], page: Path) -> str:
    """The page's text with every table in its place."""
    found = 0
    for name, content in made.items():
        place = re.compile(rf"(<!-- {title}: {name} -->\n).*?(<!-- /{title}: {name} -->)", re.DOTALL)
        text, count = place.subn(lambda found, content=content: f"{found[1]}\n{content}\n\n{found[2]}", text)
        found += count
    if not found:
        wanted = ", ".join(f"<!-- {title}: {name} -->" for name in made)
        raise ValueError(
            f"{page} has no place for a table; give it one of the lines {wanted}, and the same with a / where the "
            "table ends"
        )
    return text


def main(folder: tyro.conf.Positional[Path], page: Path | None = None) -> int:
    """Makes the report again from the results in a folder."""
    try:
        print(report(folder, page))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
