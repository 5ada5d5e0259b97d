"""What the parts of the benchmark share: arguments, medians, the machine, peak memory, and where results go."""

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from contest import Shape
from tabulate import tabulate

MB = 2**20


def add_common(parser: argparse.ArgumentParser) -> None:
    """The flags of every part."""
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0 leaves torch's own choice")
    parser.add_argument("--out", type=Path, help="a folder for this part's JSON")
    for name, default in Shape().numbers().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)


def prepared(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed arguments, with torch's threads set."""
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


def shape_of(arguments: argparse.Namespace) -> Shape:
    """The sizes that were asked for."""
    return Shape(**{name: getattr(arguments, name) for name in Shape().numbers()})


def size_flags(arguments: argparse.Namespace) -> list[str]:
    """The same sizes and threads, for a subprocess."""
    flags = [f"--threads={arguments.threads}", f"--rounds={arguments.rounds}"]
    return flags + [f"--{name.replace('_', '-')}={value}" for name, value in shape_of(arguments).numbers().items()]


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and quartiles."""
    found = {}
    for name, values in times.items():
        low, middle, high = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        )
        found[name] = {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}
    return found


def print_table(title: str, headers: list[str], rows: list[list[object]]) -> None:
    """A table with its title."""
    print(f"\n{title}\n" + tabulate(rows, headers=headers, floatfmt=".4g"), flush=True)


def finish(arguments: argparse.Namespace, name: str, found: dict[str, object]) -> None:
    """Writes a part's results beside the others."""
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"{name}.json").write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n")


def machine() -> dict[str, object]:
    """Where, with what and when."""
    versions = {}
    for name in ("torch", "sae-lens", "dictionary-learning", "eai-sparsify", "transformers", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load average": round(os.getloadavg()[0], 1),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("+changes" if _git("status", "--porcelain", "--", "fmxnn") else ""),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
    }


def cpu() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or "unknown",
    )


def _git(*words: str) -> str:
    ran = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return ran.stdout.strip()


def reset_peak() -> int:
    """Gives free memory back, forgets the peak, and says what is resident: bytes. Linux can forget; elsewhere the peak
    so far stands.
    """
    gc.collect()
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
            return _status("VmRSS")
        except OSError:
            pass
    return peak()


def peak() -> int:
    """The largest resident size since the last `reset_peak`: bytes."""
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def subprocess_json(script: str, *flags: str) -> dict[str, object]:
    """What a script prints as its last line, run in a process of its own; `{"failed": ...}` where it ends badly."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), *flags]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        return {"failed": f"exit {ran.returncode}: " + (ran.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(ran.stdout.strip().splitlines()[-1])
