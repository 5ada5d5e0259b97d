"""Sparse codes against dense ones: the same numbers for every weight, sparsifier, dtype and batch."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from fmxnn import (
    BatchTopK,
    CPWeight,
    Crosscoder,
    CrossLayerDecoder,
    CrossLayerEncoder,
    DenseWeight,
    EinsumWeight,
    FactorizedWeight,
    JumpReLU,
    LayerMask,
    ShapeError,
    TensorRingWeight,
    TopK,
)
from fmxnn.sparse import codes as sparse
from fmxnn.sparse import operators
from fmxnn.sparse import row_sums as bags
from fmxnn.sparse.codes import choose, sum_rows, to_codes, to_csr, to_dense_codes
from fmxnn.training.losses import reconstruction_loss

assert_close = torch.testing.assert_close
WEIGHTS = {
    "dense": lambda layers, latents: DenseWeight(layers, 5, latents),
    "cp": lambda layers, latents: CPWeight(layers, 5, latents, rank=6),
    "ring": lambda layers, latents: TensorRingWeight(layers, 5, latents, ranks=(2, 3, 4)),
    "tucker": lambda layers, latents: EinsumWeight(
        "d_model q, latents r, p q r, layers p", layers=layers, d_model=5, latents=latents, r=3, p=2, q=4
    ),
    "latents last": lambda layers, latents: EinsumWeight(
        "layers d_model latents", layers=layers, d_model=5, latents=latents
    ),
}


def crosscoder(weight, sparsifier, layers=3, latents=40, p=0.0):
    make = WEIGHTS[weight]
    encoder = CrossLayerEncoder(make(layers, latents), sparsifier, mask=LayerMask(p))
    return Crosscoder(encoder, CrossLayerDecoder(make(layers, latents)))


def run(coder, x, backend):
    """Output, gradients of input and parameters, and buffers after one pass."""
    coder.backend = backend
    coder.zero_grad()
    for buffer in coder.buffers():
        buffer.fill_(0.25 if not coder.training else -1.0)
    torch.manual_seed(3)
    x = x.detach().clone().requires_grad_()
    x_hat = coder(x)
    reconstruction_loss(x, x_hat).backward()
    return [x_hat.detach(), x.grad, *(p.grad for p in coder.parameters()), *(b.clone() for b in coder.buffers())]


@given(seeds, st.sampled_from(list(WEIGHTS)), st.sampled_from(["batch", "each", "above"]), st.booleans(), st.data())
def test_the_sparse_path_is_the_dense_path(seed, weight, rule, training, data):
    torch.manual_seed(seed)
    layers, latents = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    k = data.draw(st.sampled_from([1, min(3, latents), latents]))
    sparsifier = {"batch": BatchTopK(k), "each": TopK(k), "above": JumpReLU(latents)}[rule]
    coder = crosscoder(weight, sparsifier, layers, latents, p=0.3).double().train(training)
    torch.nn.init.normal_(coder.encoder.bias)
    x = torch.randn(*data.draw(st.sampled_from([(), (1,), (7,), (2, 3)])), layers, 5, dtype=torch.float64)
    for ours, theirs in zip(run(coder, x, "sparse"), run(coder, x, "dense"), strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [-10.0, 0.0, 10.0], ids=["all negative", "some positive", "all positive"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_dtype_keeps_as_many_codes_and_finite_gradients(dtype, bias):
    coder = crosscoder("ring", BatchTopK(3)).to(dtype)
    coder.encoder.bias.data.fill_(bias)
    results = run(coder, torch.randn(6, 3, 5).to(dtype), "sparse")
    assert all(result.isfinite().all() for result in results[: 2 + len(list(coder.parameters()))])
    assert results[0].dtype == dtype
    z = coder.encoder.choose(coder.encoder.read(torch.randn(6, 3, 5).to(dtype)))
    assert int(z.starts[-1]) == (0 if bias < 0 else 18)


def test_half_precision_differs_from_float32_by_its_rounding_only():
    torch.manual_seed(0)
    values, columns = torch.rand(40), torch.randint(30, (40,))
    starts = torch.tensor([0, 10, 10, 25, 40])
    table = torch.randn(30, 9)
    z = torch.sparse_csr_tensor(starts, columns, values, size=(4, 30), check_invariants=False)
    for dtype, rounding in ((torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
        half = torch.sparse_csr_tensor(starts, columns, values.to(dtype), size=(4, 30), check_invariants=False)
        exact = sum_rows(
            torch.sparse_csr_tensor(starts, columns, half.values().float(), size=(4, 30), check_invariants=False),
            table.to(dtype).float(),
        )
        assert_close(sum_rows(half, table.to(dtype)).float(), exact, rtol=rounding, atol=rounding * 4)
    assert sum_rows(z, table).dtype == torch.float32


def test_autocast_reads_in_bf16_and_decides_in_float32():
    torch.manual_seed(0)
    coder = crosscoder("ring", BatchTopK(3))
    x = torch.randn(16, 3, 5)
    results = {}
    for backend in ("dense", "sparse"):
        with torch.autocast("cpu", torch.bfloat16):
            results[backend] = run(coder, x, backend)
    assert results["sparse"][0].shape == results["dense"][0].shape
    for ours, theirs in zip(results["sparse"], results["dense"], strict=True):
        assert ours.dtype == theirs.dtype or ours.dtype == torch.float32
        difference = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert difference < 0.1  # bf16 rounds at 2^-8, and a code at the threshold may change places


def test_autocast_on_a_gpu_reads_each_table_in_half_the_bytes(monkeypatch):
    """Tried on a CPU, which is told that it is such a device."""
    torch.manual_seed(0)
    coder, x = crosscoder("ring", BatchTopK(3)), torch.randn(16, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        wide = run(coder, x, "sparse")
    read = {"choose": [], "decode": [], "sums": [], "dots": []}
    for name, tables in read.items():
        whole = getattr(bags, name) if name in ("sums", "dots") else getattr(operators, name)
        holder, place = (bags, 3) if name in ("sums", "dots") else (operators, {"choose": 1, "decode": 6}[name])
        monkeypatch.setattr(
            holder,
            name,
            lambda *a, whole=whole, place=place, tables=tables: (tables.append(a[place].dtype), whole(*a))[1],
        )
    monkeypatch.setattr(sparse, "_NARROWED", {"cpu"})
    with torch.autocast("cpu", torch.bfloat16):
        narrow = run(coder, x, "sparse")
    assert read["choose"] == read["decode"] == read["dots"] == [torch.bfloat16]
    assert set(read["sums"]) == {torch.bfloat16}
    for ours, theirs in zip(narrow, wide, strict=True):
        assert ours.dtype in (theirs.dtype, torch.bfloat16)
        assert (ours.float() - theirs.float()).norm() < 0.1 * theirs.float().norm()
    assert all(p.grad.dtype == torch.float32 for p in coder.parameters())
    assert run(coder, x, "sparse")[0].dtype == torch.float32  # and nothing changes outside autocast


def test_codes_of_inputs_that_are_not_contiguous_are_the_same():
    torch.manual_seed(0)
    coder = crosscoder("dense", BatchTopK(3)).double()
    x = torch.randn(5, 3, 8, dtype=torch.float64).transpose(1, 2)[:, :3]
    x = x.repeat(1, 1, 2)[..., :5]
    assert_close(run(coder, x[::2], "sparse"), run(coder, x[::2].contiguous(), "dense"))


@given(seeds)
def test_csr_codes_decode_with_the_gradients_of_dense_ones(seed):
    torch.manual_seed(seed)
    z, table = (
        (torch.randn(5, 30, dtype=torch.float64) - 1).relu(),
        torch.randn(30, 4, dtype=torch.float64, requires_grad=True),
    )
    dense, sparse = z.clone().requires_grad_(), z.clone().requires_grad_()
    out = torch.randn(5, 4, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((sum_rows(to_csr(sparse), table) * out).sum(), (table, sparse)),
        torch.autograd.grad((sum_rows(dense, table) * out).sum(), (table, dense)),
        strict=True,
    ):
        assert_close(ours, theirs * (z > 0) if ours.shape == z.shape else theirs)


def test_the_operators_keep_torchs_contract():
    torch.manual_seed(0)
    read, table, bias = (
        torch.randn(6, 4, requires_grad=True),
        torch.randn(50, 4, requires_grad=True),
        torch.randn(50, requires_grad=True),
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for rule, amount in (("batch", 12), ("each", 2)):
        torch.library.opcheck(
            torch.ops.fmxnn.choose.default, (read, table, bias, torch.zeros(()), rule, amount, False), test_utils=checks
        )
    torch.library.opcheck(
        torch.ops.fmxnn.choose.default, (read, table, bias, torch.ones(()), "above", 0, False), test_utils=checks[:3]
    )
    z = choose(read.detach(), table.detach(), bias.detach(), "each", 2)
    decode = (z.values.requires_grad_(), *z.indices, table)
    results = torch.library.opcheck(torch.ops.fmxnn.decode.default, decode, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}


def test_a_double_backward_is_refused_with_the_way_out():
    coder = crosscoder("dense", BatchTopK(3))
    coder.backend = "sparse"
    x = torch.randn(4, 3, 5)
    (gradient,) = torch.autograd.grad(coder(x).pow(2).sum(), coder.decoder.weight.factors[0], create_graph=True)
    with pytest.raises(RuntimeError) as error:
        gradient.sum().backward()
    assert str(error.value) == (
        "sparse codes are differentiable once, got a double backward; "
        "take the dense codes: crosscoder.backend = 'dense'"
    )


@pytest.mark.parametrize("gate", [BatchTopK(3), TopK(3), JumpReLU(40)], ids=["batch", "each", "above"])
def test_a_batch_of_no_tokens_has_no_codes(gate):
    coder = crosscoder("ring", gate)
    coder.backend = "sparse"
    assert coder(torch.randn(0, 3, 5)).shape == (0, 3, 5)
    for propose in (False, True):
        assert coder.encoder.choose(coder.encoder.read(torch.randn(0, 3, 5)), propose=propose).shape == (0, 40)
    assert coder.encode(torch.randn(0, 3, 5)).shape == (0, 40)


def test_encode_gives_sparse_codes_when_asked():
    torch.manual_seed(0)
    coder = crosscoder("ring", BatchTopK(3))
    x = torch.randn(6, 3, 5)
    dense = coder.encode(x)
    csr = coder.encode(x, layout=torch.sparse_csr)
    assert_close(csr.to_dense(), dense)
    assert_close(coder.decode(csr), coder.decode(dense))
    with pytest.raises(ShapeError) as error:
        coder.encode(x[None], layout=torch.sparse_csr)
    assert str(error.value) == (
        "CSR codes are of (tokens, layers, d_model), got (1, 6, 3, 5); flatten the batch axes first: x.flatten(0, -3)"
    )
    with pytest.raises(ValueError, match="got") as error:
        coder.encode(x, layout=torch.sparse_coo)
    assert str(error.value) == "encode gives torch.strided or torch.sparse_csr codes, got layout=torch.sparse_coo"


def test_a_weight_without_a_table_stays_dense_and_says_so():
    weight = FactorizedWeight("latents d_model, latents layers", layers=2, d_model=3, latents=8)
    coder = Crosscoder(CrossLayerEncoder(weight, TopK(2)), CrossLayerDecoder(DenseWeight(2, 3, 8)))
    x = torch.randn(4, 2, 3)
    assert "backend='auto', dense: FactorizedWeight has no table" in repr(coder)
    assert_close(coder.encode(x, layout=torch.sparse_csr).to_dense(), coder.encode(x))
    assert coder(x).shape == x.shape
    coder.backend = "sparse"
    with pytest.raises(TypeError) as error:
        coder(x)
    assert (
        str(error.value)
        == "the sparse backend cannot run: FactorizedWeight has no table; set backend to 'auto' or 'dense'"
    )
    with pytest.raises(ValueError, match="backend is 'auto', 'dense' or 'sparse', got 'fast'"):
        coder.backend = "fast"


class OneDirection(torch.nn.Module):
    """A user's own weight with a table: every layer reads and writes the same direction."""

    def __init__(self, layers, d_model, latents):
        super().__init__()
        self.layers, self.d_model, self.latents = layers, d_model, latents
        self.table = torch.nn.Parameter(torch.randn(latents, d_model))

    def to_bonds(self, x):
        return x.sum(-2)

    def from_bonds(self, h):
        return h.unsqueeze(-2).expand(*h.shape[:-1], self.layers, self.d_model)

    def to_latents(self, x):
        return self.to_bonds(x) @ self.table.T

    def to_layers(self, z):
        return self.from_bonds(z @ self.table)


def test_a_users_own_weight_takes_the_sparse_path():
    torch.manual_seed(0)
    coder = Crosscoder(
        CrossLayerEncoder(OneDirection(3, 5, 40), BatchTopK(2)), CrossLayerDecoder(OneDirection(3, 5, 40))
    ).double()
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    assert "dense:" not in repr(coder)
    assert_close(run(coder, x, "sparse"), run(coder, x, "dense"))


def test_materialized_weights_give_the_same_codes():
    torch.manual_seed(0)
    coder = crosscoder("ring", BatchTopK(3)).double().eval()
    coder.encoder.sparsifier.threshold.fill_(0.1)
    dense, x = coder.materialize(), torch.randn(6, 3, 5, dtype=torch.float64)
    assert isinstance(dense.encoder.weight, DenseWeight)
    assert not dense.training
    assert_close(dense.encode(x), coder.encode(x))
    assert_close(dense(x), coder(x))


def test_room_that_was_not_needed_is_in_no_sum():
    read = torch.randn(4, 3, dtype=torch.float64)
    table, bias = (
        torch.randn(10, 3, dtype=torch.float64, requires_grad=True),
        torch.full((10,), -1.0, dtype=torch.float64),
    )
    z = choose(read, table, bias, "batch", 40)
    kept = int(z.starts[-1])
    assert kept < len(z.values) == 40
    dense = to_dense_codes(z)
    assert_close(dense, (read @ table.T + bias).relu())
    again = to_codes(z.to_csr())
    assert torch.equal(again.firsts, z.firsts)
    assert torch.equal(again.rows, z.rows[:kept])


@pytest.mark.slow
def test_one_and_three_threads_choose_the_same_codes():
    script = (
        "import sys, torch, hashlib\n"
        "torch.set_num_threads(int(sys.argv[1])); torch.manual_seed(0)\n"
        "from fmxnn import *\n"
        "c = Crosscoder(CrossLayerEncoder(TensorRingWeight(4, 32, 3000), BatchTopK(16)), "
        "CrossLayerDecoder(TensorRingWeight(4, 32, 3000)))\n"
        "z = c.encoder.choose(c.encoder.read(torch.randn(257, 4, 32)), propose=bool(int(sys.argv[2])))\n"
        "print(hashlib.sha256(z.columns.numpy().tobytes() + z.starts.numpy().tobytes()).hexdigest())\n"
    )
    run = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, threads, propose], capture_output=True, text=True, check=True
        ).stdout
        for threads, propose in (("1", "0"), ("3", "0"), ("1", "1"), ("3", "1"))
    ]
    assert len(set(run)) == 1


def test_a_sparsifier_or_weight_that_cannot_choose_is_named():
    encoder = CrossLayerEncoder(DenseWeight(2, 3, 8), torch.nn.ReLU())
    with pytest.raises(TypeError) as error:
        encoder.choose(torch.randn(4, 6))
    assert str(error.value) == "sparse codes need a gate with choose, got ReLU; use TopK, BatchTopK or JumpReLU"
    untabled = OneDirection(2, 3, 8)
    untabled.__class__ = type("Untabled", (torch.nn.Module,), {})
    with pytest.raises(TypeError) as error:
        CrossLayerEncoder(untabled, TopK(2)).read(torch.randn(4, 2, 3))
    assert str(error.value) == "sparse codes need a weight with a table, got Untabled; use the dense codes"
    twice = FactorizedWeight("latents d_model, latents layers", layers=2, d_model=3, latents=8)
    with pytest.raises(TypeError) as error:
        CrossLayerEncoder(twice, TopK(2)).choose(torch.randn(4, 6))
    assert (
        str(error.value)
        == "sparse codes need a weight with a table, got FactorizedWeight without one; use the dense codes"
    )
