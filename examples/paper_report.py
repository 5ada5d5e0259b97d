"""Tables and figures from what reproduce_paper.py left in a folder: into `report.md` there, or into a page that has places for them.

python examples/paper_report.py runs/paper --page docs/results.md
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paper_presets import PRESETS, Variant, jobs
from tabulate import tabulate

from fmxnn.metrics import Coherence
from fmxnn.plots import compare_coherence

PAPER, TIED = Variant("dense", "paper"), Variant("dense", "tied")
COLOURS = {"dense": "black", "sae": "#e69f00", "tr": "#d55e00", "tr-wide": "#0072b2", "cp": "#009e73"}
MARKS = {"paper": "s", "tied": "o", "isometric": "D"}  # the paper's start is drawn paler as well
Record = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """What was measured: a list of records, one for each seed, for every variant that was planned."""

    preset: str
    records: dict[Variant, list[Record]]
    planned: int

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """From a folder of reproduce_paper.py. Raises ValueError where there is none."""
        if not (folder / "preset.json").exists():
            raise ValueError(f"{folder} holds no results; make them: python examples/reproduce_paper.py tiny --out {folder}")
        name = json.loads((folder / "preset.json").read_text())["preset"]
        records: dict[Variant, list[Record]] = {variant: [] for variant in PRESETS[name].variants}
        for job in jobs(PRESETS[name]):
            path = folder / "results" / f"{job.slug}.json"
            if path.exists():
                records[job.variant].append(json.loads(path.read_text()))
        return cls(name, records, len(jobs(PRESETS[name])))

    def values(self, variant: Variant, part: str, name: str) -> list[float]:
        """One number of every seed for which it was measured."""
        found = [record.get(part, {}).get(name) for record in self.records.get(variant, [])]
        return [value for value in found if value is not None]

    @property
    def finished(self) -> int:
        """How many jobs left a record."""
        return sum(map(len, self.records.values()))

    @property
    def missing(self) -> str:
        """How much of what was planned is there, and what is not at all, in a sentence or two."""
        minutes = sum(record["seconds"] for found in self.records.values() for record in found) / 60
        none = [variant.name for variant, found in self.records.items() if not found]
        said = f"{self.finished} of {self.planned} jobs are done, in {minutes:.0f} minutes of one thread."
        return f"{said} Not measured at all: {'; '.join(none)}." if none else said


Cell = Callable[[Results, Variant], str]


def spread(digits: int, part: str, name: str, *, scale: float = 1.0) -> Cell:
    """A cell with a number's mean, and its standard deviation over seeds where there are several."""

    def cell(results: Results, variant: Variant) -> str:
        values = [value * scale for value in results.values(variant, part, name)]
        if not values:
            return ""
        return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")

    return cell


def against(choose: Callable[[Variant], Variant], part: str = "numbers", name: str = "mse") -> Cell:
    """A cell with the change of a number's mean, of the MSE's unless another is named, against another variant's."""

    def cell(results: Results, variant: Variant) -> str:
        ours, theirs = (results.values(which, part, name) for which in (variant, choose(variant)))
        return f"{mean(ours) / mean(theirs) - 1:+.1%}" if ours and theirs else ""

    return cell


def ranks(results: Results, variant: Variant) -> str:
    """A cell with the bonds' sizes."""
    records = results.records[variant]
    return str(records[0]["ranks"]).strip("[]") if records else ""


RECONSTRUCTION: dict[str, Cell] = {
    "MSE": spread(4, "numbers", "mse"),
    "against dense, paper start": against(lambda _: PAPER),
    "against dense, tied start": against(lambda _: TIED),
    "EV": spread(4, "numbers", "ev"),
    "cos": spread(4, "numbers", "cos"),
    "L0": spread(1, "numbers", "l0"),
    "dead, %": spread(1, "numbers", "dead", scale=100),
}
PROBING: dict[str, Cell] = {
    "F1, %": spread(1, "probes", "f1", scale=100),
    "AUROC": spread(3, "probes", "auroc"),
    "W1 / std": spread(2, "probes", "wasserstein_scaled"),
    "W1 x 1e-3": spread(1, "probes", "wasserstein", scale=1000),
    "CE score": spread(4, "splice", "ce_score_zero"),
    "KL": spread(4, "splice", "kl"),
}
COHERENCE: dict[str, Cell] = {
    "c_n mean": spread(2, "c_n", "mean"),
    "c_n median": spread(2, "c_n", "median"),
    "c_f mean": spread(2, "c_f", "mean"),
    "against p=0": against(lambda variant: replace(variant, p=0.0), "c_f", "mean"),
    "c_f median": spread(2, "c_f", "median"),
    "latents with c_f": spread(0, "c_f", "alive"),
    "switch on, a token and layer": spread(2, "numbers", "off_to_on_per_token"),
}
COMPRESSION: dict[str, Cell] = {
    "ranks": ranks,
    "MSE": spread(4, "numbers", "mse"),
    "against all parameters": against(lambda variant: replace(variant, share=1.0)),
    "EV": spread(4, "numbers", "ev"),
    "dead, %": spread(1, "numbers", "dead", scale=100),
    "c_f mean": spread(2, "c_f", "mean"),
    "c_f against all parameters": against(lambda variant: replace(variant, share=1.0), "c_f", "mean"),
}


def table(results: Results, variants: Sequence[Variant], cells: dict[str, Cell], part: str = "numbers") -> str:
    """Markdown: a row for each variant of which something was measured; for how many seeds this `part` was, in the last column."""
    rows = [(variant, [cell(results, variant) for cell in cells.values()]) for variant in variants]
    shown = [[variant.name, *row, str(sum(part in record for record in results.records[variant]))] for variant, row in rows if any(row)]
    return tabulate(shown, headers=["dictionary", *cells, "seeds"], tablefmt="github", disable_numparse=True)


def tables(results: Results) -> dict[str, str]:
    """Every table by its name."""
    whole = [variant for variant in results.records if variant.share == 1]
    probed = [variant for variant in whole if variant.full]
    ways = sorted({(variant.weight, variant.start, variant.p) for variant in results.records if variant.share < 1})
    plain = [variant for variant in results.records if not variant.auxiliary and variant.faster == 1]
    compressed = [each for way in ways for each in plain if (each.weight, each.start, each.p) == way]
    return {
        "reconstruction": table(results, whole, RECONSTRUCTION),
        "probing": table(results, probed, PROBING, "splice"),
        "coherence": table(results, [variant for variant in whole if variant.weight != "sae"], COHERENCE),
        "compression": table(results, compressed, COMPRESSION),
        "missing": results.missing,
    }


def distributions(results: Results) -> Figure | None:
    """Figure 2: both coherences over latents, of the first seed, for what was measured in full."""

    def restored(record: Record) -> Coherence:
        values = torch.tensor([float("nan") if value is None else value for value in record["values"]], dtype=torch.float64)
        return Coherence(record["variant"], values, torch.empty(len(PRESETS[results.preset].layers), len(values)))

    rows = {
        variant.name: (restored(records[0]["c_n"]), restored(records[0]["c_f"]))
        for variant, records in sorted(results.records.items(), key=lambda pair: pair[0].slug)
        if variant.full and variant.faster == 1 and not variant.auxiliary and records and "c_n" in records[0]
    }
    return compare_coherence(rows) if rows else None


def curves(results: Results, along: str, label: str) -> Figure:
    """Figures 3 and 4: MSE and mean functional coherence along `p` or `share`, a line for each kind and start; bars are a standard deviation."""
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2)
    plain = [variant for variant in results.records if not variant.auxiliary and variant.faster == 1]
    lines: dict[tuple[str, str, float], list[Variant]] = {}
    for variant in plain if along == "share" else [variant for variant in plain if variant.share == 1]:
        lines.setdefault((variant.weight, variant.start, variant.p if along == "share" else 0.0), []).append(variant)
    for panel, (title, path) in zip(panels, (("MSE", ("numbers", "mse")), ("functional coherence", ("c_f", "mean"))), strict=True):
        for (weight, start, p), variants in lines.items():
            points = [(getattr(each, along), values) for each in variants if (values := results.values(each, *path))]
            if len(points) < 2:
                continue
            points.sort()
            bars = [stdev(values) if len(values) > 1 else float("nan") for _, values in points]
            name = Variant(variants[0].weight, variants[0].start, p=p).name
            style = {"color": COLOURS[weight], "marker": MARKS[start], "linestyle": "--" if p else "-", "capsize": 3, "markersize": 4}
            style["alpha"] = 0.5 if start == "paper" else 1.0
            panel.errorbar([x for x, _ in points], [mean(values) for _, values in points], bars, label=name, **style)
        panel.set(title=title, xlabel=label)
        panel.spines[["top", "right"]].set_visible(False)
        if along == "share":
            panel.set_xscale("log", base=2)
            panel.set_xticks([1 / 8, 1 / 4, 1 / 2, 1], ["1/8", "1/4", "1/2", "1"])
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(1, len(PRESETS[results.preset].layers))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def report(folder: Path, page: Path | None = None) -> str:
    """Tables and figures into `folder/report.md`, or into a page; says what is missing.

    A page takes what it has places for: a table between `<!-- tiny: coherence -->` and `<!-- /tiny: coherence -->`, a figure by
    its name, in the `images` beside it. Raises ValueError where it has no place for any.
    """
    results = Results.read(folder)
    made, text = tables(results), None if page is None else page.read_text()
    figures = {"distributions": distributions(results), "masking": curves(results, "p", "probability that a layer is hidden, p")}
    figures |= {"compression": curves(results, "share", "parameters as a share of the dense weight's")}
    for name, figure in figures.items():
        path = f"{results.preset}-{name}.png"
        if figure is not None and (text is None or path in text):
            figure.savefig((folder if page is None else page.parent / "images") / path, dpi=140)
    if page is None or text is None:
        (folder / "report.md").write_text("\n\n".join(f"## {name}\n\n{table}" for name, table in made.items()) + "\n")
        return results.missing
    found = 0
    for name, content in made.items():
        place = re.compile(rf"(<!-- {results.preset}: {name} -->\n).*?(<!-- /{results.preset}: {name} -->)", re.DOTALL)
        text, count = place.subn(lambda found, content=content: f"{found[1]}\n{content}\n\n{found[2]}", text)
        found += count
    if not found:
        wanted = ", ".join(f"<!-- {results.preset}: {name} -->" for name in made)
        raise ValueError(f"{page} has no place for a table; give it one of the lines {wanted}, and the same with a / where the table ends")
    page.write_text(text)
    return results.missing


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
