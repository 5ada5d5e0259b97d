"""A language model's activations, read from text; `harvest` needs transformers (`pip install 'fmxnn[harvest]'`)."""

from typing import Any

from fmxnn.activations.batches import Shuffle, activation_scale, rebatch
from fmxnn.activations.text import Contexts, contexts
from fmxnn.core.extras import from_extra

__all__ = ["Contexts", "Shuffle", "activation_scale", "contexts", "rebatch"]


def __getattr__(name: str) -> Any:
    """`harvest` and `Activations`, found when they are first asked for."""
    if name in ("harvest", "Activations"):
        return getattr(from_extra("fmxnn.activations.stream", who=name, extra="harvest"), name)
    raise AttributeError(f"module 'fmxnn.activations' has no attribute {name!r}")
