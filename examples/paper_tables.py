"""Tables from what reproduce_paper.py and planted.py left in a folder, each number with its spread over seeds."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from paper_presets import PRESETS, Variant, jobs
from tabulate import tabulate

from fmxnn.metrics import planted

PAPER, TIED = Variant("dense", "paper"), Variant("dense", "tied")
BESTS = (("dense", "tied"), ("tr-wide", "isometric"), ("dense", "data"), ("tr-wide", "data"))
"""Weights and starts among which the best was chosen, by the first seed: the table of the best leaves that seed out."""
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
            raise ValueError(
                f"{folder} holds no results; make them: python examples/reproduce_paper.py tiny --out {folder}"
            )
        name = json.loads((folder / "preset.json").read_text())["preset"]
        records: dict[Variant, list[Record]] = {variant: [] for variant in PRESETS[name].variants}
        for job in jobs(PRESETS[name]):
            path = folder / "results" / f"{job.slug}.json"
            if path.exists():
                records[job.variant].append(json.loads(path.read_text()))
        return cls(name, records, len(jobs(PRESETS[name])))

    def by_seed(self, variant: Variant, part: str, name: str) -> dict[int, float]:
        """One number for every seed for which it was measured."""
        found = {record["seed"]: record.get(part, {}).get(name) for record in self.records.get(variant, [])}
        return {seed: value for seed, value in found.items() if value is not None}

    def values(self, variant: Variant, part: str, name: str) -> list[float]:
        """The same without the seeds."""
        return list(self.by_seed(variant, part, name).values())

    def without(self, seed: int) -> "Results":
        """The results of all other seeds."""
        return replace(
            self,
            records={
                key: [record for record in found if record["seed"] != seed] for key, found in self.records.items()
            },
        )

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
        return told([value * scale for value in results.values(variant, part, name)], f".{digits}f")

    return cell


def told(values: Sequence[float], form: str) -> str:
    """The mean, with the standard deviation where there are several."""
    if not values:
        return ""
    return f"{mean(values):{form}}" + (f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else "")


def paired(form: str, part: str, name: str) -> Cell:
    """A cell with a number's difference to that of the tied dense crosscoder with the same loss, which starts from data
    where the variant does.

    Seed by seed, so that what differs between seeds falls out.
    """

    def cell(results: Results, variant: Variant) -> str:
        baseline = Variant("dense", "data" if variant.start == "data" else "tied", auxiliary=variant.auxiliary)
        ours, theirs = (results.by_seed(which, part, name) for which in (variant, baseline))
        return "" if variant == baseline else told([ours[seed] - theirs[seed] for seed in ours if seed in theirs], form)

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
BEST: dict[str, Cell] = {
    "MSE": spread(4, "numbers", "mse"),
    "MSE - tied dense": paired("+.4f", "numbers", "mse"),
    "EV": spread(4, "numbers", "ev"),
    "dead, %": spread(1, "numbers", "dead", scale=100),
    "F1, %": spread(1, "probes", "f1", scale=100),
    "KL": spread(4, "splice", "kl"),
}
PLANTED: dict[str, Cell] = {
    "mcc": spread(3, "recovery", "mcc"),
    "mcc - tied dense": paired("+.3f", "recovery", "mcc"),
    "recovered": spread(3, "recovery", "recovered"),
    "detection F1": spread(3, "recovery", "detection_f1"),
    "IoU": spread(3, "recovery", "iou"),
    "c_n error": spread(2, "recovery", "c_n_error"),
    "c_f error": spread(2, "recovery", "c_f_error"),
    "silent latents, %": spread(1, "recovery", "silent", scale=100),
    "seconds": spread(0, "recovery", "training_seconds"),
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
    """Markdown: a row for each variant of which something was measured; for how many seeds this `part` was, in the last
    column.
    """
    rows = [(variant, [cell(results, variant) for cell in cells.values()]) for variant in variants]
    shown = [
        [variant.name, *row, str(sum(part in record for record in results.records[variant]))]
        for variant, row in rows
        if any(row)
    ]
    return tabulate(shown, headers=["dictionary", *cells, "seeds"], tablefmt="github", disable_numparse=True)


def tables(results: Results) -> dict[str, str]:
    """Every table by its name."""
    whole = [variant for variant in results.records if variant.share == 1]
    probed = [variant for variant in whole if variant.full]
    ways = sorted({(variant.weight, variant.start, variant.p) for variant in results.records if variant.share < 1})
    plain = [variant for variant in results.records if not variant.auxiliary and variant.faster == 1]
    best = [variant for variant in whole if variant.full and not variant.p and (variant.weight, variant.start) in BESTS]
    compressed = [each for way in ways for each in plain if (each.weight, each.start, each.p) == way]
    return {
        "reconstruction": table(results, whole, RECONSTRUCTION),
        "probing": table(results, probed, PROBING, "splice"),
        "coherence": table(results, [variant for variant in whole if variant.weight != "sae"], COHERENCE),
        "compression": table(results, compressed, COMPRESSION),
        "best": table(results.without(PRESETS[results.preset].seeds[0]), best, BEST),
        "missing": results.missing,
    }


def planted_tables(folder: Path) -> dict[str, str]:
    """The tables of planted.py by its presets: a row for each variant, and one for the dictionary of one who knows the
    truth.
    """
    made: dict[str, str] = {}
    for preset in planted.PRESETS:
        records: dict[Variant, list[Record]] = {}
        for path in sorted((folder / preset / "results").glob("*.json")):
            record = json.loads(path.read_text())
            records.setdefault(Variant(**record["variant"]), []).append(record)
        if records:
            oracle = {
                record["seed"]: {**record, "recovery": record["oracle"]}
                for found in records.values()
                for record in found
            }
            known = Results(preset, {TIED: list(oracle.values())}, 0)
            rows = [planted_row(Results(preset, records, 0), variant, variant.name) for variant in records]
            rows.append(planted_row(known, TIED, "the oracle"))
            made[preset] = tabulate(
                rows, headers=["dictionary", *PLANTED, "seeds"], tablefmt="github", disable_numparse=True
            )
    return made


def planted_row(results: Results, variant: Variant, name: str) -> list[str]:
    """The name, the cells, and on how many seeds they stand."""
    return [name, *(cell(results, variant) for cell in PLANTED.values()), str(len(results.records[variant]))]
