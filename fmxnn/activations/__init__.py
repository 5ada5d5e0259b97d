"""A language model's activations, read from text; `harvest` needs transformers (`pip install 'fmxnn[harvest]'`)."""

from typing import TYPE_CHECKING, Any

from fmxnn.activations.adapters import adapter_off
from fmxnn.activations.batches import Shuffle, activation_scale, rebatch
from fmxnn.activations.chat.contexts import Conversations
from fmxnn.activations.editing import Attached, adding, attach
from fmxnn.activations.own import OwnActivations
from fmxnn.activations.several import SeveralSource
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
    "Attached",
    "Contexts",
    "Conversations",
    "LastLayer",
    "Moments",
    "OwnActivations",
    "SeveralSource",
    "Shuffle",
    "Statistics",
    "VllmSource",
    "activation_scale",
    "adapter_off",
    "adding",
    "attach",
    "compare_last_layer",
    "contexts",
    "conversations",
    "harvest",
    "rebatch",
    "statistics",
    "store",
]

if TYPE_CHECKING:
    from fmxnn.activations.chat.conversations import conversations
    from fmxnn.activations.harvesting import harvest
else:
    _LAZY = {"conversations": "fmxnn.activations.chat.conversations", "harvest": "fmxnn.activations.harvesting"}

    def __getattr__(name: str) -> Any:
        """`harvest` and `conversations`, found when first asked for: they need transformers, the rest here does not."""
        if name in _LAZY:
            return lazy(_LAZY[name], name, extra="harvest")
        raise AttributeError(f"module 'fmxnn.activations' has no attribute {name!r}")
