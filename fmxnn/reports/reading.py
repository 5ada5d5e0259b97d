"""Where an evaluation gets its activations and its language model from."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from fmxnn.activations.configs import check_layers_of, model_name
from fmxnn.activations.harvesting import Options, check_device, harvest
from fmxnn.activations.members import Size
from fmxnn.activations.models import Model, as_tokenizer, open_config, open_model
from fmxnn.activations.own import InOrder, OwnActivations, in_text_order
from fmxnn.activations.places import Layer, check_layers
from fmxnn.activations.storing.reading import ActivationStore
from fmxnn.activations.text import Contexts, Source
from fmxnn.reports.one_pass import Language


class Said(NamedTuple):
    """What a caller says of the language model; None for what is not said."""

    model: Model | None
    tokenizer: Any
    layers: Sequence[Layer] | None
    at: str | None
    to: str | None
    size: Size
    device: str | torch.device | None

    def completed(self, crosscoder: nn.Module) -> "Said":
        """The same with what the crosscoder was saved with in the place of what is not said, but for the model."""
        about: dict[str, Any] = getattr(crosscoder, "about", {})
        found = {name: about.get(name) for name in ("layers", "at", "to") if getattr(self, name) is None}
        return self._replace(**found)


def known(crosscoder: nn.Module, what: str, given: Any) -> Any:
    """What was given, or else what the crosscoder was saved with. Raises ValueError where it is neither."""
    about: dict[str, Any] = getattr(crosscoder, "about", {})
    found = about.get("base_model" if what == "model" else what) if given is None else given
    if found is None:
        example = {"model": "model='openai-community/gpt2'", "layers": "layers=range(2, 10)"}[what]
        raise ValueError(
            f"evaluate needs the {what} that the crosscoder was trained on, and it was not saved with it; pass "
            f"{example}"
        )
    return found


def of_text(crosscoder: nn.Module, text: object, said: Said, *, shown: bool) -> tuple[InOrder, Language]:
    """The activations of a text, and the language model that gives them; `shown` asks for a tokenizer in any case.

    Raises ValueError for a model, layers or a tokenizer that are not known, and for several models.
    """
    said = said.completed(crosscoder)
    layers, model = known(crosscoder, "layers", said.layers), known(crosscoder, "model", said.model)
    if isinstance(model, (list, tuple)):
        raise ValueError(
            f"evaluate reads a text with one language model, got {len(cast('list[object]', model))}; give it what "
            "harvest gives of them in the place of the text"
        )
    at, device = said.at or "block_out", said.device
    layers = check_layers_of(open_config(model), layers, at, said.to)
    check_device(device)
    model, tokenizer = open_model(model, said.tokenizer)
    if tokenizer is None and (shown or not isinstance(text, Contexts)):
        raise ValueError("evaluate needs the tokenizer of a model that is given as a module; pass tokenizer=...")
    options = Options(context=said.size.context, column=said.size.column, batch=1)
    options |= Options(at=at, tokenizer=tokenizer, device=device)
    stream = harvest(model, cast("Source", text), layers=layers, to=said.to, **options)
    return stream, Language(model, tokenizer, at, said.to, stream.contexts.context)


def as_given(crosscoder: nn.Module, activations: object, said: Said) -> tuple[InOrder, Language]:
    """Activations that were read already, and the language model as far as it was given or stands in them.

    Raises ValueError where other layers were named than a stream has.
    """
    if said.layers is not None:
        said = said._replace(layers=check_layers(said.layers))
    model, tokenizer = getattr(getattr(activations, "source", None), "model", None), as_tokenizer(said.tokenizer)
    if said.model is not None:
        check_device(said.device)
        model, tokenizer = open_model(said.model, tokenizer)
        if isinstance(activations, ActivationStore):
            activations.check(model=model)
        if said.device is not None:
            nn.Module.to(model, said.device)
    read = in_text_order(activations, layers=said.layers, name="" if model is None else model_name(model))
    if said.layers is not None and tuple(said.layers) != tuple(read.layers):
        raise ValueError(
            f"the activations are of the layers {', '.join(map(str, read.layers))[:200]}, got layers="
            f"{list(said.layers)!r:.200}; leave layers out"
        )
    said = said.completed(crosscoder)
    if isinstance(read, OwnActivations) and said.layers is not None and len(said.layers) == len(read.layers):
        read.layers = tuple(said.layers)
    places = getattr(activations, "identity", dict[str, Any])()
    at, to = (places.get(name) or getattr(said, name) for name in ("at", "to"))
    return read, Language(model, tokenizer, at or "block_out", to, said.size.context)
