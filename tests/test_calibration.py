import warnings
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import randn, seeds
from torch._subclasses.fake_tensor import FakeTensorMode

import fmxnn as fx
from fmxnn.activations.batches import activation_scale
from fmxnn.activations.harvesting import harvest
from fmxnn.coders import inputs
from fmxnn.metrics import measure_reconstruction
from fmxnn.training import Trainer, calibrate

assert_close = torch.testing.assert_close
TINY = Path(__file__).parents[1] / "examples" / "tiny-lm"
UNSET = (
    r"the threshold of BatchTopK\(k=2\) was never set, so eval mode keeps every positive .*; train it, .*calibrate\("
)


@given(st.integers(4, 24), st.integers(64, 256), st.sampled_from([4, 32]), seeds)
def test_twenty_steps_of_a_stationary_stream_give_k_in_eval(k, latents, d_model, seed):
    torch.manual_seed(seed)
    table, bias, gate = randn(latents, d_model), randn(latents), fx.BatchTopK(k).double()
    for _ in range(20):
        gate(randn(max(8192 // k, 512), d_model) @ table.T + bias)
    l0 = (gate.eval()(randn(20_000, d_model) @ table.T + bias) > 0).sum() / 20_000
    assert abs(l0 / k - 1) < 0.03


def gates(kind, weight, k):
    """A gate of a dictionary of 12 latents and 3 layers, and how many each of its thresholds keeps of a token."""
    match kind:
        case "plain":
            return fx.BatchTopK(k), [k]
        case "scored":
            return fx.Scored(fx.BatchTopK(k), fx.SumNorm(weight)), [k]
        case "decoupled":
            return fx.Decoupled(*(fx.BatchTopK(each) for each in (k, 1, 2)), weight=weight), [k, 1, 2]
        case "shared":
            shared = fx.BatchTopK(k)
            return fx.Decoupled(shared, fx.BatchTopK(1), shared, weight=weight), [2 * k, 1]
        case "split":
            return fx.SplitGate(fx.BatchTopK(k), fx.TopK(1), fx.BatchTopK(1), runs=(6, 2, 4)), [k, 1]
        case _:
            scored = fx.Scored(fx.BatchTopK(1), fx.ConcatNorm(fx.DenseWeight(3, 4, 4)))
            return fx.SplitGate(fx.BatchTopK(k), scored, runs=(8, 4)), [k, 1]


KINDS = ["plain", "scored", "decoupled", "shared", "split", "split scored"]


def make(kind, k=2):
    weight = fx.CPWeight(3, 4, 12, rank=5)
    gate, kept = gates(kind, weight, k)
    decoder = fx.DecoupledDecoder(weight, gate) if isinstance(gate, fx.Decoupled) else fx.CrossLayerDecoder(weight)
    made = fx.Crosscoder(fx.CrossLayerEncoder(fx.DenseWeight(3, 4, 12), gate, mask=fx.LayerMask(0.5)), decoder).double()
    with torch.no_grad():
        made.encoder.bias += 1.0  # more positive values than are kept
    return made, kept


@given(st.sampled_from(KINDS), st.integers(1, 3), st.lists(st.integers(1, 9), min_size=1, max_size=4), seeds)
def test_every_threshold_keeps_k_a_token_however_the_tokens_are_cut(kind, k, lengths, seed):
    torch.manual_seed(seed)
    crosscoder, kept = make(kind, k)
    x, gate = randn(sum(lengths), 3, 4), crosscoder.encoder.sparsifier
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "HELD", 12 * 4)  # blocks of four tokens
        l0 = calibrate(crosscoder, iter(x.split(lengths)))
    crosscoder.eval()
    values = {}
    for part, ranked in gate.ranked(crosscoder.encoder.pre_activations(x)):
        values.setdefault(part, []).append(ranked.relu().flatten())
    for (part, each), count in zip(values.items(), kept, strict=True):
        assert (torch.cat(each) > part.threshold).sum() == min(count * len(x), int((torch.cat(each) > 0).sum()))
    assert l0.after == (crosscoder.encode(x) != 0).sum() / len(x)
    found = [part.threshold.clone() for part in values]
    gate.calibrate(crosscoder.encoder.pre_activations(x))
    assert_close([part.threshold for part in values], found)


def test_it_follows_from_weights_and_tokens_alone_and_tells_what_it_did():
    crosscoder, x = make("plain")[0], randn(50, 3, 4)
    crosscoder.encoder.mask.eval()
    l0 = calibrate(crosscoder, [x])
    assert l0.before != l0.before  # NaN
    assert l0.after == 2
    assert (crosscoder.training, crosscoder.encoder.mask.training) == (True, True)
    threshold = crosscoder.encoder.sparsifier.threshold.clone()
    crosscoder.encoder.sparsifier.threshold.fill_(0.0)
    l0 = calibrate(crosscoder.eval(), [x.view(5, 10, 3, 4)])
    assert l0.before == (crosscoder.encoder.pre_activations(x) > 0).sum() / 50
    assert crosscoder.encoder.sparsifier.threshold == threshold
    assert not crosscoder.training


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (lambda x: [], ValueError, "needs activations of at least one token, got none"),
        (
            lambda x: [x, x * torch.nan],
            ValueError,
            r"without NaN of at least one token, got \(50, 12\); the threshold stays",
        ),
        (lambda x: [x[:, :2]], fx.ShapeError, "layers=3, d_model=4"),
    ],
    ids=["none", "nan", "layers"],
)
def test_what_cannot_be_calibrated_moves_no_threshold(spoil, kind, message):
    crosscoder, _ = make("split")
    with pytest.raises(kind, match=message):
        calibrate(crosscoder, spoil(randn(50, 3, 4)))
    assert crosscoder.encoder.sparsifier.threshold == -1
    assert crosscoder.training


class OwnEncoder(fx.CrossLayerEncoder):
    pre_activations = property()  # as if it had none


def test_an_encoder_without_pre_activations_is_named():
    encoder = OwnEncoder(fx.DenseWeight(3, 4, 12), fx.BatchTopK(2))
    crosscoder = fx.Crosscoder(encoder, fx.CrossLayerDecoder(fx.DenseWeight(3, 4, 12)))
    sentence = (
        r"calibrate needs an encoder with pre_activations\(x\), what its gate chooses from, and OwnEncoder lacks it"
    )
    with pytest.raises(TypeError, match=f"^{sentence}; add it$"):
        calibrate(crosscoder, [torch.randn(50, 3, 4)])
    assert encoder.sparsifier.threshold == -1


@pytest.mark.parametrize("gate", [fx.TopK(2), torch.nn.ReLU(), fx.JumpReLU(12), fx.SplitGate(fx.TopK(1), runs=(12,))])
def test_a_gate_without_a_threshold_to_set_is_named(gate):
    crosscoder, _ = make("plain")
    crosscoder.encoder.sparsifier = gate
    with pytest.raises(
        TypeError,
        match=f"calibrate sets the threshold of BatchTopK, .*{type(gate).__name__} has none to set; leave it out",
    ):
        calibrate(crosscoder, [randn(5, 3, 4)])
    with pytest.raises(TypeError, match="calibrate takes a Crosscoder, got SkipCrosscoder; give the crosscoder inside"):
        calibrate(fx.SkipCrosscoder(crosscoder), [randn(5, 3, 4)])


@pytest.mark.parametrize("kind", ["plain", "scored", "split"])
@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_an_untrained_gate_in_eval_mode_warns_once(kind, backend):
    crosscoder, x = make(kind)[0].eval(), randn(5, 3, 4)
    crosscoder.backend = backend
    with pytest.warns(UserWarning, match=UNSET) as seen:
        crosscoder(x)
    assert len(seen) == (2 if kind == "split" else 1)  # once for each of its thresholds
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crosscoder(x)
        set_one = make(kind)[0]
        calibrate(set_one, [x])
        set_one.eval()(x)
        trained = make(kind)[0]
        trained(x)
        trained.eval()(x)


@pytest.mark.parametrize("where", ["meta", "fake", "vmap", "compiled"])
def test_where_a_threshold_is_no_number_it_is_not_asked(where):
    """Meta and FakeTensors have none, under vmap it is one of many, and a graph would break."""
    torch.compiler.reset()
    gate, pre = fx.BatchTopK(2).eval(), torch.randn(5, 4)
    with warnings.catch_warnings(), FakeTensorMode() if where == "fake" else nullcontext():
        warnings.simplefilter("error")
        if where == "vmap":
            thresholds = torch.tensor([0.0, 0.5])
            call = torch.func.vmap(lambda threshold: torch.func.functional_call(gate, {"threshold": threshold}, (pre,)))
            assert torch.equal(call(thresholds)[1], torch.where(pre > 0.5, pre, 0.0))
        elif where == "compiled":
            assert torch.equal(torch.compile(gate, fullgraph=True, backend="eager")(pre), pre.relu())
        elif where == "meta":
            assert gate.to("meta")(pre.to("meta")).shape == (5, 4)
        else:
            assert fx.BatchTopK(2).eval()(torch.randn(5, 4)).shape == (5, 4)


@pytest.mark.slow
def test_a_short_run_on_a_language_model_ends_with_k_in_eval():
    k = 8
    stream = harvest(TINY, topics.values(), layers=range(2, 10), batch=256, tokens=31_000)
    scale = activation_scale(islice(stream, 8))
    torch.manual_seed(0)
    weight = [fx.DenseWeight(8, stream.d_model, 512) for _ in range(2)]
    encoder = fx.CrossLayerEncoder(weight[0], fx.BatchTopK(k), mask=fx.LayerMask(0.05))
    crosscoder = fx.tied_start(fx.Crosscoder(encoder, fx.CrossLayerDecoder(weight[1])))
    trainer = Trainer(crosscoder, torch.optim.Adam(crosscoder.parameters(), lr=1e-3))
    batches = (x * scale for x in stream)
    for x in islice(batches, 100):
        trainer.step(x)
    assert calibrate(crosscoder, (x * scale for x in islice(stream, 8))).after == pytest.approx(k, rel=1e-3)
    unseen = measure_reconstruction(crosscoder, batches)
    assert unseen.numbers()["l0"] == pytest.approx(k, rel=0.1)


def test_sharded_parameters_are_refused_in_one_sentence():
    """FSDP2 leaves parameters that have a `full_tensor`."""
    crosscoder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(1, 2, 4), fx.BatchTopK(1)), fx.CrossLayerDecoder(fx.DenseWeight(1, 2, 4))
    )
    crosscoder.encoder.bias.full_tensor = lambda: crosscoder.encoder.bias
    with pytest.raises(TypeError, match="calibrate takes whole parameters, and these are sharded; gather them first"):
        calibrate(crosscoder, [torch.randn(3, 1, 2)])
    assert crosscoder.encoder.sparsifier.threshold == -1
