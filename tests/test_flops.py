"""What torch's counter says of sparse codes is what a loop over their entries does."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import crosscoders, seeds
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fmxnn import (
    BatchTopK,
    Crosscoder,
    CrossLayerDecoder,
    CrossLayerEncoder,
    DenseWeight,
    JumpReLU,
    TensorRingWeight,
    TopK,
    causal_weight,
    sae_stack_weight,
    to_csr,
)
from fmxnn.sparse import codes
from fmxnn.sparse.tables import Tables


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def drawn(tokens, latents, bonds):
    return (
        torch.randn(tokens, bonds, requires_grad=True),
        torch.randn(latents, bonds, requires_grad=True),
        torch.zeros(latents, requires_grad=True),
    )


def loop(z, bonds):
    """Two for each entry that is stored and each bond."""
    return sum(2 for row in z for value in row if value != 0 for _ in range(bonds))


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.sampled_from(["each", "batch", "above"]), seeds)
def test_choosing_and_its_gradients_count_products_and_stored_entries(tokens, latents, bonds, rule, seed):
    torch.manual_seed(seed)
    read, table, bias = drawn(tokens, latents, bonds)
    amount = torch.tensor(0.1) if rule == "above" else 2
    z = codes.choose(read, table, bias, rule, amount)
    dense = codes.to_dense_codes(z)
    assert counted(lambda: codes.choose(read, table, bias, rule, amount)) == 2 * tokens * latents * bonds
    assert counted(lambda: z.values.sum().backward(retain_graph=True)) == 2 * loop(dense, bonds)
    only_bias = codes.choose(read.detach(), table.detach(), bias, rule, amount)
    assert counted(lambda: only_bias.values.sum().backward()) == 0


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), seeds)
def test_summing_rows_and_its_gradients_count_stored_entries(tokens, latents, bonds, seed):
    torch.manual_seed(seed)
    z = torch.randn(tokens, latents).relu()
    table = torch.randn(latents, bonds, requires_grad=True)
    values = z.clone().requires_grad_()
    assert counted(lambda: codes.sum_rows(to_csr(z), table)) == loop(z, bonds)
    y = codes.sum_rows(to_csr(values), table)
    assert counted(lambda: y.sum().backward()) == 2 * loop(z, bonds)


def test_several_tables_count_their_own_latents():
    read, bias = torch.randn(4, 5, requires_grad=True), torch.zeros(7)
    tables = [torch.randn(3, 2, requires_grad=True), torch.randn(4, 3, requires_grad=True)]
    z = codes.choose(read, Tables(tuple(tables)), bias, "each", 7)
    dense, found = codes.to_dense_codes(z).detach(), []
    parts = loop(dense[:, :3], 2) + loop(dense[:, 3:], 3)
    assert counted(lambda: codes.choose(read, Tables(tuple(tables)), bias, "each", 7)) == 2 * 4 * (3 * 2 + 4 * 3)
    assert counted(lambda: found.append(codes.sum_rows(z, Tables(tuple(tables))))) == parts
    assert counted(lambda: found[0].sum().backward()) == 2 * parts + 2 * parts


AXES = {"layers": 3, "d_model": 4, "latents": 40}


@pytest.mark.parametrize("gate", [TopK(2), BatchTopK(2)], ids=repr)
def test_a_step_counts_what_the_plan_counts(gate):
    coder = Crosscoder(CrossLayerEncoder(DenseWeight(**AXES), gate), CrossLayerDecoder(DenseWeight(**AXES)))
    x = torch.randn(10, 3, 4)
    for backend in ("sparse", "dense"):
        coder.backend = backend
        assert counted(lambda: coder(x).square().sum().backward()) == coder.plan(10).taken.flops
    if isinstance(gate, BatchTopK):
        gate.threshold.fill_(0.1)
    coder.eval().backend = "sparse"
    stored = int((coder.encode(x) != 0).sum())
    assert counted(lambda: coder(x)) == 2 * 10 * 40 * 12 + 2 * stored * 12


def test_a_ring_counts_its_small_maps_and_one_gradient_more():
    """The plan leaves out what a read row's gradient costs, because a dense weight does not need it."""
    ring = TensorRingWeight(**AXES, ranks=(2, 3, 2))
    coder = Crosscoder(CrossLayerEncoder(ring, TopK(2)), CrossLayerDecoder(TensorRingWeight(**AXES, ranks=(2, 3, 2))))
    coder.backend, x = "sparse", torch.randn(1024, 3, 4)
    with FlopCounterMode(display=False) as counter:
        coder(x).square().sum().backward()
    ours = sum(count for op, count in counter.get_flop_counts()["Global"].items() if str(op).startswith("fmxnn"))
    entries = 1024 * 2
    assert ours == 2 * 1024 * 40 * 6 + 2 * entries * 6 * (1 + 2 + 2)
    assert counter.get_total_flops() > ours


def test_parts_count_less_than_the_whole():
    parts = Crosscoder(
        CrossLayerEncoder(sae_stack_weight(DenseWeight, layers=3, d_model=4, latents=39), TopK(2)),
        CrossLayerDecoder(causal_weight(DenseWeight, layers=3, d_model=4, latents=39)),
    )
    parts.backend = "sparse"
    x = torch.randn(10, 3, 4)
    assert 2 * 10 * 39 * 4 < counted(lambda: parts(x)) < 2 * 10 * 39 * 4 + 2 * 20 * 12 + 1


def test_without_data_the_room_is_counted():
    read, table, bias = (tensor.detach() for tensor in drawn(4, 6, 3))
    z = codes.choose(read, table, bias, "each", 2)
    with FakeTensorMode() as mode:
        fake = codes.Codes(*(mode.from_tensor(tensor) for tensor in z))
        rows = mode.from_tensor(table)
        assert counted(lambda: codes.sum_rows(fake, rows)) == 2 * 8 * 3


@given(crosscoders())
def test_a_crosscoder_in_eval_has_its_shapes_without_data(coder):
    x = torch.randn(2, 3, coder.encoder.weight.layers, coder.encoder.weight.d_model, dtype=torch.float64)
    z = torch.randn(5, coder.decoder.weight.latents, dtype=torch.float64)
    shapes = coder.eval()(x).shape, coder.encode(x).shape, coder.decode(z).shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake, codes_given = mode.from_tensor(x), mode.from_tensor(z)
        assert (coder(fake).shape, coder.encode(fake).shape, coder.decode(codes_given).shape) == shapes
    coder.to("meta")
    x, z = x.to("meta"), z.to("meta")
    assert (coder(x).shape, coder.encode(x).shape, coder.decode(z).shape) == shapes


@pytest.mark.parametrize("gate", [lambda: TopK(8), lambda: BatchTopK(8), lambda: JumpReLU(16384)])
@pytest.mark.parametrize("without_data", [lambda: torch.device("meta"), FakeTensorMode])
@pytest.mark.parametrize("training", [True, False])
def test_sizes_that_take_sparse_codes_run_without_data(gate, without_data, training):
    axes = {"layers": 4, "d_model": 64, "latents": 16384}
    with without_data():
        coder = Crosscoder(
            CrossLayerEncoder(TensorRingWeight(**axes), gate()), CrossLayerDecoder(TensorRingWeight(**axes))
        )
        x = torch.randn(512, 4, 64)
        y = coder.train(training)(x)
        y.sum().backward()
    assert y.shape == x.shape
    assert coder.decoder.weight.factors[0].grad.shape == coder.decoder.weight.factors[0].shape


def test_a_counter_that_was_loaded_late_counts_from_its_first_operator():
    """In a process of its own: torch's counter is not loaded by fmxnn, and may be loaded after it."""
    script = (
        "import sys, torch, fmxnn\n"
        "assert 'torch.utils.flop_counter' not in sys.modules\n"
        "z = fmxnn.sparse.to_codes(fmxnn.to_csr(torch.eye(3)))\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    fmxnn.sparse.sum_rows(z, torch.ones(3, 4))\n"
        "assert counter.get_total_flops() == 2 * 3 * 4, counter.get_total_flops()\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
