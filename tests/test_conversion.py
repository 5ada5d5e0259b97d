from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import KNOWN, factorized, randn, seeds, weights
from torch import nn
from torch.testing import assert_close

import fmxnn as fx
from fmxnn.activations.harvesting import harvest
from fmxnn.coders import conversion
from fmxnn.training import Trainer
from fmxnn.weights import fitting, least_squares

CHAINS = (
    "latents layers d_model",
    "latents r, layers d_model r",
    "latents r s, d_model r, layers s",
    "latents r, p q r, d_model q, layers p",
)
TINY = Path(__file__).parents[1] / "examples" / "tiny-lm"
ROUNDING = 1e-9  # of errors that are differences of numbers of the size of one


def drawn(pattern, **given):
    words = dict.fromkeys(pattern.replace(",", " ").split())
    sizes = {"layers": 4, "d_model": 6, "latents": 9, **given}
    return fx.EinsumWeight(pattern, **{word: sizes.get(word, 2) for word in words}).double()


@st.composite
def pairs(draw):
    """A target of any kind and a factorised weight of the same sizes."""
    target = draw(weights())
    return target, draw(factorized(target.layers, target.d_model, target.latents))


@given(pairs())
def test_the_relative_error_is_that_of_the_dense_forms(pair):
    target, weight = (each.to_dense() for each in pair)
    assert_close(torch.tensor(fx.relative_error(*pair)).double(), ((target - weight).norm() / target.norm()).detach())


@given(pairs(), st.sampled_from([(0, 2), (0, 10), (least_squares.LARGEST, 10)]))
def test_the_error_never_rises_whatever_the_pattern_and_however_a_factor_is_solved(pair, how):
    target, weight = pair
    before, kept = fx.relative_error(*pair), (least_squares.LARGEST, least_squares._STEPS)
    least_squares.LARGEST, least_squares._STEPS = how
    try:
        fit = fx.fit_weight(target, weight, sweeps=4, tries=0, tolerance=0)
    finally:
        least_squares.LARGEST, least_squares._STEPS = kept
    assert fit.weight is weight
    assert all(later <= sooner + ROUNDING for sooner, later in pairwise((before, *fit.errors)))
    assert_close(fit.error, fx.relative_error(target, weight), atol=ROUNDING, rtol=ROUNDING)
    assert_close(fit.errors[-1], fit.error, atol=ROUNDING, rtol=ROUNDING)


@given(pairs(), st.sampled_from([0.02, 0.5]))
def test_a_try_ends_where_a_sweep_gains_too_little(pair, tolerance):
    errors = fx.fit_weight(*pair, sweeps=6, tolerance=tolerance).errors
    gains = [later < (1 - tolerance) * sooner for sooner, later in pairwise(errors)]
    assert all(gains[:-1])
    assert len(errors) == 6 or not gains[-1]


@given(pairs())
def test_after_a_sweep_the_factor_solved_last_cannot_be_bettered(pair):
    target, weight = pair
    order = sorted(range(len(weight.terms)), key=lambda i: "latents" not in weight.terms[i])
    fx.fit_weight(target, weight, sweeps=1)
    loss = (target.to_dense().detach() - weight.to_dense()).square().sum() / target.to_dense().detach().square().sum()
    (slope,) = torch.autograd.grad(loss, weight.factors[order[-1]])
    steepest = (
        slope.norm() * weight.factors[order[-1]].norm()
    ).detach()  # a share of the error, whatever the size of the factor
    assert_close(steepest, torch.zeros((), dtype=torch.float64))


@given(st.sampled_from(CHAINS), seeds)
def test_a_chain_of_cuts_finds_a_weight_of_its_rank_at_once(pattern, seed):
    torch.manual_seed(seed)
    target, weight = drawn(pattern), drawn(pattern)
    assert fx.fit_weight(target, weight, sweeps=2).error < 1e-8


@given(st.sampled_from(CHAINS), st.data())
def test_a_chain_is_cut_whatever_its_sizes(pattern, data):
    """The core of a Tucker weight is cut after the matrices before it, though alone it would lose less."""
    words = sorted(set(pattern.replace(",", " ").split()))
    weight = fx.EinsumWeight(pattern, **{word: data.draw(st.integers(1, 7)) for word in words})
    assert len(fitting._cuts(weight)) == len(weight.terms) - 1


def test_one_sweep_from_truncated_svds_finds_a_tucker_weight():
    sizes = {"layers": 4, "d_model": 16, "latents": 64, "p": 2, "q": 5, "r": 4}
    for seed in range(4):
        torch.manual_seed(seed)
        target, weight = (fx.EinsumWeight(CHAINS[3], **sizes).double() for _ in range(2))
        assert fx.fit_weight(target, weight, sweeps=1).error < 1e-12
        assert (
            max(torch.linalg.cond(weight.factors[i].flatten(0, -2)).item() for i in (2, 3)) < 1 + 1e-9
        )  # no digits lost in float32


def test_an_unfolding_too_tall_for_a_gram_matrix_starts_from_random_directions(monkeypatch):
    target = fx.DenseWeight(2, 6, 30).double()
    make = partial(fx.TensorRingWeight, 2, 6, 30, ranks=(2, 6, 4))
    cut = fx.fit_weight(target, make().double(), sweeps=1).error
    monkeypatch.setattr(fitting, "LARGEST", 11)  # 2 x 6 rows
    monkeypatch.setattr(torch.linalg, "eigh", None)
    assert cut < fx.fit_weight(target, make().double(), sweeps=1).error < 1


@settings(max_examples=10)
@given(st.sampled_from(KNOWN[2:9]), seeds)
def test_a_weight_of_the_patterns_rank_is_found_exactly(pattern, seed):
    torch.manual_seed(seed)
    target, weight = drawn(pattern), drawn(pattern)
    for _ in range(20):  # a ring may end in a local minimum; another try is then the way out
        if fx.fit_weight(target, weight, sweeps=300, tolerance=1e-4).error < 1e-2:
            break
    assert fx.fit_weight(target, weight, sweeps=500, tries=0, tolerance=1e-9).error < 1e-8


@given(weights(), st.integers(1, 4))
def test_a_matrix_factorisation_is_as_good_as_the_best_there_is(target, rank):
    weight = fx.EinsumWeight(
        "latents r, layers d_model r", layers=target.layers, d_model=target.d_model, latents=target.latents, r=rank
    ).double()
    best = reference.best_rank_error(target.to_dense().detach().flatten(0, 1), rank)
    assert_close(fx.fit_weight(target, weight).error, best, atol=1e-8, rtol=1e-7)


def test_another_try_never_gives_a_worse_fit_and_the_table_of_errors_falls_with_the_rank():
    target = fx.DenseWeight(3, 8, 20).double()
    ring = partial(fx.TensorRingWeight, 3, 8, 20)
    torch.manual_seed(1)
    once = fx.fit_weight(target, ring(ranks=(2, 3, 2)).double())
    torch.manual_seed(1)
    assert fx.fit_weight(target, ring(ranks=(2, 3, 2)).double(), tries=3).error <= once.error
    rows = fx.error_by_rank(target, [ring(ranks=ranks).double() for ranks in ((3, 5, 4), (1, 2, 1), (2, 4, 3))])
    assert [row.parameters for row in rows] == [
        1 * 8 * 2 + 2 * 20 * 1 + 1 * 3 * 1,
        2 * 8 * 4 + 4 * 20 * 3 + 3 * 3 * 2,
        120 + 400 + 36,
    ]
    assert rows[0].error > rows[1].error > rows[2].error
    assert str(rows[0]).endswith(
        f"; 59 parameters): relative error {rows[0].error:.4g} after {len(rows[0].errors)} sweeps"
    )


def test_a_float32_weight_of_the_rank_is_found_to_its_precision_across_blocks(monkeypatch):
    monkeypatch.setattr(least_squares, "_BLOCK", 7)
    target, weight = (fx.EinsumWeight(CHAINS[3], layers=4, d_model=6, latents=30, p=2, q=3, r=4) for _ in range(2))
    fit = fx.fit_weight(target, weight)
    assert weight.factors[0].dtype == torch.float32
    assert weight.factors[0].requires_grad
    assert fit.errors[-1] < 1e-7
    assert (
        fit.error == fx.relative_error(target, weight) < 1e-5
    )  # factors of unequal length lose some digits of float32


def crosscoder(weight, gate=None):
    made = fx.Crosscoder(
        fx.CrossLayerEncoder(weight, gate or fx.BatchTopK(2), mask=fx.LayerMask(0.1)),
        fx.CrossLayerDecoder(drawn(CHAINS[3])),
    )
    made.double()(randn(30, 4, 6))  # moves the threshold
    nn.init.normal_(made.encoder.bias)
    nn.init.normal_(made.decoder.bias)
    return made


def tucker(layers, d_model, latents):
    return drawn(CHAINS[3], layers=layers, d_model=d_model, latents=latents)


@pytest.mark.parametrize("training", [True, False])
def test_a_factorised_crosscoder_of_the_same_rank_does_the_same_with_gate_biases_and_mask_kept(training):
    old = crosscoder(drawn(CHAINS[3])).train(training)
    before = {key: tensor.clone() for key, tensor in old.state_dict().items()}
    new = fx.factorize(old.materialize(), tucker, sweeps=3)
    assert_close(new.eval()(x := randn(5, 4, 6)), old.eval()(x))
    assert fx.describe(new) == fx.describe(old)
    assert torch.equal(new.encoder.sparsifier.threshold, old.encoder.sparsifier.threshold)
    assert torch.equal(new.decoder.bias, old.decoder.bias)
    assert all(torch.equal(tensor, before[key]) for key, tensor in old.state_dict().items())
    assert new.encoder.sparsifier is not old.encoder.sparsifier
    Trainer(new, torch.optim.Adam(new.parameters())).step(randn(8, 4, 6))


class Scored(nn.Module):
    """A gate that holds a weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, pre):
        return pre.relu() * (self.weight.norms().sum(0) > 0)


def test_what_was_shared_stays_shared_and_a_gate_that_holds_a_weight_holds_the_new_one():
    weight = drawn("latents layers d_model")
    tied = fx.Crosscoder(fx.CrossLayerEncoder(weight, Scored(weight)), fx.CrossLayerDecoder(weight)).double()
    made = fx.factorize(tied, tucker, sweeps=1)
    assert made.encoder.weight is made.decoder.weight is made.encoder.sparsifier.weight
    assert made.encoder.weight.pattern == CHAINS[3]


def sae(latents=7, d_model=5, gate=None):
    made = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(1, d_model, latents), gate or nn.ReLU()),
        fx.CrossLayerDecoder(fx.DenseWeight(1, d_model, latents)),
    ).double()
    nn.init.normal_(made.encoder.bias)
    nn.init.normal_(made.decoder.bias)
    return made


def jumping(latents):
    gate = fx.JumpReLU(latents)
    gate.threshold = torch.rand(latents, dtype=torch.float64)
    return gate


def test_what_is_kept_beside_a_sae_is_folded_before_it_is_joined():
    beside = [
        fx.Normalised(sae(), fx.Normalisation.of(torch.tensor([2.0]), torch.randn(1, 5)).double()).eval().double()
        for _ in range(3)
    ]
    x = randn(6, 3, 5)
    assert_close(
        fx.from_saes(beside, latents=21)(x), torch.cat([each(x[:, i : i + 1]) for i, each in enumerate(beside)], dim=1)
    )


class Limited(nn.Module):
    """A gate of the user's own that chooses by a threshold."""

    def __init__(self, latents):
        super().__init__()
        self.latents = latents

    def forward(self, pre):
        return torch.where(pre > 0.5, pre, 0.0)


class Frozen(Limited):
    def frozen(self):
        made = fx.JumpReLU(self.latents).double()
        made.threshold.fill_(0.5)
        return made


class Registered(Limited):
    pass


@fx.frozen.register
def _(gate: Registered, latents: int):
    return Frozen(latents).frozen()


@pytest.mark.parametrize("cls", [Frozen, Registered])
def test_a_gate_of_ones_own_joins_by_one_method_or_one_line(cls):
    saes = [sae(gate=cls(7)), sae(gate=fx.BatchTopK(2)), sae()]
    saes[1](randn(9, 1, 5))
    x = randn(6, 3, 5)
    made = fx.from_saes([each.eval() for each in saes], latents=21).eval()
    assert_close(made(x), torch.cat([each(x[:, i : i + 1]) for i, each in enumerate(saes)], dim=1))
    with pytest.raises(ValueError, match="carries over ReLU and thresholds, got Limited"):
        fx.from_saes([sae(gate=Limited(7))] * 2)


@pytest.mark.parametrize("silent", [False, True])
def test_saes_that_choose_by_scores_keep_their_choice(silent):
    saes = []
    for _ in range(2):
        one = sae()
        one.encoder.sparsifier = fx.Scored(fx.BatchTopK(2), fx.SumNorm(one.decoder.weight))
        one(randn(9, 1, 5))
        if silent:  # a score of 0 is a threshold that nothing exceeds
            with torch.no_grad():
                one.decoder.weight.factors[0][3] = 0
        saes.append(one.eval())
    x = randn(6, 2, 5)
    made = fx.from_saes(saes, latents=14)
    assert made.encoder.sparsifier.threshold.isfinite().all()
    assert_close(made(x), torch.cat([each(x[:, i : i + 1]) for i, each in enumerate(saes)], dim=1))


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.sampled_from(["relu", "jump", "trained", "mixed", "batch"]),
    seeds,
)
def test_saes_of_which_no_latents_are_joined_do_what_each_did(widths, gate, seed):
    torch.manual_seed(seed)
    makes = {"relu": lambda _: None, "jump": jumping, "trained": fx.TrainedJumpReLU, "batch": lambda _: fx.BatchTopK(1)}
    made = [
        makes[("relu", "jump", "trained")[at % 3] if gate == "mixed" else gate](latents)
        for at, latents in enumerate(widths)
    ]
    saes = [sae(latents, gate=each) for latents, each in zip(widths, made, strict=True)]
    if gate == "batch":
        for each in saes:
            each(randn(9, 1, 5))
    made = fx.from_saes([each.eval() for each in saes], latents=sum(widths)).eval()
    x = randn(6, len(saes), 5)
    assert_close(made(x), torch.cat([each(x[:, [layer]]) for layer, each in enumerate(saes)], dim=1))


@given(st.integers(1, 4), st.integers(1, 6), seeds)
def test_one_sae_shuffled_for_each_layer_is_found_again(layers, latents, seed):
    torch.manual_seed(seed)
    first, saes = sae(latents), []
    for _ in range(layers):
        order = torch.randperm(latents)
        saes.append(sae(latents))
        saes[-1].load_state_dict(first.state_dict())
        for part in (saes[-1].encoder.weight.factors[0], saes[-1].decoder.weight.factors[0], saes[-1].encoder.bias):
            part.data = part.data[order]
    made, x = fx.from_saes(saes), randn(6, 1, 5)
    assert made.encoder.weight.latents == latents
    assert_close(made(x.expand(-1, layers, -1)), first(x).expand(-1, layers, -1))


@given(st.integers(1, 8), st.integers(1, 8), seeds, st.sampled_from([2, conversion._BLOCK]))
def test_rows_are_paired_from_the_closest_pair_on(left, right, seed, block):
    torch.manual_seed(seed)
    rows, kept = [randn(count, 3) for count in (left, right)], conversion._BLOCK
    conversion._BLOCK = block
    try:
        one, other, cosine = conversion._pairs(*(conversion._unit(each) for each in rows))
    finally:
        conversion._BLOCK = kept
    found = sorted(zip(one.tolist(), other.tolist(), cosine.tolist(), strict=True))
    for mine, theirs in zip(found, sorted(reference.greedy_pairs(*rows)), strict=True):
        assert mine[:2] == theirs[:2]
        assert_close(mine[2], theirs[2])


@given(st.integers(4, 8), seeds)
def test_the_closest_pairs_are_joined_first(latents, seed):
    torch.manual_seed(seed)
    first, noise = torch.eye(4, dtype=torch.float64), torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
    ours, theirs = conversion._chains([first, conversion._unit(first + noise[:, None] * first.roll(1, 0))], latents)
    joined = theirs == ours
    assert joined.sum() == 8 - latents
    assert noise[joined].sort().values.tolist() == noise.sort().values[: 8 - latents].tolist()


def test_a_threshold_that_was_never_set_counts_as_zero_in_the_mean():
    saes = [sae(2, gate=fx.BatchTopK(1)) for _ in range(2)]
    saes[1].load_state_dict(saes[0].state_dict())
    saes[0].encoder.sparsifier.threshold.fill_(0.8)
    lengths = saes[0].decoder.weight.norms()[0].detach()
    assert_close(fx.from_saes(saes).encoder.sparsifier.threshold, 0.4 * lengths)


class Doubled(fx.CrossLayerEncoder):
    def forward(self, x):
        return 2 * super().forward(x)


@given(st.integers(1, 3), st.floats(0, 1), seeds)
def test_joined_latents_read_the_mean_and_write_their_own_directions(layers, share, seed):
    torch.manual_seed(seed)
    saes = [sae(4) for _ in range(layers)]
    latents = 4 + round(share * 4 * (layers - 1))
    made, x = fx.from_saes(saes, latents=latents), randn(3, layers, 5)
    assert made.encoder.weight.latents == latents
    plain = [
        (
            each.encoder.weight.to_dense()[0].T,
            each.encoder.bias,
            each.decoder.weight.to_dense()[0].T,
            each.decoder.bias[0],
        )
        for each in saes
    ]
    chains = [
        chain.tolist()
        for chain in conversion._chains([conversion._unit(decoder) for _, _, decoder, _ in plain], latents)
    ]
    assert_close(made(x), reference.chained(plain, chains, x))


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: fx.fit_weight(fx.DenseWeight(2, 3, 5), fx.SumWeight(fx.DenseWeight(2, 3, 5))),
            TypeError,
            "fit_weight fits the factors of a pattern, got SumWeight; fit its parts one by one",
        ),
        (
            lambda: fx.fit_weight(fx.DenseWeight(2, 3, 5), fx.CPWeight(2, 3, 6)),
            fx.ShapeError,
            "a weight is fitted to one of the same layers, d_model and latents, "
            "got target=(2, 3, 5) and weight=(2, 3, 6); make them equal",
        ),
        (
            lambda: fx.fit_weight(fx.DenseWeight(2, 3, 5), fx.CPWeight(2, 3, 5), sweeps=0),
            ValueError,
            "fit_weight needs sweeps >= 1 and tries >= 0, got sweeps=0 and tries=1",
        ),
        (
            lambda: fx.fit_weight(fx.DenseWeight(2, 3, 5).normal_(0.0), fx.CPWeight(2, 3, 5)),
            ValueError,
            "a weight is fitted to a finite one that is not zero, got one of length 0.0",
        ),
        (
            lambda: fx.fit_weight(fx.DenseWeight(2, 3, 5), fx.CPWeight(2, 3, 5).normal_(float("inf")), tries=0),
            ValueError,
            "fit_weight with tries=0 goes on from the factors as they are, and they are not finite; draw them: tries=1",
        ),
        (
            lambda: fx.from_saes([sae(), fx.Crosscoder(Doubled(fx.DenseWeight(1, 5, 7), fx.TopK(1)), sae().decoder)]),
            TypeError,
            "from_saes joins weights and biases, and Doubled overrides forward, which would be passed by; "
            "make each SAE of shipped parts",
        ),
        (lambda: fx.from_saes([]), ValueError, "from_saes needs at least one SAE, got none"),
        (
            lambda: fx.from_saes([sae(), sae(d_model=4)]),
            fx.ShapeError,
            "from_saes joins crosscoders of layers=1 and one d_model, got (layers, d_model) (1, 5), (1, 4); "
            "give one SAE for each layer",
        ),
        (
            lambda: fx.from_saes([sae(), sae()], latents=15),
            ValueError,
            "from_saes can leave from 7 latents (all joined) to 14 (none), got latents=15; choose between",
        ),
        (
            lambda: fx.from_saes([sae(), sae(gate=fx.TopK(2))]),
            ValueError,
            "from_saes carries over ReLU and thresholds, got ReLU, TopK; "
            "give the crosscoder's gate: sparsifier=fx.BatchTopK(k=64)",
        ),
    ],
)
def test_a_mistake_is_one_sentence(call, error, sentence):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == sentence


def trained(module, batches, layers=slice(None)):
    """The module after one step a batch, and the error of each step, before it was taken."""
    trainer = Trainer(module, torch.optim.Adam(module.parameters(), lr=1e-3))
    return module, [trainer.step(x[:, layers])["error"].item() for x in batches]


def test_a_converted_start_is_ahead_of_a_fresh_one_on_a_real_model_and_stays_so_for_some_steps():
    stream = harvest(str(TINY), [(TINY / "README.md").read_text() * 4], layers=(3, 5, 7), batch=128)
    batches = [x / x.square().mean().sqrt() for x in stream][:16]
    axes = len(stream.layers), stream.d_model, 256

    def start(make, layers=axes[0]):
        sizes = layers, *axes[1:]
        gated = fx.CrossLayerEncoder(make(*sizes), fx.BatchTopK(8))
        return fx.isometric_start(fx.Crosscoder(gated, fx.CrossLayerDecoder(make(*sizes))))

    dense, _ = trained(start(fx.DenseWeight), batches * 3)
    saes = [trained(start(fx.DenseWeight, layers=1), batches * 3, [layer])[0] for layer in range(axes[0])]
    make_ring = partial(fx.TensorRingWeight, ranks=fx.wide_tensor_ring_ranks(*axes, share=0.5))
    joined, ring = fx.from_saes(saes, fx.BatchTopK(8)), fx.factorize(dense, make_ring, sweeps=3)
    for converted, fresh in ((joined, start(fx.DenseWeight)), (ring, start(make_ring))):
        ahead, behind = (trained(module, batches[:10])[1] for module in (converted, fresh))
        assert all(mine < theirs for mine, theirs in zip(ahead, behind, strict=True))
