import re

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, randn, seeds, sizes

from fmxnn import Normalisation, ShapeError, fit_normalisation

assert_close = torch.testing.assert_close


@st.composite
def normalisations(draw, layers=None, d_model=None):
    """Scales from 0.1 to 100, a mean of any sign."""
    torch.manual_seed(draw(seeds))
    layers, d_model = layers or draw(sizes), d_model or draw(sizes)
    return Normalisation.of(10 ** (3 * torch.rand(layers, dtype=torch.float64) - 1), randn(layers, d_model))


@st.composite
def activations(draw):
    """Tokens whose layers differ in size and centre, and a cut of them into batches."""
    torch.manual_seed(draw(seeds))
    tokens, layers, d_model = draw(st.integers(2, 9)), draw(sizes), draw(sizes)
    x = 30 * randn(layers, d_model) + 10 ** (3 * torch.rand(layers, 1, dtype=torch.float64) - 1) * randn(
        tokens, layers, d_model
    )
    return x, x.tensor_split(sorted(draw(st.lists(st.integers(0, tokens), max_size=3))))


@given(normalisations(), batches)
def test_it_is_its_formula_and_inverse_undoes_it(normalisation, batch):
    x = randn(*batch, normalisation.layers, normalisation.d_model)
    assert_close(normalisation(x), reference.normalise(x, normalisation.scale, normalisation.mean))
    assert normalisation(x).shape == normalisation.inverse(x).shape == x.shape
    assert_close(normalisation.inverse(normalisation(x)), x)
    assert_close(normalisation.inverted()(x), normalisation.inverse(x))
    assert_close(normalisation.inverted().inverse(x), normalisation(x))


def test_a_fresh_one_changes_nothing():
    x = torch.randn(4, 2, 3)
    assert torch.equal(Normalisation(2, 3)(x), x)


@given(activations(), st.sampled_from([None, 0.5, 10.0]))
def test_fitting_finds_the_mean_and_the_scale_of_each_layer_however_the_tokens_are_cut(drawn, target):
    x, parts = drawn
    found = fit_normalisation(parts, target=target)
    length = x.shape[-1] ** 0.5 if target is None else target
    scale, mean = reference.normalisation(x, length)
    assert_close(found.scale, scale)
    assert_close(found.mean, mean)
    normal = found(x)
    assert_close(normal.mean(0), torch.zeros_like(mean))
    assert_close(normal.pow(2).sum(-1).mean(0).sqrt(), torch.full_like(scale, length))


@given(activations())
def test_uncentred_fitting_scales_alone(drawn):
    x, parts = drawn
    found = fit_normalisation(parts, centred=False)
    assert torch.equal(found.mean, torch.zeros_like(x[0]))
    assert_close(found.scale, (x.shape[-1] / x.pow(2).sum(-1).mean(0)).sqrt())


def test_a_mean_a_million_times_the_spread_costs_no_digits():
    x = 1e6 + randn(1000, 2, 3)
    scale, _ = reference.normalisation(x, 3**0.5)
    assert_close(fit_normalisation(x.split(10)).scale, scale, rtol=1e-9, atol=0)


def test_by_hand():
    found = fit_normalisation([torch.tensor([[[2.0, 0.0]], [[0.0, 4.0]]])])  # mean (1, 2), distances sqrt(5)
    assert_close(found.mean, torch.tensor([[1.0, 2.0]]))
    assert_close(found.scale, torch.tensor([(2 / 5) ** 0.5]))


def test_numbers_stay_float32_or_wider_and_activations_keep_their_type():
    normalisation = fit_normalisation([torch.randn(8, 2, 3).bfloat16()])
    before = normalisation.mean.clone()
    assert before.dtype == torch.float32
    assert torch.equal(normalisation.bfloat16().mean, before)
    x = torch.randn(4, 2, 3).bfloat16()
    assert normalisation(x).dtype == normalisation.inverse(x).dtype == torch.bfloat16
    assert normalisation.double().scale.dtype == torch.float64


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (
            lambda: Normalisation(0, 3),
            ValueError,
            "Normalisation needs a whole layers >= 1, got layers=0",
        ),
        (
            lambda: Normalisation(2, 3)(torch.zeros(4, 3, 2)),
            ShapeError,
            "the normalisation is made for (..., layers=2, d_model=3), got (4, 3, 2); "
            "stack one activation per layer: torch.stack(hidden, dim=-2)",
        ),
        (
            lambda: Normalisation.of(torch.ones(3), torch.zeros(2, 3)),
            ShapeError,
            "Normalisation.of takes scale (layers) and mean (layers, d_model), got (3,) and (2, 3)",
        ),
        (
            lambda: Normalisation.of(torch.tensor([0.0, 1.0, torch.inf, -2.0]), torch.zeros(4, 3)),
            ValueError,
            "a normalisation needs finite scales > 0, got [0.0, inf, -2.0] at layers axis [0, 2, 3]; "
            "1 leaves a layer as it is",
        ),
        (
            lambda: Normalisation.of(torch.ones(2), torch.tensor([[0.0, 1.0], [torch.nan, 0.0]])),
            ValueError,
            "a normalisation needs finite means, got NaN or infinity at layers axis [1]; "
            "0 leaves a coordinate as it is",
        ),
        (lambda: fit_normalisation([]), ValueError, "fit_normalisation needs activations, got no tokens"),
        (
            lambda: fit_normalisation([torch.zeros(0, 2, 3)]),
            ValueError,
            "fit_normalisation needs activations, got no tokens",
        ),
        (
            lambda: fit_normalisation([torch.zeros(4, 3)]),
            ShapeError,
            "batch 0 of the activations is (4, 3), expected (..., layers, d_model); one tensor goes in as [x]",
        ),
        (
            lambda: fit_normalisation([torch.zeros(4, 2, 3), torch.zeros(4, 3, 2)]),
            ShapeError,
            "batch 1 of the activations is (4, 3, 2), expected (..., layers=2, d_model=3); one tensor goes in as [x]",
        ),
        (
            lambda: fit_normalisation([torch.tensor([[[1.0], [7.0]], [[2.0], [7.0]]])]),
            ValueError,
            "fit_normalisation needs finite activations that vary at every layer, got a root mean square norm of [0.0] "
            "at layers axis [1] over 2 tokens; leave these layers out",
        ),
        (
            lambda: fit_normalisation([torch.tensor([[[1.0], [torch.nan]], [[2.0], [7.0]]])]),
            ValueError,
            "fit_normalisation needs finite activations that vary at every layer, got a root mean square norm of [nan] "
            "at layers axis [1] over 2 tokens; leave these layers out",
        ),
        (
            lambda: fit_normalisation([torch.randn(4, 1, 3)], target=0.0),
            ValueError,
            "fit_normalisation needs a finite target > 0, the root mean square norm of each layer, got target=0.0",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(act, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        act()


def test_the_inverse_loses_no_digit_of_float32():
    read = Normalisation.of(torch.tensor([3.0, 7.0]), torch.tensor([[1e4, 0.1], [1e-4, -0.3]]))
    again = read.inverted().inverted()
    assert again.scale.dtype == again.mean.dtype == torch.float64
    assert torch.equal(again.scale.float(), read.scale)
    assert torch.equal(again.mean.float(), read.mean)
