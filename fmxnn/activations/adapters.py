"""A language model with a peft adapter on it, read with the adapter on or off."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

from torch import nn
from typing_extensions import override


class AdapterOff(nn.Module):
    """A language model whose adapter is off in every forward of this module, and on again behind it.

    It shares all weights with the model. Make one with `adapter_off`.

    ```python
    from contextlib import nullcontext
    from fmxnn.activations.adapters import AdapterOff

    model = nn.Linear(2, 2)  # stands for a model with an adapter
    AdapterOff(model, off=nullcontext)(torch.ones(1, 2))
    ```
    """

    def __init__(self, model: nn.Module, *, off: Callable[[], AbstractContextManager[Any]]):
        super().__init__()
        self.with_adapter, self.off = model, off
        self.config = getattr(model, "config", None)

    @override
    def forward(self, *given: Any, **named: Any) -> Any:
        """What the model gives without its adapter."""
        with self.off():
            return self.with_adapter(*given, **named)

    @override
    def __getattr__(self, name: str) -> Any:
        """The parts of the model, so that its blocks are found; no method, since that would run with the adapter."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self._modules["with_adapter"], name, None)
            if isinstance(found, nn.Module):
                return found
            raise


def adapter_off(model: nn.Module) -> AdapterOff:
    """The language model under a peft adapter: beside the model itself, it compares one base with and without.

    `model` is a `peft.PeftModel`, or a transformers model that an adapter was loaded into. Raises ValueError for a
    model without an adapter.
    """
    switch = getattr(model, "disable_adapter", None)
    if switch is not None:
        return AdapterOff(without_wrapper(model), off=switch)
    if getattr(model, "_hf_peft_config_loaded", False):
        return AdapterOff(model, off=lambda: _switched_off(model))
    raise ValueError(
        f"adapter_off needs a model with a peft adapter, got {type(model).__name__}; put one on with "
        "peft.PeftModel.from_pretrained(model, adapter)"
    )


@contextmanager
def _switched_off(model: Any) -> Generator[None]:
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def without_wrapper(model: nn.Module) -> nn.Module:
    """The language model inside a `peft.PeftModel`, with the adapter in its layers; any other model as it is.

    Raises ValueError for an adapter of prompts, which is in no layer.
    """
    inside = getattr(model, "get_base_model", None)
    if inside is None:
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"{type(model).__name__} has an adapter that puts a prompt before the text, and harvest reads adapters in "
            "the layers, such as LoRA; merge the prompt into the text"
        )
    return cast("nn.Module", inside())


def adapter_name(model: object) -> str | None:
    """The name of the adapter that is on, None where there is none."""
    if isinstance(model, AdapterOff):
        return None
    if getattr(model, "_hf_peft_config_loaded", False):
        return "+".join(cast("Any", model).active_adapters())
    return getattr(model, "active_adapter", None)
