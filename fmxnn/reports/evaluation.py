"""What an evaluation found: as numbers, as a table, as files."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from fmxnn.core.cells import cell, visible, writable
from fmxnn.core.files.strict_json import to_json
from fmxnn.core.version import __version__
from fmxnn.metrics import Coherence, OffToOn, ReconstructionReport, SpliceReport
from fmxnn.metrics.judge import JudgeReport
from fmxnn.metrics.probing.probing import ProbeResult
from fmxnn.reports.pages import FeaturePage
from fmxnn.reports.plots import compare_coherence, layer_heatmap, layer_lines


@dataclass(frozen=True)
class Evaluation:
    """The measures of one crosscoder on one text; a part that was not measured is None or empty.

    `numbers()` are the headlines, `per_layer()` those that each layer has. `table()` is both as Markdown, and
    `save(folder)` writes everything as files.

    ```python
    from fmxnn.metrics import norm_coherence
    from fmxnn.reports import Evaluation, compare

    ring, dense = (norm_coherence(weight(2, 3, 8)) for weight in (fx.TensorRingWeight, fx.DenseWeight))
    reports = [Evaluation("ring", "tiny-lm", (0, 1), norm=ring), Evaluation("dense", "tiny-lm", (0, 1), norm=dense)]
    compare(reports)
    ```
    """

    name: str
    model: str
    layers: tuple[int | str, ...]
    reconstruction: ReconstructionReport | None = None
    splice: SpliceReport | None = None
    norm: Coherence | None = None
    functional: Coherence | None = None
    switching: OffToOn | None = None
    probes: Mapping[str, ProbeResult] = field(default_factory=dict[str, ProbeResult])
    page: FeaturePage | None = None
    judged: JudgeReport | None = None

    def numbers(self) -> dict[str, dict[str, float]]:
        """Every headline number by part and name.

        `probing` holds means over tasks, and each task stands under `probing TASK`.
        """
        found: dict[str, dict[str, float]] = {}
        for title, part in (("reconstruction", self.reconstruction), ("spliced loss", self.splice)):
            found |= {title: part.numbers()} if part else {}
        for title, coherence in (("norm coherence", self.norm), ("functional coherence", self.functional)):
            found |= {title: coherence.numbers()} if coherence else {}
        if self.switching:
            found["switching on"] = {"rate": self.switching.rate, "per_token": float(self.switching.per_token.mean())}
        tasks = {f"probing {task}": result.numbers() for task, result in self.probes.items()}
        if tasks:
            shared = [
                name for name in next(iter(tasks.values())) if name not in ("f1_low", "f1_high")
            ]  # a mean of intervals is none
            found["probing"] = {name: _mean([each[name] for each in tasks.values()]) for name in shared}
        if self.judged:
            found["judge"] = self.judged.numbers()
        return found | tasks

    def per_layer(self) -> dict[str, Tensor]:
        """`-> layers`: every number that a layer of its own has, by name.

        Norms and dependence are means over the latents that have a coherence.
        """
        found: dict[str, Tensor] = {}
        if self.reconstruction:
            found |= {name: getattr(self.reconstruction, name) for name in ("mse", "ev", "cos", "l2_ratio")}
        if self.splice:
            found |= {"ce - clean": self.splice.ce - self.splice.clean, "kl": self.splice.kl}
            found |= {f"ce score, {ablation}": self.splice.score(ablation) for ablation in ("zero", "mean")}
        for name, coherence in (("decoder norm", self.norm), ("dependence", self.functional)):
            found |= {name: coherence.per_layer[:, ~coherence.values.isnan()].mean(1)} if coherence else {}
        return found

    def table(self, *, form: Literal["github", "plain"] = "github") -> str:
        """Headlines by part, then the numbers of each layer; `form` is one of tabulate's."""
        tables: dict[str, tuple[list[list[Any]], list[str]]] = {}
        for title, part in self.numbers().items():
            if not title.startswith("probing "):
                tables[title] = [[*part.values()]], [*part]
        if self.probes:
            rows = [(task, result.numbers()) for task, result in self.probes.items()]
            written = cell if form == "github" else visible
            tables["probing, by task"] = [[written(task), *row.values()] for task, row in rows], ["task", *rows[0][1]]
        for title, names, columns in self._by_layer():
            values = (column.tolist() for column in columns.values())
            tables[title] = [list(row) for row in zip(names, *values, strict=True)], ["layer", *columns]
        mark, names = (
            "## " if form == "github" else "",
            {"probing, by task": [0]},
        )  # a task's name may look like a number
        made = {
            title: tabulate(*table, tablefmt=form, floatfmt=".4g", disable_numparse=names.get(title, False))
            for title, table in tables.items()
        }
        return "\n\n".join(f"{mark}{title}\n\n{table}" for title, table in made.items())

    def _by_layer(self) -> list[tuple[str, list[str], dict[str, Tensor]]]:
        """The numbers of each layer: a title, the layers, and the numbers by name.

        A transcoder that writes other layers than it reads has those it writes, numbered, apart.
        """
        found, names = self.per_layer(), [str(layer) for layer in self.layers]
        read = {name: values for name, values in found.items() if len(values) == len(names)}
        written = {name: values for name, values in found.items() if len(values) != len(names)}
        count = max((len(values) for values in written.values()), default=0)
        parts = [("by layer", names, read), ("by layer written", [str(layer) for layer in range(count)], written)]
        return [part for part in parts if part[2]]

    def figures(self) -> dict[str, Figure]:
        """The figures by file name: coherence over latents, where latents live, and what each layer loses."""
        found, written = dict[str, Figure](), self._by_layer()[-1][1:] if self.per_layer() else ([], {})
        if self.norm and self.functional:
            found["coherence"] = compare_coherence(
                {visible(self.name).replace("$", r"\$"): (self.norm, self.functional)}
            )
            names = [str(layer) for layer in self.layers]
            profiles = {"decoder norms": self.norm, "dependence": self.functional}
            here = {name: each for name, each in profiles.items() if len(each.per_layer) == len(names)}
            found["layers"] = layer_heatmap(here, names)
        shown = {name: values for name, values in written[1].items() if name in ("ev", "cos", "kl")}
        if shown:
            found["per-layer"] = layer_lines(shown, written[0])
        return found

    def save(self, folder: str | Path) -> None:
        """Writes report.json, report.md, report.html, the figures as PNG, and the pages of the chosen latents.

        The pages are features.html and features.json. Each HTML file needs no other and no network. The folder is made
        where it is missing; files of the same names are replaced. Raises OSError, saying why, where it cannot be
        written.
        """
        target = Path(folder)
        try:
            target.mkdir(parents=True, exist_ok=True)
            pictures = {name: _png(figure) for name, figure in self.figures().items()}
            for name, picture in pictures.items():
                (target / f"{name}.png").write_bytes(picture)
            (target / "report.json").write_text(to_json(self.record()), encoding="utf-8")
            (target / "report.md").write_text(f"# {cell(self.title)}\n\n{self.table()}\n", encoding="utf-8")
            (target / "report.html").write_text(writable(self.html(pictures)), encoding="utf-8")
        except OSError as error:
            raise OSError(
                f"the report cannot be written into {target}: {error.strerror}; give a folder that you may write to"
            ) from error
        if self.page:
            self.page.save(target / "features.html")
            self.page.export(target / "features.json")

    @property
    def title(self) -> str:
        """What was measured, as a heading on one line."""
        return visible(f"{self.name} on {self.model}, layers {', '.join(map(str, self.layers))}")

    def record(self) -> dict[str, Any]:
        """All numbers, with the versions that made them; what `report.json` holds."""
        head = {
            "fmxnn": __version__,
            "torch": torch.__version__,
            "name": self.name,
            "model": self.model,
            "layers": self.layers,
        }
        probes = {task: [asdict(each) for each in result.classes] for task, result in self.probes.items()}
        return {
            **head,
            "tokens": self.tokens,
            "numbers": self.numbers(),
            "per layer": self.per_layer(),
            "probes": probes,
        }

    def html(self, pictures: Mapping[str, bytes]) -> str:
        """The report as one page, with the pictures in it."""
        inlined = {name: b64encode(picture).decode() for name, picture in pictures.items()}
        template = Environment(
            loader=PackageLoader("fmxnn", "reports"), autoescape=True, undefined=StrictUndefined
        ).get_template("report.html")
        return template.render(report=self, pictures=inlined, has_page=self.page is not None, version=__version__)

    @property
    def tokens(self) -> int | None:
        """Kept tokens of the text, where reconstruction was measured."""
        return self.reconstruction.tokens if self.reconstruction else None


def compare(evaluations: Sequence[Evaluation], *, form: Literal["github", "plain"] = "github") -> str:
    """Dictionaries below each other, their headlines side by side, as a table; a measure that none has is left out.

    `c_n` and `c_f` are mean norm and functional coherence, `ce - clean` what splicing costs, `f1` and `auroc` means
    over probing tasks. Raises ValueError where there is nothing to compare, or the evaluations are of other layers or
    another number of tokens.
    """
    kinds = {(each.model, each.layers, each.tokens) for each in evaluations}
    if len(kinds) != 1:
        found = (
            "; ".join(f"{model}, layers {layers}, {tokens} tokens" for model, layers, tokens in sorted(kinds, key=str))
            or "none"
        )
        raise ValueError(f"compare takes evaluations of one model, the same layers and the same text, got {found}")
    rows = [
        {name: each.numbers().get(part, {}).get(key) for name, (part, key) in _HEADLINES.items()}
        for each in evaluations
    ]
    for row, each in zip(rows, evaluations, strict=True):
        row["ce - clean"] = float((each.splice.ce - each.splice.clean).mean()) if each.splice else None
    columns = [name for name in (*_HEADLINES, "ce - clean") if any(row[name] is not None for row in rows)]
    written = cell if form == "github" else visible
    table = [
        [written(each.name), *(row[name] for name in columns)] for each, row in zip(evaluations, rows, strict=True)
    ]
    return tabulate(
        table, ["dictionary", *columns], tablefmt=form, floatfmt=".4g", disable_numparse=[0]
    )  # a name may look like a number


_HEADLINES = {name: ("reconstruction", name) for name in ("mse", "ev", "cos", "l0", "dead")} | {
    "c_n": ("norm coherence", "mean"),
    "c_f": ("functional coherence", "mean"),
    "kl": ("spliced loss", "kl"),
    "f1": ("probing", "f1"),
    "auroc": ("probing", "auroc"),
}


def _png(figure: Figure) -> bytes:
    held = BytesIO()
    figure.savefig(held, format="png", dpi=140)
    return held.getvalue()


def _mean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).nanmean())
