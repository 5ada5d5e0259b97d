"""How long refused settings take: hostile files as tests/faults makes them, read as each kind of settings; `python
benchmarks/refusals.py 2500`.
"""

import gc
import importlib
import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

from fmxnn.core.errors import FormatError, RecipeError
from fmxnn.core.files.strict_json import ABOUT_LIMITS, parse_json, read_bytes, strict_json
from fmxnn.core.recipe import check_tree
from fmxnn.saving.formats.format import SETTINGS_LIMITS
from fmxnn.saving.formats.plain_yaml import parse_yaml

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "faults")]
MAKERS = importlib.import_module("test_settings").MAKERS


def as_settings(parse):
    return lambda path: parse(read_bytes(path, SETTINGS_LIMITS), path, SETTINGS_LIMITS)


READERS = {
    "config.json": lambda path: check_tree(strict_json(path)),
    "about.json": lambda path: strict_json(path, ABOUT_LIMITS),
    "settings in JSON": as_settings(parse_json),
    "settings in YAML": as_settings(parse_yaml),
}


def refusal(read, path):
    """The milliseconds of this thread until it was refused; None where it was read."""
    began = time.thread_time()
    try:
        read(path)
    except (RecipeError, FormatError):
        return (time.thread_time() - began) * 1e3
    return None


def main():
    gc.freeze()  # else a collection walks all that torch made, in the middle of a refusal
    files, taken = int(sys.argv[1]), {name: [] for name in READERS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hostile"
        for seed in range(files):
            draw = random.Random(seed)
            path.write_bytes(draw.choice(MAKERS)(draw))
            for name, read in READERS.items():
                taken[name].append(refusal(read, path))
    print("| read as | tried | refused | slowest refusal, ms | over 50 ms |\n|---|---|---|---|---|")
    for name, found in taken.items():
        refused = [ms for ms in found if ms is not None]
        print(f"| {name} | {files:,} | {len(refused):,} | {max(refused):.0f} | {sum(ms > 50 for ms in refused)} |")


if __name__ == "__main__":
    main()
