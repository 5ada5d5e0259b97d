"""A language model's activations, read from text; `harvest` needs transformers (`pip install 'fmxnn[harvest]'`)."""

from typing import Any

from fmxnn.activations.batches import Shuffle, activation_scale, rebatch
from fmxnn.activations.stream import Activations
from fmxnn.activations.text import Contexts, contexts
from fmxnn.core.extras import from_extra

__all__ = ["Activations", "Contexts", "Shuffle", "activation_scale", "contexts", "rebatch"]


def __getattr__(name: str) -> Any:
    """`harvest`, found when it is first asked for: it needs transformers, and nothing else here does."""
    if name == "harvest":
        return from_extra("fmxnn.activations.models", who=name, extra="harvest").harvest
    raise AttributeError(f"module 'fmxnn.activations' has no attribute {name!r}")
