"""How well latents tell labelled texts apart; needs scikit-learn and datasets (`pip install 'fmxnn[metrics]'`)."""

from fmxnn.metrics.probing.own_codes import pooled_own_codes
from fmxnn.metrics.probing.pooling import pooled_codes
from fmxnn.metrics.probing.probing import ProbeResult, probe
from fmxnn.metrics.probing.tasks import LabelledTexts, ProbeTask, load_probes

__all__ = ["LabelledTexts", "ProbeResult", "ProbeTask", "load_probes", "pooled_codes", "pooled_own_codes", "probe"]
