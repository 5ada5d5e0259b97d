"""One pass of a crosscoder in training, with what it made on the way."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from torch import Tensor, nn

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.decoder import written
from fmxnn.core.shortcuts import why_replaced, why_watched
from fmxnn.sparse.codes import Codes, to_dense_codes
from fmxnn.weights.weight import Tabled


@dataclass(frozen=True)
class Pass:
    """What one pass of a crosscoder gave, for a loss of your own."""

    x: Tensor
    """`tokens layers d_model`: what was read."""
    y: Tensor
    """`tokens layers d_model`: what is rebuilt, at the decoder's layers; x itself unless the step was given another."""
    codes: Tensor | Codes
    """`tokens latents`: the codes as the step holds them, dense or sparse. l1_penalty and matryoshka_loss take both; take `z` for sums of your own."""
    x_hat: Tensor
    """`tokens layers d_model`: y as it was rebuilt."""
    read_pre: Callable[[], Tensor]

    @cached_property
    def z(self) -> Tensor:
        """`-> tokens latents`: the codes as a dense tensor, whatever the step ran on."""
        return to_dense_codes(self.codes)

    @cached_property
    def pre(self) -> Tensor:
        """`-> tokens latents`: the pre-activations that the gate chose from; computed when asked for, where the step ran on sparse codes."""
        return self.read_pre()


def dense_pass(crosscoder: Crosscoder, x: Tensor, y: Tensor) -> Pass:
    """A pass that calls every module, so that hooks and methods of the user's own take part."""
    with _noted(crosscoder.encoder.sparsifier) as pre, _noted(cast("nn.Module", crosscoder.decoder)) as z:
        if is_plain(crosscoder):
            x_hat = crosscoder.decode(crosscoder.encode(x))
        else:
            backend, crosscoder.backend = crosscoder.backend, "dense"
            try:
                x_hat = crosscoder(x)
            finally:
                crosscoder.backend = backend
    if not pre or not z:
        raise TypeError(
            f"a step needs the pre-activations and codes of the pass, and {type(crosscoder).__name__} called its "
            f"{'decoder' if pre else 'sparsifier'} never; call encoder and decoder in forward, encode and decode"
        )
    return Pass(x, y, z[-1], x_hat.view_as(y).to(y.dtype), lambda: pre[-1])


def sparse_pass(crosscoder: Crosscoder, x: Tensor, y: Tensor, *, propose: bool) -> tuple[Pass, Tensor]:
    """A pass at the two tables, and what the encoder's table read; for a crosscoder without an obstacle."""
    encoder = crosscoder.encoder
    read = encoder.read(x)
    z = encoder.choose(read, propose=propose)
    x_hat = written(crosscoder.decoder, z).view_as(y).to(y.dtype)
    return Pass(
        x, y, z, x_hat, lambda: read @ cast("Tensor", cast("Tabled", encoder.weight).table).T + encoder.bias
    ), read


def is_plain(crosscoder: Crosscoder) -> bool:
    """Whether a step may run encoder and decoder in place of the crosscoder's own call: its forward is fmxnn's, and no hook stands on it."""
    return not (why_replaced(crosscoder, Crosscoder, ("forward", "__call__")) or why_watched([crosscoder]))


@contextmanager
def _noted(module: nn.Module) -> Generator[list[Tensor]]:
    """What the module is called with, after all hooks of the user's own."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        handle.remove()
