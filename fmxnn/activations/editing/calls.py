"""One call of a language model: its tokens, its padding, its cache; and which of its tokens are edited."""

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from fmxnn.core.errors import ShapeError

Tokens = Tensor | slice | None
"""Which tokens are edited: a mask `contexts context`, columns of the text, or None for all that `harvest` reads."""
_HEAD = ("labels", "logits_to_keep")


@dataclass(frozen=True)
class Call:
    """What a language model was called with.

    - `extra` are arguments that its forward takes as `*args`, `named` are all the others
    - `takes` says which names its forward knows

    ```python
    from fmxnn.activations.editing.calls import call_of

    call_of(nn.Embedding(5, 2), (torch.tensor([[3, 1, 4]]),), {}).tokens  # (1, 3)
    ```
    """

    extra: tuple[Any, ...]
    named: Mapping[str, Any]
    takes: frozenset[str]

    @property
    def ids(self) -> Tensor | None:
        """`contexts context`: the token ids, where it was given any."""
        ids = self.named.get("input_ids", self._first)
        return ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None

    @property
    def tokens(self) -> tuple[int, int]:
        """Contexts and tokens of each that are new in this call."""
        given = next((x for x in (self.ids, self.named.get("inputs_embeds"), self._first) if x is not None), None)
        if not isinstance(given, Tensor) or given.ndim < 2:
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ShapeError(
                f"a model that is edited is called with ids or embeddings of (contexts, context, ...), got {got}; "
                "give one text as ids[None]"
            )
        return given.shape[0], given.shape[1]

    @property
    def cache(self) -> Any:
        """Keys and values of earlier tokens, or None."""
        return self.named.get("past_key_values")

    @property
    def past(self) -> int:
        """How many columns of the text came in earlier calls."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    def caches(self, model: nn.Module) -> bool:
        """Whether keys and values are kept for later calls."""
        asked = self.named.get("use_cache")
        kept = getattr(getattr(model, "config", None), "use_cache", False) if asked is None else asked
        return self.cache is not None or bool(kept)

    def clean(self, cache: Any, *, keep: bool) -> dict[str, Any]:
        """The named arguments of a call for activations alone, which reads and fills `cache`."""
        named = {name: value for name, value in self.named.items() if name not in _HEAD}
        if self.cache is not None:
            named["past_key_values"] = cache
        if "logits_to_keep" in self.takes:
            named["logits_to_keep"] = 1
        if "use_cache" in self.takes or "use_cache" in named:
            named["use_cache"] = keep
        return named

    def attended(self) -> tuple[Tensor, Tensor] | None:
        """`contexts context, contexts`: which new tokens are not padding, and whether any came before; None: all."""
        mask, past, (_, new) = self.named.get("attention_mask"), self.past, self.tokens
        if isinstance(mask, Mapping):  # one for each kind of attention
            mask = mask.get("full_attention", next(iter(mask.values())))
        if mask is None:
            return None
        if mask.ndim == 2:
            return mask[:, past : past + new].bool(), mask[:, :past].bool().any(1)
        seen = (
            mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        )  # contexts new columns, to be added to scores
        return seen[:, :, past : past + new].diagonal(dim1=1, dim2=2), seen[:, 0, :past].any(1)

    @property
    def _first(self) -> Any:
        return next(iter((*self.extra, *self.named.values())), None)


def call_of(model: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> Call:
    """The arguments of a call by their names. Raises ShapeError for tokens that are no `contexts context`."""
    parameters = signature(model.forward).parameters
    bound = dict(signature(model.forward).bind_partial(*args, **named).arguments)
    extra: tuple[Any, ...] = ()
    for name, parameter in parameters.items():
        if parameter.kind is Parameter.VAR_POSITIONAL:
            extra = bound.pop(name, ())
        if parameter.kind is Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    call = Call(extra, bound, frozenset(parameters))
    _ = call.tokens
    return call


def edited(call: Call, model: nn.Module, tokens: Tokens) -> Tensor:
    """`-> contexts context`: which new tokens are edited; never padding.

    A mask is taken at its word, and columns beyond it are left alone. Otherwise the first token of each context, BOS
    and EOS stay as they are, as no crosscoder is trained on them.
    """
    contexts, new = call.tokens
    columns = torch.arange(call.past, call.past + new)
    attended = call.attended()
    real, begun = attended or (torch.ones(contexts, new, dtype=torch.bool), torch.full((contexts,), call.past > 0))
    if isinstance(tokens, Tensor):
        return real & _masked(tokens.to(real.device), contexts, columns.to(real.device))
    first = (real.cumsum(1) == 1) & ~begun.unsqueeze(1)
    chosen = real & ~first
    if call.ids is not None:
        chosen = chosen.to(call.ids.device) & ~torch.isin(call.ids, _special(model).to(call.ids.device))
    if tokens is not None:
        stop = call.past + new if tokens.stop is None else tokens.stop
        chosen = chosen & ((columns >= (tokens.start or 0)) & (columns < stop)).to(chosen.device)
    return chosen


def check_tokens(tokens: Tokens) -> None:
    """Raises ValueError for what is no mask and no range of columns, and TypeError for anything else."""
    if isinstance(tokens, slice):
        if tokens.step in (None, 1) and all(end is None or end >= 0 for end in (tokens.start, tokens.stop)):
            return
        raise ValueError(
            f"tokens are columns of the text counted from its start, without a step, got {tokens}; "
            "the generated ones alone are slice(ids.shape[1], None)"
        )
    if not isinstance(tokens, Tensor | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"tokens are a mask of bool (contexts, context), or a slice of columns, got {tokens!r:.200}; the generated "
            "ones alone are slice(ids.shape[1], None)"
        )
    if tokens is not None and (tokens.dtype != torch.bool or tokens.ndim != 2):
        raise ValueError(
            f"tokens are a mask of bool (contexts, context), or a slice of columns, got {tokens.dtype} "
            f"{tuple(tokens.shape)}; ids != x is one"
        )


def at_tokens(given: Tensor, where: Tensor, past: int) -> tuple[Tensor, Tensor]:
    """`contexts columns ..., contexts context -> tokens, known ...`: which tokens a tensor knows, and its rows.

    The tokens are those of `where`. Column c of `given` is column c of the text; later ones it does not know. One
    context stands for all.
    """
    contexts, columns = where.nonzero(as_tuple=True)
    if len(given) not in (1, len(where)):
        raise ShapeError(
            f"what is given for {len(given)} contexts does not fit a call with {len(where)} contexts; "
            "give one for each, or one for all"
        )
    columns = columns + past
    known = columns < given.shape[1]
    rows = contexts[known] if len(given) > 1 else torch.zeros_like(contexts[known])
    return known, given.to(where.device)[rows, columns[known]]


def _masked(mask: Tensor, contexts: int, columns: Tensor) -> Tensor:
    if len(mask) not in (1, contexts):
        raise ShapeError(
            f"the mask of tokens has {len(mask)} contexts and the call has {contexts}; give a row for each, or one"
        )
    known = columns < mask.shape[1]
    return known & mask[:, columns.clamp(max=mask.shape[1] - 1)]


def _special(model: nn.Module) -> Tensor:
    """BOS and EOS, as the config of a model names them; a config may name several."""
    found = list[int]()
    for name in ("bos_token_id", "eos_token_id"):
        given = getattr(getattr(model, "config", None), name, None)
        found += [] if given is None else [given] if isinstance(given, int) else list(given)
    return torch.tensor(found, dtype=torch.long)
