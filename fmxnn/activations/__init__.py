"""A language model's activations, read from text; `harvest` needs transformers (`pip install 'fmxnn[harvest]'`)."""

from typing import TYPE_CHECKING, Any

from fmxnn.activations.batches import Shuffle, activation_scale, rebatch
from fmxnn.activations.storing import (
    ActivationStore,
    LastLayer,
    Moments,
    Statistics,
    VllmSource,
    compare_last_layer,
    statistics,
    store,
)
from fmxnn.activations.stream import ActivationPairs, Activations
from fmxnn.activations.text import Contexts, contexts
from fmxnn.core.extras import lazy

__all__ = [
    "ActivationPairs",
    "ActivationStore",
    "Activations",
    "Contexts",
    "LastLayer",
    "Moments",
    "Shuffle",
    "Statistics",
    "VllmSource",
    "activation_scale",
    "compare_last_layer",
    "contexts",
    "harvest",
    "rebatch",
    "statistics",
    "store",
]

if TYPE_CHECKING:
    from fmxnn.activations.harvesting import harvest
else:

    def __getattr__(name: str) -> Any:
        """`harvest`, found when it is first asked for: it needs transformers, and nothing else here does."""
        if name == "harvest":
            return lazy("fmxnn.activations.harvesting", name, extra="harvest")
        raise AttributeError(f"module 'fmxnn.activations' has no attribute {name!r}")
