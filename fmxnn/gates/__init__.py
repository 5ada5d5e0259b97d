"""Gates: which codes are kept."""

from fmxnn.gates.decoupled import Decoupled
from fmxnn.gates.scored import ConcatNorm, MixedNorm, Score, Scored, SumNorm
from fmxnn.gates.signed import GroupMax, SignedBatchTopK, SignedGroupMax, SignedTopK
from fmxnn.gates.top_k import BatchTopK, JumpReLU, TopK, TrainedJumpReLU

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
    "SumNorm",
    "TopK",
    "TrainedJumpReLU",
]
