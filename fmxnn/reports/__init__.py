"""What people look at: a whole evaluation, plots and pages; needs packages beyond the core (`pip install 'fmxnn[evaluate]'`)."""

from typing import Any

from fmxnn.core.extras import from_extra

_FILES = {
    "evaluate": "fmxnn.reports.evaluating",
    "Evaluation": "fmxnn.reports.evaluation",
    "compare": "fmxnn.reports.evaluation",
}


def __getattr__(name: str) -> Any:
    """`evaluate`, `Evaluation` and `compare`, found when they are first asked for."""
    if name in _FILES:
        return getattr(from_extra(_FILES[name], who=name, extra="evaluate"), name)
    raise AttributeError(f"module 'fmxnn.reports' has no attribute {name!r}")
