"""Everything that is measured of a crosscoder, in one call; needs transformers, scikit-learn, matplotlib and more (`pip install 'fmxnn[evaluate]'`)."""

from fmxnn.evaluation.evaluate import evaluate
from fmxnn.evaluation.report import Evaluation, compare

__all__ = ["Evaluation", "compare", "evaluate"]
