"""`make bench`: makes the environment, runs every part in it, and writes JSON, tables and a plot to
`benchmarks/results`.

Needs Python 3.11 or later and nothing else; everything is installed into `.venv-bench`.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import environment

HERE = Path(__file__).resolve().parent
PARTS = {"steps": ["steps.py", "memory.py"], "parts": ["parts.py"], "growth": ["growth.py"], "choice": ["choice.py"]}
QUICK = ["--rounds=1", "--tokens=64", "--d-model=16", "--latents=1024", "--k=4"]
QUICK_GROWTH = ["--exponents", "10", "11", "--layer-counts", "2", "4"]


def main() -> int:
    """Runs the parts, then the report; the exit code is that of the first that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, one round: tries the code, measures nothing, writes to .venv-bench",
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts with commas between: " + ",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of every contender alike; 0 leaves torch's own choice"
    )
    parser.add_argument(
        "--no-huge-pages", action="store_true", help="do not let torch ask for huge pages (THP_MEM_ALLOC_ENABLE)"
    )
    parser.add_argument("--name", help="of the result files; the processor's name if nothing is given")
    arguments = parser.parse_args()
    chosen = [part.strip() for part in arguments.only.split(",")]
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; take from {', '.join(PARTS)}")
    python, variables = environment.ensure(), surroundings(arguments)
    warn_of_load(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="fmxnn-bench-") as folder:
        for script in (script for part in chosen for script in PARTS[part]):
            ran = run(python, script, *flags(arguments, script), f"--out={folder}", variables=variables)
            if ran:
                print(f"{script} ended with exit code {ran}", file=sys.stderr)
                return ran
        target = (
            environment.FOLDER / "quick" if arguments.quick else HERE / "results" / (arguments.name or machine_name())
        )
        return run(python, "report.py", folder, str(target), variables=variables)


def run(python: Path, script: str, *words: str, variables: dict[str, str]) -> int:
    """One script in the environment."""
    return subprocess.run(
        [str(python), "-W", "ignore", str(HERE / script), *words], env=variables, check=False
    ).returncode


def flags(arguments: argparse.Namespace, script: str) -> list[str]:
    """Sizes only where they are not the defaults."""
    given = [f"--rounds={arguments.rounds}", f"--threads={arguments.threads}"]
    if arguments.quick:
        given += QUICK + (QUICK_GROWTH if script == "growth.py" else [])
    return given


def surroundings(arguments: argparse.Namespace) -> dict[str, str]:
    """The variables that all contenders run under. With huge pages, fresh gradients of 64 MB cost fewer page faults."""
    variables = dict(os.environ, TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    variables.pop("THP_MEM_ALLOC_ENABLE", None)
    return variables if arguments.no_huge_pages else variables | {"THP_MEM_ALLOC_ENABLE": "1"}


def warn_of_load(threads: int) -> None:
    """Says so where other processes hold cores: threads that wait for one another then take many times as long."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load + (threads or cores) > cores + 0.5:
        print(
            f"warning: load {load:.1f} beside {threads or cores} threads on {cores} cores; figures will be bad, take "
            "fewer --threads",
            flush=True,
        )


def machine_name() -> str:
    """A file name from the processor's."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next(
        (line.split(":", 1)[1] for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {os.cpu_count()} cores".lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
