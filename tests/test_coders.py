import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import batches, crosscoders, randn, seeds, weights

import fmxnn as fx
from fmxnn import (
    BatchTopK,
    Crosscoder,
    CrossLayerDecoder,
    CrossLayerEncoder,
    DenseWeight,
    JumpReLU,
    LayerMask,
    ShapeError,
    TopK,
    to_csr,
)
from fmxnn.coders.crosscoder import crosscoder_in
from fmxnn.training import Trainer

assert_close = torch.testing.assert_close


@given(crosscoders(), batches)
def test_a_crosscoder_is_its_formula(coder, batch):
    coder.eval()
    encoder, decoder = coder.encoder, coder.decoder
    torch.nn.init.normal_(encoder.bias)
    torch.nn.init.normal_(decoder.bias)
    x = randn(*batch, encoder.weight.layers, encoder.weight.d_model)
    pre = torch.einsum("...ld,ldn->...n", x, encoder.weight.to_dense()) + encoder.bias
    assert_close(encoder.pre_activations(x), pre)
    z = encoder.sparsifier(pre)
    assert_close(coder.encode(x), z)
    x_hat = torch.einsum("...n,ldn->...ld", z, decoder.weight.to_dense()) + decoder.bias
    assert_close(coder.decode(z), x_hat)
    assert_close(coder(x), x_hat)


@given(crosscoders(), batches)
def test_training_reaches_every_parameter_with_finite_gradients(coder, batch):
    x = randn(*batch, coder.encoder.weight.layers, coder.encoder.weight.d_model)
    coder(x).pow(2).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in coder.parameters())


@given(crosscoders())
def test_sparse_codes_decode_as_dense_ones(coder):
    z = randn(4, coder.decoder.weight.latents).relu()
    assert_close(coder.decode(to_csr(z)), coder.decode(z))


def test_biases_start_at_zero():
    coder = Crosscoder(CrossLayerEncoder(DenseWeight(2, 3, 5), TopK(2)), CrossLayerDecoder(DenseWeight(2, 3, 5)))
    assert torch.equal(coder.encoder.bias, torch.zeros(5))
    assert torch.equal(coder.decoder.bias, torch.zeros(2, 3))


def test_one_layer_may_be_read_and_eight_written():
    coder = Crosscoder(CrossLayerEncoder(DenseWeight(1, 3, 5), TopK(2)), CrossLayerDecoder(DenseWeight(8, 4, 5)))
    assert coder(torch.randn(7, 1, 3)).shape == (7, 8, 4)


def test_no_mask_is_a_mask_that_drops_nothing():
    encoder = CrossLayerEncoder(DenseWeight(2, 3, 5), TopK(2))
    assert isinstance(encoder.mask, LayerMask)
    assert encoder.mask.p == 0


def test_the_mask_acts_before_the_weight():
    encoder = CrossLayerEncoder(DenseWeight(2, 3, 5), torch.nn.ReLU(), mask=LayerMask(0.999))
    torch.nn.init.constant_(encoder.bias, 2.0)
    assert torch.equal(encoder(torch.randn(2, 3)), torch.full((5,), 2.0))


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (
            lambda: CrossLayerEncoder(DenseWeight(2, 3, 5), BatchTopK(6)),
            ValueError,
            "the sparsifier keeps k=6 latents a token, and the weight has latents=5; take k <= 5",
        ),
        (
            lambda: CrossLayerEncoder(DenseWeight(2, 3, 5), JumpReLU(6)),
            ValueError,
            "the sparsifier is made for latents=6, and the weight has latents=5; make them equal",
        ),
        (
            lambda: CrossLayerEncoder(DenseWeight(2, 3, 5), TopK(5))(torch.zeros(4, 3, 2)),
            ShapeError,
            "the encoder reads (..., layers=2, d_model=3), got (4, 3, 2); "
            "stack one activation per layer: torch.stack(hidden, dim=-2)",
        ),
        (
            lambda: CrossLayerDecoder(DenseWeight(2, 3, 5))(torch.zeros(4, 6)),
            ShapeError,
            "the decoder reads codes of (..., latents=5), got (4, 6)",
        ),
        (
            lambda: Crosscoder(
                CrossLayerEncoder(DenseWeight(2, 3, 5), TopK(5)), CrossLayerDecoder(DenseWeight(2, 3, 4))
            ),
            ShapeError,
            "the encoder has latents=5 and the decoder latents=4; make them equal",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(act, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        act()


KINDS = {
    "dense": lambda: fx.DenseWeight(2, 3, 8),
    "ring": lambda: fx.TensorRingWeight(2, 3, 8, ranks=(2, 2, 2)),
    "no table": lambda: fx.EinsumWeight("latents d_model, latents layers", layers=2, d_model=3, latents=8),
    "parts": lambda: fx.causal_weight(fx.DenseWeight, layers=2, d_model=3, latents=8),
    "sum": lambda: fx.SumWeight(fx.DenseWeight(2, 3, 8), fx.CPWeight(2, 3, 8, rank=2)),
    "restricted": lambda: fx.RestrictedWeight(fx.CPWeight(2, 3, 8, rank=2), at=[[0], [0, 1]]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.complex64], ids=str)
def test_activations_of_another_dtype_are_one_sentence(kind, backend, dtype):
    if kind == "no table" and backend == "sparse":
        pytest.skip("has no sparse path")
    coder = fx.Crosscoder(
        fx.CrossLayerEncoder(KINDS[kind](), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 3, 8))
    )
    coder.backend = backend
    x = torch.randn(4, 2, 3).to(dtype)
    with pytest.raises(TypeError) as error:
        coder(x)
    message = (
        f"the encoder's weight is torch.float32 and reads activations of that dtype, got {dtype}; "
        "cast them: x.to(torch.float32)"
    )
    assert str(error.value).startswith(message)
    assert (f"crosscoder.to({dtype}), or run both under torch.autocast" in str(error.value)) == dtype.is_floating_point
    if dtype.is_floating_point:
        assert coder.to(dtype)(x).dtype == dtype


@pytest.mark.parametrize("backend", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_takes_either_dtype(backend, dtype):
    coder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(2, 3, 8), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 3, 8))
    )
    coder.backend = backend
    with torch.autocast("cpu", torch.bfloat16):
        assert coder(torch.randn(4, 2, 3).to(dtype)).isfinite().all()


GATES = {
    "relu": lambda n, weight: torch.nn.ReLU(),
    "topk": lambda n, weight: fx.TopK(1),
    "batchtopk": lambda n, weight: fx.BatchTopK(1),
    "jumprelu": lambda n, weight: fx.JumpReLU(n),
    "trained": lambda n, weight: fx.TrainedJumpReLU(n),
    "scored": lambda n, weight: fx.Scored(fx.BatchTopK(1), fx.SumNorm(weight)),
    "split": lambda n, weight: fx.SplitGate(fx.TopK(1), runs=(n,)),
    "decoupled": lambda n, weight: fx.Decoupled(*[fx.BatchTopK(1)] * weight.layers, weight=weight),
    "groupmax": lambda n, weight: fx.GroupMax(1, n),
    "signed groupmax": lambda n, weight: fx.SignedGroupMax(1, n),
    "signed topk": lambda n, weight: fx.SignedTopK(1),
    "signed batchtopk": lambda n, weight: fx.SignedBatchTopK(1),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gate", GATES)
@settings(max_examples=8)
@given(weights(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.booleans(), seeds)
def test_codes_have_the_dtype_of_the_encoders_parameters_under_autocast_too(gate, training, weight, dtype, cast, seed):
    torch.manual_seed(seed)
    coder = Crosscoder(CrossLayerEncoder(weight, GATES[gate](weight.latents, weight)), CrossLayerDecoder(weight))
    coder.to(dtype).train(training)
    for part in coder.modules():
        if isinstance(part, BatchTopK):
            part.threshold.fill_(0.1)
    x = torch.randn(4, weight.layers, weight.d_model).to(dtype)
    for given_dtype in {dtype, torch.bfloat16} if cast and dtype != torch.float64 else {dtype}:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast), torch.no_grad():
            for layout in (torch.strided, torch.sparse_csr):
                z = coder.encode(x.to(given_dtype), layout=layout)
                assert z.dtype == coder.encoder.bias.dtype == dtype


class Gated(torch.nn.Module):
    """An encoder of the user's own, with a magnitude beside the gate's choice."""

    def __init__(self, weight, sparsifier):
        super().__init__()
        self.weight, self.sparsifier = weight, sparsifier
        self.bias = torch.nn.Parameter(torch.zeros(weight.latents))
        self.gain = torch.nn.Parameter(torch.full((weight.latents,), 2.0))

    def pre_activations(self, x):
        return self.weight.to_latents(x) + self.bias

    def forward(self, x):
        return self.sparsifier(self.pre_activations(x)) * self.gain


class Fast(Gated):
    """The same with the fast methods."""

    def read(self, x):
        return self.weight.to_bonds(x).flatten(0, -2)

    def choose(self, read, *, propose=False):
        z = self.sparsifier.choose(read, self.weight.table, self.bias, propose=propose)
        return z._replace(values=z.values * self.gain[z.columns])


@pytest.mark.parametrize("cls", [Gated, Fast])
def test_an_encoder_of_ones_own_runs_trains_and_says_why_it_is_dense(cls):
    weight = fx.DenseWeight(2, 16, 4096).double()
    coder = Crosscoder(cls(weight, TopK(4)), CrossLayerDecoder(weight)).double()
    x = randn(64, 2, 16)
    assert coder.obstacle == ("" if cls is Fast else "Gated has no read")
    assert coder.plan(64).taken.backend == ("sparse" if cls is Fast else "dense")
    z = TopK(4)(weight.to_latents(x)) * 2
    x_hat = weight.to_layers(z)
    assert_close(coder(x), x_hat)
    assert_close(coder.encode(x, layout=torch.sparse_csr).to_dense(), z)
    trainer = Trainer(coder, torch.optim.Adam(coder.parameters()))
    assert trainer.step(x)["error"] == pytest.approx(float(fx.reconstruction_loss(x, x_hat.detach())))
    assert not torch.equal(coder.encoder.gain.detach(), torch.full((4096,), 2.0, dtype=torch.float64))


def test_a_backend_that_is_none_is_refused_where_it_is_set_and_a_set_one_is_saved():
    parts = CrossLayerEncoder(DenseWeight(2, 3, 5), TopK(2)), CrossLayerDecoder(DenseWeight(2, 3, 5))
    coder = Crosscoder(*parts)
    for act in (lambda: setattr(coder, "backend", "fast"), lambda: Crosscoder(*parts, backend="fast")):
        with pytest.raises(ValueError, match="backend is 'auto', 'dense' or 'sparse', got 'fast'"):
            act()
    assert coder.backend == "auto"
    coder.backend, coder.folded_scale = "dense", 2.0
    again = fx.build(fx.describe(coder), [type(part) for part in coder.modules()])
    assert (again.backend, again.folded_scale) == ("dense", 2.0)


class Holder(torch.nn.Module):
    def __init__(self, crosscoder):
        super().__init__()
        self.crosscoder = crosscoder


def test_a_crosscoder_is_found_inside_what_holds_one():
    coder = Crosscoder(CrossLayerEncoder(DenseWeight(2, 3, 5), TopK(2)), CrossLayerDecoder(DenseWeight(2, 3, 5)))
    for module in (coder, Holder(coder), Holder(fx.SkipCrosscoder(fx.Normalised(coder, fx.Normalisation(2, 3))))):
        assert crosscoder_in(module) is coder
    with pytest.raises(TypeError, match="holds one as `crosscoder`.*, got ReLU; pass what it holds"):
        crosscoder_in(torch.nn.ReLU())
