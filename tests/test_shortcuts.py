"""Whatever is overridden or hooked, the output follows, at a size where sparse codes would be taken."""

from functools import partial

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize

import fmxnn as fx
from fmxnn.metrics import functional_coherence, off_to_on
from fmxnn.sparse.codes import Codes
from fmxnn.sparse.tables import Tables
from fmxnn.training import AuxiliaryLoss, Trainer

LAYERS, D_MODEL, LATENTS, K, TOKENS = 2, 16, 4096, 4, 64
AXES = (LAYERS, D_MODEL, LATENTS)
assert_close = torch.testing.assert_close


def half(*sizes):
    return fx.DenseWeight(LAYERS, D_MODEL, LATENTS // 2)


def projected():
    return fx.ProjectedWeight(fx.Projection(LATENTS, 8), fx.DenseWeight(LAYERS, D_MODEL, 8))


WEIGHTS = {
    "dense": lambda: fx.DenseWeight(*AXES),
    "ring": lambda: fx.TensorRingWeight(*AXES, ranks=(2, 8, 4)),
    "sum": lambda: fx.SumWeight(fx.DenseWeight(*AXES), fx.CPWeight(*AXES, rank=4)),
    "concat": lambda: fx.ConcatWeight(half(), half()),
    "nested": lambda: fx.ConcatWeight(fx.PlacedWeight(fx.ConcatWeight(half()), layers=LAYERS, at=0), half()),
    "ragged": lambda: fx.RaggedWeight(fx.ConcatWeight(half(), half()), widths=(D_MODEL, 9)),
    "restricted": lambda: fx.RestrictedWeight(fx.TensorRingWeight(*AXES, ranks=(2, 8, 4)), at=[[0], [0, 1]]),
    "projected": projected,
}


def square(projection):
    return fx.PowerTerm(fx.DenseWeight(LAYERS, D_MODEL, 6), degree=2, start=0.5)


def polynomial(weight):
    projection = fx.Projection(LATENTS, 8)
    return fx.PolynomialDecoder(square(projection), weight=weight, projection=projection)


def multilinear(weight):
    one, other = fx.Projection(LATENTS, 8), fx.Projection(LATENTS, 8)
    return fx.MultilinearDecoder(
        fx.ProductTerm(one, other, weight=fx.DenseWeight(LAYERS, D_MODEL, 6), start=0.5), weight=weight
    )


GATES = {
    "topk": lambda weight: fx.TopK(K),
    "batchtopk": lambda weight: fx.BatchTopK(K),
    "scored": lambda weight: fx.Scored(fx.BatchTopK(K), fx.SumNorm(weight)),
    "split": lambda weight: fx.SplitGate(fx.TopK(2), fx.BatchTopK(2), runs=(LATENTS // 2, LATENTS // 2)),
}


def made(weight="dense", gate="topk", decoder=fx.CrossLayerDecoder):
    torch.manual_seed(0)
    writer = WEIGHTS[weight]()
    encoder = fx.CrossLayerEncoder(WEIGHTS[weight](), GATES[gate](writer), mask=fx.LayerMask(0.0))
    coder = fx.Crosscoder(encoder, decoder(writer)).double()
    torch.nn.init.normal_(coder.encoder.bias, std=0.1)
    torch.nn.init.normal_(coder.decoder.bias)
    return coder


x = torch.randn(TOKENS, LAYERS, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def trained(coder):
    """The error of a step that moves nothing."""
    return Trainer(coder, torch.optim.SGD(coder.parameters(), lr=0.0)).step(x)["error"]


def ways(coder):
    """Every number that a user takes from a crosscoder, sparse where it may be."""
    torch.manual_seed(1)
    codes = coder.encode(x, layout=torch.sparse_csr)
    return [coder(x).detach(), codes.to_dense().detach(), trained(coder)]


def both(coder):
    """What every way gives as planned, and by dense products."""
    coder.backend = "auto"
    planned = ways(coder)
    coder.backend = "dense"
    dense = [coder(x).detach(), coder.encode(x).detach(), trained(coder)]
    coder.backend = "auto"
    return planned, dense


def twice(value):
    if isinstance(value, Codes):
        return value._replace(values=2 * value.values)
    if isinstance(value, Tables):
        return Tables(tuple(2 * block for block in value.blocks))
    return 2 * value


def overridden(cls, name):
    original = next(parent.__dict__[name] for parent in cls.__mro__ if name in parent.__dict__)
    if isinstance(original, property):
        return property(lambda self: twice(original.fget(self)))

    def method(self, *given, **named):
        return twice(original(self, *given, **named))

    return method


def subclassed(module, name, monkeypatch):
    cls = type(module)
    module.__class__ = type("Mine", (cls,), {name: overridden(cls, name), "__module__": __name__})


def mixed_in(module, name, monkeypatch):
    cls = type(module)
    mixin = type("Mixin", (), {name: overridden(cls, name), "__module__": __name__})
    module.__class__ = type("Mine", (mixin, cls), {"__module__": __name__})


def set_on_the_object(module, name, monkeypatch):
    original = getattr(module, name)
    object.__setattr__(module, name, lambda *given, **named: twice(original(*given, **named)))


def set_on_the_class(module, name, monkeypatch):
    cls = next(parent for parent in type(module).__mro__ if name in parent.__dict__)
    monkeypatch.setattr(cls, name, overridden(cls, name))


HOW = [subclassed, mixed_in, set_on_the_object, set_on_the_class]
SLOW = {
    "": ["__call__", "forward", "encode", "decode"],
    "encoder": ["__call__", "forward", "pre_activations"],
    "encoder.sparsifier": ["__call__", "forward", "select"],
    "encoder.mask": ["__call__", "forward"],
    "decoder": ["__call__", "forward"],
    "encoder.weight": ["to_latents"],
    "decoder.weight": ["to_layers"],
}
FAST = {"encoder": ["read", "choose"], "encoder.sparsifier": ["choose"], "decoder": ["from_codes"]}
PARTS = {"encoder.weight": ["to_bonds", "table"], "decoder.weight": ["from_bonds", "table"]}


def cases(contracts):
    return [
        pytest.param(place, name, id=f"{place or 'crosscoder'}.{name}")
        for place, names in contracts.items()
        for name in names
    ]


def differ(ours, theirs):
    return any(not torch.allclose(one, other, rtol=1e-3) for one, other in zip(ours, theirs, strict=True))


def assert_followed(coder, before, *, dense=True):
    """What is planned is what dense products give, and not what it was; where it is dense, it says why."""
    planned, products = both(coder)
    for ours, theirs in zip(planned, products, strict=True):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert differ(planned, before)
    if dense:
        assert coder.plan(TOKENS).taken.backend == "dense"
        assert f"dense: {coder.obstacle}" in repr(coder)
        assert coder.obstacle in coder.explain(TOKENS)


def skip_what_is_not_there(coder, place, name, how=subclassed):
    module = coder.get_submodule(place)
    if not hasattr(module, name):
        pytest.skip(f"{type(module).__name__} has no {name}")
    if name == "__call__" and how is set_on_the_object:
        pytest.skip("Python looks __call__ up on the class alone")
    if (
        how is set_on_the_class
        and any(name in parent.__dict__ for parent in torch.nn.Module.__mro__)
        and name == "__call__"
    ):
        pytest.skip("torch's own class, for every module of the process")
    return module


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_sparse_codes_are_taken_where_nothing_stands_in_their_way(weight, gate):
    coder = made(weight, gate)
    assert coder.obstacle == ""
    assert coder.plan(TOKENS).taken.backend == "sparse"
    for ours, theirs in zip(*both(coder), strict=True):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", HOW, ids=lambda how: how.__name__)
@pytest.mark.parametrize(("place", "name"), cases(SLOW))
def test_an_overridden_method_is_followed(place, name, how, monkeypatch):
    coder = made(gate="batchtopk")
    module = skip_what_is_not_there(coder, place, name, how)
    before = ways(coder)
    how(module, name, monkeypatch)
    own = place in ("", "encoder.mask") and name in ("__call__", "forward")  # run as they are, whatever the backend
    assert_followed(coder, before, dense=not own)


@pytest.mark.parametrize("how", HOW[:2], ids=lambda how: how.__name__)
@pytest.mark.parametrize(("place", "name"), cases(FAST))
def test_a_fast_method_of_ones_own_is_run(place, name, how, monkeypatch):
    coder = made(gate="batchtopk")
    module = skip_what_is_not_there(coder, place, name)
    before = ways(coder)
    how(module, name, monkeypatch)
    assert coder.obstacle == ""
    assert differ(ways(coder), before)


@pytest.mark.parametrize("weight", ["dense", "ring", "sum", "concat", "ragged", "projected"])
@pytest.mark.parametrize(
    ("place", "name"), cases({place: SLOW.get(place, []) + names for place, names in PARTS.items()})
)
def test_every_method_of_a_weight_is_followed(place, name, weight, monkeypatch):
    coder = made(weight)
    before = ways(coder)
    subclassed(skip_what_is_not_there(coder, place, name), name, monkeypatch)
    if isinstance(coder.get_submodule(place), fx.SumWeight | fx.ConcatWeight | fx.RaggedWeight) and name in (
        "to_bonds",
        "from_bonds",
        "table",
    ):
        assert differ(ways(coder), before)  # its slow methods do not go by its own table
        return
    assert_followed(coder, before, dense=name in ("to_latents", "to_layers"))


@pytest.mark.parametrize(
    ("weight", "inside"),
    [
        ("sum", "weights.0"),
        ("concat", "weights.1"),
        ("nested", "weights.0"),
        ("nested", "weights.0.weight"),
        ("nested", "weights.0.weight.weights.0"),
        ("projected", "weight"),
    ],
)
@pytest.mark.parametrize(("place", "name"), [("encoder.weight", "to_latents"), ("decoder.weight", "to_layers")])
def test_a_weight_inside_a_weight_is_followed(place, name, weight, inside, monkeypatch):
    coder = made(weight)
    before = ways(coder)
    subclassed(coder.get_submodule(f"{place}.{inside}"), name, monkeypatch)
    assert_followed(coder, before, dense=weight != "projected")


@pytest.mark.parametrize("name", ["to_latents", "to_layers"])
def test_a_ragged_weight_follows_the_weight_that_it_is_made_of(name, monkeypatch):
    inner = fx.ConcatWeight(fx.DenseWeight(2, 4, 5), fx.DenseWeight(2, 4, 3)).double()
    subclassed(inner, name, monkeypatch)
    given = (
        torch.randn(3, 2, 4, dtype=torch.float64) if name == "to_latents" else torch.randn(3, 8, dtype=torch.float64)
    )
    plain = fx.ConcatWeight(*inner.weights)
    ours, theirs = (getattr(fx.RaggedWeight(weight, widths=(4, 4)), name)(given) for weight in (inner, plain))
    assert_close(ours, 2 * theirs)


def test_a_restricted_weight_refuses_what_it_would_pass_by(monkeypatch):
    weight = fx.DenseWeight(2, 4, 6)
    subclassed(weight, "to_layers", monkeypatch)
    with pytest.raises(TypeError, match="slices of a weight's factors, and Mine overrides to_layers; .*PlacedWeight"):
        fx.RestrictedWeight(weight, at=[[0], [0, 1]])


@pytest.mark.parametrize(
    ("gate", "place", "name"),
    [
        ("scored", "sparsifier", "forward"),
        ("scored", "score", "forward"),
        ("scored", "score", "combine"),
        ("split", "gates.0", "forward"),
        ("split", "gates.1", "select"),
    ],
)
def test_a_gate_inside_a_gate_is_followed(gate, place, name, monkeypatch):
    coder = made(gate=gate)
    before = ways(coder)
    module = coder.get_submodule(f"encoder.sparsifier.{place}")
    if place == "score":  # twice the score is the same choice
        original = getattr(module, name)
        cls = type(module)
        scores = torch.linspace(1, 2, LATENTS, dtype=torch.float64)
        module.__class__ = type(
            "Mine", (cls,), {name: lambda self, *given: original(*given) * scores, "__module__": __name__}
        )
    else:  # what Scored takes of the gate inside is which latents it keeps
        some = torch.arange(LATENTS if gate == "scored" else LATENTS // 2) % 2
        original = getattr(type(module), name)
        module.__class__ = type(
            "Mine", (type(module),), {name: lambda self, pre: original(self, pre) * some, "__module__": __name__}
        )
    assert_followed(coder, before, dense=place != "score")


@pytest.mark.parametrize(
    ("decoder", "place", "name"),
    [
        (polynomial, "", "forward"),
        (polynomial, "", "read"),
        (polynomial, "linear", "forward"),
        (polynomial, "terms.0", "forward"),
        (polynomial, "projection", "forward"),
        (polynomial, "terms.0.weight", "to_layers"),
        (multilinear, "", "forward"),
        (multilinear, "", "read"),
        (multilinear, "linear", "forward"),
        (multilinear, "terms.0", "forward"),
        (multilinear, "terms.0.weight", "to_layers"),
    ],
)
def test_every_part_of_a_polynomial_decoder_is_followed(decoder, place, name, monkeypatch):
    coder = made(decoder=decoder)
    assert coder.plan(TOKENS).taken.backend == "sparse"
    before = ways(coder)
    subclassed(coder.get_submodule(f"decoder.{place}".rstrip(".")), name, monkeypatch)
    assert_followed(coder, before, dense=(decoder, place) != (polynomial, "terms.0") and "weight" not in place)


HOOKS = {
    "forward hook": lambda module, fn: module.register_forward_hook(lambda m, given, out: fn(out)),
    "forward pre-hook": lambda module, fn: module.register_forward_pre_hook(lambda m, given: fn(given[0])),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("place", ["", "encoder", "encoder.sparsifier", "encoder.mask", "decoder"])
def test_a_hook_is_run_and_is_handed_tensors(place, kind):
    coder, seen = made(gate="batchtopk"), []
    before = ways(coder)

    def hook(value):
        seen.append(value)
        return 2 * value

    handle = HOOKS[kind](coder.get_submodule(place), hook)
    assert_followed(coder, before, dense=place not in ("", "encoder.mask"))
    assert seen
    assert all(isinstance(value, torch.Tensor) for value in seen)
    handle.remove()
    assert coder.obstacle == ""
    for ours, theirs in zip(ways(coder), before, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("place", ["linear", "terms.0", "projection"])
def test_a_hook_inside_a_decoder_is_run(place):
    coder = made(decoder=polynomial)
    before = ways(coder)
    coder.get_submodule(f"decoder.{place}").register_forward_hook(lambda m, given, out: 2 * out)
    assert_followed(coder, before)


def test_a_hook_on_every_module_of_the_process_is_run():
    coder = made()
    before = ways(coder)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda m, given, out: 2 * out if isinstance(m, fx.TopK) else out
    )
    try:
        assert_followed(coder, before)
    finally:
        handle.remove()


@pytest.mark.parametrize("place", ["encoder", "encoder.sparsifier", "decoder"])
def test_a_backward_hook_changes_the_gradient(place):
    def gradient(backend, *, hooked):
        coder = made()
        coder.backend = backend
        if hooked:
            coder.get_submodule(place).register_full_backward_hook(lambda m, into, out: (2 * into[0],))
        (found,) = torch.autograd.grad(coder(given := x.clone().requires_grad_()).pow(2).sum(), given)
        return found

    assert_close(gradient("auto", hooked=True), gradient("dense", hooked=True), rtol=1e-10, atol=1e-10)
    assert differ([gradient("auto", hooked=True)], [gradient("auto", hooked=False)])


class UnitRows(torch.nn.Module):
    def forward(self, factor):
        return torch.nn.functional.normalize(factor.flatten(1), dim=1).view_as(factor)


@pytest.mark.parametrize("place", ["encoder.weight.factors", "decoder.weight.factors"])
def test_a_parametrization_is_followed(place):
    coder = made()
    before = ways(coder)
    parametrize.register_parametrization(coder.get_submodule(place), "0", UnitRows())
    assert_followed(coder, before)
    assert "is parametrized" in coder.obstacle


def test_a_parametrized_bias_is_followed():
    coder = made()
    before = ways(coder)
    parametrizations.weight_norm(coder.decoder, "bias")
    with torch.no_grad():
        coder.decoder.parametrizations.bias.original0.mul_(3)
    assert_followed(coder, before)


class Gained(torch.nn.Module):
    """A decoder of a user's own, which knows tensors alone."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.gain = weight, torch.nn.Parameter(torch.full((LATENTS,), 3.0))
        self.bias = torch.nn.Parameter(torch.zeros(LAYERS, D_MODEL))

    def forward(self, z):
        return self.weight.to_layers(z * self.gain) + self.bias


def test_a_decoder_of_ones_own_is_handed_a_tensor():
    coder = made(decoder=Gained)
    assert_followed(coder, ways(made()))
    assert coder.obstacle == "Gained has no from_codes"
    assert_close(coder(x), coder.decode(coder.encode(x)))


class Halved(fx.TopK):
    """A gate of a user's own that joins the fast path by its fast method."""

    def forward(self, pre):
        return super().forward(pre) / 2

    def choose(self, read, table, bias, *, propose=False):
        assert isinstance(table, torch.Tensor)
        z = super().choose(read, table, bias, propose=propose)
        return z._replace(values=z.values / 2)


def test_a_gate_of_ones_own_joins_with_its_fast_method_and_is_handed_one_table(monkeypatch):
    monkeypatch.setitem(GATES, "mine", lambda weight: Halved(K))
    coder = made(gate="mine")
    assert coder.plan(TOKENS).taken.backend == "sparse"
    assert_followed(coder, ways(made()), dense=False)
    several = made("concat", "mine")
    assert_followed(several, ways(made("concat")))
    assert several.obstacle == "Halved.choose takes one table, and the weight has several"


def test_a_penalty_is_handed_the_same_tensors_whatever_the_backend():
    seen = {}
    for backend in ("sparse", "dense"):
        coder = made(gate="batchtopk")
        coder.backend = backend
        trainer = Trainer(coder, torch.optim.SGD(coder.parameters(), lr=0.0))

        def penalty(run, backend=backend):
            seen[backend] = [run.z, run.pre]
            return run.z.sum() + run.pre.pow(2).mean()

        trainer.penalty = penalty
        trainer.step(x)
        seen[backend] += [parameter.grad for parameter in coder.parameters()]
    for ours, theirs in zip(seen["sparse"], seen["dense"], strict=True):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_auxiliary_loss_is_the_same_where_a_hook_makes_the_step_dense():
    losses = []
    for hooked in (False, True):
        coder = made(gate="batchtopk")
        trainer = Trainer(
            coder, torch.optim.SGD(coder.parameters(), lr=0.0), auxiliary=AuxiliaryLoss(k=8, weight=1.0, after=1)
        )
        trainer.silent += 5
        if hooked:
            coder.encoder.register_forward_hook(lambda m, given, out: None)
        losses.append(trainer.step(x)["loss"])
    assert_close(*losses, rtol=1e-10, atol=1e-10)


def test_a_step_refuses_a_forward_that_goes_round_the_parts():
    coder = made()
    coder.__class__ = type("Mine", (fx.Crosscoder,), {"forward": lambda self, given: given * self.decoder.bias.sum()})
    with pytest.raises(
        TypeError,
        match="needs the pre-activations and codes of the pass, and Mine called its sparsifier never; "
        ".*encode and decode",
    ):
        trained(coder)


@pytest.mark.parametrize("prefixes", [(8, LATENTS)], ids=str)
@pytest.mark.parametrize("place", ["", "weight"])
def test_the_matryoshka_loss_follows_too(place, prefixes, monkeypatch):
    coder = made()
    z = coder.encode(x)
    subclassed(coder.get_submodule(f"decoder.{place}".rstrip(".")), "to_layers" if place else "forward", monkeypatch)
    kept = [torch.where(torch.arange(LATENTS) < stop, z, 0.0) for stop in prefixes]
    expected = sum((coder.decode(code) - x).pow(2).sum((1, 2)).mean() / LAYERS for code in kept)
    for codes in (z, fx.to_csr(z)):
        assert_close(fx.matryoshka_loss(x, codes, coder.decoder, prefixes), expected)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("", "forward"),
        ("", "pre_activations"),
        ("sparsifier", "forward"),
        ("weight", "to_latents"),
        ("mask", "forward"),
    ],
)
@pytest.mark.parametrize("how", ["override", "hook"])
def test_metrics_that_hide_layers_follow_too(place, name, how, monkeypatch):
    torch.manual_seed(0)
    weight = fx.DenseWeight(3, 4, 6)
    coder = (
        fx.Crosscoder(fx.CrossLayerEncoder(weight, fx.BatchTopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(3, 4, 6)))
        .double()
        .eval()
    )
    coder.encoder.sparsifier.threshold.fill_(0.5)
    given = torch.randn(40, 3, 4, dtype=torch.float64)
    module = coder.encoder.get_submodule(place)

    def bent(z):
        return z.abs().pow(1.5) * z.sign()  # twice the codes would be the same coherence

    if how == "hook":
        if place == "weight" or name == "pre_activations":
            pytest.skip("is not called as a module")
        module.register_forward_hook(lambda m, into, out: bent(out))
    else:
        original = getattr(type(module), name)
        module.__class__ = type(
            "Mine", (type(module),), {name: lambda self, into: bent(original(self, into)), "__module__": __name__}
        )
    hidden = [given * (torch.arange(3) != layer).view(3, 1) for layer in range(3)]
    z, *gone = [coder.encode(each).detach() for each in (given, *hidden)]
    share = torch.stack([((z - less).abs() / z).where(z > 0, 0.0).sum(0) / (z > 0).sum(0) for less in gone])
    assert_close(functional_coherence(coder, [given], min_active=1).per_layer, share, equal_nan=True)
    switched = torch.stack([((z == 0) & (less > 0)).sum(0) for less in gone])
    assert torch.equal(off_to_on(coder, [given]).switched, switched)


def test_what_knows_the_plain_classes_alone_refuses_others(monkeypatch):
    coder = made()
    subclassed(coder.decoder, "forward", monkeypatch)
    with pytest.raises(TypeError, match="materialize takes .* CrossLayerDecoder, got Mine"):
        coder.materialize()
    with pytest.raises(TypeError, match="stack_layers takes .* CrossLayerDecoder, got Mine"):
        fx.stack_layers(coder)


class Doubled(fx.DenseWeight):
    """Overrides the slow methods and leaves the fast ones as they were."""

    def to_latents(self, x):
        return 2 * super().to_latents(x)

    def to_layers(self, z):
        return 2 * super().to_layers(z)

    def atoms(self, index):
        return 2 * super().atoms(index)


class Joined(Doubled):
    """The same with its fast methods."""

    def to_bonds(self, x):
        return x.flatten(-2)

    def from_bonds(self, h):
        return h.unflatten(-1, (self.layers, self.d_model))

    @property
    def table(self):
        return 2 * self.factors[0].flatten(1)

    def to_latents(self, x):
        return self.to_bonds(x) @ self.table.T

    def to_layers(self, z):
        return self.from_bonds(fx.sparse.sum_rows(z, self.table))


class Drawn(Joined):
    """The same with a start of its own: a table of twice the factors is drawn from factors of half the deviation."""

    def normal_(self, std):
        return super().normal_(std / 2)


def test_check_weight_compares_the_table_with_reading_and_writing():
    with pytest.raises(AssertionError, match=r"the law 'to_latents\(x\) = to_bonds\(x\) @ table.T' does not hold"):
        fx.check_weight(Doubled(2, 3, 4).double())
    with pytest.raises(AssertionError, match=r"the law 'normal_\(std\) draws entries of deviation std' does not hold"):
        fx.check_weight(Joined(2, 3, 4).double())
    fx.check_weight(Drawn(2, 3, 4).double())


@pytest.mark.parametrize("cls", [Doubled, Joined])
def test_a_weight_of_ones_own_runs_as_its_methods_say(cls, monkeypatch):
    monkeypatch.setitem(WEIGHTS, "mine", partial(cls, *AXES))
    coder = made("mine")
    assert_followed(coder, ways(made()), dense=cls is Doubled)


WRONG = {
    "shape": (lambda value: value[..., :-1], fx.ShapeError, "must give .*got "),
    "broadcast": (lambda value: value[..., :1], fx.ShapeError, "must give .*got "),
    "None": (lambda value: None, TypeError, "must give .*got NoneType"),
    "tuple": (lambda value: (value,), TypeError, "must give .*got tuple"),
}
OUTPUTS = {
    "encoder": ["forward", "pre_activations"],
    "encoder.sparsifier": ["forward"],
    "encoder.mask": ["forward"],
    "encoder.weight": ["to_latents", "to_bonds"],
    "decoder": ["forward", "from_codes"],
    "decoder.weight": ["to_layers", "from_bonds"],
}


BEFORE_THE_GATE = [
    ("encoder", "pre_activations"),
    ("encoder.mask", "forward"),
    ("encoder.weight", "to_latents"),
    ("encoder.weight", "to_bonds"),
]


def spoiled(module, name, wrong):
    original = getattr(type(module), name)
    changed = {name: lambda self, *given, **named: wrong(original(self, *given, **named)), "__module__": __name__}
    module.__class__ = type("Mine", (type(module),), changed)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize(("place", "name"), cases(OUTPUTS))
def test_an_override_that_gives_something_else_is_one_sentence_and_nothing_is_half_done(place, name, kind):
    wrong, error, message = WRONG[kind]
    coder = made(gate="batchtopk")
    optimizer = torch.optim.Adam(coder.parameters())
    trainer = Trainer(coder, optimizer)
    trainer.step(x)
    spoiled(coder.get_submodule(place), name, wrong)
    before = {key: value.clone() for key, value in coder.state_dict().items()}
    with pytest.raises(error, match=f"(Mine|DenseWeight).*{message}.*; "):
        coder(x)
    if (place, name) in BEFORE_THE_GATE:
        assert all(torch.equal(value, before[key]) for key, value in coder.state_dict().items())
    with pytest.raises(error, match=message):
        trainer.step(x)
    assert trainer.steps == 1
    assert all(torch.equal(value, before[key]) for key, value in coder.named_parameters())


@pytest.mark.parametrize("kind", ["shape", "broadcast", "tuple"])
@pytest.mark.parametrize("place", ["encoder", "encoder.sparsifier", "encoder.mask", "decoder"])
def test_a_hook_that_gives_something_else_is_one_sentence(place, kind):
    wrong, error, message = WRONG[kind]
    coder = made()
    name = type(coder.get_submodule(place)).__name__
    coder.get_submodule(place).register_forward_hook(lambda m, given, out: wrong(out))
    for run in (coder, partial(coder.encode, layout=torch.sparse_csr), trained_on(coder)):
        if place == "decoder" and isinstance(run, partial):
            continue
        with pytest.raises(error, match=f"^{name}.forward {message}.*hooks on it$"):
            run(x)


def trained_on(coder):
    return lambda given: trained(coder)


@pytest.mark.parametrize("place", ["encoder", "encoder.sparsifier", "encoder.mask", "decoder"])
def test_a_hook_that_returns_nothing_changes_nothing(place):
    coder = made()
    before = ways(coder)
    coder.get_submodule(place).register_forward_hook(lambda m, given, out: None)
    coder.get_submodule(place).register_forward_pre_hook(lambda m, given: None)
    for ours, theirs in zip(ways(coder), before, strict=True):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda z: z.values, TypeError, "must give fmxnn.sparse.Codes of .*, got Tensor; return what .*choose gives"),
        (lambda z: None, TypeError, "must give fmxnn.sparse.Codes of .*, got NoneType"),
        (lambda z: z._replace(firsts=z.firsts[:-1]), fx.ShapeError, "must give fmxnn.sparse.Codes of .*, got "),
    ],
)
def test_a_choose_that_gives_no_codes_is_one_sentence(wrong, error, message):
    coder = made(gate="batchtopk")
    spoiled(coder.encoder.sparsifier, "choose", wrong)
    for run in (coder, partial(coder.encode, layout=torch.sparse_csr)):
        with pytest.raises(error, match=f"^Mine.choose {message}"):
            run(x)


class Cumulative(fx.CrossLayerDecoder):
    """Writes prefixes in a way of its own."""

    def write_prefixes(self, z, stops):
        for x_hat in super().write_prefixes(z, stops):
            yield 2 * x_hat


class Slower(Cumulative):
    """Overrides forward below it."""

    def forward(self, z):
        return 3 * super().forward(z)


def test_prefixes_are_written_by_the_decoder_unless_that_passes_its_forward_by():
    prefixes = (8, LATENTS)
    losses = []
    for cls, factor in ((fx.CrossLayerDecoder, 1), (Cumulative, 2), (Slower, 3)):
        coder = made(decoder=cls)
        z = coder.encode(x)
        kept = [torch.where(torch.arange(LATENTS) < stop, z, 0.0) for stop in prefixes]
        plain = fx.CrossLayerDecoder(coder.decoder.weight)
        plain.bias = coder.decoder.bias
        expected = sum((factor * plain(code) - x).pow(2).sum((1, 2)).mean() / LAYERS for code in kept)
        for codes in (z, fx.to_csr(z)):
            assert_close(fx.matryoshka_loss(x, codes, coder.decoder, prefixes), expected)
        losses.append(expected)
    assert differ(losses[:2], losses[1:])
