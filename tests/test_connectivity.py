"""Weights whose latents read or write some layers only: against loops over their blocks, and as crosscoders."""

import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import block_sparse
from strategies import CLASSES, randn, seeds

from fmxnn import (
    BatchTopK,
    CPWeight,
    Crosscoder,
    CrossLayerDecoder,
    CrossLayerEncoder,
    DenseWeight,
    PlacedWeight,
    ShapeError,
    TensorRingWeight,
    causal_weight,
    check_weight,
    from_pretrained,
    sae_stack_weight,
    save_pretrained,
    windowed_weight,
)

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
makers, variants = pytest.mark.parametrize("maker", MAKERS), pytest.mark.parametrize("variant", VARIANTS)


def runs(variant, layers):
    """Which layers each share of the latents has."""
    return {
        "stack": [[i] for i in range(layers)],
        "causal": [list(range(i, layers)) for i in range(layers)],
        "windowed": [[i, i + 1] for i in range(layers - 1)],
    }[variant]


def made(variant, maker, layers=3, d_model=4, share=4):
    return VARIANTS[variant](MAKERS[maker], layers=layers, d_model=d_model, latents=share * len(runs(variant, layers))).double()


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
    assert_close(weight.to_dense(), block_sparse([(inner.to_dense(), [at, at + 1] if isinstance(at, int) else at)], 4, d_model))
    x = randn(2, 4, d_model).requires_grad_()
    weight.to_latents(x).sum().backward()
    assert torch.equal(x.grad != 0, (weight.to_dense() != 0).any(-1).expand(2, -1, -1))


@makers
def test_a_weakly_causal_crosscoder_is_saved_and_loaded_bit_for_bit(maker, tmp_path):
    coder = Crosscoder(CrossLayerEncoder(made("stack", maker), BatchTopK(2)), CrossLayerDecoder(made("causal", maker)))
    save_pretrained(coder, tmp_path / "saved")
    again, x = from_pretrained(tmp_path / "saved"), randn(6, 3, 4)
    assert torch.equal(again(x), coder.eval()(x))


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
    message = "causal_weight gives each of its 3 parts an equal share of the latents, got latents=10; take a multiple of 3"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        causal_weight(DenseWeight, layers=3, d_model=4, latents=10)
    message = "sae_stack_weight gives each of its 3 parts an equal share of the latents, got latents=0; take a multiple of 3"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sae_stack_weight(DenseWeight, layers=3, d_model=4, latents=0)
    with pytest.raises(ValueError, match=r"^windowed_weight needs a window of 1 to layers=3, got window=4$"):
        windowed_weight(DenseWeight, layers=3, d_model=4, latents=12, window=4)


def test_activations_and_codes_of_other_sizes_are_refused():
    weight = sae_stack_weight(DenseWeight, layers=3, d_model=4, latents=6)
    message = "the weight reads (..., layers=3, d_model=4), got (5, 4, 3); stack one activation per layer: torch.stack(hidden, dim=-2)"
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        weight.to_latents(torch.randn(5, 4, 3))
    with pytest.raises(ShapeError, match=f"^{re.escape('the weight writes codes of (..., latents=6), got (5, 4)')}$"):
        weight.to_layers(torch.randn(5, 4))
