"""Weights whose latents read or write some layers only: against loops over their blocks, and as crosscoders."""

import copy
import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import block_sparse, masked
from strategies import CLASSES, randn, seeds
from torch.utils._python_dispatch import TorchDispatchMode

from fmxnn import (
    BatchTopK,
    ConcatWeight,
    CPWeight,
    Crosscoder,
    CrossLayerDecoder,
    CrossLayerEncoder,
    DenseWeight,
    EinsumWeight,
    JumpReLU,
    Normalisation,
    Normalised,
    PlacedWeight,
    RaggedWeight,
    RestrictedWeight,
    ShapeError,
    SumWeight,
    TensorRingWeight,
    TopK,
    causal_weight,
    check_weight,
    fold,
    from_pretrained,
    gaussian_start,
    isometric_start,
    pad_layers,
    reconstruction_loss,
    sae_stack_weight,
    save_pretrained,
    tied_start,
    to_csr,
    unpad_layers,
    windowed_weight,
)
from fmxnn.sparse.tables import Tables
from fmxnn.training.trainer import AuxiliaryLoss, Trainer

assert_close = torch.testing.assert_close
MAKERS = {
    "dense": DenseWeight,
    "ring": partial(TensorRingWeight, ranks=(2, 3, 2)),
    "cp": partial(CPWeight, rank=3),
}
VARIANTS = {
    "stack": sae_stack_weight,
    "causal": causal_weight,
    "windowed": partial(windowed_weight, window=2),
}
CAUSAL, OWN = [[0, 1, 2], [1, 2], [2]], [[0], [1], [2]]
PAIRS = {
    "SAE stack": lambda make: (made("stack", make), made("stack", make)),
    "weakly causal": lambda make: (made("stack", make), made("causal", make)),
    "windowed": lambda make: (made("windowed", make, share=6), made("windowed", make, share=6)),
    "one factorisation, causal": lambda make: (
        RestrictedWeight(MAKERS[make](3, 4, 12), at=OWN),
        RestrictedWeight(MAKERS[make](3, 4, 12), at=CAUSAL),
    ),
    "scattered": lambda make: (
        RestrictedWeight(MAKERS[make](3, 4, 12), at=[[0, 2], [1]]),
        PlacedWeight(MAKERS[make](2, 4, 12), layers=3, at=[0, 2]),
    ),
    "ragged": lambda make: (
        RaggedWeight(MAKERS[make](3, 4, 12), widths=[2, 4, 3]),
        RaggedWeight(MAKERS[make](3, 4, 12), widths=[2, 4, 3]),
    ),
    "ragged causal": lambda make: (
        RaggedWeight(made("stack", make), widths=[2, 4, 3]),
        RaggedWeight(RestrictedWeight(MAKERS[make](3, 4, 12), at=CAUSAL), widths=[2, 4, 3]),
    ),
    "sum": lambda make: (
        SumWeight(MAKERS[make](3, 4, 12), DenseWeight(3, 4, 12)),
        ConcatWeight(two(make, 5), two(make, 7)),
    ),
    "ragged stack": lambda make: (ragged_stack(make), ragged_stack(make)),
    "layers to one": lambda make: (MAKERS[make](2, 5, 12), made("causal", make)),
}
makers, variants, pairs = (
    pytest.mark.parametrize(*pair) for pair in (("maker", MAKERS), ("variant", VARIANTS), ("pair", PAIRS))
)


def crosscoder(pair, maker, gate=None):
    reader, writer = PAIRS[pair](maker)
    return Crosscoder(CrossLayerEncoder(reader, gate or BatchTopK(2)), CrossLayerDecoder(writer)).double()


def ragged_stack(maker):
    """Per-layer SAEs on layers of 2, 4 and 3 coordinates, which stores no padding at all."""
    return ConcatWeight(
        *(PlacedWeight(MAKERS[maker](1, width, 4), layers=3, at=i, d_model=4) for i, width in enumerate([2, 4, 3]))
    )


def two(maker, latents):
    """The sum of a weight and a dense one."""
    return SumWeight(MAKERS[maker](3, 4, latents), DenseWeight(3, 4, latents))


def directions(layers, d_model, latents):
    """A weight without a table."""
    return EinsumWeight("latents d_model, latents layers", layers=layers, d_model=d_model, latents=latents)


def run(coder, x, backend):
    """Output, gradients of input and parameters, and buffers after one pass."""
    coder.backend = backend
    coder.zero_grad()
    for buffer in coder.buffers():
        buffer.fill_(-1.0 if coder.training else 0.25)
    x = x.detach().clone().requires_grad_()
    x_hat = coder(x)
    x_hat.pow(2).sum().backward()
    return [x_hat.detach(), x.grad, *(p.grad for p in coder.parameters()), *(b.clone() for b in coder.buffers())]


def runs(variant, layers):
    """Which layers each share of the latents has."""
    return {
        "stack": [[i] for i in range(layers)],
        "causal": [list(range(i, layers)) for i in range(layers)],
        "windowed": [[i, i + 1] for i in range(layers - 1)],
    }[variant]


def made(variant, maker, layers=3, d_model=4, share=4):
    return VARIANTS[variant](
        MAKERS[maker], layers=layers, d_model=d_model, latents=share * len(runs(variant, layers))
    ).double()


@makers
@variants
@given(seeds, st.integers(2, 4), st.integers(1, 3), st.integers(1, 3))
def test_each_variant_is_its_blocks_and_zeros(variant, maker, seed, layers, d_model, share):
    torch.manual_seed(seed)
    weight = made(variant, maker, layers, d_model, share)
    blocks = [(part.weight.to_dense(), at) for part, at in zip(weight.weights, runs(variant, layers), strict=True)]
    assert_close(weight.to_dense(), block_sparse(blocks, layers, d_model))


@makers
@variants
def test_each_variant_obeys_every_law(variant, maker):
    check_weight(made(variant, maker), classes=CLASSES)


def test_nothing_is_stored_for_absent_layers():
    stack, causal = (make(DenseWeight, layers=5, d_model=7, latents=20) for make in (sae_stack_weight, causal_weight))
    assert sum(p.numel() for p in stack.parameters()) == 20 * 7
    assert sum(p.numel() for p in causal.parameters()) == 4 * 7 * (5 + 4 + 3 + 2 + 1)


@given(seeds, st.sampled_from([0, 1, [0, 2], [1, 3]]), st.integers(3, 5))
def test_a_placed_weight_reads_and_writes_its_corner_of_the_stack(seed, at, d_model):
    torch.manual_seed(seed)
    inner = CPWeight(2, 3, 5, rank=2).double()
    weight = PlacedWeight(inner, layers=4, at=at, d_model=d_model)
    assert_close(
        weight.to_dense(), block_sparse([(inner.to_dense(), [at, at + 1] if isinstance(at, int) else at)], 4, d_model)
    )
    x = randn(2, 4, d_model).requires_grad_()
    weight.to_latents(x).sum().backward()
    assert torch.equal(x.grad != 0, (weight.to_dense() != 0).any(-1).expand(2, -1, -1))


@pairs
@given(
    seeds, st.sampled_from(list(MAKERS)), st.sampled_from(["batch", "each", "above"]), st.booleans(), st.integers(0, 7)
)
def test_the_sparse_path_is_the_dense_path(pair, seed, maker, rule, training, tokens):
    torch.manual_seed(seed)
    coder = crosscoder(pair, maker, {"batch": BatchTopK(2), "each": TopK(2), "above": JumpReLU(12)}[rule]).train(
        training
    )
    torch.nn.init.normal_(coder.encoder.bias)
    x = randn(tokens, coder.encoder.weight.layers, coder.encoder.weight.d_model)
    for ours, theirs in zip(run(coder, x, "sparse"), run(coder, x, "dense"), strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    z = coder.encoder(x)
    assert_close(coder.decoder(to_csr(z)), coder.decoder(z), rtol=1e-12, atol=1e-12)


@makers
@pairs
def test_every_connectivity_is_saved_and_loaded_bit_for_bit(pair, maker, tmp_path):
    coder = crosscoder(pair, maker)
    save_pretrained(coder, tmp_path / "saved")
    again, x = from_pretrained(tmp_path / "saved"), randn(6, coder.encoder.weight.layers, coder.encoder.weight.d_model)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(again.state_dict().values(), coder.state_dict().values(), strict=True)
    )
    assert torch.equal(
        copy.deepcopy(again)(x), coder.eval()(x)
    )  # a copy, for a file's tensors are not aligned and may be summed in another order


@makers
@pairs
@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_every_connectivity_trains(pair, maker, backend):
    coder = gaussian_start(crosscoder(pair, maker, BatchTopK(4)), decoder_std=0.3)
    coder.backend = backend
    hidden = randn(64, 3)
    x, y = (
        torch.einsum("tr,rld->tld", hidden, randn(3, weight.layers, weight.d_model))
        for weight in (coder.encoder.weight, coder.decoder.weight)
    )
    optimizer, losses = torch.optim.Adam(coder.parameters(), lr=0.02), []
    for _ in range(30):
        loss = reconstruction_loss(y, coder(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made meanwhile holds."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_a_step_makes_nothing_of_the_size_of_the_dense_weights(backend):
    axes = {"layers": 6, "d_model": 8, "latents": 600}
    coder = Crosscoder(
        CrossLayerEncoder(sae_stack_weight(DenseWeight, **axes), BatchTopK(3)),
        CrossLayerDecoder(causal_weight(DenseWeight, **axes)),
    )
    coder.backend = backend
    with Largest() as largest:
        coder(torch.randn(5, 6, 8)).sum().backward()
    assert largest.numel <= 100 * 6 * 8  # the first part's atoms; one dense weight is 28,800


def test_the_auxiliary_loss_reads_dead_latents_at_several_tables():
    losses = []
    for backend in ("dense", "sparse"):
        torch.manual_seed(0)
        coder = crosscoder("weakly causal", "dense").float()
        coder.backend = backend
        trainer = Trainer(
            coder, torch.optim.Adam(coder.parameters(), lr=0.01), auxiliary=AuxiliaryLoss(k=4, weight=1.0, after=1)
        )
        x = torch.randn(16, 3, 4)
        losses.append([trainer.step(x)["loss"].item() for _ in range(6)])
    torch.testing.assert_close(*losses)


def test_a_part_without_a_table_stays_dense_and_is_named():
    weight = ConcatWeight(SumWeight(directions(2, 3, 4)), DenseWeight(2, 3, 4))
    coder = Crosscoder(CrossLayerEncoder(weight, TopK(2)), CrossLayerDecoder(DenseWeight(2, 3, 8)))
    assert "backend='auto', dense: EinsumWeight has no table" in repr(coder)
    x = torch.randn(4, 2, 3)
    assert_close(coder.encode(x, layout=torch.sparse_csr).to_dense(), coder.encode(x))
    z = coder.encode(x)
    assert_close(weight.to_layers(to_csr(z)), weight.to_layers(z))


@pytest.mark.slow
@pairs
def test_every_connectivity_compiles_as_one_graph(pair):
    torch.compiler.reset()
    coder = crosscoder(pair, "ring")
    coder.backend = "sparse"
    compiled, x = (
        torch.compile(coder, fullgraph=True, backend="aot_eager"),
        randn(6, coder.encoder.weight.layers, coder.encoder.weight.d_model),
    )
    results = []
    for call in (coder, compiled):
        coder.zero_grad()
        x_hat = call(x)
        x_hat.pow(2).sum().backward()
        results.append([x_hat.detach(), *(p.grad.clone() for p in coder.parameters())])
    assert_close(*results)


def test_the_operator_at_several_tables_keeps_torchs_contract():
    read, bias = torch.randn(6, 5, requires_grad=True), torch.randn(50, requires_grad=True)
    tables = [torch.randn(20, 3, requires_grad=True), torch.randn(30, 2, requires_grad=True)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for rule, amount in (("batch", 12), ("each", 2)):
        arguments = (read, tables, bias, torch.zeros(()), rule, amount, False, "")
        results = torch.library.opcheck(torch.ops.fmxnn.choose_at_tables.default, arguments, test_utils=checks)
        assert results == dict.fromkeys(checks, "SUCCESS")


@given(seeds, st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3))
def test_tables_are_one_block_diagonal_table(seed, sizes):
    torch.manual_seed(seed)
    tables = Tables(tuple(randn(*size) for size in sizes))
    whole = torch.block_diag(*tables.blocks)
    latents, bonds = tables.shape
    assert (latents, bonds) == whole.shape
    z, h, score = randn(2, 5, latents), randn(5, bonds), randn(latents, 1)
    assert_close(z @ tables, z @ whole)
    assert_close(h @ tables.T, h @ whole.T)
    assert_close(z @ (tables * score), z @ (whole * score))
    index = torch.arange(latents)[torch.rand(latents) < 0.5]
    assert_close(h @ tables[index].T, h @ whole[index].T)
    assert tables.to(torch.float32).dtype == torch.float32
    if latents > 1:
        with pytest.raises(IndexError) as error:
            tables[torch.tensor([1, 0])]
        assert (
            str(error.value)
            == "the rows of several tables are taken in ascending order of latents; sort the index first"
        )


@given(
    seeds,
    st.sampled_from(list(MAKERS) + ["two carriers"]),
    st.lists(st.sets(st.integers(0, 2), min_size=1).map(sorted), min_size=1, max_size=3),
)
def test_a_restricted_weight_is_the_weight_with_zeros_elsewhere(seed, maker, groups):
    torch.manual_seed(seed)
    inner = {**MAKERS, "two carriers": directions}[maker](3, 4, 2 * len(groups)).double()
    weight = RestrictedWeight(inner, at=groups)
    assert_close(
        weight.to_dense(), masked(inner.to_dense().detach(), lambda layer, _, latent: layer in groups[latent // 2])
    )
    check_weight(weight, classes=CLASSES)
    twin, x = copy.deepcopy(weight), randn(5, 3, 4)
    twin.scale_(2.0)
    assert_close(twin.to_latents(x), 2 * weight.to_latents(x))


@pytest.mark.parametrize("inner", [*MAKERS, *VARIANTS, "sum", "two carriers"])
@given(seeds, st.permutations([1, 2, 4]))
def test_padding_is_neither_read_nor_written(inner, seed, widths):
    torch.manual_seed(seed)
    plain = {**MAKERS, "sum": lambda *axes: two("ring", axes[-1]), "two carriers": directions}
    inner = made(inner, "ring") if inner in VARIANTS else plain[inner](3, 4, 6).double()
    weight = RaggedWeight(inner, widths=widths)
    assert_close(
        weight.to_dense(), masked(inner.to_dense().detach(), lambda layer, coordinate, _: coordinate < widths[layer])
    )
    check_weight(weight, classes=CLASSES)
    x = pad_layers([randn(2, 5, width) for width in widths])
    spoilt = x.clone()
    for layer, width in enumerate(widths):
        assert not x[..., layer, width:].any()
        spoilt[..., layer, width:] = torch.nan
    spoilt.requires_grad_()
    z = weight.to_latents(spoilt)
    assert_close(z, weight.to_latents(x))
    (z.sum() + weight.to_layers(z).sum()).backward()
    assert all(p.grad.isfinite().all() for p in weight.parameters())
    for layer, width in enumerate(widths):
        assert not spoilt.grad[..., layer, width:].any()


def test_padding_adds_nothing_to_the_loss_and_nothing_to_the_bias():
    parts = [randn(7, width) for width in (2, 4, 3)]
    x, coder = pad_layers(parts), crosscoder("ragged", "ring")
    x_hat = coder(x)
    own = [(a - b).pow(2).sum(-1).mean() for a, b in zip(parts, unpad_layers(x_hat, [2, 4, 3]))]
    assert_close(reconstruction_loss(x, x_hat), torch.stack(own).mean())
    reconstruction_loss(x, x_hat).backward()
    assert not coder.decoder.bias.grad[0, 2:].any()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from([(), (3,), (2, 1)]))
def test_unpadding_undoes_padding(widths, batch):
    parts = [randn(*batch, width) for width in widths]
    assert_close(unpad_layers(pad_layers(parts), widths), parts)


@pairs
@pytest.mark.parametrize("start", [gaussian_start, tied_start, isometric_start])
def test_starts_reach_every_part(pair, start):
    reader = PAIRS[pair]("cp")[0]
    coder = Crosscoder(CrossLayerEncoder(reader, TopK(2)), CrossLayerDecoder(copy.deepcopy(reader))).double()
    if start is isometric_start and isinstance(reader, SumWeight):
        with pytest.raises(
            ValueError,
            match="^isometric_start needs a factorised weight, got SumWeight; use tied_start, or .*isometric_",
        ):
            start(coder)
        return
    before = copy.deepcopy(coder.state_dict())
    start(coder)
    assert all(
        not torch.equal(before[name], tensor) for name, tensor in coder.state_dict().items() if "factors" in name
    )
    if start is not gaussian_start:
        norm = coder.decoder.weight.to_dense().flatten(0, 1).norm(dim=0).mean()
        assert_close(norm.item(), 0.1)


@pairs
@given(seeds, st.sampled_from(list(MAKERS)))
def test_a_normalisation_folds_into_every_connectivity(pair, seed, maker):
    torch.manual_seed(seed)
    coder = crosscoder(pair, maker, TopK(3)).eval()
    read, written = (
        Normalisation.of(10 ** (2 * torch.rand(weight.layers).double() - 1), randn(weight.layers, weight.d_model))
        for weight in (coder.encoder.weight, coder.decoder.weight)
    )
    normalised, x = (
        Normalised(coder, read, output=written),
        randn(5, coder.encoder.weight.layers, coder.encoder.weight.d_model),
    )
    assert_close(fold(normalised)(x), normalised(x), rtol=1e-10, atol=1e-10)


def test_one_weight_at_two_layers_cannot_be_scaled_twice():
    shared = DenseWeight(1, 4, 5)
    weight = ConcatWeight(PlacedWeight(shared, layers=2, at=0), PlacedWeight(shared, layers=2, at=1))
    before = weight.to_dense().detach().clone()
    assert_close(weight.scale_(3.0).to_dense(), 3 * before)
    coder = Crosscoder(CrossLayerEncoder(weight, TopK(2)), CrossLayerDecoder(DenseWeight(2, 4, 10)))
    fold(Normalised(coder, Normalisation.of(torch.tensor([2.0, 2.0]), torch.zeros(2, 4))))
    message = (
        "one weight stands at several layers, each of another scale; "
        "give each place a weight of its own: copy.deepcopy(weight)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fold(Normalised(coder, Normalisation.of(torch.tensor([2.0, 3.0]), torch.zeros(2, 4))))


@pytest.mark.parametrize("at", [-1, 3, [0], [0, 4], [1, 0], [1, 1], [0, 1, 2]])
def test_places_that_do_not_fit_are_refused(at):
    message = f"PlacedWeight needs 2 places for a weight of layers=2, ascending and in range(4), got at={at}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PlacedWeight(DenseWeight(2, 3, 5), layers=4, at=at)


def test_a_stack_narrower_than_its_part_is_refused():
    message = "PlacedWeight reads the first 3 coordinates of each layer, got d_model=2; take the largest of all layers"
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        PlacedWeight(DenseWeight(2, 3, 5), layers=4, at=0, d_model=2)


def test_latents_that_do_not_divide_are_refused():
    message = (
        "causal_weight gives each of its 3 parts an equal share of the latents, got latents=10; take a multiple of 3"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        causal_weight(DenseWeight, layers=3, d_model=4, latents=10)
    message = "sae_stack_weight needs a whole latents >= 1, got latents=0"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sae_stack_weight(DenseWeight, layers=3, d_model=4, latents=0)
    with pytest.raises(ValueError, match=r"^windowed_weight needs a window of 1 to layers=3, got window=4$"):
        windowed_weight(DenseWeight, layers=3, d_model=4, latents=12, window=4)


def test_activations_and_codes_of_other_sizes_are_refused():
    weight = sae_stack_weight(DenseWeight, layers=3, d_model=4, latents=6)
    message = (
        "the weight reads (..., layers=3, d_model=4), got (5, 4, 3); "
        "stack one activation per layer: torch.stack(hidden, dim=-2)"
    )
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        weight.to_latents(torch.randn(5, 4, 3))
    with pytest.raises(ShapeError, match=f"^{re.escape('the weight writes codes of (..., latents=6), got (5, 4)')}$"):
        weight.to_layers(torch.randn(5, 4))


def test_groups_that_do_not_fit_are_refused():
    for at in ([[]], [[1, 0]], [[0, 0]], [[0, 3]], [[-1]]):
        message = f"RestrictedWeight needs layers in range(3) for each group, ascending, got {at[0]}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            RestrictedWeight(DenseWeight(3, 4, 6), at=at)
    message = "RestrictedWeight makes equal groups, got latents=7 for 3 groups; take a multiple"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RestrictedWeight(DenseWeight(3, 4, 7), at=CAUSAL)
    message = "RestrictedWeight needs a factorised weight, got ConcatWeight; place its parts: PlacedWeight"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        RestrictedWeight(ConcatWeight(DenseWeight(3, 4, 6)), at=CAUSAL)


def test_widths_and_layers_that_do_not_fit_are_refused():
    for widths in ([4, 4], [3, 3, 3], [0, 4, 4], [4, 5, 4]):
        message = f"RaggedWeight needs one width for each of layers=3, the largest d_model=4, got {widths}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            RaggedWeight(DenseWeight(3, 4, 6), widths=widths)
    with pytest.raises(
        ValueError, match=re.escape("pad_layers stacks one tensor of (..., d_model) for each layer, got none")
    ):
        pad_layers([])
    message = (
        "pad_layers stacks the same tokens of every layer, got batch axes [(2,), (3,)]; give all layers the same ones"
    )
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        pad_layers([torch.zeros(2, 4), torch.zeros(3, 4)])
    with pytest.raises(
        ShapeError, match=f"^{re.escape('unpad_layers takes (..., layers=2, d_model>=5), got (3, 2, 4)')}$"
    ):
        unpad_layers(torch.zeros(3, 2, 4), [5, 3])
    message = (
        "the weight reads (..., layers=3, d_model=4), got (2, 4); "
        "stack one activation per layer: torch.stack(hidden, dim=-2)"
    )
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        RaggedWeight(DenseWeight(3, 4, 6), widths=[4, 4, 4]).to_latents(torch.zeros(2, 4))
