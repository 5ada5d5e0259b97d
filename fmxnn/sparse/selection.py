"""Which codes are kept, exactly, from pre-activations that come block by block: tokens x latents is never held."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fmxnn.sparse.pre_activations import GROUP, Block, Given, Products, halved
from fmxnn.sparse.row_sums import dots, within

Source = Products | Given

_CROWD = 32
"""One candidate in so many entries costs as much again as the float32 product it saves."""


class Found(NamedTuple):
    """Entries in row-major order: `keys = token * latents + latent`."""

    values: Tensor
    keys: Tensor


def largest(source: Source, count: int) -> Found:
    """The `count` largest positive entries of all tokens together, the earlier of equals first.

    They are fewer where fewer are positive.

    The first block gives a threshold that leaves a little more than `count` entries of all blocks. Where `count`
    or more reach it the choice is exact; otherwise the blocks are read again under a threshold that only rises.
    """
    if not count:
        return _nothing(source)
    sampled = source.steps() > 1
    found, held = _largest(source, count, sampled=sampled)
    return found if held >= count or not sampled else _largest(source, count, sampled=False)[0]


def _largest(source: Source, count: int, *, sampled: bool) -> tuple[Found, int]:
    low, found, held = 0.0, [_nothing(source)], 0
    for block in source.blocks():
        maxima = _maxima(block)
        if block.start == 0:
            low = max(_nth(maxima, _share(count, block.step) if sampled else count), 0.0)
        new = _entries(block, maxima, low, source.shape[1])
        found, held = [*found, new], held + len(new.keys)
        if held > 2 * count:
            found, held, sampled = [_first(_joined(found), count)], count, False
            low = float(found[0].values.amin())
    return _ordered(_first(_joined(found), count), source), held


def largest_proposed(source: Products, count: int) -> Found | None:
    """`largest`, with the products in bf16 and the decision in float32; None where the bound is too loose to pay.

    An entry whose bf16 product is below a threshold by more than rounding explains (see `pre_activations.halved`) is
    below it in float32 too; every other is computed again in float32.
    Certificate: at least `count` of those reach the threshold, so no entry left out could have been kept.
    """
    low, found, held = 0.0, [_nothing(source)], 0
    for block, bound in halved(source):
        maxima = _maxima(block)
        if block.start == 0:
            low = _nth(maxima, _share(count, block.step))
        near = _entries(block, maxima, _below(low - bound), source.shape[1])
        if low <= 0 or len(near.keys) > 4 * _share(count, block.step):
            return None
        exact = _recomputed(source, near.keys)
        reach = ~(exact < low)
        found, held = [*found, Found(exact[reach], near.keys[reach])], held + int(reach.sum())
    return _ordered(_first(_joined(found), count), source) if held >= count else None


def largest_of_each(source: Source, k: int) -> Found:
    """The `k` largest positive entries of each token; fewer where fewer are positive."""
    latents = source.shape[1]
    values, columns = None, None
    for block in source.blocks():
        top = block.pre.topk(min(k, block.pre.shape[1]), dim=1, sorted=False)
        here = block.start + top.indices * block.step
        if values is None or columns is None:
            values, columns = top
            columns = here
            continue
        values, columns = torch.cat([values, top.values], 1), torch.cat([columns, here], 1)
        again = values.topk(min(k, values.shape[1]), dim=1, sorted=False)
        values, columns = again.values, columns.gather(1, again.indices)
    if values is None or columns is None:
        return _nothing(source)
    rows, at = (~(values <= 0)).nonzero(as_tuple=True)
    return _ordered(Found(values[rows, at], rows * latents + columns[rows, at]), None)


def above_proposed(source: Products, threshold: Tensor) -> Found | None:
    """`above` for one number, multiplied in bf16 and decided in float32; None where the bound is too loose to pay."""
    low, found = max(float(threshold), 0.0), [_nothing(source)]
    for block, bound in halved(source):
        near = _entries(block, _maxima(block), _below(low - bound), source.shape[1])
        if len(near.keys) > block.pre.numel() // _CROWD:
            return None
        exact = _recomputed(source, near.keys)
        reach = ~(exact <= low)
        found.append(Found(exact[reach], near.keys[reach]))
    return _ordered(_joined(found), source)


def above(source: Source, threshold: Tensor) -> Found:
    """All positive entries above `threshold`, one number or one a latent."""
    latents = source.shape[1]
    threshold = threshold.clamp(min=0).expand(latents)
    found = [_nothing(source)]
    for block in source.blocks():
        limits = threshold[block.start :: block.step]
        limits = functional.pad(limits, (0, block.pre.shape[1] - len(limits))).unflatten(0, (-1, GROUP))
        groups = block.pre.unflatten(1, (-1, GROUP))
        rows, group = (~(groups.amax(-1) <= limits.amin(-1))).nonzero(as_tuple=True)
        entries = groups[rows, group]
        at, inside = (~(entries <= limits[group])).nonzero(as_tuple=True)
        columns = block.start + (group[at] * GROUP + inside) * block.step
        found.append(Found(entries[at, inside], rows[at] * latents + columns))
    return _ordered(_joined(found), source)


def _share(count: int, steps: int) -> int:
    """The rank in one of `steps` blocks under which `count` entries of all blocks very likely lie."""
    return int(1.05 * count / steps + 4 * (count / steps) ** 0.5) + 1


def _maxima(block: Block) -> Tensor:
    groups = block.pre.unflatten(1, (-1, GROUP))
    if groups.dtype != torch.bfloat16:
        return groups.amax(-1)
    while (width := groups.shape[-1]) > 1:  # four times faster than bf16's amax on a CPU; NaN survives as there
        groups = torch.maximum(groups[..., : width // 2], groups[..., width // 2 :])
    return groups.squeeze(-1)


def _nth(values: Tensor, rank: int) -> float:
    """The `rank`-th largest value, which at least `rank` entries reach; -inf where there are fewer."""
    return float(values.flatten().kthvalue(values.numel() - rank + 1).values) if values.numel() >= rank else -torch.inf


def _entries(block: Block, maxima: Tensor, low: float | Tensor, latents: int) -> Found:
    """All entries that reach `low`, one number or `tokens 1`; 0 stands for all positive ones.

    NaN reaches, so that it is seen.
    """
    groups = maxima.shape[1]
    hit = _reaching(maxima, low).flatten().nonzero().flatten()
    entries = block.pre.reshape(-1, GROUP).index_select(0, hit)
    inside = _reaching(entries, low[hit // groups] if isinstance(low, Tensor) else low).flatten().nonzero().flatten()
    at = hit[inside // GROUP]
    rows = at // groups
    columns = block.start + ((at - rows * groups) * GROUP + inside % GROUP) * block.step
    return Found(entries.flatten()[inside], rows * latents + columns)


def _reaching(values: Tensor, low: float | Tensor) -> Tensor:
    return ~(values < low) if isinstance(low, Tensor) or low > 0 else ~(values <= 0)


def _recomputed(source: Products, keys: Tensor) -> Tensor:
    """The float32 pre-activations of these entries."""
    tokens, latents = source.shape
    keys, order = keys.sort()
    columns = keys % latents
    starts = torch.searchsorted(keys, torch.arange(tokens + 1, device=keys.device) * latents)
    exact = _dots(source, columns, starts) + source.bias[columns]
    return torch.empty_like(exact).scatter_(0, order, exact)


def _dots(source: Products, columns: Tensor, starts: Tensor) -> Tensor:
    parts = source.parts()
    if len(parts) == 1:
        return dots(source.read, columns, starts, parts[0][1])
    exact = source.read.new_empty(len(columns))
    for read, table, first in parts:
        at, own, rows = within(columns, starts, first, len(table))
        exact[at] = dots(read, own, rows, table)
    return exact


def _below(limits: Tensor) -> Tensor:
    """The limits in bf16, below them by the rounding of the limit, of a product and of its sum with the bias."""
    return (limits - 2**-7 * limits.abs()).bfloat16()


def _nothing(source: Source) -> Found:
    like = source.pre if isinstance(source, Given) else source.bias
    return Found(like.new_empty(0), torch.empty(0, dtype=torch.int64, device=like.device))


def _joined(found: list[Found]) -> Found:
    return Found(torch.cat([part.values for part in found]), torch.cat([part.keys for part in found]))


def _ordered(found: Found, source: Source | None) -> Found:
    """Row-major; the entries of a single block come so."""
    if source is not None and source.steps() == 1:
        return found
    keys, order = found.keys.sort()
    return Found(found.values[order], keys)


def _first(found: Found, count: int) -> Found:
    """The `count` largest; of those equal to the smallest kept, the earliest."""
    values, keys = found
    if len(values) <= count:
        return found
    smallest = values.kthvalue(len(values) - count + 1).values
    missing = smallest.isnan()  # then NaN takes all places
    chosen = ~(values <= smallest) & ~missing
    tied = torch.where(missing, values.isnan(), values == smallest).nonzero().flatten()
    chosen[tied[keys[tied].argsort()[: count - int(chosen.sum())]]] = True
    kept = chosen.nonzero().flatten()
    return Found(values[kept], keys[kept])
