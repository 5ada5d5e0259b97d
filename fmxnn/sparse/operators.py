"""The custom operators of sparse codes: one graph under torch.compile, with gradients of their own."""

from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor  # torch has no public name for it

from fmxnn.sparse import row_sums as bags
from fmxnn.sparse import selection
from fmxnn.sparse.across_ranks import largest_of_ranks
from fmxnn.sparse.pre_activations import Given, Products
from fmxnn.sparse.tables import Tables


@torch.library.custom_op("fmxnn::keep_largest", mutates_args=())
def keep_largest(pre: Tensor, count: int) -> Tensor:
    """`tokens latents -> tokens latents`: True at the `count` largest positive entries."""
    kept = torch.zeros(pre.shape, dtype=torch.bool, device=pre.device)
    kept.view(-1)[selection.largest(Given(pre), count).keys] = True
    return kept


@keep_largest.register_fake
def _(pre: Tensor, count: int) -> Tensor:
    return torch.empty(pre.shape, dtype=torch.bool, device=pre.device)


@torch.library.custom_op("fmxnn::keep_largest_of_ranks", mutates_args=())
def keep_largest_of_ranks(pre: Tensor, k: int, group: str) -> Tensor:
    """`tokens latents -> tokens latents`: True at this rank's share of the `tokens k` largest of all ranks."""
    kept = torch.zeros(pre.shape, dtype=torch.bool, device=pre.device)
    tokens, latents = pre.shape
    found = largest_of_ranks(lambda count: selection.largest(Given(pre), count), (tokens, latents), k, pre.dtype, group)
    kept.view(-1)[found.keys] = True
    return kept


@keep_largest_of_ranks.register_fake
def _(pre: Tensor, k: int, group: str) -> Tensor:
    return torch.empty(pre.shape, dtype=torch.bool, device=pre.device)


@torch.library.custom_op("fmxnn::choose", mutates_args=())
def choose(
    read: Tensor, table: Tensor, bias: Tensor, threshold: Tensor, rule: str, amount: int, propose: bool, group: str = ""
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`tokens bonds, latents bonds, latents -> ...`: the fields of Codes."""
    return _chosen(read, table, bias, threshold, rule, amount, propose, group)


@choose.register_fake
def _(
    read: Tensor, table: Tensor, bias: Tensor, threshold: Tensor, rule: str, amount: int, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _promised(read, bias, rule, amount)


@torch.library.custom_op("fmxnn::choose_at_tables", mutates_args=())
def choose_at_tables(
    read: Tensor,
    tables: list[Tensor],
    bias: Tensor,
    threshold: Tensor,
    rule: str,
    amount: int,
    propose: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`choose` at several tables, each with its own share of the bonds and of the latents.

    `group` has no default here: beside a list of tensors torch counts gradients without the defaults.
    """
    return _chosen(read, Tables(tuple(tables)), bias, threshold, rule, amount, propose, group)


@choose_at_tables.register_fake
def _(
    read: Tensor, tables: list[Tensor], bias: Tensor, threshold: Tensor, rule: str, amount: int, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _promised(read, bias, rule, amount)


def _chosen(
    read: Tensor,
    table: Tensor | Tables,
    bias: Tensor,
    threshold: Tensor,
    rule: str,
    amount: int,
    propose: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    read = read.to(torch.promote_types(read.dtype, table.dtype)) if not read.is_cuda else read
    source = Products(read.contiguous(), table, bias)
    tokens, latents = source.shape
    found, propose = None, propose and len(read) > 0 and read.dtype == table.dtype == torch.float32
    if rule == "each":
        found = selection.largest_of_each(source, amount)
    elif rule == "batch":
        found = _largest(source, amount, propose)
    elif rule == "ranks":
        dtype = torch.promote_types(read.dtype, bias.dtype)
        found = largest_of_ranks(
            lambda count: _largest(source, count, propose), (tokens, latents), amount, dtype, group
        )
    else:
        found = selection.above_proposed(source, threshold) if propose and threshold.ndim == 0 else None
        found = selection.above(source, threshold) if found is None else found
    room = len(found.keys) if rule in _UNKNOWN else _room(rule, amount, tokens, latents)
    values, columns = found.values.new_zeros(room), found.keys.new_zeros(room)
    values[: len(found.keys)] = found.values
    columns[: len(found.keys)] = found.keys % latents
    starts = torch.searchsorted(found.keys, torch.arange(tokens + 1, device=read.device) * latents)
    return values, columns, starts, *bags.transpose(columns, starts, latents)


def _largest(source: Products, count: int, propose: bool) -> selection.Found:
    found = selection.largest_proposed(source, count) if propose and count else None
    return selection.largest(source, count) if found is None else found


def _promised(
    read: Tensor, bias: Tensor, rule: str, amount: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, latents = read.shape[0], bias.shape[0]
    room = _unknown(tokens * latents) if rule in _UNKNOWN else _room(rule, amount, tokens, latents)
    columns, starts, order, rows, firsts = (
        read.new_empty(size, dtype=torch.int64) for size in (room, tokens + 1, room, room, latents + 1)
    )
    return read.new_empty(room, dtype=torch.promote_types(read.dtype, bias.dtype)), columns, starts, order, rows, firsts


_UNKNOWN = {"above", "ranks"}
"""Rules whose number of codes is known from the numbers alone."""


def _unknown(most: int) -> int:
    """A symbol where a graph is traced; without symbols, as on the meta device, the most there can be."""
    try:
        return cast("int", torch.library.get_ctx().new_dynamic_size())
    except RuntimeError:
        return most


def _room(rule: str, amount: int, tokens: int, latents: int) -> int:
    return cast(
        "int", torch.sym_min(amount, tokens * latents) if rule == "batch" else tokens * torch.sym_min(amount, latents)
    )


@torch.library.custom_op("fmxnn::decode", mutates_args=())
def decode(
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    order: Tensor,
    rows: Tensor,
    firsts: Tensor,
    table: Tensor,
    first: int = -1,
) -> Tensor:
    """`Codes, latents bonds -> tokens bonds`: of all latents, or of those of `table` alone, which start at `first`."""
    if first >= 0:
        at, columns, starts = bags.within(columns, starts, first, len(table))
        values = values[at]
    return bags.sums(values, columns, starts, table)


@decode.register_fake
def _(
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    order: Tensor,
    rows: Tensor,
    firsts: Tensor,
    table: Tensor,
    first: int = -1,
) -> Tensor:
    return table.new_empty(starts.shape[0] - 1, table.shape[1])


@torch.library.custom_op("fmxnn::bag", mutates_args=())
def _bag(values: Tensor, columns: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    return bags.sums(values, columns, starts, table)


@_bag.register_fake
def _(values: Tensor, columns: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(starts.shape[0] - 1, table.shape[1])


@torch.library.custom_op("fmxnn::dots", mutates_args=())
def _dots(grad: Tensor, columns: Tensor, starts: Tensor, table: Tensor, first: int = -1) -> Tensor:
    if first < 0:
        return bags.dots(grad, columns, starts, table).to(grad.dtype)
    out = grad.new_zeros(len(columns))
    at, columns, starts = bags.within(columns, starts, first, len(table))
    out[at] = bags.dots(grad, columns, starts, table).to(grad.dtype)
    return out


@_dots.register_fake
def _(grad: Tensor, columns: Tensor, starts: Tensor, table: Tensor, first: int = -1) -> Tensor:
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
        *([None] * 5),
    )


def _keep_choice_at_tables(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    read, tables, bias = inputs[:3]
    ctx.save_for_backward(read, *output[1:], *tables)
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(*output[1:])


def _choice_gradients_at_tables(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    read, columns, starts, order, rows, firsts, *tables = ctx.saved_tensors
    to_read, to_tables, to_bias = ctx.needs_input_grad[:3]
    by_latent, along = grad[order], list(Tables(tuple(tables)).along(read))
    reads = [decode(grad, columns, starts, order, rows, firsts, table, first) for _, table, first in along if to_read]
    return (
        torch.cat(reads, dim=-1).to(read.dtype) if to_read else None,
        [
            _bag(by_latent, rows, firsts[first : first + len(table) + 1], part).to(table.dtype) if wanted else None
            for (part, table, first), wanted in zip(along, to_tables, strict=True)
        ],
        _sums(by_latent, firsts).to(ctx.bias_dtype) if to_bias else None,
        *([None] * 5),
    )


def _keep_decoding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.first = inputs
    ctx.save_for_backward(*tensors)


def _decoding_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, columns, starts, order, rows, firsts, table = ctx.saved_tensors
    own = firsts if ctx.first < 0 else firsts[ctx.first : ctx.first + table.shape[0] + 1]
    return (
        _dots(grad, columns, starts, table, ctx.first).to(values.dtype) if ctx.needs_input_grad[0] else None,
        *([None] * 5),
        _bag(values[order], rows, own, grad).to(table.dtype) if ctx.needs_input_grad[6] else None,
        None,
    )


def is_without_data(tensor: Tensor) -> bool:
    """Whether it has a shape and no numbers: on device="meta", or under torch's FakeTensorMode."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        "sparse codes are differentiable once, got a double backward; "
        "take the dense codes: crosscoder.backend = 'dense'"
    )


choose.register_autograd(_choice_gradients, setup_context=_keep_choice)
choose_at_tables.register_autograd(_choice_gradients_at_tables, setup_context=_keep_choice_at_tables)
decode.register_autograd(_decoding_gradients, setup_context=_keep_decoding)
_bag.register_autograd(_refuse)
_dots.register_autograd(_refuse)
_sums.register_autograd(_refuse)
