"""What the rest of the package asks of a weight before it does something with it."""

from torch import nn

from fmxnn.core.shortcuts import why_overridden
from fmxnn.weights.weight import Scalable, Startable, Weight


def why_not_its_dense_form(weight: Weight) -> str:
    """Why the dense form cannot stand for `to_latents`, if it cannot.

    `to_latents` is overridden below what the form is made of: the weight's own `atoms`, or else its `to_layers`.
    """
    made_of = "to_layers" if type(weight).atoms is Weight.atoms else "atoms"
    return why_overridden(weight, {"to_latents": (made_of,)})


def startable(weight: nn.Module) -> Startable:
    """The weight itself, which can be drawn and scaled. Raises TypeError for one that cannot."""
    if not isinstance(weight, Startable):
        raise TypeError(
            f"a start needs a weight with normal_(std) and scale_(factor), and {type(weight).__name__} lacks them; "
            "add both or draw it yourself"
        )
    return weight


def scalable(weight: nn.Module) -> Scalable:
    """The weight itself, which can be multiplied by a number. Raises TypeError for one that cannot."""
    if not isinstance(weight, Scalable):
        raise TypeError(f"fold_scale needs a weight with scale_(factor), and {type(weight).__name__} lacks it; add it")
    return weight
