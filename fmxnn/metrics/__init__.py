"""What a crosscoder has learned: one file per question."""

from fmxnn.metrics.coherence import Coherence, functional_coherence, norm_coherence
from fmxnn.metrics.reconstruction import Reconstruction, ReconstructionReport, measure_reconstruction

__all__ = ["Coherence", "Reconstruction", "ReconstructionReport", "functional_coherence", "measure_reconstruction", "norm_coherence"]
