"""Codes, dense or sparse, and the two maps at a table: choosing codes from it, and summing its rows by them."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fmxnn import bags, selection
from fmxnn.contraction import ShapeError
from fmxnn.products import Given, Products

Indices = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Codes(NamedTuple):
    """`tokens latents` in compressed rows, and once more in order of latents, which every gradient of a table shares.

    `starts` (`tokens+1`) says where each token's `values` and `columns` begin, `order`, `rows` and `firsts` (`latents+1`)
    the same from the side of latents. Entries beyond `starts[-1]` are room that was not needed. All values are positive.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    order: Tensor
    rows: Tensor
    firsts: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and latents."""
        return self.starts.shape[0] - 1, self.firsts.shape[0] - 1

    @property
    def indices(self) -> Indices:
        """All but the values."""
        return self.columns, self.starts, self.order, self.rows, self.firsts

    def to_csr(self) -> Tensor:
        """`-> tokens latents`: as torch.sparse_csr; gradients reach the values."""
        kept = int(self.starts[-1])
        return torch.sparse_csr_tensor(self.starts, self.columns[:kept], self.values[:kept], size=self.shape, check_invariants=False)


def is_sparse(z: Tensor) -> bool:
    """Whether codes are held as torch.sparse_csr."""
    return z.layout == torch.sparse_csr


def to_csr(z: Tensor) -> Tensor:
    """`tokens latents -> tokens latents`: the same codes as torch.sparse_csr; gradients reach the dense codes.

    CSR has one batch axis: flatten the others first. Raises ShapeError for any other rank.
    """
    if is_sparse(z):
        return z
    if z.ndim != 2:
        raise ShapeError(f"CSR codes are (tokens, latents), got {tuple(z.shape)}; flatten the batch axes first: z.flatten(0, -2)")
    rows, columns = z.detach().nonzero(as_tuple=True)
    starts = torch.nn.functional.pad(torch.bincount(rows, minlength=z.shape[0]).cumsum(0), (1, 0))
    return torch.sparse_csr_tensor(starts, columns, z[rows, columns], size=z.shape, check_invariants=False)


def to_codes(z: Tensor) -> Codes:
    """`tokens latents -> tokens latents`: torch.sparse_csr codes with their order by latent."""
    columns, starts = z.col_indices().long(), z.crow_indices().long()
    return Codes(z.values(), columns, starts, *bags.transpose(columns, starts, z.shape[1]))


def to_dense_codes(z: Tensor | Codes) -> Tensor:
    """`... latents -> ... latents`: the same codes as a dense tensor."""
    if isinstance(z, Codes):
        rows = bags.rows_of(z.starts, len(z.columns))
        return z.values.new_zeros(z.shape).index_put((rows, z.columns), z.values, accumulate=True)
    return z.to_dense() if is_sparse(z) else z


def sum_rows(z: Tensor | Codes, table: Tensor) -> Tensor:
    """`... latents, latents bonds -> ... bonds`: the table's rows, weighted by the codes and summed.

    Sparse codes touch only the rows they name, forward and backward; the gradients are those of the dense product.
    Differentiable once. Raises RuntimeError in a double backward.
    """
    if isinstance(z, Codes):
        return _decode(z.values, *z.indices, table)
    if is_sparse(z):
        return sum_rows(to_codes(z), table)
    return z @ table


def choose(read: Tensor, table: Tensor, bias: Tensor, rule: str, amount: int | Tensor, *, propose: bool = False) -> Codes:
    """`tokens bonds, latents bonds, latents -> tokens latents`: codes from `read @ table.T + bias`, which is never held whole.

    `rule` is `batch` (the `amount` largest positives of all tokens), `each` (of each token) or `above` (all that
    exceed the `amount`, one number or one a latent). `propose` lets `batch` and `above` one number compute in bf16 and decide in float32:
    the same codes, sooner where the processor multiplies bf16 fast. Gradients reach all three, through kept entries only, once.
    """
    threshold = amount.detach() if isinstance(amount, Tensor) else read.new_zeros(())
    return Codes(*_choose(read, table, bias, threshold, rule, 0 if isinstance(amount, Tensor) else amount, propose))


def keep_largest(pre: Tensor, count: int) -> Tensor:
    """`tokens latents -> tokens latents`: True at the `count` largest positive entries, the earlier of equals first."""
    return _keep_largest(pre.detach(), count)


@torch.library.custom_op("fmxnn::keep_largest", mutates_args=())
def _keep_largest(pre: Tensor, count: int) -> Tensor:
    kept = torch.zeros(pre.shape, dtype=torch.bool, device=pre.device)
    kept.view(-1)[selection.largest(Given(pre), count).keys] = True
    return kept


@_keep_largest.register_fake
def _(pre: Tensor, count: int) -> Tensor:
    return torch.empty(pre.shape, dtype=torch.bool, device=pre.device)


@torch.library.custom_op("fmxnn::choose", mutates_args=())
def _choose(
    read: Tensor, table: Tensor, bias: Tensor, threshold: Tensor, rule: str, amount: int, propose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    read = read.to(torch.promote_types(read.dtype, table.dtype)) if not read.is_cuda else read
    source = Products(read.contiguous(), table, bias)
    tokens, latents = source.shape
    found, propose = None, propose and len(read) > 0 and read.dtype == table.dtype == torch.float32
    if rule == "each":
        found = selection.largest_of_each(source, amount)
    elif rule == "batch":
        found = selection.largest_proposed(source, amount) if propose else None
        found = selection.largest(source, amount) if found is None else found
    else:
        found = selection.above_proposed(source, threshold) if propose and threshold.ndim == 0 else None
        found = selection.above(source, threshold) if found is None else found
    room = len(found.keys) if rule == "above" else _room(rule, amount, tokens, latents)
    values, columns = found.values.new_zeros(room), found.keys.new_zeros(room)
    values[: len(found.keys)] = found.values
    columns[: len(found.keys)] = found.keys % latents
    starts = torch.searchsorted(found.keys, torch.arange(tokens + 1, device=read.device) * latents)
    return values, columns, starts, *bags.transpose(columns, starts, latents)


@_choose.register_fake
def _(
    read: Tensor, table: Tensor, bias: Tensor, threshold: Tensor, rule: str, amount: int, propose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, latents = read.shape[0], table.shape[0]
    room = torch.library.get_ctx().new_dynamic_size() if rule == "above" else _room(rule, amount, tokens, latents)
    columns, starts, order, rows, firsts = (read.new_empty(size, dtype=torch.int64) for size in (room, tokens + 1, room, room, latents + 1))
    return read.new_empty(room, dtype=torch.promote_types(read.dtype, bias.dtype)), columns, starts, order, rows, firsts


def _room(rule: str, amount: int, tokens: int, latents: int) -> int:
    return cast("int", torch.sym_min(amount, tokens * latents) if rule == "batch" else tokens * torch.sym_min(amount, latents))


@torch.library.custom_op("fmxnn::decode", mutates_args=())
def _decode(values: Tensor, columns: Tensor, starts: Tensor, order: Tensor, rows: Tensor, firsts: Tensor, table: Tensor) -> Tensor:
    return bags.bag(values, columns, starts, table)


@_decode.register_fake
def _(values: Tensor, columns: Tensor, starts: Tensor, order: Tensor, rows: Tensor, firsts: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(starts.shape[0] - 1, table.shape[1])


@torch.library.custom_op("fmxnn::bag", mutates_args=())
def _bag(values: Tensor, columns: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    return bags.bag(values, columns, starts, table)


@_bag.register_fake
def _(values: Tensor, columns: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(starts.shape[0] - 1, table.shape[1])


@torch.library.custom_op("fmxnn::dots", mutates_args=())
def _dots(grad: Tensor, columns: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    return bags.dots(grad, columns, starts, table).to(grad.dtype)


@_dots.register_fake
def _(grad: Tensor, columns: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    return grad.new_empty(columns.shape[0])


@torch.library.custom_op("fmxnn::sums", mutates_args=())
def _sums(values: Tensor, starts: Tensor) -> Tensor:
    return torch.segment_reduce(values[: int(starts[-1])], "sum", offsets=starts, unsafe=True, initial=0)


@_sums.register_fake
def _(values: Tensor, starts: Tensor) -> Tensor:
    return values.new_empty(starts.shape[0] - 1)


def _keep_choice(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    read, table, bias = inputs[:3]
    ctx.save_for_backward(read, table, *output[1:])
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(*output[1:])


def _choice_gradients(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    read, table, columns, starts, order, rows, firsts = ctx.saved_tensors
    to_read, to_table, to_bias = ctx.needs_input_grad[:3]
    by_latent = grad[order]
    return (
        _bag(grad, columns, starts, table).to(read.dtype) if to_read else None,
        _bag(by_latent, rows, firsts, read).to(table.dtype) if to_table else None,
        _sums(by_latent, firsts).to(ctx.bias_dtype) if to_bias else None,
        *([None] * 4),
    )


def _keep_decoding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _decoding_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, columns, starts, order, rows, firsts, table = ctx.saved_tensors
    return (
        _dots(grad, columns, starts, table).to(values.dtype) if ctx.needs_input_grad[0] else None,
        *([None] * 5),
        _bag(values[order], rows, firsts, grad).to(table.dtype) if ctx.needs_input_grad[6] else None,
    )


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("sparse codes are differentiable once, got a double backward; take the dense codes: crosscoder.backend = 'dense'")


_choose.register_autograd(_choice_gradients, setup_context=_keep_choice)
_decode.register_autograd(_decoding_gradients, setup_context=_keep_decoding)
_bag.register_autograd(_refuse)
_dots.register_autograd(_refuse)
_sums.register_autograd(_refuse)
