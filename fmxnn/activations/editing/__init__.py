"""A language model changed while it runs, by a crosscoder's latents or by vectors of your own."""

from fmxnn.activations.editing.attaching import Attached, attach
from fmxnn.activations.editing.interception import adding

__all__ = ["Attached", "adding", "attach"]
