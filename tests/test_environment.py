"""What the project runs in: every package is pinned."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PINS = {
    canonicalize_name(pin.name): pin.specifier
    for pin in (Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
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
        pytest.skip(f"this environment was not installed with -c constraints.txt, which has other versions than {', '.join(other)}")
    missing = sorted(here.keys() - PINS.keys())
    assert not missing, f"constraints.txt does not pin {missing}"
