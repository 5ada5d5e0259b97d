"""Activations on disk: written while they are harvested, read back as the same stream, and summed up."""

from fmxnn.activations.storing.reading import ActivationStore
from fmxnn.activations.storing.statistics import Moments, Statistics, statistics
from fmxnn.activations.storing.vllm import LastLayer, VllmSource, compare_last_layer
from fmxnn.activations.storing.writing import store

__all__ = [
    "ActivationStore",
    "LastLayer",
    "Moments",
    "Statistics",
    "VllmSource",
    "compare_last_layer",
    "statistics",
    "store",
]
