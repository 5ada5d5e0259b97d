"""Gates: which codes are kept."""

from fmxnn.gates.decoupled import Decoupled
from fmxnn.gates.freezing import frozen
from fmxnn.gates.gate import (
    Chooser,
    Counted,
    Freezable,
    Gate,
    HasK,
    HasLatents,
    HasThreshold,
    Ranking,
    Scoring,
    Selector,
    Thresholded,
)
from fmxnn.gates.group_max import GroupMax, SignedGroupMax
from fmxnn.gates.jump_relu import JumpReLU, TrainedJumpReLU
from fmxnn.gates.laws import check_gate
from fmxnn.gates.scored import ConcatNorm, MixedNorm, Score, Scored, SumNorm
from fmxnn.gates.signed import SignedBatchTopK, SignedTopK
from fmxnn.gates.split import SplitGate
from fmxnn.gates.steps import one_step
from fmxnn.gates.thresholds import Calibrated
from fmxnn.gates.top_k import BatchTopK, TopK

__all__ = [
    "BatchTopK",
    "Calibrated",
    "Chooser",
    "ConcatNorm",
    "Counted",
    "Decoupled",
    "Freezable",
    "Gate",
    "GroupMax",
    "HasK",
    "HasLatents",
    "HasThreshold",
    "JumpReLU",
    "MixedNorm",
    "Ranking",
    "Score",
    "Scored",
    "Scoring",
    "Selector",
    "SignedBatchTopK",
    "SignedGroupMax",
    "SignedTopK",
    "SplitGate",
    "SumNorm",
    "Thresholded",
    "TopK",
    "TrainedJumpReLU",
    "check_gate",
    "frozen",
    "one_step",
]
