"""A judge that is a transformers model on this machine; needs transformers (`pip install 'fmxnn[harvest]'`)."""

from collections.abc import Mapping
from typing import Any

import torch

from fmxnn.activations.configs import longest_context
from fmxnn.activations.models import Model, open_model
from fmxnn.metrics.judge.endpoint import EndpointError


class LocalEndpoint:
    """A causal language model on this machine that answers greedily, one prompt at a time.

    It takes a folder or Hub name, or a model with its tokenizer, and uses its chat template where it has one. The cache
    knows the model by its name, so weights of your own need a name of their own. Raises EndpointError for a prompt
    beyond the model's context.

    ```python
    from fmxnn.metrics.judge.local import LocalEndpoint

    endpoint = LocalEndpoint("examples/tiny-lm", new_tokens=4)
    endpoint.answer("Once upon a time")
    ```
    """

    in_flight = 1

    def __init__(self, model: Model, tokenizer: Any = None, *, new_tokens: int = 128):
        loaded, tokenizer = open_model(model, tokenizer)
        if tokenizer is None:
            raise ValueError(
                "LocalEndpoint needs the tokenizer of a model that is given as a module; pass tokenizer=..."
            )
        self.model: Any = loaded.eval()
        self.tokenizer, self.new_tokens = tokenizer, new_tokens

    @property
    def settings(self) -> Mapping[str, Any]:
        """The model's name or folder, and how much it may answer."""
        name = getattr(self.model, "name_or_path", "") or type(self.model).__name__
        return {"model": str(name), "temperature": 0, "new_tokens": self.new_tokens}

    @torch.no_grad()
    def answer(self, prompt: str) -> str:
        """The likeliest tokens after the prompt, up to the end of the answer or `new_tokens`."""
        read = self._tokens(prompt)
        length, most = read["input_ids"].shape[1], longest_context(self.model)
        if most is not None and length + self.new_tokens > most:
            raise EndpointError(
                f"{type(self.model).__name__} reads at most {most} tokens, and this prompt has {length} with "
                f"{self.new_tokens} to answer; "
                "take a model of longer context, or fewer tokens and contexts: Judge(..., prompt=Prompt(tokens=10, "
                "contexts=1))"
            )
        written = self.model.generate(
            **read, do_sample=False, max_new_tokens=self.new_tokens, pad_token_id=self.tokenizer.eos_token_id
        )
        return str(self.tokenizer.decode(written[0, length:], skip_special_tokens=True))

    def _tokens(self, prompt: str) -> Mapping[str, Any]:
        if getattr(self.tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": prompt}]
            read = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            read = self.tokenizer(f"{prompt}\n", return_tensors="pt", verbose=False)
        return {name: read[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
