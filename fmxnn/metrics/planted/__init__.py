"""Activations with features that are known, and how many of them a crosscoder finds again; `recovery` needs scipy (`pip
install 'fmxnn[metrics]'`).
"""

from fmxnn.metrics.planted.planted import PRESETS, PlantedFeatures
from fmxnn.metrics.planted.planting import MOTIONS, SPANS, Firing, Planting, Surroundings

__all__ = ["MOTIONS", "PRESETS", "SPANS", "Firing", "PlantedFeatures", "Planting", "Surroundings"]
