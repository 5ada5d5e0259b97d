"""check_gate and check_decoder pass what is shipped and name the method that breaks a law."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, weights

import fmxnn as fx
from fmxnn.gates.gate import above
from fmxnn.metrics import off_to_on
from fmxnn.sparse.tables import Tables
from fmxnn.training import Trainer, anneal_k, calibrate

AXES = (2, 3, 12)
LATENTS = AXES[-1]


def scores(inside):
    return fx.Scored(inside, fx.SumNorm(fx.DenseWeight(*AXES)))


GATES = {
    "relu": torch.nn.ReLU,
    "topk": lambda: fx.TopK(3),
    "batchtopk": lambda: fx.BatchTopK(3),
    "jumprelu": lambda: fx.JumpReLU(LATENTS),
    "trained": lambda: fx.TrainedJumpReLU(LATENTS),
    "scored": lambda: scores(fx.BatchTopK(3)),
    "scored topk": lambda: scores(fx.TopK(3)),
    "scored jumprelu": lambda: scores(fx.JumpReLU(LATENTS)),
    "split": lambda: fx.SplitGate(fx.TopK(2), fx.BatchTopK(2), runs=(5, 7)),
    "split relu": lambda: fx.SplitGate(torch.nn.ReLU(), fx.BatchTopK(2), runs=(5, 7)),
    "decoupled": lambda: fx.Decoupled(fx.BatchTopK(3), fx.BatchTopK(2), weight=fx.DenseWeight(*AXES)),
    "groupmax": lambda: fx.GroupMax(4, LATENTS),
    "signed groupmax": lambda: fx.SignedGroupMax(4, LATENTS),
    "signed topk": lambda: fx.SignedTopK(3),
    "signed batchtopk": lambda: fx.SignedBatchTopK(3),
}


@pytest.mark.parametrize("name", GATES)
def test_every_gate_passes_and_is_left_as_it_was(name):
    gate = GATES[name]()
    before = {key: value.clone() for key, value in gate.state_dict().items()}
    fx.check_gate(gate)
    assert gate.training
    for key, value in gate.state_dict().items():
        assert torch.equal(value, before[key])


@given(seeds, st.integers(1, 9), st.integers(1, 7), st.data())
def test_gates_of_any_size_pass(seed, latents, tokens, data):
    torch.manual_seed(seed)
    k = data.draw(st.integers(1, latents))
    weight = fx.DenseWeight(2, 3, latents)
    made = [fx.TopK(k), fx.BatchTopK(k), fx.JumpReLU(latents), fx.Scored(fx.BatchTopK(k), fx.ConcatNorm(weight))]
    fx.check_gate(data.draw(st.sampled_from(made)), latents=latents, tokens=tokens)


class Mine(fx.BatchTopK):
    """A gate of the user's own, with one method at a time to spoil."""

    def choose(self, read, table, bias, *, propose=False):
        return super().choose(read, table, bias, propose=propose)


class Slow(fx.BatchTopK):
    """The same without a fast method."""

    choose = None


class Narrow(torch.nn.Module):
    def forward(self, pre):
        return pre[..., :-1]


class Rounded(torch.nn.Module):
    def forward(self, pre):
        return pre.relu().float()


class OneAxis(fx.TopK):
    takes_tables = False

    def forward(self, pre):
        return super().forward(pre) if pre.ndim == 2 else 2 * super().forward(pre)

    def choose(self, read, table, bias, *, propose=False):
        return super().choose(read, table, bias, propose=propose)


class Doubled(Mine):
    def choose(self, read, table, bias, *, propose=False):
        z = super().choose(read, table, bias, propose=propose)
        return z._replace(values=2 * z.values)


class Deaf(Mine):
    def choose(self, read, table, bias, *, propose=False):
        return super().choose(read, table, bias.detach(), propose=propose)


class Still(Mine):
    def choose(self, read, table, bias, *, propose=False):
        before = self.threshold.clone()
        z = super().choose(read, table, bias, propose=propose)
        self.threshold.copy_(before)
        return z


class Hasty(Mine):
    def choose(self, read, table, bias, *, propose=False):
        z = super().choose(read, table, bias)
        return z._replace(values=z.values.bfloat16().to(z.values.dtype)) if propose else z


class Signed(fx.SignedTopK):
    def choose(self, read, table, bias, *, propose=False):
        pre = read @ table.T + bias
        kept = self(pre)
        codes = fx.sparse.to_codes(fx.to_csr(kept))
        rows, columns = kept.nonzero(as_tuple=True)
        return codes._replace(values=kept[rows, columns])


class Together(Mine):
    takes_tables = True

    def choose(self, read, table, bias, *, propose=False):
        if isinstance(table, Tables):
            table = Tables(tuple(2 * block for block in table.blocks))
        return super().choose(read, table, bias, propose=propose)


class Picky(Slow):
    def select(self, pre):
        return super().select(pre) * (pre < pre.amax())

    def forward(self, pre):
        return super().select(pre) if self.training else super().forward(pre)


class Moved(Slow):
    def select(self, pre):
        self.threshold.add_(1)
        return super().select(pre)


class Loose(torch.nn.Module):
    def __init__(self, latents):
        super().__init__()
        self.latents = latents
        self.register_buffer("threshold", torch.ones(latents))

    def forward(self, pre):
        return above(pre, self.threshold / 2)


class Overcounted(Slow):
    def ranked(self, pre):
        yield self, pre.relu() + 1


class Strangers(Slow):
    def ranked(self, pre):
        yield self, pre
        yield fx.BatchTopK(2).double(), pre  # another one each time: what is set is not what is asked


class Thawed(fx.TrainedJumpReLU):
    def frozen(self):
        made = super().frozen()
        made.threshold.add_(1)
        return made


class Stuck(torch.nn.Module):
    def __init__(self, k):
        super().__init__()
        self._k = k

    @property
    def k(self):
        return self._k

    @k.setter
    def k(self, k):
        self._k = 3

    def forward(self, pre):
        return fx.TopK(self._k)(pre)


BROKEN = [
    (Narrow, "forward(pre) has the shape of pre"),
    (Rounded, "forward(pre) has the dtype of pre"),
    (lambda: OneAxis(3), "forward(pre) is the same whatever batch axes pre has"),
    (lambda: Doubled(3), "choose(read, table, bias) = forward(read @ table.T + bias)"),
    (lambda: Deaf(3), "the gradient of choose in bias = that of forward"),
    (lambda: Still(3), "choose moves threshold as forward does"),
    (lambda: Hasty(3), "choose(..., propose=True) = choose(...)"),
    (lambda: Signed(11), "choose gives positive values"),
    (lambda: Together(3), "choose(read, table, bias) = forward(read @ table.T + bias) at several tables"),
    (lambda: Picky(3), "select(pre) = forward(pre) in training"),
    (lambda: Moved(3), "select leaves threshold as it is"),
    (lambda: Loose(LATENTS), "what eval mode keeps exceeds threshold"),
    (lambda: Overcounted(3), "calibrate(pre) makes forward keep k a token"),
    (lambda: Strangers(3), "a threshold set from what ranked(pre) gives keeps k a token"),
    (lambda: Thawed(LATENTS), "frozen()(pre) = forward(pre) in eval mode"),
    (lambda: Stuck(3), "k is what it was set to"),
]


@pytest.mark.parametrize(("gate", "law"), BROKEN, ids=[law for _, law in BROKEN])
def test_a_broken_gate_fails_and_the_law_is_named(gate, law):
    with pytest.raises(AssertionError, match=f"^{re.escape(f'the law {law!r} does not hold')}"):
        fx.check_gate(gate())


class NoTensor(torch.nn.Module):
    def forward(self, pre):
        return None


def test_a_gate_that_gives_no_tensor_fails():
    with pytest.raises(AssertionError, match=r"^the law 'forward\(pre\) gives a tensor' does not hold: got NoneType$"):
        fx.check_gate(NoTensor())


def test_a_gate_whose_constructor_makes_another_state_fails():
    gate = fx.TopK(3)
    gate.register_buffer("seen", torch.zeros(()))
    with pytest.raises(AssertionError, match="the law 'build.describe.gate.. has the same state' does not hold"):
        fx.check_gate(gate)


def test_a_gate_of_ones_own_needs_no_fast_method():
    class Halved(fx.TopK):
        def forward(self, pre):
            return super().forward(pre) / 2

    class Joined(Halved):
        def choose(self, read, table, bias, *, propose=False):
            z = super().choose(read, table, bias, propose=propose)
            return z._replace(values=z.values / 2)

    fx.check_gate(Halved(3))
    fx.check_gate(Joined(3))


class Squared(torch.nn.Module):
    """Has no constructor of its own, so its recipe is its name."""

    def forward(self, pre):
        return pre.relu().square()


def test_the_smallest_gate_passes():
    fx.check_gate(Squared())
    assert fx.describe(Squared()) == {"Squared": {}}


class Own(torch.nn.Module):
    """Joins every question that the package asks of a gate, and is of no class of fmxnn."""

    def __init__(self, k, k_is_fixed=False):
        super().__init__()
        self.k, self.k_is_fixed = k, k_is_fixed
        self.register_buffer("threshold", torch.tensor(-1.0))

    def forward(self, pre):
        return self.select(pre) if self.training else above(pre, self.threshold.clamp(min=0))

    def select(self, pre):
        return fx.BatchTopK(self.k).select(pre)

    def ranked(self, pre):
        yield self, pre


def coder_of(gate):
    weight = fx.DenseWeight(*AXES)
    return fx.Crosscoder(fx.CrossLayerEncoder(fx.DenseWeight(*AXES), gate), fx.CrossLayerDecoder(weight)).double()


def test_a_gate_of_ones_own_is_asked_as_the_shipped_ones_are():
    x = torch.randn(20, *AXES[:2], dtype=torch.float64)
    found = {}
    for name, gate in (("own", Own(3)), ("shipped", fx.BatchTopK(3))):
        torch.manual_seed(0)
        coder = coder_of(gate)
        trainer = Trainer(coder, torch.optim.SGD(coder.parameters(), lr=0.0))
        anneal_k(trainer, start=6, k=3, steps=2)
        assert gate.k == 6
        trainer.step(x)
        trainer.step(x)
        assert gate.k == 3
        threshold = gate.threshold.fill_(-1.0)
        before, after = calibrate(coder, [x])
        assert before != before  # the threshold was not set
        kept = off_to_on(coder, [x], selection="batch").switched
        found[name] = [after, float(threshold), kept.tolist()]
    assert found["own"] == found["shipped"]


def test_a_k_that_cannot_move_is_said_by_the_gate():
    coder = coder_of(Own(3, k_is_fixed=True))
    with pytest.raises(TypeError, match="anneal_k moves the k of a sparsifier, and that of Own cannot move"):
        anneal_k(Trainer(coder, torch.optim.SGD(coder.parameters(), lr=0.0)), start=6, k=3, steps=2)


def test_a_gate_of_ones_own_inside_decoupled_is_asked_what_it_chose_in_training():
    weight = fx.DenseWeight(*AXES).double()
    pre = torch.randn(8, LATENTS, dtype=torch.float64)
    ours, theirs = (fx.Decoupled(cls(3), cls(2), weight=weight).double() for cls in (Own, fx.BatchTopK))
    for one, other in zip(ours.split(ours(pre)), theirs.split(theirs(pre)), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"layers axis \[0, 1\] were never set"):
        ours.eval()(pre)


def test_a_gate_of_gates_has_what_its_gates_have():
    for inside, there in ((fx.BatchTopK(3), True), (fx.TopK(3), False)):
        gate = scores(inside)
        assert [hasattr(gate, name) for name in ("select", "threshold")] == [there, there]
        assert (fx.frozen(gate, LATENTS) is not None) == there


def decoders(weight):
    projection = fx.Projection(weight.latents, min(2, weight.latents))
    term = fx.PowerTerm(fx.DenseWeight(weight.layers, weight.d_model, projection.rank), degree=2, start=0.5)
    product = fx.ProductTerm(
        projection,
        fx.Projection(weight.latents, projection.rank),
        weight=fx.DenseWeight(weight.layers, weight.d_model, projection.rank),
        start=0.5,
    )
    return [
        fx.CrossLayerDecoder(weight),
        fx.PolynomialDecoder(term, weight=weight, projection=projection),
        fx.MultilinearDecoder(product, weight=weight),
        fx.DecoupledDecoder(
            weight, fx.Decoupled(*(fx.JumpReLU(weight.latents) for _ in range(weight.layers)), weight=weight)
        ),
    ]


@given(weights(), st.integers(0, 3), seeds)
def test_every_decoder_of_any_weight_passes(weight, which, seed):
    torch.manual_seed(seed)
    decoder = decoders(weight)[which].double()
    torch.nn.init.normal_(decoder.bias)
    fx.check_decoder(decoder, tokens=3)


class MyDecoder(fx.CrossLayerDecoder):
    def __init__(self, weight):
        super().__init__(weight)
        torch.nn.init.normal_(self.bias)


class NarrowBias(MyDecoder):
    def __init__(self, weight):
        super().__init__(weight)
        self.bias = torch.nn.Parameter(torch.randn(weight.d_model))


class Summed(MyDecoder):
    def forward(self, z):
        return super().forward(z).sum(-2)


class OneBatchAxis(MyDecoder):
    def forward(self, z):
        return super().forward(z) * (1 if z.ndim == 2 else 2)


class Shifted(MyDecoder):
    def forward(self, z):
        return super().forward(z) + 1


class DenseOnly(MyDecoder):
    def forward(self, z):
        x_hat = super().forward(z)
        return x_hat if z.layout == torch.strided else 2 * x_hat


class DoubledCodes(MyDecoder):
    def from_codes(self, z):
        return super().from_codes(z._replace(values=2 * z.values))


class DeafCodes(MyDecoder):
    def from_codes(self, z):
        return super().from_codes(z._replace(values=z.values.detach()))


class DeafBias(MyDecoder):
    def from_codes(self, z):
        return super().from_codes(z) - self.bias + self.bias.detach()


class Unbiased(MyDecoder):
    def forward(self, z):
        return self.weight.to_layers(z)


class OneLess(MyDecoder):
    def write_prefixes(self, z, stops):
        return super().write_prefixes(z, [stop - 1 for stop in stops])


BROKEN_DECODERS = [
    (NarrowBias, "bias is layers d_model"),
    (Summed, "forward(z) is tokens layers d_model"),
    (OneBatchAxis, "forward(z) is the same whatever batch axes z has"),
    (Shifted, "forward(0) = bias"),
    (Unbiased, "forward(0) = bias"),
    (DenseOnly, "forward(csr) = forward(dense)"),
    (DoubledCodes, "from_codes(codes) = forward(z)"),
    (DeafCodes, "the gradient of from_codes in the codes = that of forward"),
    (DeafBias, "the gradient of from_codes in bias = that of forward"),
    (OneLess, "write_prefixes(z, stops) = forward of the first 1 latents"),
]


@pytest.mark.parametrize(("cls", "law"), BROKEN_DECODERS, ids=[cls.__name__ for cls, _ in BROKEN_DECODERS])
def test_a_broken_decoder_fails_and_the_law_is_named(cls, law):
    with pytest.raises(AssertionError, match=f"^{re.escape(f'the law {law!r} does not hold')}"):
        fx.check_decoder(cls(fx.DenseWeight(2, 3, 6)).double())


def test_a_decoder_whose_constructor_makes_another_state_fails():
    decoder = fx.CrossLayerDecoder(fx.DenseWeight(2, 3, 5))
    decoder.register_buffer("seen", torch.zeros(()))
    with pytest.raises(AssertionError, match="the law 'build.describe.decoder.. has the same state' does not hold"):
        fx.check_decoder(decoder)


@pytest.mark.parametrize(
    ("check", "given", "words"),
    [
        (fx.check_weight, torch.nn.Linear(3, 4), "check_weight takes a weight, got Linear without layers, d_model"),
        (fx.check_weight, fx.TopK(2), "got TopK without layers"),
        (fx.check_gate, "x", "check_gate takes a gate, .* got str which is no module; see"),
        (fx.check_decoder, torch.nn.Linear(3, 4), "takes a decoder with a weight, got Parameter which is no module"),
        (fx.check_decoder, torch.nn.ReLU(), "got ReLU without weight, bias"),
    ],
)
def test_what_is_no_part_at_all_is_one_sentence(check, given, words):
    with pytest.raises(TypeError, match=words):
        check(given)
