"""One pass of a crosscoder in training, with what it made on the way."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, singledispatch
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from fmxnn.coders.crosscoder import Crosscoder, Tabled
from fmxnn.coders.decoder import Decoder, written
from fmxnn.coders.encoder import CrossLayerEncoder
from fmxnn.coders.normalisation import Normalised
from fmxnn.coders.skip import SkipCrosscoder
from fmxnn.core.contraction import PLANNED_BATCH
from fmxnn.core.errors import ShapeError
from fmxnn.core.shortcuts import why_replaced, why_watched
from fmxnn.sparse.codes import Codes, to_dense_codes


@runtime_checkable
class Coder(Protocol):
    """What a module must hold to be trained: an encoder with `weight`, `sparsifier` and `bias`, and a decoder.

    A `Crosscoder` is one. The `forward` of a module of your own must call the sparsifier and the decoder.
    """

    encoder: CrossLayerEncoder
    decoder: Decoder


@dataclass(frozen=True)
class Inside:
    """What a pass ran on."""

    coder: Coder
    """The crosscoder itself, inside of whatever was trained."""
    silent: Tensor
    """`latents`: tokens since each latent fired, before this pass."""
    pre: Tensor | None = None
    """`tokens latents`: the pre-activations, where the pass made them."""
    read: Tensor | None = None
    """`tokens bonds`: what the encoder's table read, where the pass ran on sparse codes."""


@dataclass(frozen=True)
class Pass:
    """What one pass of a crosscoder gave, for a loss of your own.

    ```python
    def penalty(run: fx.training.Pass) -> torch.Tensor:
        return 0.04 * fx.l1_penalty(run.codes, run.coder.decoder.weight.norms())
    ```
    """

    x: Tensor
    """`tokens layers d_model`: what the crosscoder read, in its units: normalised ones inside of a Normalised."""
    y: Tensor
    """`tokens layers d_model`: what it was to rebuild: x, or the y that the step was given, less what a skip writes."""
    codes: Tensor | Codes
    """`tokens latents`: dense or sparse, as the step holds them. `l1_penalty` and `matryoshka_loss` take both."""
    x_hat: Tensor
    """`tokens layers d_model`: y as it was rebuilt."""
    inside: Inside

    @cached_property
    def z(self) -> Tensor:
        """`-> tokens latents`: the codes as a dense tensor, for sums of your own."""
        return to_dense_codes(self.codes)

    @cached_property
    def pre(self) -> Tensor:
        """`-> tokens latents`: the pre-activations that the gate chose from; after sparse codes computed when asked."""
        if self.inside.pre is not None:
            return self.inside.pre
        encoder = self.coder.encoder
        table = cast("Tensor", cast("Tabled", encoder.weight).table)
        return cast("Tensor", self.inside.read) @ table.T + encoder.bias

    @property
    def coder(self) -> Coder:
        """The crosscoder that ran."""
        return self.inside.coder

    @property
    def silent(self) -> Tensor:
        """`-> latents`: tokens since each latent fired, before this pass."""
        return self.inside.silent


def coder_in(module: nn.Module) -> Coder:
    """The crosscoder itself, or the one inside a Normalised, a SkipCrosscoder or a module of one's own.

    Raises TypeError for a module without one, and for one that was compiled or wrapped for several devices.
    """
    inner: Any = module
    while not isinstance(inner, Coder) and isinstance(getattr(inner, "crosscoder", None), nn.Module):
        inner = inner.crosscoder
    lacks = [name for name in ("encoder", "decoder") if not hasattr(inner, name)] or [
        f"{part}.{name}"
        for part, names in (("encoder", ("weight", "sparsifier", "bias")), ("decoder", ("weight", "bias")))
        for name in names
        if not hasattr(getattr(inner, part), name)
    ]
    if "_orig_mod" in dict(module.named_children()):
        lacks = ["code that was not compiled"]
    if lacks:
        raise TypeError(
            f"an objective holds a Crosscoder, a Normalised or SkipCrosscoder of one, or a module with its encoder and "
            f"decoder, got {type(module).__name__} without {', '.join(lacks)}; wrap the objective and not what it "
            "holds: DistributedDataParallel(fx.Objective(crosscoder)), torch.compile(fx.Objective(crosscoder))"
        )
    return cast("Coder", inner)


@singledispatch
def run_pass(module: nn.Module, x: Tensor, y: Tensor, silent: Tensor) -> Pass:
    """`... layers d_model, ... layers d_model, latents -> `: runs a module of whatever kind, and says what it made.

    Sparse codes and direct calls stand for a call of the module only where nobody could tell: no method of a user's own
    and no hook stands in between. Raises TypeError and ShapeError for a module that gives anything else than y's shape.
    """
    return noted_pass(module, x, y, silent)


@run_pass.register
def _(crosscoder: Crosscoder, x: Tensor, y: Tensor, silent: Tensor) -> Pass:
    plan = crosscoder.plan(PLANNED_BATCH if torch.compiler.is_compiling() else x.shape[:-2].numel())
    if not is_plain(crosscoder, Crosscoder):
        return noted_pass(crosscoder, x, y, silent)
    if plan.taken.backend == "dense":
        return dense_pass(crosscoder, x, y, silent)
    return sparse_pass(crosscoder, x, y, silent, propose=plan.taken.propose)


@run_pass.register
def _(module: Normalised, x: Tensor, y: Tensor, silent: Tensor) -> Pass:
    if not is_plain(module, Normalised):
        return noted_pass(module, x, y, silent)
    return run_pass(module.crosscoder, *_normalised(module, x, y), silent)


@run_pass.register
def _(module: SkipCrosscoder, x: Tensor, y: Tensor, silent: Tensor) -> Pass:
    if not is_plain(module, SkipCrosscoder):
        return noted_pass(module, x, y, silent)
    return run_pass(module.crosscoder, x, y - module.linear(x), silent)


@singledispatch
def inner_batch(_module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`... layers d_model, ... layers d_model -> `: what the crosscoder inside reads, and what it is to rebuild.

    Of a Normalised these are in normalised units. Beside a skip, the skip's part is taken off what is rebuilt.
    """
    return x, y


@inner_batch.register
def _(module: Normalised, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return inner_batch(module.crosscoder, *_normalised(module, x, y))


@inner_batch.register
def _(module: SkipCrosscoder, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return inner_batch(module.crosscoder, x, y - module.linear(x))


def _normalised(module: Normalised, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    read = module.normalisation(x)
    return read, read if y is x and module.output is module.normalisation else module.output(y)


def dense_pass(crosscoder: Crosscoder, x: Tensor, y: Tensor, silent: Tensor) -> Pass:
    """A pass by dense products, part by part where nobody watches the calls between the parts."""
    encoder, decoder = crosscoder.encoder, cast("nn.Module", crosscoder.decoder)
    if why_replaced(crosscoder, Crosscoder, ("encode", "decode")) or not (
        is_plain(encoder, CrossLayerEncoder) and _is_unwatched(encoder.sparsifier, decoder)
    ):
        return noted_pass(crosscoder, x, y, silent)
    pre = encoder.pre_activations(x)
    z = encoder.sparsifier(pre)
    return Pass(x, y, z, _rebuilt(crosscoder, decoder(z), y), Inside(crosscoder, silent, pre=pre))


def sparse_pass(crosscoder: Crosscoder, x: Tensor, y: Tensor, silent: Tensor, *, propose: bool) -> Pass:
    """A pass at the two tables, for a crosscoder without an obstacle."""
    encoder = crosscoder.encoder
    read = encoder.read(x)
    z = encoder.choose(read, propose=propose)
    x_hat = written(crosscoder.decoder, z).view_as(y).to(y.dtype)
    return Pass(x, y, z, x_hat, Inside(crosscoder, silent, read=read))


def noted_pass(module: nn.Module, x: Tensor, y: Tensor, silent: Tensor) -> Pass:
    """A pass that calls the module as its user does, and notes what sparsifier and decoder were handed on the way."""
    coder = coder_in(module)
    decoder = cast("nn.Module", coder.decoder)
    with _noted(coder.encoder.sparsifier, "sparsifier") as pre, _noted(decoder, "decoder") as z, _dense(coder):
        x_hat = module(x)
    if not pre or not z:
        raise TypeError(
            f"a step needs the pre-activations and codes of the pass, and {type(module).__name__} called its "
            f"{'decoder' if pre else 'sparsifier'} never; call encoder and decoder in forward, encode and decode, "
            "and compile the objective, not what it holds"
        )
    x_hat = _rebuilt(module, x_hat, y)
    _, within = inner_batch(module, x, x_hat)
    x, y = inner_batch(module, x, y)
    return Pass(x, y, z[-1], within, Inside(coder, silent, pre=pre[-1]))


def is_plain(module: nn.Module, owner: type[nn.Module]) -> bool:
    """Whether a step may run a module's parts in place of its call: the forward is its owner's and nobody watches."""
    return not why_replaced(module, owner, ("forward", "__call__")) and _is_unwatched(module)


def _is_unwatched(*modules: nn.Module) -> bool:
    return not why_watched(modules) and all(getattr(part, "_compiled_call_impl", None) is None for part in modules)


def _rebuilt(module: nn.Module, x_hat: object, y: Tensor) -> Tensor:
    """`-> ... layers d_model`: what the module gave, if that can be compared with y. Raises TypeError and ShapeError."""
    name, mend = type(module).__name__, "mend its forward, or the hook or override inside that changes it"
    if not isinstance(x_hat, Tensor):
        raise TypeError(f"{name} gave {_kind(x_hat)}, expected a tensor of {tuple(y.shape)}; {mend}")
    if x_hat.shape != y.shape:
        raise ShapeError(f"{name} gave {tuple(x_hat.shape)}, expected {tuple(y.shape)}, as y is; {mend}")
    return x_hat.to(y.dtype)


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


@contextmanager
def _dense(coder: Coder) -> Generator[None]:
    """While open, a Crosscoder makes dense codes in its forward, so that the sparsifier is called."""
    if not isinstance(coder, Crosscoder):
        yield
        return
    backend, coder.backend = coder.backend, "dense"
    try:
        yield
    finally:
        coder.backend = backend


@contextmanager
def _noted(module: nn.Module, part: str) -> Generator[list[Tensor]]:
    """What the module is called with, after all hooks of the user's own. Raises TypeError for anything but a tensor."""
    seen: list[Tensor] = []

    def note(_: nn.Module, given: tuple[object, ...], named: dict[str, object]) -> None:
        value = next(iter((*given, *named.values())), None)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the {part} {type(module).__name__} was handed {_kind(value)}, expected a tensor; "
                "look at the hooks and overrides of what is called before it, which must give tensors"
            )
        seen.append(value)

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
