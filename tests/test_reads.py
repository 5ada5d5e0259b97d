"""A weight over further axes is one over the flat axes, to everything that reads `layers d_model`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import CLASSES, batches, randn, seeds, sizes

from fmxnn import (
    BatchTopK,
    Crosscoder,
    CrossLayerDecoder,
    CrossLayerEncoder,
    DenseWeight,
    EinsumWeight,
    Normalisation,
    PatternError,
    RestrictedWeight,
    ShapeError,
    TensorRingWeight,
    build,
    check_weight,
    describe,
    fit_weight,
    fold,
    from_pretrained,
    isometric_start,
    relative_error,
    save_pretrained,
    unfold,
)

READS = "layers positions d_model"
PATTERNS = (
    "latents layers positions d_model",
    "latents r, layers positions r, d_model r",
    "latents r s, layers r, positions d_model s",
    "latents positions, latents layers d_model",
    "latents r, d_model r t, positions t, layers r",
    "layers, latents positions r, d_model r",
)
axes = {"layers": 2, "positions": 3, "d_model": 4, "latents": 5, "r": 3, "s": 2, "t": 2}


def made(pattern, **given):
    words = set(pattern.replace(",", " ").split())
    return EinsumWeight(pattern, reads=READS, **{w: (axes | given)[w] for w in words}).double()


@st.composite
def read_weights(draw):
    torch.manual_seed(draw(seeds))
    return made(draw(st.sampled_from(PATTERNS)), **{word: draw(sizes) for word in axes})


def full(weight):
    """`layers positions d_model latents` by torch.einsum."""
    letters = dict(zip(axes, "lpdnrst", strict=True))
    equation = ",".join("".join(letters[word] for word in term) for term in weight.terms)
    return torch.einsum(f"{equation}->lpdn", *weight.factors)


@given(read_weights(), batches)
def test_reading_and_writing_are_sums_over_the_named_axes(weight, batch):
    w = full(weight)
    x, z = randn(*batch, *w.shape[:3]), randn(*batch, weight.latents)
    assert (weight.layers, weight.d_model) == (w.shape[0], w.shape[1] * w.shape[2])
    torch.testing.assert_close(weight.to_latents(weight.flat(x)), torch.einsum("...lpd,lpdn->...n", x, w))
    torch.testing.assert_close(weight.named(weight.to_layers(z)), torch.einsum("...n,lpdn->...lpd", z, w))
    assert torch.equal(weight.named(weight.flat(x)), x)
    torch.testing.assert_close(weight.to_dense(), w.flatten(1, 2))
    one = weight.at(-1)
    torch.testing.assert_close(one.to_dense(), w[-1].flatten(0, 1))
    torch.testing.assert_close(
        one.to_latents(weight.flat(x)[..., -1, :]), torch.einsum("...pd,pdn->...n", x[..., -1, :, :], w[-1])
    )


@given(read_weights())
def test_it_obeys_the_laws_of_every_weight(weight):
    check_weight(weight, classes=CLASSES)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_is_fitted_as_any_pattern(pattern):
    target = made(pattern)
    fit = fit_weight(target, made(pattern), sweeps=100, tries=3)
    assert fit.error < 0.2
    assert fit.error == relative_error(target, fit.weight)
    dense = DenseWeight(2, 12, 5).double()
    assert fit_weight(dense, made(PATTERNS[0])).error < 1e-6


def crosscoder(**more):
    weight = made("latents r, layers positions r, d_model r", **more)
    return Crosscoder(CrossLayerEncoder(weight, BatchTopK(2)), CrossLayerDecoder(weight)).double()


@given(seeds)
def test_a_crosscoder_reads_and_writes_the_named_axes(seed):
    torch.manual_seed(seed)
    coder, x = crosscoder(), randn(6, 2, 3, 4)
    weight = coder.encoder.weight
    dense = coder.materialize()
    torch.testing.assert_close(coder(weight.flat(x)), dense(weight.flat(x)))
    coder.backend = "sparse"
    torch.testing.assert_close(coder(weight.flat(x)), dense(weight.flat(x)))
    assert weight.named(coder(weight.flat(x))).shape == x.shape


def test_it_is_started_folded_restricted_and_saved(tmp_path):
    coder = isometric_start(crosscoder(r=5))
    small = coder.decoder.weight.from_bonds(torch.eye(5, dtype=torch.float64)).flatten(1)
    gram = small @ small.T
    torch.testing.assert_close(gram / gram[0, 0], torch.eye(5, dtype=torch.float64))  # up to one scale
    normalisation = Normalisation(2, 12).double()
    normalisation.scale.fill_(2.0)
    coder, x = coder.eval(), randn(4, 2, 12)
    torch.testing.assert_close(fold(unfold(coder, normalisation))(x), coder(x))
    restricted = RestrictedWeight(coder.encoder.weight, at=[[1]])
    torch.testing.assert_close(restricted.to_dense()[1], coder.encoder.weight.to_dense()[1])
    save_pretrained(coder, tmp_path)
    again = from_pretrained(tmp_path)
    assert torch.equal(again(x), coder(x))
    assert again.encoder.weight.reads == READS


def test_the_usual_axes_are_not_in_a_recipe():
    assert "reads" not in describe(TensorRingWeight(2, 3, 4))["TensorRingWeight"]
    plain = describe(EinsumWeight("latents layers d_model", layers=2, d_model=3, latents=4))
    assert plain == {"EinsumWeight": {"pattern": "latents layers d_model", "layers": 2, "d_model": 3, "latents": 4}}
    assert build(plain, [EinsumWeight]).reads == "layers d_model"
    assert "reads='layers positions d_model'" in repr(made(PATTERNS[0]))


@pytest.mark.parametrize(
    ("pattern", "reads", "words"),
    [
        ("latents layers heads", "layers d_model", ["the axes layers, d_model and latents", "has no d_model"]),
        ("latents layers d_model", "layers heads d_model", ["layers, heads, d_model and latents", "has no heads"]),
        ("latents layers d_model", "d_model layers", ["layers first", "'d_model layers'"]),
        ("latents layers d_model", "layers", ["one or more after it", "'layers'"]),
        ("latents layers d_model", "layers d_model latents", ["layers first", "latents"]),
        ("latents layers d_model", "layers, d_model", ["layers first", "write 'layers positions d_model'"]),
        ("latents layers d_model", "", ["empty term"]),
        ("latents layers d_model", "layers layers", ["repeats the axis 'layers'"]),
        ("latents layers d_model", "... layers d_model", ["layers first"]),
    ],
)
def test_words_that_fit_no_axis_are_one_sentence(pattern, reads, words):
    sizes = dict.fromkeys(pattern.split(), 2)
    with pytest.raises(PatternError) as error:
        EinsumWeight(pattern, reads=reads, **sizes)
    for word in words:
        assert word in str(error.value)


def test_other_shapes_are_one_sentence():
    weight = made(PATTERNS[0])
    with pytest.raises(
        ShapeError, match=r"flat takes \(\.\.\., layers=2, positions=3, d_model=4\), got \(5, 2, 4, 3\)"
    ):
        weight.flat(torch.zeros(5, 2, 4, 3))
    with pytest.raises(ShapeError, match=r"layers=2, d_model=12.*got \(5, 2, 4\)"):
        weight.named(torch.zeros(5, 2, 4))
