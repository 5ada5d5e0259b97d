"""A language model's activations, read from text; `harvest` needs transformers (`pip install 'fmxnn[harvest]'`)."""

from typing import TYPE_CHECKING, Any

from fmxnn.activations.batches import Shuffle, activation_scale, rebatch
from fmxnn.activations.editing import Attached, adding, attach
from fmxnn.activations.stream import ActivationPairs, Activations
from fmxnn.activations.text import Contexts, contexts
from fmxnn.core.extras import lazy

__all__ = [
    "ActivationPairs",
    "Activations",
    "Attached",
    "Contexts",
    "Shuffle",
    "activation_scale",
    "adding",
    "attach",
    "contexts",
    "harvest",
    "rebatch",
]

if TYPE_CHECKING:
    from fmxnn.activations.harvesting import harvest
else:

    def __getattr__(name: str) -> Any:
        """`harvest`, found when it is first asked for: it needs transformers, and nothing else here does."""
        if name == "harvest":
            return lazy("fmxnn.activations.harvesting", name, extra="harvest")
        raise AttributeError(f"module 'fmxnn.activations' has no attribute {name!r}")
