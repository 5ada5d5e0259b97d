"""What people look at: a whole evaluation, plots and pages; needs `pip install 'fmxnn[evaluate]'`."""

from typing import TYPE_CHECKING, Any

from fmxnn.core.extras import lazy

__all__ = ["Evaluation", "compare", "evaluate"]

if TYPE_CHECKING:
    from fmxnn.reports.evaluating import evaluate
    from fmxnn.reports.evaluation import Evaluation, compare
else:
    _FILES = {name: "fmxnn.reports.evaluation" for name in ("Evaluation", "compare")}
    _FILES["evaluate"] = "fmxnn.reports.evaluating"

    def __getattr__(name: str) -> Any:
        """`evaluate`, `Evaluation` and `compare`, found when they are first asked for."""
        if name in _FILES:
            return lazy(_FILES[name], name, extra="evaluate")
        raise AttributeError(f"module 'fmxnn.reports' has no attribute {name!r}")
