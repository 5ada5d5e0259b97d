"""Results as JSON, a table in Markdown with the goals beside what was reached, and a plot: `python benchmarks/report.py
PARTS TARGET`.
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl
from tabulate import tabulate

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

PARTS = ("steps", "memory", "parts", "growth", "choice")
Found = dict[str, dict]


def main() -> None:
    """Joins the parts' JSON, prints the tables and writes the three files."""
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    found: Found = {
        part: json.loads((folder / f"{part}.json").read_text()) for part in PARTS if (folder / f"{part}.json").exists()
    }
    target.parent.mkdir(exist_ok=True)
    target.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    text = markdown(found)
    target.with_suffix(".md").write_text(text)
    draw(found, target.with_suffix(".png"))
    print("\n" + text)
    print(f"written to {target.parent}: " + ", ".join(target.name + end for end in (".json", ".md", ".png")))


def markdown(found: Found) -> str:
    """The whole report."""
    machine = next(iter(found.values()))["machine"]
    facts = ", ".join(f"{key}: {value}" for key, value in machine.items() if key != "versions")
    versions = ", ".join(f"{key} {value}" for key, value in machine["versions"].items())
    parts = [f"# Benchmarks\n\n{facts}; {versions}.", "## Goals\n\n" + table(["", "goal", "reached", ""], goals(found))]
    for title in ("step", "step with fused Adam"):
        if "steps" in found:
            times = found["steps"][title]
            parts.append(f"## {title.capitalize()}, ms, {sizes(found['steps'])}\n\n" + step_table(times))
    if "memory" in found:
        rows = [[name, one.get("MiB", one.get("failed"))] for name, one in found["memory"]["temporaries"].items()]
        parts.append("## Temporaries of a step beyond parameters and gradients\n\n" + table(["", "MiB"], rows))
    for title in ("BatchTopK", "decode", "functional coherence", "import", "from_pretrained"):
        if "parts" in found:
            rows = [
                [name, t["median"], f"{t['low']:.4g} to {t['high']:.4g}"] for name, t in found["parts"][title].items()
            ]
            parts.append(f"## {title}, ms\n\n" + table(["", "median", "quartiles"], rows))
    if "choice" in found:
        rows = [list(row.values()) for row in found["choice"]["rows"]]
        parts.append("## The cost model's choice, ms\n\n" + table([*found["choice"]["rows"][0]], rows))
    for axis, what in (("latents", "Encode under no_grad"), ("layers", "Training step")):
        if "growth" in found:
            rows = [[p[axis], p["name"], p.get("ms", p.get("failed")), p.get("peak MB")] for p in found["growth"][axis]]
            parts.append(f"## {what}, over {axis}\n\n" + table([axis, "", "ms", "peak MB beyond the modules"], rows))
    return "\n\n".join(parts) + "\n"


def table(headers: list[str], rows: list[list[object]]) -> str:
    """Markdown."""
    return tabulate(rows, headers=headers, tablefmt="github", floatfmt=".4g")


def step_table(times: dict[str, dict[str, float]]) -> str:
    """Medians, quartiles, and how many times SAELens's speed."""
    base = times["SAELens BatchTopK"]["median"]
    rows = [[name, t["median"], f"{t['low']:.4g} to {t['high']:.4g}", base / t["median"]] for name, t in times.items()]
    return table(["", "median", "quartiles", "times SAELens"], rows)


def sizes(part: dict) -> str:
    """The shape in words."""
    return ", ".join(f"{name} {size}" for name, size in part["shape"].items())


def goals(found: Found) -> list[list[object]]:
    """The goals, what was reached, and whether that is enough."""
    rows: list[list[object]] = []

    def add(name: str, goal: float, reached: float | None, *, most: bool = False, unit: str = "x") -> None:
        if reached is not None:
            enough = reached <= goal if most else reached >= goal
            rows.append(
                [name, f"{'<=' if most else '>='} {goal:g}{unit}", f"{reached:.3g}{unit}", "yes" if enough else "no"]
            )

    if "steps" in found:
        step_goals(found["steps"]["step"], add)
        add(
            "gradients against dense autograd, float64",
            1e-12,
            max(found["steps"]["gradients"].values()),
            most=True,
            unit="",
        )
    if "memory" in found:
        for name, one in found["memory"]["temporaries"].items():
            if name.startswith("fmxnn"):
                add(f"temporaries, {name}", 30, one.get("MiB"), most=True, unit=" MiB")
    if "parts" in found:
        parts = found["parts"]
        add(
            "BatchTopK against torch.topk",
            12,
            ratio(parts["BatchTopK"], "torch.topk, flattened", "fmxnn, sorted entries"),
        )
        rows.append(
            ["the same set as torch.topk's", "exact", str(parts["same set"]), "yes" if parts["same set"] else "no"]
        )
        both = parts["functional coherence"]
        add("functional coherence against layers + 1 encodes", 10, ratio(both, *both))
        rows.append(
            [
                "codes with 1 and with 4 threads",
                "identical",
                parts["threads"],
                "yes" if parts["threads"] == "codes identical" else "see",
            ]
        )
    if "choice" in found:
        choice = found["choice"]
        add(
            "where the cost model takes sparse codes, slowest against the dense path",
            1.05,
            choice["slowest sparse choice against dense"],
            most=True,
        )
        rows.append(
            [
                "where it takes the dense path, the same path measured twice",
                "",
                "{:.3g} to {:.3g}x".format(*choice["equal paths differ by"]),
                "",
            ]
        )
    for point in found.get("growth", {}).get("latents", []):
        if point["latents"] == 2**18:
            add(
                f"peak of the encode at 2^18 latents, {point['name']}", 300, point.get("peak MB"), most=True, unit=" MB"
            )
    return rows


def step_goals(times: dict[str, dict[str, float]], add) -> None:
    """The goals of the training step."""
    sae, sparsify = "SAELens BatchTopK", "eai-sparsify TopK"
    add("dense against SAELens", 9, ratio(times, sae, "fmxnn dense"))
    add("dense against eai-sparsify", 2.8, ratio(times, sparsify, "fmxnn dense"))
    add("TR at equal parameters against SAELens", 6.5, ratio(times, sae, "fmxnn TR"))
    add("TR against its own contracted autograd (fmxnn's BatchTopK)", 6, ratio(times, "contracted TR", "fmxnn TR"))
    add("TR against its own contracted autograd (torch.topk)", 6, ratio(times, "all-dense torch.topk TR", "fmxnn TR"))
    add("CP at equal parameters against SAELens", 3.2, ratio(times, sae, "fmxnn CP"))
    add("TR at an eighth against SAELens", 25, ratio(times, sae, "fmxnn TR 1/8"))


def ratio(times: dict[str, dict[str, float]], slow: str, fast: str) -> float | None:
    """Of the medians."""
    return times[slow]["median"] / times[fast]["median"] if slow in times and fast in times else None


def draw(found: Found, path: Path) -> None:
    """Bars of the training step, and the growth on logarithmic axes."""
    figure, (bars, latents, memory, layers) = plt.subplots(1, 4, figsize=(22, 5.5), layout="constrained")
    if "steps" in found:
        times = found["steps"]["step"]
        names = sorted(times, key=lambda name: -times[name]["median"])
        colours = ["tab:orange" if name.startswith("fmxnn") else "tab:grey" for name in names]
        spread = [
            [times[n]["median"] - times[n]["low"] for n in names],
            [times[n]["high"] - times[n]["median"] for n in names],
        ]
        bars.barh(names, [times[name]["median"] for name in names], xerr=spread, color=colours)
    bars.set(title="training step, forward and backward", xlabel="ms")
    grown = found.get("growth", {})
    lines(latents, grown.get("latents", []), "latents", "ms", "encode", 2)
    lines(memory, grown.get("latents", []), "latents", "peak MB", "peak of the encode beyond the modules", 2)
    lines(layers, grown.get("layers", []), "layers", "ms", "training step", 2)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def lines(axes: Axes, points: list[dict], x: str, y: str, title: str, base: int) -> None:
    """One line a name."""
    for name in dict.fromkeys(point["name"] for point in points):
        drawn = [(point[x], point[y]) for point in points if point["name"] == name and point.get(y, 0) > 0]
        if drawn:
            axes.plot(
                *zip(*drawn, strict=True), marker="o", linestyle="--" if "dense codes" in name else "-", label=name
            )
    axes.set_xscale("log", base=base)
    axes.set_yscale("log")
    axes.set(title=title, xlabel=x, ylabel=y)
    if points:
        axes.legend()


if __name__ == "__main__":
    main()
