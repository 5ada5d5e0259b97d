"""Gates as activations: latents along any axis, codes in the dtype of the pre-activations, and shapes alone."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import randn, seeds
from torch._subclasses.fake_tensor import FakeTensorMode

import fmxnn as fx
from fmxnn.core.recipe import build, describe
from fmxnn.sparse.codes import sum_rows

KINDS = [
    lambda latents, dim: fx.TopK(2, dim=dim),
    lambda latents, dim: fx.BatchTopK(2, dim=dim),
    lambda latents, dim: fx.JumpReLU(latents, dim=dim),
    lambda latents, dim: fx.TrainedJumpReLU(latents, dim=dim),
    lambda latents, dim: fx.GroupMax(latents // 2, latents, dim=dim),
    lambda latents, dim: fx.SignedGroupMax(latents // 2, latents, dim=dim),
    lambda latents, dim: fx.SignedTopK(2, dim=dim),
    lambda latents, dim: fx.SignedBatchTopK(2, dim=dim),
]
kinds = st.sampled_from(KINDS)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind(4, -1)).__name__)
DTYPES = [
    *((dtype,) * 3 for dtype in (torch.float32, torch.float64, torch.bfloat16)),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
]
"""Of what is read, the table and the bias."""
CHOOSERS = [fx.TopK(2), fx.BatchTopK(2), fx.JumpReLU(12), fx.TrainedJumpReLU(12)]


@st.composite
def shaped(draw):
    """Pre-activations with their latents along any axis, often with ties, and that axis, counted from either end."""
    torch.manual_seed(draw(seeds))
    sizes = draw(st.lists(st.integers(0, 3), max_size=3))
    place = draw(st.integers(0, len(sizes)))
    sizes.insert(place, 2 * draw(st.integers(1, 3)))
    pre = randn(*sizes)
    return pre.round() if draw(st.booleans()) else pre, draw(st.sampled_from([place, place - len(sizes)]))


@given(shaped(), kinds, st.booleans())
def test_a_gate_along_an_axis_is_the_gate_of_the_last_after_a_move(drawn, kind, training):
    pre, dim = drawn
    gate, last = (kind(pre.shape[dim], at).double().train(training) for at in (dim, -1))
    for each in (gate, last):
        for tensor in (*each.buffers(), *each.parameters()):
            tensor.data.copy_(torch.linspace(-0.5, 1, tensor.numel()).view_as(tensor))
    upstream, results = randn(*pre.shape), []
    for run in (gate, lambda x: last(x.movedim(dim, -1)).movedim(-1, dim)):
        x = pre.clone().requires_grad_()
        z = run(x)
        (z * upstream).sum().backward()
        results.append([z.detach(), x.grad])
    assert all(torch.equal(*pair) for pair in zip(*results))
    assert z.dtype == pre.dtype
    assert all(torch.equal(*pair) for pair in zip(gate.state_dict().values(), last.state_dict().values()))
    for method in ("select", "active"):
        if hasattr(gate, method):
            expected = getattr(last, method)(pre.movedim(dim, -1)).movedim(-1, dim)
            assert torch.equal(getattr(gate, method)(pre), expected)


@given(shaped())
def test_calibration_counts_tokens_along_the_other_axes(drawn):
    pre, dim = drawn
    if not pre.numel():
        return
    gate, last = fx.BatchTopK(1, dim=dim), fx.BatchTopK(1)
    gate.calibrate(pre)
    last.calibrate(pre.movedim(dim, -1))
    assert gate.threshold == last.threshold


@every_kind
def test_an_axis_is_kept_in_the_recipe_where_it_is_not_the_last(kind):
    gate, last = kind(4, 1), kind(4, -1)
    name = type(gate).__name__
    assert describe(gate)[name].pop("dim") == 1
    assert "dim" not in describe(last)[name]  # so that a recipe from before is the same
    for each in (gate, last):
        made = build(describe(each), {type(each)})
        assert (made.dim, repr(made)) == (each.dim, repr(each))
    assert "dim=1" in repr(gate)
    assert "dim" not in repr(last)
    if isinstance(gate, fx.TrainedJumpReLU):
        assert gate.frozen().dim == 1


@pytest.mark.parametrize("group", [None, "local", "world"])
def test_a_group_is_kept_in_the_recipe_where_one_was_named(group):
    made = build(describe(fx.BatchTopK(2, group=group)), {fx.BatchTopK})
    assert made.group == group
    assert ("group" in describe(made)["BatchTopK"]) == (group is not None)


@every_kind
def test_an_axis_that_is_not_there_is_named(kind):
    name = type(kind(4, -1)).__name__
    with pytest.raises(
        fx.ShapeError, match=rf"{name} has its latents along dim=2, got \(4, 4\); take a dim from -2 to 1"
    ):
        kind(4, 2)(torch.ones(4, 4))
    with pytest.raises(fx.ShapeError, match=rf"{name} has its latents along dim=-1, got \(\)"):
        kind(4, -1)(torch.tensor(1.0))
    for dim in (1.5, None, "last", True):
        with pytest.raises(
            ValueError, match=f"{name} needs a whole dim, the axis of the latents, got dim={dim!r}; -1 is"
        ):
            kind(4, dim)
    gate = kind(4, 0)
    if hasattr(gate, "latents"):
        with pytest.raises(fx.ShapeError, match=rf"{name} is made for latents=4 along dim=0, got \(8, 4\); make them"):
            gate(torch.ones(8, 4))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if hasattr(kind(4, -1), "choose")])
def test_sparse_codes_need_the_last_axis_and_say_so(kind):
    weights = [fx.DenseWeight(2, 3, 4) for _ in range(2)]
    with pytest.raises(ValueError, match="latents lie along the last axis, .* along dim=1; leave its dim at -1"):
        fx.CrossLayerEncoder(weights[0], kind(4, 1))
    coder = fx.Crosscoder(fx.CrossLayerEncoder(weights[0], kind(4, -1)), fx.CrossLayerDecoder(weights[1])).eval()
    coder.encoder.sparsifier.dim = 1
    assert f"dense: {type(coder.encoder.sparsifier).__name__} has its latents along dim=1, not along the last" in repr(
        coder
    )
    coder.backend = "sparse"
    with pytest.raises(TypeError, match="the sparse backend cannot run: .* along dim=1, not along the last"):
        coder(torch.randn(5, 2, 3))


@pytest.mark.parametrize("gate", CHOOSERS[:2], ids=repr)
@pytest.mark.parametrize("dim", [-1, 1])
def test_a_compiled_graph_sees_the_axis_too(gate, dim):
    torch.compiler.reset()
    gate = copy.deepcopy(gate)
    weights = [fx.DenseWeight(2, 3, 12) for _ in range(2)]
    coder = fx.Crosscoder(fx.CrossLayerEncoder(weights[0], gate), fx.CrossLayerDecoder(weights[1]), backend="sparse")
    gate.dim = dim
    compiled, x = torch.compile(coder, fullgraph=True, backend="aot_eager"), torch.randn(5, 2, 3)
    if dim == -1:
        torch.testing.assert_close(compiled(x), coder(x))
        return
    with pytest.raises(RuntimeError, match="the sparse backend cannot run: .* along dim=1, not along the last"):
        compiled(x)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_codes_have_the_dtype_of_the_pre_activations(kind, dtype, training, autocast):
    if {dtype, autocast} == {torch.float16, torch.bfloat16}:
        pytest.skip("torch joins no float16 under autocast to bfloat16, nor the other way round")
    gate, pre = kind(12, -1).train(training), torch.randn(5, 12, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        z = gate(pre)
    assert z.dtype == dtype
    z.sum().backward()
    assert pre.grad.dtype == dtype


@pytest.mark.parametrize("gate", CHOOSERS, ids=repr)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_sparse_codes_have_it_too(gate, dtypes, training, autocast):
    """That of `read @ table.T + bias`: under autocast too, where a product in bf16 meets a bias in float32."""
    gate = copy.deepcopy(gate).train(training)
    read, table, bias = (torch.randn(size, dtype=dtype) for size, dtype in zip(((5, 4), (12, 4), (12,)), dtypes))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert gate.choose(read, table, bias).values.dtype == torch.promote_types(dtypes[0], dtypes[2])


@pytest.mark.parametrize("gate", [*CHOOSERS, fx.BatchTopK(2, group="world")], ids=repr)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where", ["meta", "fake"])
def test_shapes_follow_without_numbers(gate, training, where):
    """Sparse codes whose number the numbers decide have room for all, as Codes may."""
    gate = copy.deepcopy(gate).train(training)
    sizes = (5, 12), (5, 4), (12, 4), (12,)
    if where == "meta":
        gate, (pre, read, table, bias) = gate.to("meta"), [torch.empty(size, device="meta") for size in sizes]
        z, codes = gate(pre), gate.choose(read, table, bias)
        written = sum_rows(codes, table)
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            pre, read, table, bias = (torch.empty(size) for size in sizes)
            z, codes = gate(pre), gate.choose(read, table, bias)
            written = sum_rows(codes, table)
    assert (z.shape, codes.shape, written.shape) == ((5, 12), (5, 12), (5, 4))
    assert len(codes.values) == len(codes.columns) <= 5 * 12
