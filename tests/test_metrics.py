import re
from itertools import pairwise

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import fmxnn as fx
from fmxnn.metrics import Reconstruction, functional_coherence, measure_reconstruction, norm_coherence
from fmxnn.metrics.hiding import off_to_on
from fmxnn.training import Trainer

float64 = torch.float64


def tiny_crosscoder(encoder, sparsifier=None):
    """A crosscoder of d_model 1 whose encoder is `layers latents`, without bias."""
    layers, latents = encoder.shape
    made = [fx.DenseWeight(layers, 1, latents) for _ in range(2)]
    with torch.no_grad():
        made[0].factors[0].copy_(encoder.T.unsqueeze(-1))
    return fx.Crosscoder(
        fx.CrossLayerEncoder(made[0], sparsifier or torch.nn.ReLU()), fx.CrossLayerDecoder(made[1])
    ).double()


HAND = tiny_crosscoder(torch.tensor([[1.0, 1.0], [1.0, 0.0], [2.0, -1.0]]))
TOKENS = torch.tensor([[1, 1, 1], [2, 0, 1], [0, 0, 0], [1, 1, 0]], dtype=float64).unsqueeze(-1)


def report_of(x, x_hat, z=None, cuts=()):
    measured = Reconstruction()
    bounds = [0, *sorted(cuts), len(x)]
    for start, stop in pairwise(bounds):
        measured.update(x[start:stop], x_hat[start:stop], None if z is None else z[start:stop])
    return measured.compute()


def test_the_hand_vector_of_reconstruction():
    x, x_hat = torch.tensor([[[2.0, 0.0]], [[0.0, 4.0]]]), torch.tensor([[[2.0, 1.0]], [[0.0, 3.0]]])
    numbers = report_of(x, x_hat, torch.tensor([[1.0, 0, 0, 2.0], [0, 0, 0, 1.0]])).numbers()
    assert numbers["mse"] == 0.5
    assert numbers["ev"] == pytest.approx(0.8)
    assert numbers["ev_pooled"] == pytest.approx(0.8)
    assert numbers["cos"] == pytest.approx(0.9472136, abs=1e-7)
    assert numbers["l2_ratio"] == pytest.approx(0.934017, abs=1e-6)
    assert numbers["relative_reconstruction_bias"] == 0.875
    assert numbers["l0"] == 1.5
    assert numbers["dead"] == 0.5


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.sampled_from([fx.SignedTopK, fx.SignedBatchTopK, lambda k: fx.SignedGroupMax(k, 6 * k)]),
)
def test_training_and_reports_count_the_same_firings_of_signed_codes(seed, k, gate):
    torch.manual_seed(seed)
    sparsifier = gate(k)
    weight = fx.DenseWeight(2, 3, getattr(sparsifier, "latents", 6))
    coder, x = (
        fx.Crosscoder(fx.CrossLayerEncoder(weight, sparsifier), fx.CrossLayerDecoder(weight)),
        torch.randn(5, 2, 3),
    )
    with torch.no_grad():
        coder.encoder.bias -= 100  # every code is negative
    reported = measure_reconstruction(coder, [x])
    trainer = Trainer(coder, torch.optim.SGD(coder.parameters(), lr=1e-3))
    assert reported.l0 == pytest.approx(float(trainer.step(x)["l0"])) == k
    assert reported.dead == float((trainer.silent > 0).double().mean())


def test_the_hand_vector_of_saebench():
    x, x_hat = torch.tensor([[[2.0, 0.0]], [[0.0, 4.0]]]), torch.tensor([[[2.0, 1.0]], [[0.0, 3.0]]])
    report = report_of(x, x_hat)
    assert report.numbers(compat="saebench-0.6") == {"mse": 0.5, "ev": pytest.approx(1 + 1 / 15)}
    assert (
        report_of(x, x_hat, cuts=(1,)).numbers(compat="saebench-0.6")["mse"] == 1.0
    )  # twice as large in batches of one
    assert report.mean("ev") == pytest.approx(0.8)
    with pytest.raises(ValueError, match=re.escape("numbers knows compat 'saebench-0.6', got 'saelens'")):
        report.numbers(compat="saelens")


@given(st.integers(0, 10**6), st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_saebenchs_numbers_equal_its_loop_over_batches(seed, layers, lengths):
    torch.manual_seed(seed)
    x = torch.randn(sum(lengths), layers, 3, dtype=float64) + 1
    x_hat, order = x + torch.randn_like(x), torch.randperm(layers)
    measured = Reconstruction()
    for batch, guess in zip(x.split(lengths), x_hat.split(lengths)):
        measured.update(batch[:, order], guess[:, order])
    found = measured.compute().compat["saebench-0.6"]
    for place, layer in enumerate(order.tolist()):
        mse, ev = reference.saebench(x[:, layer].split(lengths), x_hat[:, layer].split(lengths))
        assert_close(found["mse"][place].item(), mse)
        assert_close(found["ev"][place].item(), ev)


def reference_reconstruction(x, x_hat):
    """mse, ev, cos, l2 ratio and bias of each layer by loops."""
    tokens, layers, d_model = x.shape
    rows = []
    for layer in range(layers):
        mean = [sum(float(x[t, layer, d]) for t in range(tokens)) / tokens for d in range(d_model)]
        sse = sum(float((x[t, layer, d] - x_hat[t, layer, d]) ** 2) for t in range(tokens) for d in range(d_model))
        sst = sum((float(x[t, layer, d]) - mean[d]) ** 2 for t in range(tokens) for d in range(d_model))
        cos = ratio = counted = energy = inner = 0.0
        for t in range(tokens):
            a = sum(float(v) ** 2 for v in x[t, layer]) ** 0.5
            b = sum(float(v) ** 2 for v in x_hat[t, layer]) ** 0.5
            ab = sum(float(v) * float(w) for v, w in zip(x[t, layer], x_hat[t, layer], strict=True))
            energy, inner = energy + b * b, inner + ab
            if a > 0:
                counted += 1
                cos += ab / (a * b) if b > 0 else 0.0
                ratio += b / a
        rows.append([sse / tokens / d_model, 1 - sse / sst, cos / counted, ratio / counted, energy / inner])
    return torch.tensor(rows, dtype=float64).T


@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(1, 4), st.integers(1, 5), st.floats(-1e3, 1e3))
def test_reconstruction_equals_a_loop_however_the_batches_are_cut(seed, tokens, layers, d_model, mean):
    torch.manual_seed(seed)
    x = torch.randn(tokens, layers, d_model, dtype=float64) + mean
    x_hat = x + torch.randn_like(x)
    x[0, 0] = 0
    expected = reference_reconstruction(x, x_hat)
    cuts = torch.randint(tokens + 1, (2,)).tolist()
    for report in (report_of(x, x_hat), report_of(x, x_hat, cuts=cuts)):
        got = torch.stack([report.mse, report.ev, report.cos, report.l2_ratio, report.relative_reconstruction_bias])
        assert_close(got, expected)
        assert report.zero_rows.tolist() == [1] + [0] * (layers - 1)


@given(st.integers(0, 10**6))
def test_layers_and_latents_may_be_permuted_and_codes_may_be_csr(seed):
    torch.manual_seed(seed)
    x, z = torch.randn(6, 3, 4, dtype=float64), torch.randn(6, 5, dtype=float64).relu()
    x_hat = x + torch.randn_like(x)
    order, latents = torch.randperm(3), torch.randperm(5)
    one, other = report_of(x, x_hat, z), Reconstruction()
    other.update(x[:, order], x_hat[:, order], fx.to_csr(z[:, latents]))
    assert_close(other.compute().ev, one.ev[order])
    assert_close(other.compute().densities, one.densities[latents])
    assert other.compute().dead == one.dead


def test_the_explained_variance_of_a_large_mean_keeps_its_digits():
    x = torch.randn(1000, 1, 3, dtype=float64)
    x_hat = x + 0.1 * torch.randn_like(x)
    assert_close(report_of(x + 1e6, x_hat + 1e6, cuts=(10, 500)).ev, report_of(x, x_hat).ev, rtol=1e-7, atol=1e-7)


def test_measuring_runs_in_eval_and_gives_the_mode_back():
    weights = [fx.CPWeight(3, 4, 9, rank=5) for _ in range(2)]
    crosscoder = fx.Crosscoder(
        fx.CrossLayerEncoder(weights[0], fx.BatchTopK(2), mask=fx.LayerMask(0.9)), fx.CrossLayerDecoder(weights[1])
    )
    x = torch.randn(50, 3, 4)
    crosscoder(x)
    threshold = crosscoder.encoder.sparsifier.threshold.clone()
    report = measure_reconstruction(crosscoder, [x[:20], x[20:]])
    assert crosscoder.training
    assert crosscoder.encoder.sparsifier.threshold == threshold
    crosscoder.eval()
    assert_close(
        report.mse, (x - crosscoder(x)).double().pow(2).mean((0, 2)), rtol=1e-5, atol=1e-6
    )  # the forward is float32


def test_reconstruction_says_what_is_wrong():
    with pytest.raises(
        fx.ShapeError,
        match=re.escape("Reconstruction compares two tensors (..., layers, d_model), got (2, 3, 4) and (2, 3, 5)"),
    ):
        Reconstruction().update(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="^Reconstruction has seen no tokens; call update first$"):
        Reconstruction().compute()
    with pytest.raises(
        ValueError, match="^Reconstruction needs finite values; there is a NaN or an infinity after 0 tokens$"
    ):
        Reconstruction().update(torch.full((2, 3, 4), torch.nan), torch.zeros(2, 3, 4))
    measured = Reconstruction()
    measured.update(torch.ones(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="^Reconstruction needs codes with every batch or with none$"):
        measured.update(torch.ones(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 5))


@pytest.mark.parametrize(("norms", "expected"), [([1, 1, 1], 3), ([2, 1, 1], 2), ([3, 4, 0], 1.75), ([1, 0, 0], 1)])
def test_the_hand_vectors_of_norm_coherence(norms, expected):
    weight = tiny_crosscoder(torch.tensor(norms, dtype=torch.float32).unsqueeze(-1)).encoder.weight
    result = norm_coherence(weight)
    assert result.values.tolist() == [expected]
    assert (result.variant, result.alive, result.excluded) == ("norm", 1, 0)


def test_an_atom_of_zeros_has_no_norm_coherence():
    result = norm_coherence(tiny_crosscoder(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).encoder.weight)
    assert (result.alive, result.excluded, result.mean, result.median, result.quantiles(0.0, 1.0)) == (
        1,
        1,
        2.0,
        2.0,
        [2.0, 2.0],
    )
    assert result.numbers() == {"mean": 2.0, "median": 2.0, "q05": 2.0, "q95": 2.0, "alive": 1, "excluded": 1}


@pytest.mark.parametrize(
    ("estimator", "expected"), [("active", [2.4, 1.5]), ("ratio", [2.5, 1.5]), ("paper", [2.4, 1.0])]
)
@pytest.mark.parametrize("cut", [0, 2])
def test_the_hand_vectors_of_functional_coherence(estimator, expected, cut):
    batches = [TOKENS[:cut], TOKENS[cut:]] if cut else [TOKENS]
    result = functional_coherence(HAND, batches, estimator=estimator, min_active=1)
    assert_close(
        result.values, torch.tensor(expected, dtype=float64), rtol=1e-7, atol=1e-6
    )  # eps 1e-8 stands in the paper's own formula
    assert result.active_tokens.tolist() == [3, 2]
    assert result.variant == f"functional, {estimator}, threshold selection, at least 1 active tokens"


def reference_coherence(encode, x, estimator):
    tokens, layers, _ = x.shape
    z = encode(x)
    values = []
    for latent in range(z.shape[1]):
        share = []
        for layer in range(layers):
            masked = x.clone()
            masked[:, layer] = 0
            gone = encode(masked)
            pairs = [(float(z[t, latent]), abs(float(z[t, latent] - gone[t, latent]))) for t in range(tokens)]
            if estimator == "paper":
                share.append(sum(d / (v + 1e-8) for v, d in pairs) / tokens)
            elif estimator == "ratio":
                share.append(sum(d for v, d in pairs if v > 0) / max(sum(v for v, _ in pairs), 1e-300))
            else:
                on = [d / v for v, d in pairs if v > 0]
                share.append(sum(on) / max(len(on), 1))
        active = sum(float(z[t, latent]) > 0 for t in range(tokens))
        values.append(sum(share) / max(share) if active and max(share) > 0 else float("nan"))
    return torch.tensor(values, dtype=float64)


@given(st.integers(0, 10**6), st.sampled_from(["active", "ratio", "paper"]), st.sampled_from(["threshold", "batch"]))
def test_functional_coherence_equals_a_loop(seed, estimator, selection):
    torch.manual_seed(seed)
    weights = [fx.TensorRingWeight(3, 4, 6, ranks=(2, 2, 3)) for _ in range(2)]
    crosscoder = fx.Crosscoder(
        fx.CrossLayerEncoder(weights[0], fx.BatchTopK(2)), fx.CrossLayerDecoder(weights[1])
    ).double()
    x = torch.randn(12, 3, 4, dtype=float64)
    with torch.no_grad():
        crosscoder(x)
        crosscoder.encoder.sparsifier.threshold.mul_(0.99)  # off the entry it was read from, which rounding may let in
        crosscoder.eval()
        pre = crosscoder.encoder.pre_activations
        encode = (
            crosscoder.encode if selection == "threshold" else lambda x: crosscoder.encoder.sparsifier.select(pre(x))
        )
        expected = reference_coherence(encode, x, estimator)
    result = functional_coherence(crosscoder, [x], estimator=estimator, selection=selection, min_active=1)
    assert_close(result.values, expected, equal_nan=True)


def test_few_active_tokens_are_excluded_and_counted():
    result = functional_coherence(HAND, [TOKENS], min_active=3)
    assert (result.alive, result.excluded) == (1, 1)
    assert_close(result.mean, 2.4)


def test_functional_coherence_says_what_is_wrong():
    with pytest.raises(ValueError, match="^functional_coherence knows estimator active, ratio, paper, got 'mean'$"):
        functional_coherence(HAND, [TOKENS], estimator="mean")
    with pytest.raises(ValueError, match="^functional_coherence knows selection threshold, batch, got 'token'$"):
        functional_coherence(HAND, [TOKENS], selection="token")
    with pytest.raises(
        ValueError,
        match=re.escape(
            "selection='batch' needs a gate with select, such as BatchTopK, got ReLU; use selection='threshold'"
        ),
    ):
        functional_coherence(HAND, [TOKENS], selection="batch")
    with pytest.raises(
        ValueError,
        match=re.escape("functional_coherence has seen no tokens; give it batches of (tokens, layers, d_model)"),
    ):
        functional_coherence(HAND, [])


@pytest.mark.parametrize("gate", [fx.TopK(2), fx.JumpReLU(6), torch.nn.ReLU()], ids=["TopK", "JumpReLU", "ReLU"])
@pytest.mark.parametrize("estimator", ["active", "ratio", "paper"])
@pytest.mark.parametrize("own", [False, True], ids=["plain", "own mask"])
def test_functional_coherence_equals_a_loop_for_every_gate(gate, estimator, own):
    torch.manual_seed(4)
    mask = torch.nn.Tanh() if own else None  # not linear: nothing but whole runs can be right
    encoder = fx.CrossLayerEncoder(fx.CPWeight(3, 4, 6, rank=3), gate, mask=mask)
    crosscoder = fx.Crosscoder(encoder, fx.CrossLayerDecoder(fx.DenseWeight(3, 4, 6))).double()
    torch.nn.init.normal_(encoder.bias, std=0.3)
    x = torch.randn(15, 3, 4, dtype=float64)
    with torch.no_grad():
        crosscoder.eval()
        expected = reference_coherence(crosscoder.encode, x, estimator)
    batches = [x[:1], x[1:7], x[7:]]
    crosscoder.train()
    assert_close(
        functional_coherence(crosscoder, batches, estimator=estimator, min_active=1).values, expected, equal_nan=True
    )
    assert crosscoder.training


def layer_by_layer(crosscoder, batches, estimator, selection, min_active):
    """Values, shares and counts by layers + 1 whole encodes of every batch."""
    weight, sparsifier = crosscoder.encoder.weight, crosscoder.encoder.sparsifier
    change, total, active = torch.zeros(weight.layers, weight.latents).double(), 0, 0
    choose = sparsifier if selection == "threshold" else sparsifier.select
    for x in batches:
        z = choose(crosscoder.encoder.pre_activations(x))
        total, active = total + z.sum(0), active + (z > 0).sum(0)
        for layer in range(weight.layers):
            keep = (torch.arange(weight.layers) != layer).unsqueeze(-1)
            moved = (z - choose(crosscoder.encoder.pre_activations(x * keep))).abs()
            weighed = {"active": moved / z, "ratio": moved, "paper": moved / (z + 1e-8)}[estimator]
            change[layer] += (weighed if estimator == "paper" else torch.where(z > 0, weighed, 0)).sum(0)
    share = change / {"active": active, "ratio": total, "paper": sum(map(len, batches))}[estimator]
    values = share.sum(0) / share.amax(0)
    return values.masked_fill(active < max(min_active, 1), torch.nan), share, active


def random_crosscoder(weight, gate, latents=11):
    made = {
        "dense": lambda: fx.DenseWeight(3, 4, latents),
        "cp": lambda: fx.CPWeight(3, 4, latents, rank=5),
        "ring": lambda: fx.TensorRingWeight(3, 4, latents, ranks=(2, 3, 2)),
    }[weight]()
    sparsifier = {
        "batch": fx.BatchTopK(2),
        "token": fx.TopK(2),
        "jump": fx.JumpReLU(latents),
        "relu": torch.nn.ReLU(),
        "own": torch.nn.Softplus(),
    }[gate]
    encoder = fx.CrossLayerEncoder(made, sparsifier, mask=fx.LayerMask(0.5))
    crosscoder = fx.Crosscoder(encoder, fx.CrossLayerDecoder(fx.DenseWeight(3, 4, latents))).double()
    torch.nn.init.normal_(encoder.bias, std=0.2)
    with torch.no_grad():
        encoder.bias[0] = -1e3  # never fires
        if gate == "jump":
            sparsifier.threshold.uniform_(-0.2, 0.4)
    return crosscoder


@given(
    st.integers(0, 10**6),
    st.sampled_from(["dense", "cp", "ring"]),
    st.sampled_from(["batch", "token", "jump", "relu", "own"]),
    st.sampled_from(["active", "ratio", "paper"]),
    st.sampled_from(["threshold", "batch"]),
    st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(sum),
    st.integers(0, 4),
)
def test_linearity_gives_the_numbers_of_layers_plus_one_encodes(
    seed, weight, gate, estimator, selection, sizes, min_active
):
    torch.manual_seed(seed)
    crosscoder = random_crosscoder(weight, gate)
    batches = [torch.randn(size, 3, 4, dtype=float64) for size in sizes]
    with torch.no_grad():
        if gate == "batch":
            crosscoder.encoder.sparsifier.calibrate(crosscoder.eval().encoder.pre_activations(torch.cat(batches)))
            crosscoder.encoder.sparsifier.threshold.mul_(
                0.99
            )  # off the entry it was read from, which rounding may let in
        selection = selection if gate == "batch" else "threshold"
        filled = [x for x in batches if len(x)]
        values, share, active = layer_by_layer(crosscoder.eval(), filled, estimator, selection, min_active)
    found = functional_coherence(
        crosscoder.train(), batches, estimator=estimator, selection=selection, min_active=min_active
    )
    assert crosscoder.training
    assert found.active_tokens.tolist() == active.tolist()
    assert_close(found.values, values, equal_nan=True)
    assert_close(found.per_layer, share, equal_nan=True)
    if gate != "own":
        assert found.values[0].isnan()


@pytest.mark.parametrize("weight", ["dense", "cp", "ring"])
@pytest.mark.parametrize("estimator", ["active", "ratio"])
def test_linearity_in_float32_differs_by_its_rounding_only(weight, estimator):
    torch.manual_seed(1)
    crosscoder = random_crosscoder(weight, "relu", latents=64)
    x = torch.randn(300, 3, 4, dtype=float64)
    expected = functional_coherence(crosscoder, [x], estimator=estimator)
    found = functional_coherence(crosscoder.float(), [x.float()], estimator=estimator)
    # |dz| / z of a code just above its threshold has a rounding error of 1e-7 / z, and such codes are in every mean
    assert_close(found.values, expected.values, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_a_code_choice_or_weight_of_ones_own_is_not_taken_for_the_librarys():
    class Strict(fx.JumpReLU):
        def forward(self, pre):
            return torch.where(pre > 0.5, pre, 0.0)

    class Bare(torch.nn.Module):
        layers, d_model, latents = 3, 4, 11

        def __init__(self, table):
            super().__init__()
            self.table_of_mine = table

        def to_latents(self, x):
            return torch.einsum("tld,fld->tf", x, self.table_of_mine)

    torch.manual_seed(2)
    crosscoder = random_crosscoder("dense", "relu")
    x = torch.randn(20, 3, 4, dtype=float64)
    expected = functional_coherence(crosscoder, [x], min_active=1).values
    crosscoder.encoder.weight = Bare(crosscoder.encoder.weight.factors[0])
    assert_close(functional_coherence(crosscoder, [x], min_active=1).values, expected, equal_nan=True)
    strict = random_crosscoder("ring", "relu")
    strict.encoder.sparsifier = Strict(11)
    with torch.no_grad():
        values, _, active = layer_by_layer(strict.eval(), [x], "active", "threshold", 1)
    found = functional_coherence(strict, [x], min_active=1)
    assert_close(found.values, values, equal_nan=True)
    assert found.active_tokens.tolist() == active.tolist()


class OwnEncoder(torch.nn.Module):
    """What an encoder must have, and no mask."""

    def __init__(self, weight, sparsifier):
        super().__init__()
        self.weight, self.sparsifier = weight, sparsifier
        self.bias = torch.nn.Parameter(torch.zeros(weight.latents))

    def forward(self, x):
        return self.sparsifier(self.weight.to_latents(x) + self.bias)


def test_an_encoder_of_ones_own_is_measured_by_running_it():
    weight = fx.DenseWeight(3, 4, 6)
    plain = fx.Crosscoder(fx.CrossLayerEncoder(weight, fx.TopK(2)), fx.CrossLayerDecoder(weight)).double()
    own = fx.Crosscoder(OwnEncoder(weight, fx.TopK(2)).double(), plain.decoder)
    x = torch.randn(100, 3, 4, dtype=float64)
    assert_close(functional_coherence(own, [x]).values, functional_coherence(plain, [x]).values)
    assert torch.equal(off_to_on(own, [x]).switched, off_to_on(plain, [x]).switched)


@pytest.mark.parametrize("gate", ["relu", "token"])
@pytest.mark.parametrize("shape", [(5, 4, 4), (5, 2, 4), (5, 4, 3), (5, 3, 5)])
def test_other_layers_or_d_model_are_refused_and_the_mode_is_given_back(gate, shape):
    crosscoder = random_crosscoder("dense", gate)
    with pytest.raises(
        fx.ShapeError, match=r"^the crosscoder reads \(\.\.\., layers=3, d_model=4\), got " + re.escape(str(shape))
    ):
        functional_coherence(crosscoder, [torch.randn(2, 3, 4), torch.randn(shape)])
    assert crosscoder.training


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_what_switches_on_in_the_hand_vector(cut):
    found = off_to_on(
        HAND, [TOKENS[:cut], TOKENS[cut:]]
    )  # only the second latent at the first token, which the third layer holds at 0
    assert found.switched.tolist() == [[0, 0], [0, 0], [0, 1]]
    assert found.off.tolist() == [1, 2]
    assert found.tokens == 4
    assert found.rate == pytest.approx(1 / 9)
    assert_close(found.per_layer, torch.tensor([0, 0, 1 / 3], dtype=float64))
    assert_close(found.per_token, torch.tensor([0, 0, 1 / 4], dtype=float64))


@given(
    st.integers(0, 10**6),
    st.sampled_from(["dense", "cp", "ring"]),
    st.sampled_from(["batch", "token", "jump", "relu", "own mask"]),
    st.sampled_from(["threshold", "batch"]),
)
def test_what_switches_on_equals_a_loop(seed, weight, gate, selection):
    torch.manual_seed(seed)
    crosscoder = random_crosscoder(weight, "relu" if gate == "own mask" else gate)
    if gate == "own mask":
        crosscoder.encoder.mask = torch.nn.Tanh()  # not linear: nothing but whole runs can be right
    selection, x = selection if gate == "batch" else "threshold", torch.randn(9, 3, 4, dtype=float64)
    with torch.no_grad():
        if gate == "batch":
            crosscoder.encoder.sparsifier.calibrate(crosscoder.eval().encoder.pre_activations(x))
            crosscoder.encoder.sparsifier.threshold.mul_(
                0.99
            )  # off the entry it was read from, which rounding may let in
        pre, sparsifier = crosscoder.eval().encoder.pre_activations, crosscoder.encoder.sparsifier
        encode = crosscoder.encode if selection == "threshold" else lambda x: sparsifier.select(pre(x))
        switched, off = reference.off_to_on(encode, x)
    cuts = [x] if selection == "batch" else [x[:4], x[:0], x[4:]]
    found = off_to_on(crosscoder.train(), cuts, selection=selection)
    assert crosscoder.training
    assert found.switched.tolist() == switched
    assert found.off.tolist() == off
    assert found.rate == pytest.approx(sum(map(sum, switched)) / (3 * sum(off)))


@given(st.integers(0, 10**6), st.sampled_from(["relu", "jump"]), st.sampled_from(["active", "ratio"]))
def test_coherence_follows_layers_and_latents_and_forgets_the_scale_of_codes(seed, gate, estimator):
    torch.manual_seed(seed)
    crosscoder, x = random_crosscoder("dense", gate), torch.randn(12, 3, 4, dtype=float64)
    layers, latents, gains = torch.randperm(3), torch.randperm(11), torch.rand(11, dtype=float64) + 0.5
    other = random_crosscoder("dense", gate)
    encoder, decoder = crosscoder.encoder, crosscoder.decoder
    with torch.no_grad():  # (z, D) -> (c z, D / c), latent by latent
        other.encoder.weight.factors[0].copy_((encoder.weight.factors[0] * gains.view(-1, 1, 1))[latents][:, layers])
        other.decoder.weight.factors[0].copy_((decoder.weight.factors[0] / gains.view(-1, 1, 1))[latents][:, layers])
        other.encoder.bias.copy_((encoder.bias * gains)[latents])
        if gate == "jump":
            other.encoder.sparsifier.threshold.copy_((encoder.sparsifier.threshold * gains)[latents])
    assert_close(norm_coherence(other.decoder.weight).values, norm_coherence(decoder.weight).values[latents])
    one = functional_coherence(crosscoder, [x], estimator=estimator, min_active=1)
    two = functional_coherence(other, [x[:, layers]], estimator=estimator, min_active=1)
    assert_close(two.values, one.values[latents], equal_nan=True)
    assert_close(two.per_layer, one.per_layer[:, latents][layers], equal_nan=True)
    assert torch.equal(
        off_to_on(other, [x[:, layers]]).switched, off_to_on(crosscoder, [x]).switched[:, latents][layers]
    )


@given(
    st.integers(0, 10**6),
    st.integers(1, 80),
    st.sampled_from(["dense", "ring"]),
    st.sampled_from(["token", "jump", "relu", "batch"]),
)
def test_how_many_pre_activations_are_held_changes_no_count(seed, held, weight, gate):
    torch.manual_seed(seed)
    crosscoder, x, made = random_crosscoder(weight, gate), torch.randn(9, 3, 4, dtype=float64), []
    whole, dependence = (
        off_to_on(crosscoder, [x]),
        functional_coherence(crosscoder, [x], estimator="paper", min_active=1),
    )
    crosscoder.encoder.sparsifier.register_forward_pre_hook(lambda _m, args: made.append(args[0].numel()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fmxnn.coders.inputs.HELD", held)
        found = off_to_on(crosscoder, [x[:2], x[2:]])
        assert_close(
            functional_coherence(crosscoder, [x], estimator="paper", min_active=1).values,
            dependence.values,
            equal_nan=True,
        )
    assert torch.equal(found.switched, whole.switched)
    assert torch.equal(found.off, whole.off)
    assert max(made) <= max(held, 11)


@given(st.integers(0, 10**6))
def test_a_choice_over_a_batch_is_made_of_the_whole_batch(seed):
    torch.manual_seed(seed)
    crosscoder, x = random_crosscoder("dense", "batch"), torch.randn(9, 3, 4, dtype=float64)
    switched = off_to_on(crosscoder, [x], selection="batch").switched
    dependence = functional_coherence(crosscoder, [x], selection="batch", min_active=1).values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fmxnn.coders.inputs.HELD", 1)
        assert torch.equal(off_to_on(crosscoder, [x], selection="batch").switched, switched)
        assert_close(
            functional_coherence(crosscoder, [x], selection="batch", min_active=1).values, dependence, equal_nan=True
        )


def test_off_to_on_says_what_is_wrong():
    with pytest.raises(ValueError, match="^off_to_on knows selection threshold, batch, got 'token'$"):
        off_to_on(HAND, [TOKENS], selection="token")
    with pytest.raises(
        ValueError, match=re.escape("off_to_on has seen no tokens; give it batches of (tokens, layers, d_model)")
    ):
        off_to_on(HAND, [TOKENS[:0]])
