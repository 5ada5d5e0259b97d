"""Every call of a language model, made twice where that is needed: once to read it clean, once to change it."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fmxnn.activations.adapters import without_wrapper
from fmxnn.activations.configs import check_unfolded
from fmxnn.activations.editing.additions import Additions
from fmxnn.activations.editing.caches import CleanCaches, cache_in
from fmxnn.activations.editing.calls import Call, Tokens, call_of, check_tokens, edited
from fmxnn.activations.editing.writing import Change, added
from fmxnn.activations.families import is_compiled
from fmxnn.activations.layer_reader import AllRead
from fmxnn.activations.places import Layer, Place, find_places

_ATTACHED = WeakSet[nn.Module]()


class Plan(Protocol):
    """What is done to the calls of a model."""

    @property
    def reads(self) -> Sequence[Place]:
        """Where the clean pass reads."""
        ...

    @property
    def writes(self) -> Sequence[Place]:
        """Where the second pass writes."""
        ...

    @property
    def asks(self) -> bool:
        """Whether there must be a clean pass."""
        ...

    def changes(self, call: Call, clean: Sequence[Tensor]) -> Sequence[Change | None]:
        """For each place of `writes` what happens there, from the clean activations at `reads`."""
        ...


class Interception:
    """While open, each call of `model` is changed by `plan`.

    The whole model has to be called. A second one for the same model is refused. Closing it removes every hook.

    ```python
    from fmxnn.activations.editing.interception import Interception
    from fmxnn.activations.places import Place

    class Silence:
        reads, asks = (), False

        def __init__(self, *writes):
            self.writes = writes

        def changes(self, call, clean):
            return [torch.zeros_like for _ in self.writes]

    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
    with Interception(model, Silence(Place("first", model[0], "out"))):
        assert not model(torch.randn(3, 4, 2)).any()
    ```
    """

    def __init__(self, model: nn.Module, plan: Plan):
        self.model, self._plan = model, plan
        self._caches = CleanCaches()
        self._hooks = list[RemovableHandle]()
        self._clean_cache: Any = None
        self._reading: dict[int, Tensor] | None = None
        self._whole = False
        self._call: Call | None = None
        self._changes: Sequence[Change | None] | None = None

    def __enter__(self) -> Self:
        model = self.model
        if model in _ATTACHED:
            raise RuntimeError(
                f"{type(model).__name__} is attached to already, and edits of two would mix; close the first one, or "
                "make all edits on it"
            )
        if is_compiled(model, "_compiled_call"):  # the last is how generate compiles
            raise RuntimeError(
                f"{type(model).__name__} is compiled, and compiled code may pass by edits; attach to a model that is "
                "not, and call generate(..., disable_compile=True)"
            )
        _ATTACHED.add(model)
        self._hooks.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(self._after, always_call=True))
        for number, place in enumerate(self._plan.reads):
            self._hooks.append(place.hook(self._see(number)))
        for number, place in enumerate(self._plan.writes):
            self._hooks.append(place.hook(self._change(number)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._caches.release()
        self._changes = self._reading = self._clean_cache = self._call = None
        _ATTACHED.discard(self.model)

    def _before(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._reading is not None or not self._hooks:
            return
        if model.training:
            raise RuntimeError(
                f"{type(model).__name__} is in train mode, where two passes over the same tokens differ; "
                "call model.eval() first"
            )
        self._call = call = call_of(model, args, named)
        asks = self._plan.asks or (call.cache is not None and call.cache in self._caches)
        clean = self._read(call) if asks else ()
        self._changes = self._plan.changes(call, clean)
        if call.cache is not None and not asks and any(self._changes):
            self._caches.spoil(call.cache)

    def _after(self, _model: nn.Module, _args: Any, output: Any) -> None:
        if self._reading is not None:
            return
        call, changed, clean = self._call, self._changes, self._clean_cache
        self._call = self._changes = self._clean_cache = None
        filled = cache_in(output)
        if filled is None or call is None or call.cache is not None:
            return
        if clean is not None:
            self._caches.pair(filled, clean)
        elif any(changed or ()):
            self._caches.spoil(filled)

    @torch.no_grad()
    def _read(self, call: Call) -> list[Tensor]:
        """What stands at the places that are read, of the clean model."""
        cache = None if call.cache is None else self._caches.of(call.cache)
        self._whole = call.caches(self.model)
        self._reading = read = dict[int, Tensor]()
        output = None
        try:
            output = self.model(*call.extra, **call.clean(cache, keep=self._whole))
        except AllRead:
            pass
        finally:
            self._reading = None
        if cache is None:
            self._clean_cache = cache_in(output)
        if len(read) < len(self._plan.reads):
            missing = [place.name for number, place in enumerate(self._plan.reads) if number not in read]
            raise RuntimeError(f"{type(self.model).__name__} did not run {', '.join(missing)}; leave these layers out")
        return [read[number] for number in range(len(read))]

    def _see(self, number: int) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            if self._reading is None:
                return
            self._reading[number] = x
            if len(self._reading) == len(self._plan.reads) and not self._whole:
                raise AllRead

        return see

    def _change(self, number: int) -> Change:
        def change(x: Tensor) -> Tensor | None:
            if self._reading is not None or not self._hooks:
                return None
            if self._changes is None:
                raise RuntimeError(
                    f"a part of {type(self.model).__name__} was called alone, and its edits need the whole; "
                    "call the model that was attached to"
                )
            now = self._changes[number]
            return None if now is None else now(x)

        return change


@contextmanager
def adding(
    model: nn.Module,
    delta: Tensor,
    *,
    layers: Sequence[Layer],
    at: str = "block_out",
    path: str | None = None,
    tokens: Tokens = None,
) -> Generator[None]:
    """`layers d_model`, or `contexts context layers d_model`: while open, `delta` is added at these places.

    One for all edited tokens, or one for each token of a text, of which later tokens are left alone: what patching
    from another model adds. Each layer gets its own; in a residual stream they accumulate. `tokens` as for `attach`.
    Raises ShapeError for a delta of other axes.
    """
    check_tokens(tokens)
    model = edited_model(model, "adding")
    plan = _Adding(model, find_places(model, layers, at=at, path=path), tokens)
    plan.additions.add(delta, len(plan.writes))
    with Interception(model, plan):
        yield


class _Adding:
    """The plan of `adding`."""

    reads: Sequence[Place] = ()
    asks = False

    def __init__(self, model: nn.Module, writes: Sequence[Place], tokens: Tokens):
        self.model, self.writes, self.tokens = model, writes, tokens
        self.additions = Additions()

    def changes(self, call: Call, clean: Sequence[Tensor]) -> Sequence[Change | None]:
        where = edited(call, self.model, self.tokens)
        delta = self.additions.at(where, call.past)
        return [adds(where, None if delta is None else delta[:, number]) for number in range(len(self.writes))]


def edited_model(model: nn.Module, who: str) -> nn.Module:
    """The language model whose calls are changed: of a `peft.PeftModel` the one inside, which `generate` calls.

    Raises TypeError for what is no module, and ValueError for weights that TransformerLens folded.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"{who} changes a model while you call it, so it takes the module, got {model!r:.200}; open it first: "
            "fmxnn.activations.models.open_model(name)"
        )
    check_unfolded(model)
    return without_wrapper(model)


def adds(where: Tensor, delta: Tensor | None) -> Change | None:
    """`contexts context, tokens d_model -> `: the change that adds `delta` there, None where it is nothing."""
    moved = None if delta is None else (delta != 0).any(-1) | delta.requires_grad  # what learns may start at zero
    if delta is None or moved is None or not moved.any():
        return None
    return lambda x: added(x, _some(where, moved).to(x.device), delta[moved])


def _some(where: Tensor, chosen: Tensor) -> Tensor:
    """`contexts context, tokens -> contexts context`: of the tokens `where`, those chosen."""
    some = where.clone()
    some[where] = chosen.to(where.device)
    return some
