"""What a crosscoder has learned: one file per question."""

from fmxnn.metrics.coherence import Coherence, functional_coherence, norm_coherence
from fmxnn.metrics.firing import TopToken, top_tokens
from fmxnn.metrics.hiding import OffToOn, off_to_on
from fmxnn.metrics.logits import LogitWeights, logit_weights
from fmxnn.metrics.reconstruction import Reconstruction, ReconstructionReport, measure_reconstruction
from fmxnn.metrics.splice import SpliceReport, spliced_loss

__all__ = [
    "Coherence",
    "LogitWeights",
    "OffToOn",
    "Reconstruction",
    "ReconstructionReport",
    "SpliceReport",
    "TopToken",
    "functional_coherence",
    "logit_weights",
    "measure_reconstruction",
    "norm_coherence",
    "off_to_on",
    "spliced_loss",
    "top_tokens",
]
