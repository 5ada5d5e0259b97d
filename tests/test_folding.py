import re
from copy import deepcopy

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import crosscoders, factorized, named, randn, seeds, weights
from test_normalisation import normalisations

import fmxnn as fx
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
    PolynomialDecoder,
    Scored,
    ShapeError,
    SumNorm,
    SumWeight,
    TensorRingWeight,
    TopK,
    Weight,
    build,
    describe,
    fold,
    from_pretrained,
    polysae_decoder,
    save_pretrained,
    unfold,
)
from fmxnn.metrics import functional_coherence, measure_reconstruction
from fmxnn.saving.hub import KNOWN
from fmxnn.training import fold_scale

assert_close = torch.testing.assert_close
# A layer's error over twelve tokens, against the size of its output and of the mean that is added to it.
# float64: thousands of eps. float32: an entry of the folded weight, one of its bias and each product round once,
# eps = 6e-8, and what is summed is up to a hundred times its sum.
WITHIN = {torch.float64: 1e-12, torch.float32: 1e-5}


@st.composite
def normalised(draw):
    """Any crosscoder between any normalisations, its threshold set, and tokens of which no choice hangs on rounding."""
    coder = draw(crosscoders()).eval()
    encoder, decoder = coder.encoder, coder.decoder
    read = draw(normalisations(encoder.weight.layers, encoder.weight.d_model))
    written = draw(normalisations(decoder.weight.layers, decoder.weight.d_model))
    whole = Normalised(coder, read, output=written).eval()
    torch.manual_seed(draw(seeds))
    torch.nn.init.normal_(encoder.bias)
    torch.nn.init.normal_(decoder.bias)
    x = read.mean + randn(12, read.layers, read.d_model)
    pre = encoder.pre_activations(read(x)).detach()
    threshold = getattr(encoder.sparsifier, "threshold", torch.zeros(1))
    threshold.copy_(pre.max().clamp(min=0) / 2 * torch.rand_like(threshold))
    rivals = torch.cat([pre.flatten(), threshold.flatten().double(), torch.zeros(1)]).sort().values
    assume(rivals.diff().min() > 1e-5 * rivals.abs().max())  # a tie may fall either way, folded or not
    return whole, x


def assert_layers_close(got, expected, whole):
    error, size, mean = (
        (value.double().pow(2).sum((0, -1)) / 12).sqrt()
        for value in (got - expected, expected, whole.output.mean.expand_as(got))
    )
    assert (error <= WITHIN[got.dtype] * (size + mean)).all(), (error / (size + mean)).tolist()


@pytest.mark.parametrize("dtype", WITHIN, ids=str)
@given(normalised())
def test_folding_changes_no_code_and_no_output(dtype, drawn):
    whole, x = drawn[0].to(dtype), drawn[1].to(dtype)
    folded = fold(whole)
    for mode in (False, True):
        whole.crosscoder.train(mode)
        whole.crosscoder.encoder.mask.eval()  # what a mask draws is another matter, below
        folded.train(mode).encoder.mask.eval()
        assert torch.equal(folded.encode(x) > 0, whole.encode(x) > 0)
        assert_layers_close(folded(x), whole(x), whole)
        assert_layers_close(folded.decode(folded.encode(x)), whole.decode(whole.encode(x)), whole)
    assert folded.encoder.bias.dtype == folded(x).dtype == dtype


@given(normalised())
def test_thresholds_stay_the_same_bits(drawn):
    whole, x = drawn
    folded = fold(whole)
    for name, value in whole.crosscoder.encoder.sparsifier.state_dict().items():
        assert torch.equal(folded.encoder.sparsifier.state_dict()[name], value)
    pre = whole.crosscoder.encoder.pre_activations(whole.normalisation(x))
    assert_close(folded.encoder.pre_activations(x), pre)


@given(normalised())
def test_a_normalised_crosscoder_and_its_fold_are_their_formula(drawn):
    whole, x = drawn
    coder, read, written = whole.crosscoder, whole.normalisation, whole.output
    pre = (
        reference.read(reference.normalise(x, read.scale, read.mean), coder.encoder.weight.to_dense())
        + coder.encoder.bias
    )
    x_hat = reference.write(coder.encoder.sparsifier(pre), coder.decoder.weight.to_dense()) + coder.decoder.bias
    expected = reference.normalise(x_hat, 1 / written.scale, -written.mean * written.scale.unsqueeze(-1))
    assert_close(whole(x), expected)
    assert_close(fold(whole)(x), expected)


@pytest.mark.parametrize("dtype", WITHIN, ids=str)
@given(normalised())
def test_unfolding_undoes_folding(dtype, drawn):
    whole, x = drawn[0].to(dtype), drawn[1].to(dtype)
    again = unfold(fold(whole), whole.normalisation, output=whole.output)
    assert again.normalisation is whole.normalisation
    assert again.output is whole.output
    assert not again.training
    assert_layers_close(again(x), whole(x), whole)
    if (
        dtype == torch.float64
    ):  # in float32 a bias that went through one a thousand times larger comes back with fewer digits
        for name, value in again.crosscoder.state_dict().items():
            assert_close(value, whole.crosscoder.state_dict()[name])


@given(normalised())
def test_folding_leaves_its_argument_alone(drawn):
    whole, x = drawn
    before, x_hat = deepcopy(whole.state_dict()), whole(x)
    folded = fold(whole)
    for parameter in (*folded.parameters(), *folded.buffers()):
        parameter.detach().fill_(0.5)
    assert torch.equal(whole(x), x_hat)
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())


@given(st.one_of(weights(), factorized(), named()), st.data())
def test_any_weight_is_scaled_layer_by_layer(weight, data):
    read = data.draw(normalisations(weight.layers, weight.d_model))
    coder = Crosscoder(CrossLayerEncoder(weight, torch.nn.ReLU()), CrossLayerDecoder(weight)).double()
    folded = fold(Normalised(coder, read))  # tied: one weight cannot be both times the scale and divided by it
    dense, scale = weight.to_dense(), read.scale[:, None, None]
    assert_close(folded.encoder.weight.to_dense(), dense * scale)
    assert_close(folded.decoder.weight.to_dense(), dense / scale)
    assert folded.encoder.weight is not folded.decoder.weight


@pytest.mark.parametrize("kind", [SumWeight, ConcatWeight])
def test_a_weight_that_stands_twice_in_another_is_scaled_once(kind):
    part = CPWeight(2, 3, 5, rank=4).double()
    weight = kind(part, SumWeight(part, DenseWeight(2, 3, 5).double()))
    read = Normalisation.of(torch.tensor([0.1, 100.0], dtype=torch.float64), randn(2, 3))
    folded = fold(Normalised(Crosscoder(CrossLayerEncoder(weight, TopK(2)), CrossLayerDecoder(weight)).double(), read))
    assert_close(folded.encoder.weight.to_dense(), weight.to_dense() * read.scale[:, None, None])
    assert folded.encoder.weight.weights[0] is folded.encoder.weight.weights[1].weights[0]


class Loudest(torch.nn.Module):
    """Keeps the latent of the largest z times the norm of its atom; holds the decoder's weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, pre):
        score = pre.relu() * self.weight.norms().sum(0)
        return pre.relu() * (score == score.amax(-1, keepdim=True))


def test_a_gate_that_holds_the_decoders_weight_keeps_the_norms_it_was_trained_with():
    weight = TensorRingWeight(3, 4, 16, ranks=(2, 3, 4)).double()
    for gate in (Loudest(weight), Loudest(writer := DenseWeight(3, 4, 16).double())):
        coder = Crosscoder(
            CrossLayerEncoder(weight, gate), CrossLayerDecoder(writer if gate.weight is not weight else weight)
        ).double()
        whole = Normalised(coder, Normalisation.of(torch.tensor([0.1, 10.0, 100.0], dtype=torch.float64), randn(3, 4)))
        x = whole.normalisation.mean + randn(200, 3, 4)
        folded = fold(whole)
        assert_close(folded.encode(x), whole.encode(x))
        assert_close(folded(x), whole(x))
        assert_close(unfold(folded, whole.normalisation)(x), whole(x))


class DropFirst(torch.nn.Module):
    """A mask that always drops the first layer."""

    def forward(self, x):
        return torch.cat([torch.zeros_like(x[..., :1, :]), x[..., 1:, :]], dim=-2)


def test_a_dropped_layer_is_its_mean_before_folding_and_zero_after():
    weight = DenseWeight(3, 4, 5).double()
    coder = Crosscoder(
        CrossLayerEncoder(weight, torch.nn.ReLU(), mask=DropFirst()), CrossLayerDecoder(DenseWeight(3, 4, 5))
    ).double()
    whole = Normalised(coder, Normalisation.of(torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64), randn(3, 4)))
    x, scale, mean = randn(7, 3, 4), whole.normalisation.scale, whole.normalisation.mean
    dropped = x.clone()
    dropped[:, 0] = mean[0]
    plain = Crosscoder(CrossLayerEncoder(weight, torch.nn.ReLU()), coder.decoder)
    assert_close(whole.encode(x), Normalised(plain, whole.normalisation).encode(dropped))
    dropped[:, 0] = 0
    assert_close(fold(whole).encode(x), Normalised(plain, whole.normalisation).encode(dropped))
    between = torch.einsum("d,dn->n", scale[0] * mean[0], weight.to_dense()[0])
    pre = coder.encoder.pre_activations(whole.normalisation(x))
    assert_close(fold(whole).encoder.pre_activations(x), pre - between)


def test_one_scale_and_no_mean_is_fold_scale():
    coder = Crosscoder(
        CrossLayerEncoder(CPWeight(2, 3, 5), TopK(2)), CrossLayerDecoder(TensorRingWeight(2, 3, 5))
    ).double()
    whole, x = (
        Normalised(coder, Normalisation.of(torch.full((2,), 0.3, dtype=torch.float64), torch.zeros(2, 3))),
        randn(7, 2, 3),
    )
    folded = fold(whole)
    assert_close(folded(x), fold_scale(coder, 0.3)(x))


def holding(kind, gate):
    reader, writer = (DenseWeight(2, 3, 12).double() for _ in range(2))
    held = {
        "tied": (reader, reader, writer),
        "gate and reader": (reader, writer, reader),
        "all": (reader, reader, reader),
    }[kind]
    coder = Crosscoder(CrossLayerEncoder(held[0], Scored(gate, SumNorm(held[2]))), CrossLayerDecoder(held[1])).double()
    torch.nn.init.normal_(coder.encoder.bias)
    torch.nn.init.normal_(coder.decoder.bias)
    return coder.eval()


@pytest.mark.parametrize("gate", [TopK(2), JumpReLU(12)], ids=repr)
@pytest.mark.parametrize("kind", ["tied", "gate and reader", "all"])
def test_one_scale_parts_what_is_shared_as_folding_does(kind, gate):
    for buffer in gate.buffers():
        buffer.fill_(0.3)
    coder, x = holding(kind, gate), randn(40, 2, 3)
    whole = Normalised(coder, Normalisation.of(torch.full((2,), 30.0, dtype=torch.float64), torch.zeros(2, 3)))
    expected, again = whole(x), fold(whole)(x)
    assert_close(again, expected)
    assert_close(fold_scale(coder, 30.0)(x), expected)


@given(normalised())
def test_sparse_codes_are_the_same_codes(drawn):
    whole, x = drawn
    z = whole.encode(x, layout=torch.sparse_csr)
    assert_close(z.to_dense(), whole.encode(x))
    assert_close(whole.decode(z), whole.decode(whole.encode(x)))


@given(normalised())
def test_its_recipe_builds_it_again(drawn):
    whole, x = drawn
    again = build(describe(whole), KNOWN).double().eval()
    again.load_state_dict(whole.state_dict())
    assert torch.equal(again(x), whole(x))


@pytest.mark.parametrize(
    "output", [None, Normalisation.of(torch.tensor([3.0, 5.0]), torch.arange(6.0).view(2, 3))], ids=["same", "other"]
)
def test_it_is_saved_and_loaded_bit_for_bit_folded_or_not(tmp_path, output):
    coder = Crosscoder(CrossLayerEncoder(CPWeight(2, 3, 5), BatchTopK(2)), CrossLayerDecoder(DenseWeight(2, 3, 5)))
    whole = Normalised(coder, Normalisation.of(torch.tensor([0.1, 100.0]), torch.randn(2, 3)), output=output).eval()
    whole.crosscoder.encoder.sparsifier.threshold.fill_(0.7)
    x = torch.randn(7, 2, 3)
    for number, module in enumerate((whole, fold(whole))):
        save_pretrained(module, tmp_path / str(number))
        assert torch.equal(from_pretrained(tmp_path / str(number))(x), module(x))
    again = from_pretrained(tmp_path / "0")
    assert (again.output is again.normalisation) == (output is None)


def test_mode_backend_and_frozen_parameters_are_carried_over():
    coder = (
        Crosscoder(CrossLayerEncoder(DenseWeight(2, 3, 5), TopK(2)), CrossLayerDecoder(DenseWeight(2, 3, 5)))
        .eval()
        .requires_grad_(False)
    )
    coder.backend = "dense"
    folded = fold(Normalised(coder, Normalisation(2, 3)))
    assert folded.backend == "dense"
    assert not folded.training
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert {id(part) for part in coder.modules()}.isdisjoint(
        id(part) for part in folded.modules()
    )  # a mode set here stays here


class Mine(Weight):
    """Every layer reads and writes the same direction."""

    def __init__(self, layers, d_model, latents):
        super().__init__()
        self.layers, self.d_model, self.latents = layers, d_model, latents
        self.direction = torch.nn.Parameter(torch.randn(latents, d_model))
        self.register_buffer("gain", torch.ones(layers))

    def to_latents(self, x):
        return torch.einsum("...ld,nd,l->...n", x, self.direction, self.gain)

    def to_layers(self, z):
        return torch.einsum("...n,nd,l->...ld", z, self.direction, self.gain)


class MineScaled(Mine):
    def scale_layers_(self, factors):
        self.gain.mul_(factors)


def test_a_weight_of_your_own_needs_scale_layers():
    read, x = Normalisation.of(torch.tensor([0.1, 100.0], dtype=torch.float64), randn(2, 3)), randn(7, 2, 3)
    dense = DenseWeight(2, 3, 5)
    for weight in (MineScaled(2, 3, 5), SumWeight(MineScaled(2, 3, 5), dense)):
        whole = Normalised(
            Crosscoder(CrossLayerEncoder(weight, TopK(2)), CrossLayerDecoder(MineScaled(2, 3, 5))).double(), read
        )
        assert_close(fold(whole)(x), whole(x))
    for coder in (
        Crosscoder(CrossLayerEncoder(dense, TopK(2)), CrossLayerDecoder(Mine(2, 3, 5))),
        Crosscoder(CrossLayerEncoder(SumWeight(dense, Mine(2, 3, 5)), TopK(2)), CrossLayerDecoder(dense)),
    ):
        message = (
            "a normalisation is folded into each layer on its own, and Mine cannot scale its layers; "
            "give it scale_layers_(factors), which multiplies each layer by its factor"
        )
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            fold(Normalised(coder.double(), read))


class Squares(torch.nn.Module):
    """A decoder of one's own: squared codes beside the linear part."""

    def __init__(self, weight, more):
        super().__init__()
        self.weight, self.more = weight, more
        self.bias = torch.nn.Parameter(torch.randn(weight.layers, weight.d_model))

    def forward(self, z):
        return self.weight.to_layers(z) + self.more.to_layers(z.square()) + self.bias

    def scale_layers_(self, factors):
        self.weight.scale_layers_(factors)
        self.more.scale_layers_(factors)


def test_a_decoder_of_your_own_needs_scale_layers_too():
    coder = Crosscoder(
        CrossLayerEncoder(DenseWeight(2, 3, 5), TopK(2)), Squares(MineScaled(2, 3, 5), MineScaled(2, 3, 5))
    ).double()
    coder.backend = "dense"
    whole, x = (
        Normalised(coder, Normalisation.of(torch.tensor([0.1, 100.0], dtype=torch.float64), randn(2, 3))),
        randn(7, 2, 3),
    )
    assert_close(fold(whole)(x), whole(x))


def tied_factor():
    one, other = (
        EinsumWeight("latents r, layers r, d_model r", layers=2, d_model=3, latents=5, r=4),
        CPWeight(2, 3, 5, rank=4),
    )
    other.factors[2] = one.factors[1]
    return SumWeight(one, other)


def plain(reader, writer=None):
    return Crosscoder(CrossLayerEncoder(reader, JumpReLU(5)), CrossLayerDecoder(writer or DenseWeight(2, 3, 5)))


def broken():
    normalisation = Normalisation(2, 3)
    normalisation.scale[1] = 0
    return normalisation


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (
            lambda: Normalised(plain(DenseWeight(2, 3, 5)), Normalisation(3, 2)),
            ShapeError,
            "the crosscoder reads layers=2, d_model=3, and the normalisation is made for layers=3, d_model=2; "
            "make them equal",
        ),
        (
            lambda: Normalised(plain(DenseWeight(1, 3, 5)), Normalisation(1, 3)),
            ShapeError,
            "the crosscoder writes layers=2, d_model=3, and the normalisation is made for layers=1, d_model=3; "
            "give one for what it writes: output=...",
        ),
        (
            lambda: fold(Normalised(plain(DenseWeight(2, 3, 5)), broken(), output=Normalisation(2, 3))),
            ValueError,
            "a normalisation needs finite scales > 0, got [0.0] at layers axis [1]; 1 leaves a layer as it is",
        ),
        (
            lambda: fold(Normalised(plain(DenseWeight(2, 3, 5)), Normalisation(2, 3), output=broken())),
            ValueError,
            "a normalisation needs finite scales > 0, got [0.0] at layers axis [1]; 1 leaves a layer as it is",
        ),
        (
            lambda: unfold(plain(DenseWeight(2, 3, 5)), broken()),
            ValueError,
            "a normalisation needs finite scales > 0, got [0.0] at layers axis [1]; 1 leaves a layer as it is",
        ),
        (
            lambda: fold(plain(DenseWeight(2, 3, 5))),
            TypeError,
            "fold takes a Normalised, got Crosscoder; wrap it: fold(Normalised(crosscoder, normalisation))",
        ),
        (
            lambda: Normalised(plain(DenseWeight(2, 3, 5)), 0.5),
            TypeError,
            "Normalised takes a Normalisation, got 0.5; make one: Normalisation.of(scale, mean)",
        ),
        (
            lambda: fold(Normalised(plain(tied_factor()), Normalisation(2, 3))),
            ValueError,
            "two places hold one factor, which would be scaled twice; share the weight itself, or copy the factor",
        ),
    ],
)
def test_what_cannot_be_folded_is_refused_in_one_sentence(act, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        act()


class Doubled(CrossLayerEncoder):
    def forward(self, x):
        return 2 * super().forward(x)


class Late(CrossLayerEncoder):
    """Adds another bias before it reads, which no fold knows of."""

    def __init__(self, weight, sparsifier):
        super().__init__(weight, sparsifier)
        self.before = torch.nn.Parameter(torch.ones(weight.layers, weight.d_model))

    def pre_activations(self, x):
        return super().pre_activations(x - self.before)


class Plus(Crosscoder):
    def decode(self, z):
        return super().decode(z) + 1


class OwnEncoder(torch.nn.Module):
    def __init__(self, weight, sparsifier):
        super().__init__()
        self.weight, self.sparsifier = weight, sparsifier
        self.bias = torch.nn.Parameter(torch.randn(weight.latents))

    def forward(self, x):
        return self.sparsifier(self.weight.to_latents(x) + self.bias)


def own(encoder=CrossLayerEncoder, cls=Crosscoder, hook=None):
    made = cls(encoder(DenseWeight(2, 3, 5), JumpReLU(5)), CrossLayerDecoder(DenseWeight(2, 3, 5))).double()
    if hook is not None:
        made.get_submodule(hook).register_forward_hook(lambda module, given, made: 2 * made)
    return Normalised(made, Normalisation.of(torch.tensor([0.1, 100.0], dtype=torch.float64), randn(2, 3)))


@pytest.mark.parametrize("case", [{"encoder": Doubled}, {"encoder": OwnEncoder}, {"hook": "encoder"}], ids=repr)
def test_folding_keeps_code_of_ones_own(case):
    whole, x = own(**case), 10 * randn(7, 2, 3)
    folded = fold(whole)
    assert_close(folded(x), whole(x))
    assert type(folded.encoder) is type(whole.crosscoder.encoder)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ({"encoder": Late}, "Late overrides pre_activations"),
        ({"cls": Plus}, "Plus overrides decode"),
        ({"hook": "decoder"}, "a hook stands on CrossLayerDecoder"),
        ({"hook": ""}, "a hook stands on Crosscoder"),
    ],
    ids=repr,
)
def test_code_of_ones_own_that_cannot_be_folded_is_named(case, why):
    message = (
        f"fold puts a scale and a mean into weights and biases, and {why}, which then gives something else; "
        "keep the Normalised as it is"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        fold(own(**case))


@pytest.mark.parametrize("kind", ["published", "own linear part"])
@given(seeds, st.data())
def test_every_term_of_a_polynomial_decoder_is_scaled_once(kind, seed, data):
    torch.manual_seed(seed)
    decoder = polysae_decoder(4, 6, layers=3, ranks=(4, 3, 2))
    if kind == "own linear part":
        decoder = PolynomialDecoder(*decoder.terms, weight=CPWeight(3, 4, 6, rank=2), projection=decoder.projection)
    torch.nn.init.normal_(decoder.bias)
    coder = Crosscoder(CrossLayerEncoder(DenseWeight(3, 4, 6), torch.nn.ReLU()), decoder).double().eval()
    whole = Normalised(coder, data.draw(normalisations(3, 4))).eval()
    x = whole.normalisation.mean + randn(12, 3, 4)
    assert_layers_close(fold(whole)(x), whole(x), whole)


def test_what_measures_or_starts_a_crosscoder_is_told_where_a_normalised_has_it():
    coder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(2, 3, 8), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 3, 8))
    )
    normalised = fx.Normalised(
        coder.double(), fx.Normalisation.of(torch.tensor([2.0, 0.5]), torch.randn(2, 3))
    ).double()
    x = torch.randn(20, 2, 3, dtype=torch.float64)
    for ask in (
        lambda: functional_coherence(normalised, [x]),
        lambda: fx.tied_start(normalised),
    ):
        with pytest.raises(
            AttributeError, match=r"a Normalised has no encoder in the units of the data; .*fx.fold\(normalised\)"
        ):
            ask()
    ours, theirs = (measure_reconstruction(one, [x]).numbers() for one in (normalised, fx.fold(normalised)))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], rel=1e-9, nan_ok=True), name
