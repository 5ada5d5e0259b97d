"""BatchTopK over all ranks of a process group: what one process does on the same tokens.

The functions called `check_...` run in each of three processes, which draw the same numbers.
"""

import copy
import random
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fmxnn as fx
from fmxnn.core.recipe import describe
from fmxnn.gates import one_step
from fmxnn.sparse.codes import to_dense_codes
from fmxnn.sparse.tables import Tables
from fmxnn.training.losses import reconstruction_loss

assert_close = torch.testing.assert_close


def gates(k, group="world", **options):
    """A gate over all ranks, and that of one process."""
    return fx.BatchTopK(k, group=group, **options), fx.BatchTopK(k, group="local", **options)


def own(tensor, lengths):
    """This rank's shard."""
    return tensor.split(lengths)[dist.get_rank()]


def drawn(seed, ranks):
    """Shards of any length, often none; a k, latents, and a source of random choices that all ranks share."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    lengths = [draw.choice([0, 1, 2, 5, 9]) for _ in range(ranks)]
    latents = draw.randint(1, 40)
    return draw, lengths, draw.randint(1, latents), latents


def same(ours, theirs):
    """Equal bit for bit, NaN with NaN."""
    assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def check_a_scaled_shard():
    """One shard has three times the others' size: codes, gradients and threshold are those of one process."""
    torch.manual_seed(0)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    pre = torch.randn(ranks, 64, 32, dtype=torch.float64) * torch.tensor([1.0, 3.0, 1.0][:ranks]).view(-1, 1, 1)
    upstream, whole = torch.randn_like(pre), pre.clone().requires_grad_()
    over, one = gates(4)
    expected = one(whole.flatten(0, 1)).view_as(whole)
    (expected * upstream).sum().backward()
    mine = pre[rank].clone().requires_grad_()
    z = over(mine)
    (z * upstream[rank]).sum().backward()
    same(z, expected[rank])
    same(mine.grad, whole.grad[rank])
    same(over.threshold, one.threshold)


def check_dense_codes(group, ranks):
    for seed in range(30):
        draw, lengths, k, latents = drawn(seed, ranks)
        pre = torch.randn(sum(lengths), latents, dtype=draw.choice([torch.float32, torch.float64, torch.bfloat16]))
        pre = (pre.round() if draw.random() < 0.5 else pre) * draw.choice([1.0, 1e-42, 1e30])
        pre = pre + draw.choice([0.0, 0.0, -1.0, -9.0])
        pre = torch.cat([part * draw.choice([1.0, 3.0]) for part in pre.split(lengths)])
        if pre.numel() and draw.random() < 0.2:
            pre.view(-1)[draw.randrange(pre.numel()) :: draw.randint(1, 9)] = draw.choice(
                [torch.nan, -torch.nan, torch.inf]
            )
        over, one = gates(k, group)
        same(over(own(pre, lengths)), own(one(pre), lengths))
        same(over.threshold, one.threshold)


def check_sparse_codes(group, ranks):
    """Whole numbers, so that products of other shapes round alike, with many ties."""
    for seed in range(30):
        draw, lengths, k, latents = drawn(seed, ranks)
        dtype, wide = draw.choice([torch.float32, torch.float64]), draw.randint(1, 3)
        tensors = [torch.randint(-3, 4, size).to(dtype) for size in ((sum(lengths), 3), (latents, 3), (latents,))]
        tensors[0] *= torch.cat([torch.full((length, 1), draw.choice([1.0, wide])) for length in lengths])
        upstream, found = torch.randint(-3, 4, (sum(lengths), latents)).to(dtype), []
        for gate, part in zip(gates(k, group), (partial(own, lengths=lengths), lambda t: t), strict=True):
            read, table, bias = [t.clone().requires_grad_() for t in (part(tensors[0]), *tensors[1:])]
            z = to_dense_codes(gate.choose(read, table, bias, propose=draw.random() < 0.5))
            (z * part(upstream)).sum().backward()
            found.append([z.detach(), read.grad, table.grad, bias.grad, gate.threshold])
        ours, theirs = found
        for gradient in ours[2:4]:
            dist.all_reduce(gradient, group=None if group == "world" else group)
        same(ours[0], own(theirs[0], lengths))
        same(ours[1], own(theirs[1], lengths))
        for mine, expected in zip(ours[2:], theirs[2:], strict=True):
            same(mine, expected)


def check_sparse_codes_at_several_tables():
    torch.manual_seed(0)
    lengths, found = [2, 4, 9], []
    whole, *blocks, bias = (torch.randint(-3, 4, size).double() for size in ((15, 5), (8, 3), (12, 2), (20,)))
    for gate, read in zip(gates(3), (own(whole, lengths), whole), strict=True):
        tables = [block.clone().requires_grad_() for block in blocks]
        z = to_dense_codes(gate.choose(read, Tables(tuple(tables)), bias))
        z.square().sum().backward()
        found.append([z.detach(), *(table.grad for table in tables)])
    for gradient in found[0][1:]:
        dist.all_reduce(gradient)
    same(found[0], [own(found[1][0], lengths), *found[1][1:]])


def check_paths_may_differ():
    """A rank with dense codes beside one with sparse codes asks the others the same questions."""
    torch.manual_seed(0)
    tensors = [torch.randint(-3, 4, size).double() for size in ((12, 3), (20, 3), (20,))]
    over, one = gates(4)
    expected = one(tensors[0] @ tensors[1].T + tensors[2]).split(4)[dist.get_rank()]
    read = tensors[0].split(4)[dist.get_rank()]
    sparse = dist.get_rank() == 1
    same(
        to_dense_codes(over.choose(read, *tensors[1:])) if sparse else over(read @ tensors[1].T + tensors[2]), expected
    )
    same(over.threshold, one.threshold)


def check_gates_inside_others():
    torch.manual_seed(0)
    weight, pre = fx.CPWeight(2, 3, 12, rank=4).double(), torch.randn(15, 12, dtype=torch.float64)
    pre[:5] *= 3
    makers = {
        "scored": lambda gate: fx.Scored(gate, fx.SumNorm(weight)),
        "decoupled": lambda gate: fx.Decoupled(gate, fx.BatchTopK(1, group=gate.group), weight=weight),
        "shared": lambda gate: fx.Decoupled(gate, gate, weight=weight),
        "split": lambda gate: fx.SplitGate(gate, fx.TopK(1), runs=(9, 3)),
    }
    for make in makers.values():
        over, one = (make(gate) for gate in gates(3))
        same(over(own(pre, [2, 4, 9])), own(one(pre), [2, 4, 9]))
        same([*over.buffers()], [*one.buffers()])
        if isinstance(over, fx.Decoupled):
            for ours, theirs in zip(over.split(over(own(pre, [2, 4, 9]))), one.split(one(pre)), strict=True):
                same(ours, own(theirs, [2, 4, 9]))


def crosscoder(gate, backend):
    torch.manual_seed(0)
    weights = [fx.DenseWeight(2, 4, 24) for _ in range(2)]
    made = fx.Crosscoder(fx.CrossLayerEncoder(weights[0], gate), fx.CrossLayerDecoder(weights[1]), backend=backend)
    return made.double()


class Recomputed(torch.nn.Module):
    """A crosscoder whose backward pass repeats the forward."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=False)


def check_training(backend):
    """DDP with two micro-batches a step, whose forwards the backward pass repeats, ends where one process does."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    over, one = (crosscoder(gate, backend) for gate in gates(3))
    wrapped = DistributedDataParallel(Recomputed(over))
    optimizers = [torch.optim.Adam(each.parameters(), lr=1e-2) for each in (over, one)]
    torch.manual_seed(1)
    for x in torch.randn(4, 2, ranks, 6, 2, 4, dtype=torch.float64):
        mine, whole = x[:, rank], x.flatten(1, 2)
        with one_step():
            with wrapped.no_sync():
                reconstruction_loss(mine[0], wrapped(mine[0])).backward()
            reconstruction_loss(mine[1], wrapped(mine[1])).backward()
            for batch in whole:
                reconstruction_loss(batch, one(batch)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip([*over.parameters(), *over.buffers()], [*one.parameters(), *one.buffers()], strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def check_different_modules_are_named():
    rank = dist.get_rank()
    for k, latents, dtype in ((2 + rank, 9, torch.float32), (2, 9 + rank, torch.float32), (12, 9, torch.float32),
                              (2, 9, torch.float64 if rank else torch.float32)):  # fmt: skip
        gate, message = (
            fx.BatchTopK(k, group="world"),
            r"same k, latents and dtype on each, got k=\[2, .*build the same",
        )
        message = "BatchTopK cannot keep k=12 of latents=9; set k <= 9" if k == 12 else message
        with pytest.raises(ValueError, match=message):
            gate(torch.ones(3, latents, dtype=dtype))
        with pytest.raises(ValueError, match=message):
            gate.choose(
                torch.ones(3, 2, dtype=dtype), torch.ones(latents, 2, dtype=dtype), torch.ones(latents, dtype=dtype)
            )
        assert gate.threshold == -1


def check_a_process_group(pair):
    if dist.get_rank() == 2:
        with pytest.raises(ValueError, match="or a torch.distributed.ProcessGroup that this process is in, got -100"):
            fx.BatchTopK(2, group=pair)
        return
    check_dense_codes(pair, 2)
    check_sparse_codes(pair, 2)
    gate = fx.BatchTopK(2, group=pair)
    assert describe(gate) == {"BatchTopK": {"k": 2, "decay": 0.9, "group": "world"}}
    pre = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    expected = fx.BatchTopK(2, group="local")(pre.flatten(0, 1)).view_as(pre)[dist.get_rank()]
    same(copy.deepcopy(gate)(pre[dist.get_rank()]), expected)


def check_eval_mode_asks_no_other_rank():
    if dist.get_rank() == 0:
        gate, pre = fx.BatchTopK(2, group="world").eval(), torch.randn(5, 9)
        gate.threshold.fill_(0.5)
        same(gate(pre), torch.where(pre > 0.5, pre, 0.0))
        same(gate.select(pre), fx.BatchTopK(2, group="local")(pre))


def check_the_warning():
    gate, pre = fx.BatchTopK(2), torch.randn(5, 9)
    with pytest.warns(
        UserWarning, match=r"BatchTopK\(k=2\) chooses among .* own rank, .* 3 ranks.*'world'.*'local'"
    ) as seen:
        gate(pre)
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="own rank"):
        fx.BatchTopK(2).choose(torch.ones(3, 2), torch.ones(9, 2), torch.ones(9))
    gate(pre)
    fx.BatchTopK(2, group="local")(pre)
    fx.TopK(2)(pre)
    gate.threshold.fill_(0.0)
    copy.deepcopy(gate).eval()(pre)


def check_what_is_sent():
    """As docs/distributed.md says: six sums of 49 KB, nine of 98 KB in float64, and a few bytes a rank."""
    sent, reduce = [], dist.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda x, **how: (sent.append(x.numel() * x.itemsize), reduce(x, **how)))
        for dtype, sums, counts in ((torch.float32, 6, 3 * 2**14), (torch.float64, 9, 6 * 2**14)):
            sent.clear()
            fx.BatchTopK(4, group="world")(torch.randn(50, 100, dtype=dtype))
            assert len(sent) == sums
            assert sum(sent) == counts + 3 * 6 * 8 + 4  # three rows of six whole numbers, and a float32


def everything():
    pair = dist.new_group([0, 1])
    check_a_scaled_shard()
    check_dense_codes("world", 3)
    check_sparse_codes("world", 3)
    check_sparse_codes_at_several_tables()
    check_paths_may_differ()
    check_different_modules_are_named()
    check_a_process_group(pair)
    check_eval_mode_asks_no_other_rank()
    check_the_warning()
    check_gates_inside_others()
    check_what_is_sent()
    check_training("dense")
    check_training("sparse")


def page():
    """The names of the script in docs/distributed.md."""
    text = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    names = {"__name__": "page"}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    return names


def the_script_of_the_page():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    batches = torch.randn(20, 2, 2, 8, 3, 16)  # of micro-batches and of ranks
    ours, train = batches[:, :, dist.get_rank()].flatten(1, 2), page()["train"]
    trained = train(ours)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        patch.setattr(fx, "BatchTopK", lambda k, group: fx.gates.BatchTopK(k, group="local"))
        expected = train(batches.flatten(1, 3))
    assert_close(trained.state_dict(), expected.state_dict(), rtol=1e-12, atol=1e-12)
    assert trained.encoder.sparsifier.threshold > 0


def test_the_script_of_the_page_ends_where_one_process_does(tmp_path):
    run_ranks(the_script_of_the_page, 2, tmp_path)


def test_three_processes_do_what_one_does(tmp_path):
    run_ranks(everything, 3, tmp_path)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_gate_over_ranks_compiles_as_one_graph():
    """A graph knows a process group by its name."""
    torch.compiler.reset()
    over, one = gates(3)
    compiled = torch.compile(over, fullgraph=True, backend="aot_eager")
    for pre in torch.randn(3, 6, 12):
        same(compiled(pre), one(pre))
        same(over.threshold, one.threshold)
    coder, x = crosscoder(fx.BatchTopK(3, group="world"), "auto"), torch.randn(5, 2, 4, dtype=torch.float64)
    same(torch.compile(coder, fullgraph=True, backend="aot_eager")(x), copy.deepcopy(coder)(x))
    coder.backend = "sparse"
    same(coder(x), copy.deepcopy(coder)(x))


@pytest.mark.usefixtures("alone")
def test_the_operators_keep_torchs_contract():
    pre, checks = torch.randn(5, 12), ("test_schema", "test_autograd_registration", "test_faketensor")
    read, table, bias = (torch.randn(size, requires_grad=True) for size in ((5, 4), (12, 4), (12,)))
    gate, ops = fx.BatchTopK(2), torch.ops.fmxnn
    for operator, arguments in (
        (ops.keep_largest_of_ranks, (pre, 2, "world")),
        (ops.choose, (read, table, bias, torch.zeros(()), "ranks", 2, False, "world")),
        (ops.follow, (gate.threshold, torch.tensor(2.0), 0.9, gate._moves.serial, "world", False)),
    ):
        results = torch.library.opcheck(operator.default, arguments, test_utils=checks)
        assert results == dict.fromkeys(checks, "SUCCESS")


@pytest.mark.usefixtures("alone")
def test_a_group_that_is_gone_is_named():
    gate = fx.BatchTopK(2, group=dist.new_group([0]))
    gate(torch.ones(3, 4))
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="needs an initialised process group, got none"):
        gate(torch.ones(3, 4))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the fixture to end


@pytest.mark.parametrize("call", ["forward", "choose"])
def test_a_group_that_was_never_initialised_is_named(call):
    gate = fx.BatchTopK(2, group="world")
    with pytest.raises(
        RuntimeError, match="group='world' needs an initialised process group, .*init_process_group.*'local'"
    ):
        gate(torch.ones(3, 4)) if call == "forward" else gate.choose(torch.ones(3, 2), torch.ones(4, 2), torch.ones(4))
    assert gate.threshold == -1
    gate.group = "local"
    gate(torch.ones(3, 4))
    assert gate.threshold == 1


@pytest.mark.parametrize("group", ["rank", 3, [0, 1]])
def test_what_is_no_group_is_named(group):
    with pytest.raises(ValueError, match="group=None, 'local', 'world' or a .*ProcessGroup.*got .*; give one of them"):
        fx.BatchTopK(2, group=group)
