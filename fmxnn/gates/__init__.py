"""Gates: which codes are kept."""

from fmxnn.gates.decoupled import Decoupled
from fmxnn.gates.group_max import GroupMax, SignedGroupMax
from fmxnn.gates.jump_relu import JumpReLU, TrainedJumpReLU
from fmxnn.gates.scored import ConcatNorm, MixedNorm, Score, Scored, SumNorm
from fmxnn.gates.signed import SignedBatchTopK, SignedTopK
from fmxnn.gates.split import SplitGate
from fmxnn.gates.steps import one_step
from fmxnn.gates.top_k import BatchTopK, TopK

__all__ = [
    "BatchTopK",
    "ConcatNorm",
    "Decoupled",
    "GroupMax",
    "JumpReLU",
    "MixedNorm",
    "Score",
    "Scored",
    "SignedBatchTopK",
    "SignedGroupMax",
    "SignedTopK",
    "SplitGate",
    "SumNorm",
    "TopK",
    "TrainedJumpReLU",
    "one_step",
]
