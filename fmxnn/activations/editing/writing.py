"""What stands at some tokens of a place, replaced; and blocks that give what they are told."""

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fmxnn.core.errors import ShapeError

Output = Tensor | tuple[Tensor, ...]
"""What a block gives: the residual stream, or a tuple that it leads (before transformers 5)."""
Change = Callable[[Tensor], Tensor | None]
"""`contexts context d_model -> contexts context d_model`: what is put in the place of x; None leaves it as it is."""


def residual_of(output: Output) -> Tensor:
    """`-> contexts context d_model`: the residual stream of what a block gave."""
    return output if isinstance(output, Tensor) else output[0]


def replaced(x: Tensor, where: Tensor, new: Tensor) -> Tensor:
    """`contexts context d_model, contexts context, tokens d_model -> contexts context d_model`: new where `where`.

    `new` may also be one `d_model` for all of them. The dtype stays that of x. Raises ShapeError for another d_model.
    """
    _check(x, where, new)
    changed = x.clone()
    changed[where] = new.to(x)
    return changed


def added(x: Tensor, where: Tensor, delta: Tensor) -> Tensor:
    """`contexts context d_model, contexts context, tokens d_model -> contexts context d_model`: x + delta there.

    The sum is made in the wider dtype of the two and rounded once.
    """
    _check(x, where, delta)
    wide = torch.promote_types(x.dtype, delta.dtype)
    return replaced(x, where, x[where].to(wide) + delta.to(x.device, wide))


def _check(x: Tensor, where: Tensor, new: Tensor) -> None:
    if x.shape[:-1] != where.shape or x.shape[-1:] != new.shape[-1:]:
        raise ShapeError(
            f"the activations here are {tuple(x.shape)}, and vectors of d_model={new.shape[-1]} were to be written at "
            f"(contexts, context)={tuple(where.shape)}; give a crosscoder or vectors that were made for this place"
        )


def with_residual(output: Output, where: Tensor, new: Tensor) -> Output:
    """What a block gave, but for `new` (`tokens d_model`, or one `d_model`) at the tokens `where`."""
    residual = replaced(residual_of(output), where, new)
    return residual if isinstance(output, Tensor) else (residual, *output[1:])


@contextmanager
def giving(block: nn.Module, change: Callable[[Output], Output]) -> Generator[None]:
    """While open, the block does its work and gives what `change` makes of it."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Output:
        return change(output)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def skipping(blocks: Iterable[nn.Module], output: Output) -> Generator[None]:
    """While open, these blocks do no work and give `output`."""
    with ExitStack() as skipped:
        for block in blocks:
            skipped.enter_context(_skipped(block, output))
        yield


@contextmanager
def _skipped(block: nn.Module, output: Output) -> Generator[None]:
    own = vars(block).get("forward")  # what others put in the place of its class's, if anything
    block.forward = lambda *_args, **_more: output
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own
