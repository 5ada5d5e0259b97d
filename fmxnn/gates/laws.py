"""The laws of gates, shipped, for gates of your own."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fmxnn.core.outputs import check_gives
from fmxnn.core.recipe import build, describe
from fmxnn.gates.gate import Chooser, Freezable, Ranking
from fmxnn.gates.questions import (
    fixed_k,
    k_of,
    latents_of,
    scores_of,
    select_of,
    threshold_of,
    why_dense,
    why_one_table,
)
from fmxnn.gates.thresholds import ranked, set_thresholds
from fmxnn.sparse.codes import Codes, to_dense_codes
from fmxnn.sparse.tables import Tables

_BONDS = 3
_M = TypeVar("_M", bound=nn.Module)


def check_gate(
    gate: nn.Module, *, latents: int | None = None, tokens: int = 6, classes: Iterable[type[nn.Module]] = ()
) -> None:
    """Raises AssertionError, naming the law and so the method, unless `gate` obeys every law of a gate.

    Codes have the shape and dtype of the pre-activations. Of what the gate gives beside `forward`, `choose` finds the
    same codes, gradients and thresholds at one table and at several; `select` is the choice of training and moves
    nothing; what eval mode keeps exceeds `threshold`; `ranked` names thresholds that keep k a token once they are
    calibrated; `frozen` makes the choice of eval mode; k can be set; the recipe builds a gate of the same state.

    `latents` is needed for a gate that takes any number, and is 12 unless it keeps more. The gate stays as it is.
    `classes` are those its recipe needs beside its own and torch's.

    ```python
    fx.check_gate(fx.BatchTopK(2))
    ```
    """
    check_gives("check_gate", "a gate, a module from `... latents` to `... latents`", gate, "")
    own = latents_of(gate) or latents or max(12, 2 * (k_of(gate) or 0))
    gate = deepcopy(gate).double()
    pre = torch.randn(tokens, own, dtype=torch.float64, device=_device(gate))
    for training in (True, False):
        mode = _fresh(gate, training=training)
        _settled(mode, pre)
        _check_forward(mode, pre)
        _check_choose(mode, tokens, own)
    _check_select(gate, pre)
    _check_threshold(gate, pre)
    _check_ranked(gate, pre)
    _check_frozen(gate, pre)
    _check_k(gate, own)
    _check_recipe(gate, classes)


def _check_forward(gate: nn.Module, pre: Tensor) -> None:
    z = cast("object", _fresh(gate)(pre))
    if not isinstance(z, Tensor):
        raise AssertionError(f"the law 'forward(pre) gives a tensor' does not hold: got {type(z).__name__}")
    _equal("forward(pre) has the shape of pre", torch.tensor(z.shape), torch.tensor(pre.shape))
    _true("forward(pre) has the dtype of pre", z.dtype == pre.dtype)
    folded = pre.unflatten(0, (1, len(pre)))
    _equal("forward(pre) is the same whatever batch axes pre has", _fresh(gate)(folded)[0], z)


def _check_choose(gate: nn.Module, tokens: int, latents: int) -> None:
    """`choose` against `forward` of the same pre-activations, at one table and at two along the diagonal."""
    if not isinstance(gate, Chooser) or why_dense(gate):
        return
    read, table, bias = (_like(gate, *shape) for shape in ((tokens, _BONDS), (latents, _BONDS), (latents,)))
    several = Tables((_like(gate, latents // 2, 2), _like(gate, latents - latents // 2, 1)))
    for given, where in ((table, ""), (several, " at several tables")):
        if where and why_one_table(gate):
            return
        slow, fast = _fresh(gate), _fresh(gate)
        whole = given if isinstance(given, Tensor) else torch.block_diag(*given.blocks)
        z, gradients = _learned(partial(_forward, slow), read, whole, bias)
        codes, fast_gradients = _learned(partial(_choose, fast, given), read, whole, bias)
        _equal(f"choose(read, table, bias) = forward(read @ table.T + bias){where}", codes, z)
        gradients[1] = gradients[1] * (whole != 0)  # nobody holds what lies beside several tables
        for name, ours, theirs in zip(("read", "table", "bias"), fast_gradients, gradients, strict=True):
            _equal(f"the gradient of choose in {name} = that of forward{where}", ours, theirs)
        for key, buffer in slow.state_dict().items():
            _equal(f"choose moves {key} as forward does{where}", fast.state_dict()[key], buffer)
        proposed = _choose(_fresh(gate), given, read, whole, bias, propose=True)
        _equal(f"choose(..., propose=True) = choose(...){where}", to_dense_codes(proposed), codes)
        _true(f"choose gives positive values{where}", bool((proposed.values[: int(proposed.starts[-1])] > 0).all()))


def _forward(gate: nn.Module, read: Tensor, table: Tensor, bias: Tensor) -> Tensor:
    return gate(read @ table.T + bias)


def _choose(
    gate: nn.Module, like: Tensor | Tables, read: Tensor, table: Tensor, bias: Tensor, *, propose: bool = False
) -> Codes:
    """The gate's choice at `table`, which is cut into several where `like` is."""
    at: Tensor | Tables = table
    if isinstance(like, Tables):
        rows, bonds = like.blocks[0].shape
        at = Tables((table[:rows, :bonds], table[rows:, bonds:]))
    return cast("Chooser", gate).choose(read, cast("Tensor", at), bias, propose=propose)


def _check_select(gate: nn.Module, pre: Tensor) -> None:
    if select_of(gate) is None:
        return
    expected = _fresh(gate, training=True)(pre)
    for training in (True, False):
        asked = _fresh(gate, training=training)
        before = deepcopy(asked.state_dict())
        select = select_of(asked)
        found = select(pre) if select else pre
        _equal("select(pre) = forward(pre) in training", found, expected)
        for key, buffer in asked.state_dict().items():
            _equal(f"select leaves {key} as it is", buffer, before[key])


def _check_threshold(gate: nn.Module, pre: Tensor) -> None:
    asked = _fresh(gate, training=False)
    _settled(asked, pre)
    threshold, ruled = threshold_of(asked), sum(values.numel() for _, values in ranked(asked, pre))
    if threshold is None or ruled not in (0, pre.numel()):  # a gate of several, of which some choose otherwise
        return
    scores = scores_of(asked, pre)
    by = pre if scores is None else pre * scores
    kept = asked(pre) != 0
    _true("what eval mode keeps exceeds threshold", bool((by > threshold)[kept].all()))


def _check_ranked(gate: nn.Module, pre: Tensor) -> None:
    asked = _fresh(gate, training=False)
    if not isinstance(asked, Ranking) or not list(ranked(asked, pre)):
        return
    set_thresholds(asked, [pre], len(pre))
    found: dict[nn.Module, list[Tensor]] = {}
    for part, values in ranked(asked, pre):
        found.setdefault(part, []).append(values.flatten())
    for part, each in found.items():
        values, count = torch.cat(each), len(pre) * len(each) * (k_of(part) or 0)
        above = int((values > cast("Tensor", threshold_of(part))).sum())
        _equal(
            "a threshold set from what ranked(pre) gives keeps k a token",
            torch.tensor(above),
            torch.tensor(min(count, int((values > 0).sum()))),
        )
    if len(found) == 1 and next(iter(found)) is asked:
        count = int((asked(pre) != 0).sum())
        most = min(len(pre) * (k_of(asked) or 0), int((pre > 0).sum()))
        _equal("calibrate(pre) makes forward keep k a token", torch.tensor(count), torch.tensor(most))


def _check_frozen(gate: nn.Module, pre: Tensor) -> None:
    asked = _fresh(gate, training=False)
    if not isinstance(asked, Freezable) or threshold_of(asked) is None:
        return
    _settled(asked, pre)
    _equal("frozen()(pre) = forward(pre) in eval mode", asked.frozen().eval()(pre), asked(pre))


def _check_k(gate: nn.Module, latents: int) -> None:
    if k_of(gate) is None or fixed_k(gate) is not None or latents < 2:
        return
    asked = _fresh(gate)
    for k in (1, 2):
        cast("Any", asked).k = k
        _equal("k is what it was set to", torch.tensor(k_of(asked)), torch.tensor(k))


def _check_recipe(gate: nn.Module, classes: Iterable[type[nn.Module]]) -> None:
    again = build(describe(gate), [type(part) for part in gate.modules()] + list(classes))
    mine, theirs = ({key: value.shape for key, value in each.state_dict().items()} for each in (gate, again))
    _true("build(describe(gate)) has the same state", mine == theirs)


def _settled(gate: nn.Module, pre: Tensor) -> None:
    """Sets what can be set from data, so that eval mode chooses."""
    if isinstance(gate, Ranking) and list(ranked(gate, pre)):
        set_thresholds(gate, [pre], len(pre))


def _fresh(gate: _M, *, training: bool | None = None) -> _M:
    made = deepcopy(gate)
    return made if training is None else made.train(training)


def _learned(run: Callable[..., Tensor | Codes], *given: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The codes from these, and the gradients of a sum over them."""
    inputs = [each.clone().requires_grad_() for each in given]
    codes = to_dense_codes(run(*inputs))
    weights = torch.linspace(1, 2, codes.numel(), dtype=codes.dtype, device=codes.device).view_as(codes)
    loss = (codes * weights).sum()
    return codes.detach(), list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))


def _device(gate: nn.Module) -> torch.device:
    tensors = [*gate.parameters(), *gate.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _like(gate: nn.Module, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=_device(gate))


def _true(law: str, holds: bool) -> None:
    _equal(law, torch.tensor(holds), torch.tensor(True))


def _equal(law: str, got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, msg=lambda text: f"the law {law!r} does not hold: {text}")
