"""Activations with known features, and how many a crosscoder finds (`pip install 'fmxnn[metrics]'` for `recovery`)."""

from fmxnn.metrics.planted.planted import PRESETS, PlantedFeatures
from fmxnn.metrics.planted.planting import MOTIONS, SPANS, Firing, Planting, Surroundings

__all__ = ["MOTIONS", "PRESETS", "SPANS", "Firing", "PlantedFeatures", "Planting", "Surroundings"]
