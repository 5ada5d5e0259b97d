"""One pass of a crosscoder in training, with what it made on the way."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.decoder import Decoder, written
from fmxnn.coders.encoder import CrossLayerEncoder
from fmxnn.core.contraction import PLANNED_BATCH
from fmxnn.core.errors import ShapeError
from fmxnn.core.outputs import checked
from fmxnn.core.shortcuts import why_overridden, why_replaced, why_watched
from fmxnn.sparse.codes import Codes, to_dense_codes
from fmxnn.weights.weight import Tabled


class Coder(Protocol):
    """What a module must hold to be trained: an encoder with `weight`, `sparsifier` and `bias`, and a decoder.

    A `Crosscoder` is one. The `forward` of a module of your own must call the sparsifier and the decoder. A module
    around a crosscoder holds it as `crosscoder`, and may say by `within(x, y)` what that reads and is to rebuild.
    """

    encoder: CrossLayerEncoder
    decoder: Decoder


class _Wrapper(Protocol):
    """A module around a crosscoder that also says what the crosscoder itself is trained on."""

    crosscoder: nn.Module

    def within(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]: ...


_WRAPPER = {"forward": ("within",), "__call__": ("within",)}
_CONTRACT = ("encoder.weight", "encoder.sparsifier", "encoder.bias", "decoder.weight", "decoder.bias")


@dataclass(frozen=True)
class Inside:
    """What a pass ran on, for terms that need more than activations: `run.inside.coder.encoder.bias`."""

    coder: Coder
    """The crosscoder itself, inside of whatever was trained."""
    silent: Tensor
    """`latents`: tokens since each latent fired, before this pass."""
    read: Tensor | None
    """`tokens bonds`: what the encoder's table read, where the pass ran on sparse codes."""
    kept: dict[str, Tensor]
    """What was computed once: the dense codes `z`, and `pre`, which a dense pass makes anyway."""


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

    @property
    def z(self) -> Tensor:
        """`-> tokens latents`: the codes as a dense tensor, for sums of your own."""
        kept = self.inside.kept  # not a cached_property, whose lock no compiled graph holds
        if "z" not in kept:
            kept["z"] = to_dense_codes(self.codes)
        return kept["z"]

    @property
    def pre(self) -> Tensor:
        """`-> tokens latents`: the pre-activations that the gate chose from; after sparse codes computed when asked."""
        kept = self.inside.kept
        if "pre" not in kept:
            encoder = self.coder.encoder
            table = cast("Tensor", cast("Tabled", encoder.weight).table)
            kept["pre"] = cast("Tensor", self.inside.read) @ table.T + encoder.bias
        return kept["pre"]

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
    inner: object = module
    held = getattr(module, "named_children", tuple)()
    while not hasattr(inner, "encoder") and isinstance(getattr(inner, "crosscoder", None), nn.Module):
        inner = cast("_Wrapper", inner).crosscoder
    lacks = [
        name for name in _CONTRACT if not hasattr(getattr(inner, name.partition(".")[0], None), name.partition(".")[2])
    ]
    if "_orig_mod" in dict(held):
        lacks = ["code that was not compiled"]
    if lacks:
        raise TypeError(
            f"an objective holds a Crosscoder, a Normalised or SkipCrosscoder of one, or a module with its encoder and "
            f"decoder, got {type(module).__name__} without {', '.join(lacks)}; wrap the objective and not what it "
            "holds: DistributedDataParallel(fx.Objective(crosscoder)), torch.compile(fx.Objective(crosscoder))"
        )
    return cast("Coder", inner)


def inner_coder(module: nn.Module) -> Coder:
    """What `coder_in` found, without its checks."""
    while not hasattr(module, "encoder"):
        module = cast("_Wrapper", module).crosscoder
    return cast("Coder", module)


def run_pass(module: nn.Module, x: Tensor, y: Tensor, silent: Tensor) -> Pass:
    """`... layers d_model, ... layers d_model, latents -> `: runs a module of whatever kind, and says what it made.

    Sparse codes and direct calls stand for a call of the module only where nobody could tell: no method of a user's own
    and no hook stands in between. Raises TypeError and ShapeError for a module that gives anything else than y's shape.
    """
    if not isinstance(module, Crosscoder):
        if why_overridden(module, _WRAPPER) or not _is_unwatched(module):
            return noted_pass(module, x, y, silent)
        wrapper = cast("_Wrapper", module)
        return run_pass(wrapper.crosscoder, *wrapper.within(x, y), silent)
    plan = module.plan(PLANNED_BATCH if torch.compiler.is_compiling() else x.shape[:-2].numel())
    if why_replaced(module, Crosscoder, ("forward", "__call__")) or not _is_unwatched(module):
        return noted_pass(module, x, y, silent)
    if plan.taken.backend == "dense":
        return dense_pass(module, x, y, silent)
    return sparse_pass(module, x, y, silent, propose=plan.taken.propose)


def inner_batch(module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`... layers d_model, ... layers d_model -> `: what the crosscoder inside reads, and what it is to rebuild.

    Of a Normalised these are in normalised units. Beside a skip, the skip's part is taken off what is rebuilt.
    """
    while hasattr(module, "within"):
        wrapper = cast("_Wrapper", module)
        (x, y), module = wrapper.within(x, y), wrapper.crosscoder
    return x, y


def dense_pass(crosscoder: Crosscoder, x: Tensor, y: Tensor, silent: Tensor) -> Pass:
    """A pass by dense products, part by part where nobody watches the calls between the parts."""
    encoder, decoder = crosscoder.encoder, cast("nn.Module", crosscoder.decoder)
    if why_replaced(crosscoder, Crosscoder, ("encode", "decode")) or not (
        not why_replaced(encoder, CrossLayerEncoder, ("forward", "__call__"))
        and _is_unwatched(encoder, encoder.sparsifier, decoder)
    ):
        return noted_pass(crosscoder, x, y, silent)
    shape, gate = (*x.shape[:-2], encoder.weight.latents), encoder.sparsifier
    pre = checked(encoder.pre_activations(x), shape, encoder, "pre_activations")
    z = checked(gate(pre), shape, gate)
    x_hat = checked(decoder(z), y.shape, decoder).to(y.dtype)
    return Pass(x, y, z, x_hat, Inside(crosscoder, silent, None, {"pre": pre}))


def sparse_pass(crosscoder: Crosscoder, x: Tensor, y: Tensor, silent: Tensor, *, propose: bool) -> Pass:
    """A pass at the two tables, for a crosscoder without an obstacle."""
    encoder = crosscoder.encoder
    read = encoder.read(x)
    z = encoder.choose(read, propose=propose)
    x_hat = written(crosscoder.decoder, z).view_as(y).to(y.dtype)
    return Pass(x, y, z, x_hat, Inside(crosscoder, silent, read, {}))


def noted_pass(module: nn.Module, x: Tensor, y: Tensor, silent: Tensor) -> Pass:
    """A pass that calls the module as its user does, and notes what sparsifier and decoder were handed on the way."""
    coder = inner_coder(module)
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
    return Pass(x, y, z[-1], within, Inside(coder, silent, None, {"pre": pre[-1]}))


def _is_unwatched(*modules: nn.Module) -> bool:
    return not why_watched(modules) and all(getattr(part, "_compiled_call_impl", None) is None for part in modules)


def _rebuilt(module: nn.Module, x_hat: object, y: Tensor) -> Tensor:
    """`-> ... layers d_model`: what the module gave, if it compares with y. Raises TypeError and ShapeError."""
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
