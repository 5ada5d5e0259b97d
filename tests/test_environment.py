"""What the project runs in: every package is pinned, and torch is loaded after it was said how its threads wait."""

import ast
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PINS = {
    canonicalize_name(pin.name): pin.specifier
    for pin in (
        Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
}


def installed(name, extras, found):
    """Adds what is installed of the package, of these extras of it and of all that they require."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return found
    for extra in ("", *extras):
        if (name, extra) not in found:
            found[name, extra] = package.version
            for required in map(Requirement, package.requires or ()):
                if required.marker is None or required.marker.evaluate({"extra": extra}):
                    installed(canonicalize_name(required.name), required.extras, found)
    return found


def test_every_package_that_the_extras_bring_is_pinned_at_the_version_that_is_installed():
    here = {name: version for (name, _), version in installed("fmxnn", ("test", "docs"), {}).items() if name != "fmxnn"}
    assert {"torch", "anyio", "tqdm"} <= here.keys()
    other = [f"{name} {version}" for name, version in here.items() if name in PINS and not PINS[name].contains(version)]
    if other:
        pytest.skip(
            "this environment was not installed with -c constraints.txt, which has other versions than "
            f"{', '.join(other)}"
        )
    missing = sorted(here.keys() - PINS.keys())
    assert not missing, f"constraints.txt does not pin {missing}"


WAITING = "os.environ.setdefault('OMP_WAIT_POLICY', 'passive')"
WITHOUT_TORCH = {*sys.stdlib_module_names, "environment", "matplotlib", "numpy", "tabulate", "tqdm", "tyro"}
RUN = [
    path
    for folder in ("examples", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text()
]


def imported(statement):
    """The packages that a statement imports."""
    names = (
        [alias.name for alias in statement.names]
        if isinstance(statement, ast.Import)
        else [getattr(statement, "module", None)]
    )
    return {name.split(".")[0] for name in names if name}


@pytest.mark.parametrize("path", [ROOT / "conftest.py", *RUN], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_is_run_says_how_threads_wait_before_it_loads_torch(path):
    body = ast.parse(path.read_text()).body
    first = next((at for at, statement in enumerate(body) if imported(statement) - WITHOUT_TORCH), None)
    assert first is None or WAITING in map(ast.unparse, body[:first])


def test_make_passes_the_policy_on_and_a_users_choice_wins(tmp_path):
    asked = tmp_path / "ask.mk"
    asked.write_text(f"include {ROOT / 'Makefile'}\nask:\n\t@echo $$OMP_WAIT_POLICY\n")
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for given, policy in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        made = subprocess.run(
            ["make", "-sf", asked, "ask"], env=kept | given, capture_output=True, text=True, check=True
        )
        assert made.stdout == f"{policy}\n"
