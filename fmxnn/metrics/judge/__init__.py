"""A language model judges what a latent fires on: one meaning, one form, both or neither."""

from fmxnn.metrics.judge.calibration import Calibration, CalibrationError
from fmxnn.metrics.judge.endpoint import Endpoint, EndpointError, ScriptedEndpoint
from fmxnn.metrics.judge.judge import Estimate, Judge, Judgements
from fmxnn.metrics.judge.panel import PANEL, PseudoLatent
from fmxnn.metrics.judge.prompt import Prompt
from fmxnn.metrics.judge.report import JudgeReport, Share, summarise
from fmxnn.metrics.judge.scores import Scores, read_scores

__all__ = [
    "PANEL",
    "Calibration",
    "CalibrationError",
    "Endpoint",
    "EndpointError",
    "Estimate",
    "Judge",
    "JudgeReport",
    "Judgements",
    "Prompt",
    "PseudoLatent",
    "Scores",
    "ScriptedEndpoint",
    "Share",
    "read_scores",
    "summarise",
]
