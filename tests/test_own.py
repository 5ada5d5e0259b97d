"""Activations of one's own measure as harvested ones do, however they are cut; what is missing is said."""

import json
import re
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language import make_model, make_tokenizer, words
from test_judge import knowing
from torch.testing import assert_close
from transformers import AutoTokenizer

import fmxnn as fx
from fmxnn.activations import ActivationPairs, Shuffle
from fmxnn.activations.harvesting import harvest
from fmxnn.activations.own import POSITIONS, OwnActivations, in_text_order, passages
from fmxnn.activations.own_batches import sides_of
from fmxnn.activations.stream import Stream
from fmxnn.activations.text import contexts
from fmxnn.metrics import functional_coherence, measure_reconstruction, off_to_on, spliced_loss, top_tokens
from fmxnn.metrics.firing import whole_contexts
from fmxnn.metrics.judge import Judge, ScriptedEndpoint
from fmxnn.metrics.probing.tasks import LabelledTexts, ProbeTask
from fmxnn.reports.pages import feature_page

MODEL, TOKENIZER, LAYERS = make_model(), make_tokenizer(), (0, 2)
TEXT = contexts([words(20, 0), words(7, 1), "", words(31, 2)], TOKENIZER, context=9)
TINY = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "examples" / "tiny-lm")


class Kept:
    """A source without a model, as files are one; its numbers are so short that sums of them are exact in any order."""

    def __init__(self, source, **said):
        self.contexts, self.layers, self.d_model = source.contexts, source.layers, source.d_model
        self.device, self.name, self.said, self.inner = torch.device("cpu"), "kept", said, source

    def read(self, start, stop):
        return tuple(short(side) for side in self.inner.read(start, stop))

    def identity(self):
        return {"text": self.contexts.digest, "layers": list(self.layers), **self.said}


def short(x):
    return (x * 256).round() / 256


HARVESTED = harvest(MODEL, TEXT, layers=LAYERS, batch=16, dtype=torch.float64)
STORED = Stream(Kept(HARVESTED.source), Shuffle(batch=16))
PAIRS = harvest(MODEL, TEXT, layers=LAYERS, at="mlp_in", to="mlp_out", batch=16, dtype=torch.float64)


def make_crosscoder(layers=2, written=None, gate=None):
    torch.manual_seed(3)
    reader, writer = fx.DenseWeight(layers, 16, 12), fx.DenseWeight(written or layers, 16, 12)
    made = fx.Crosscoder(fx.CrossLayerEncoder(reader, gate or fx.TopK(3)), fx.CrossLayerDecoder(writer)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(short(parameter))
    return made


CROSSCODER = make_crosscoder()


def kept(stream=STORED):
    """The sides, ids and positions of every kept token, in order."""
    sides = zip(*(each for each, _, _ in stream.in_order(3)), strict=True)
    _, position = stream.contexts.keep.nonzero(as_tuple=True)
    return tuple(torch.cat(side) for side in sides), stream.contexts.ids[stream.contexts.keep], position


def cut(columns, at):
    """The columns in batches that end at these tokens."""
    for start, stop in pairwise([0, *sorted(at), len(columns[-1])]):
        yield tuple(column[start:stop] for column in columns)


class Again:
    """An iterable that begins anew each time and has no length, as a loader may be."""

    def __init__(self, batches):
        self.batches = list(batches)

    def __iter__(self):
        return iter(self.batches)


cuts = st.lists(st.integers(0, TEXT.tokens), max_size=6)
ways = st.sampled_from([list, iter, Again])


def features(page):
    """The latents of a page, with shares and means, whose sums are rounded, to nine digits.

    Without the sample of each interval, which depends on the numbers of the contexts: those of own batches begin at 0.
    """
    text = json.dumps([asdict(feature) | {"intervals": ()} for feature in page.features])
    return json.loads(text, parse_float=lambda number: f"{float(number):.9g}"), page.tokens


@settings(max_examples=40)
@given(cuts, ways, st.integers(0, 5), st.integers(1, 4))
def test_passages_hold_each_token_once_at_its_place_in_whole_contexts(at, way, shift, at_once):
    (x,), ids, positions = kept()
    found = list(passages(OwnActivations(way(cut((x, ids, positions + shift), at))), at_once))
    assert torch.equal(torch.cat([sides[0] for sides, _, _ in found]), x)
    assert torch.equal(torch.cat([text.ids[text.keep] for _, text, _ in found]), ids)
    assert all(len(sides[0]) == text.tokens for sides, text, _ in found)
    assert [start for _, _, start in found] == [sum(len(text) for _, text, _ in found[:i]) for i in range(len(found))]
    assert max(len(text) for _, text, _ in found) <= at_once
    lines = [row[row >= 0].tolist() for _, text, _ in found for row in text.ids]
    rows = zip(TEXT.ids, TEXT.keep, strict=True)
    assert lines == [row[keep].tolist() for row, keep in rows if keep.any()]


@settings(max_examples=40)
@given(cuts, ways)
def test_top_tokens_are_those_of_harvested_activations_however_batches_are_cut(at, way):
    (x,), ids, positions = kept()
    batches = way(cut((x, ids, positions), at))
    found = top_tokens(CROSSCODER, batches, TOKENIZER, contexts=3)
    assert found == top_tokens(CROSSCODER, STORED, TOKENIZER, contexts=3)


@settings(max_examples=15)
@given(cuts, ways)
def test_a_page_is_that_of_harvested_activations_however_batches_are_cut(at, way):
    (x,), ids, positions = kept()
    page = feature_page(CROSSCODER, way(cut((x, ids, positions), at)), TOKENIZER, [3, 1])
    assert features(page) == features(feature_page(CROSSCODER, STORED, TOKENIZER, [3, 1]))
    assert page.layers == (0, 1)


@settings(max_examples=15)
@given(cuts, ways)
def test_an_evaluation_is_that_of_the_text_however_batches_are_cut(at, way):
    (x,), ids, positions = kept(HARVESTED)
    more = dict(tokenizer=TOKENIZER, latents=[3, 1], judge=Judge(ScriptedEndpoint(knowing)))
    own = fx.evaluate(CROSSCODER, way(cut((x, ids, positions), at)), layers=LAYERS, **more)
    expected = fx.evaluate(CROSSCODER, TEXT, model=MODEL, layers=LAYERS, **more).numbers()
    del expected["spliced loss"]
    assert own.splice is None
    assert own.layers == LAYERS
    assert own.reconstruction.tokens == TEXT.tokens
    assert list(own.numbers()) == list(expected)
    for part, numbers in expected.items():
        assert_close(own.numbers()[part], numbers, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_contexts_as_rows_are_read_as_tokens_with_positions():
    ids = torch.randint(3, 60, (5, 7))
    x = short(HARVESTED.reader(ids))
    flat = (x.flatten(0, 1), ids.flatten(), torch.arange(7).repeat(5))
    expected = top_tokens(CROSSCODER, [flat], TOKENIZER)
    assert top_tokens(CROSSCODER, [(x[:2], ids[:2]), (x[2:], ids[2:])], TOKENIZER) == expected
    assert top_tokens(CROSSCODER, [(x, ids, torch.arange(7).expand(5, 7))], TOKENIZER) == expected
    of_one_token = passages(OwnActivations([(x[:, :1], ids[:, :1])]), at_once=9)
    assert [row.tolist() for _, text, _ in of_one_token for row in text.ids] == ids[:, :1].tolist()


def test_tokens_of_one_character_stay_together_and_none_reaches_over_a_token_that_was_left_out():
    ids = torch.tensor(TINY("so “no”, said", add_special_tokens=False)["input_ids"])
    mark = TINY("“", add_special_tokens=False)["input_ids"]
    first = ids.tolist().index(mark[0])
    x, positions = torch.ones(len(ids), 2, 16, dtype=torch.float64), torch.arange(len(ids))
    open_gate = make_crosscoder(gate=torch.nn.ReLU())
    torch.nn.init.constant_(open_gate.encoder.bias, 50.0)
    whole = [one.token for one in top_tokens(open_gate, [(x, ids, positions)], TINY, [0])[0]]
    assert "“" in whole
    assert "”" in whole
    holed = torch.arange(len(ids)) != first + 1
    shown = top_tokens(open_gate, [(x[holed], ids[holed], positions[holed])], TINY, [0])[0]
    assert "“" not in [one.token for one in shown]
    assert "”" in [one.token for one in shown]
    assert not any("so" in context and "no" in context for one in shown for context in one.contexts)


@settings(max_examples=30)
@given(cuts, ways, st.booleans())
def test_measures_look_at_x_alone_beside_tokens(at, way, with_tokens):
    (x,), ids, positions = kept()
    columns = (x, ids, positions) if with_tokens else (x,)
    bare = [x]
    measured = measure_reconstruction(CROSSCODER, way(cut(columns, at)))
    assert_close(measured.numbers(), measure_reconstruction(CROSSCODER, bare).numbers())
    assert_close(
        functional_coherence(CROSSCODER, way(cut(columns, at)), min_active=1).values,
        functional_coherence(CROSSCODER, bare, min_active=1).values,
        equal_nan=True,
    )
    assert torch.equal(off_to_on(CROSSCODER, way(cut(columns, at))).off, off_to_on(CROSSCODER, bare).off)


def test_bare_activations_have_all_but_what_needs_tokens_or_the_model():
    (x,), _, _ = kept()
    for given_ in (x, [x], (part for part in x.split(7))):
        report = fx.evaluate(CROSSCODER, given_, parts=None)
        assert list(report.numbers()) == ["reconstruction", "norm coherence", "functional coherence", "switching on"]
        assert report.reconstruction.tokens == TEXT.tokens
        report.table()


def test_activations_in_16_bits_are_measured_in_the_crosscoders_own_dtype():
    (x,), ids, positions = kept()
    crosscoder, half = make_crosscoder().float(), x.bfloat16()
    report = fx.evaluate(crosscoder, [(half, ids, positions)], tokenizer=TOKENIZER, latents=[1])
    same = fx.evaluate(crosscoder, [(half.float(), ids, positions)], tokenizer=TOKENIZER, latents=[1])
    assert report.numbers() == same.numbers()
    assert features(report.page) == features(same.page)


# ---- streams of any source


def test_a_stream_of_any_source_measures_as_its_text_does():
    (x,), _, _ = kept()
    stream = Stream(Kept(HARVESTED.source), Shuffle(batch=16))
    given_ = dict(tokenizer=TOKENIZER, latents=[3, 1])
    report = fx.evaluate(CROSSCODER, stream, **given_)
    assert report.splice is None
    assert (report.model, report.layers) == ("kept", LAYERS)
    assert (report.page.model, report.page.layers) == ("kept", LAYERS)
    assert report.title == "DenseWeight of 12 latents on kept, layers 0, 2"
    assert_close(report.reconstruction.numbers(), measure_reconstruction(CROSSCODER, [x]).numbers())
    assert_close(report.functional.values, functional_coherence(CROSSCODER, [x]).values, equal_nan=True)
    assert features(report.page) == features(feature_page(CROSSCODER, stream, TOKENIZER, [3, 1]))


def test_a_stream_has_its_model_and_takes_one():
    expected = spliced_loss(CROSSCODER, MODEL, TEXT, layers=LAYERS).numbers()
    for stream, more in ((HARVESTED, {}), (STORED, {"model": MODEL})):
        assert_close(fx.evaluate(CROSSCODER, stream, parts=["splice"], **more).splice.numbers(), expected)


def test_probing_of_a_stream_is_that_of_its_model():
    texts = LabelledTexts([words(5, i) for i in range(40)], ["a", "b"] * 20)
    given_ = dict(tokenizer=TOKENIZER, probes=[ProbeTask("task", texts, texts)], parts=["probing"], context=9)
    expected = fx.evaluate(CROSSCODER, TEXT, model=MODEL, layers=LAYERS, **given_).numbers()
    assert fx.evaluate(CROSSCODER, HARVESTED, **given_).numbers() == expected
    assert fx.evaluate(CROSSCODER, [kept()[0][0]], model=MODEL, layers=LAYERS, **given_).numbers() == expected


def test_layers_of_a_crosscoder_that_was_saved_name_those_of_bare_activations():
    crosscoder = make_crosscoder()
    crosscoder.about = {"layers": [4, 7]}
    assert fx.evaluate(crosscoder, [kept()[0][0]], parts=["coherence"]).layers == (4, 7)
    assert fx.evaluate(crosscoder, STORED, parts=["coherence"]).layers == LAYERS
    crosscoder.about = {"layers": [6]}  # of two models
    assert fx.evaluate(crosscoder, [kept()[0][0]], parts=["coherence"]).layers == (0, 1)


# ---- transcoders


@pytest.mark.parametrize("written", [2, 1])
def test_a_transcoder_rebuilds_y_from_x_in_every_measure(written):
    (x, y), ids, positions = kept(PAIRS)
    y = y[:, :written]
    coder = make_crosscoder(written=written)
    y_hat = coder.eval()(x)
    measured = measure_reconstruction(coder, [(x, y)])
    assert_close(measured.mse, (y - y_hat).pow(2).mean((0, 2)))
    spread = (y - y.mean(0)).pow(2).sum((0, 2))
    assert_close(measured.ev, 1 - (y - y_hat).pow(2).sum((0, 2)) / spread)
    for batch in ((x, y), ((x, y), ids, positions)):
        report = fx.evaluate(coder, [batch])
        assert_close(report.reconstruction.numbers(), measured.numbers())
        assert_close(report.functional.values, functional_coherence(coder, [x]).values, equal_nan=True)
        assert report.splice is None
        assert len(report.per_layer()["decoder norm"]) == written
        report.table()
        report.figures()


def test_a_transcoder_is_evaluated_on_text_at_the_places_given_or_saved():
    (x, y), _, _ = kept(PAIRS)
    coder = make_crosscoder()
    expected = measure_reconstruction(coder, [(x, y)]).numbers()
    places = dict(at="mlp_in", to="mlp_out")
    report = fx.evaluate(coder, TEXT, model=MODEL, layers=LAYERS, tokenizer=TOKENIZER, latents=[1], **places)
    assert_close(report.reconstruction.numbers(), expected)
    assert report.splice is None
    assert features(report.page) == features(feature_page(coder, PAIRS, TOKENIZER, [1]))
    coder.about = {"layers": LAYERS, **places}
    assert_close(fx.evaluate(coder, TEXT, model=MODEL).reconstruction.numbers(), expected)
    assert_close(fx.evaluate(coder, PAIRS).reconstruction.numbers(), expected)


def test_the_linear_part_of_a_skip_counts_in_what_is_rebuilt():
    (x, y), _, _ = kept(PAIRS)
    skip = fx.SkipCrosscoder(make_crosscoder()).double()
    torch.nn.init.normal_(skip.skip)
    assert_close(measure_reconstruction(skip, [(x, y)]).mse, (y - skip.eval()(x)).pow(2).mean((0, 2)))


def test_splicing_at_other_places_is_refused_with_the_reason():
    for text, more in ((TEXT, dict(layers=LAYERS, model=MODEL, at="mlp_in", to="mlp_out")), (PAIRS, {})):
        with pytest.raises(
            ValueError, match=r"part splice: .*residual stream after blocks.* mlp_in and mlp_out; leave"
        ):
            fx.evaluate(CROSSCODER, text, parts=["splice"], **more)
    stored = Stream(Kept(PAIRS.source, at="mlp_in", to="mlp_out"), Shuffle(batch=16))
    with pytest.raises(ValueError, match=r"part splice: .* mlp_in and mlp_out"):
        fx.evaluate(CROSSCODER, stored, model=MODEL, parts=["splice"])


# ---- what is missing


BARE = [torch.zeros(4, 2, 16)]
TOKENS = [(torch.zeros(4, 2, 16), torch.arange(4), torch.arange(4))]


@pytest.mark.parametrize(
    ("batches", "more", "words_said"),
    [
        (BARE, {"latents": [1], "tokenizer": TOKENIZER}, ["part features", "without tokens", "(x, ids, positions)"]),
        (BARE, {"judge": Judge(ScriptedEndpoint(knowing))}, ["part judge", "without tokens", "(x, ids, positions)"]),
        (TOKENS, {"latents": [1]}, ["part features", "tokenizer", "pass tokenizer="]),
        (TOKENS, {"parts": ["splice"], "model": MODEL}, ["part splice", "whole contexts", "give the text"]),
        (STORED, {"parts": ["splice"]}, ["part splice", "come without one", "pass model="]),
        (STORED, {"probes": [ProbeTask("t", *(LabelledTexts(["w5"], ["a"]),) * 2)]}, ["part probing", "pass model="]),
        (STORED, {"layers": [5, 6]}, ["layers 0, 2", "[5, 6]", "leave layers out"]),
        (TEXT, {"model": [MODEL, MODEL], "layers": LAYERS}, ["one language model", "got 2", "harvest"]),
    ],
)
def test_what_is_missing_is_said_with_the_way_out(batches, more, words_said):
    with pytest.raises(ValueError, match="evaluate|activations") as caught:
        fx.evaluate(CROSSCODER, batches, **more)
    for word in words_said:
        assert word in str(caught.value)


def test_layers_of_several_models_are_not_spliced():
    source = Kept(HARVESTED.source)
    source.layers = ("base 2", "chat 2")
    stream = Stream(source, Shuffle(batch=16))
    assert fx.evaluate(CROSSCODER, stream, model=MODEL).splice is None
    with pytest.raises(ValueError, match=r"part splice: .* one language model.* base 2, chat 2; leave it out of parts"):
        fx.evaluate(CROSSCODER, stream, model=MODEL, parts=["splice"])


X, IDS = torch.zeros(4, 2, 16), torch.arange(4)


@pytest.mark.parametrize(
    ("batches", "error", "words_said"),
    [
        ([], ValueError, ["no batch", "generator"]),
        ([X, torch.zeros(3, 2, 8)], fx.ShapeError, ["batch 1", "d_model=8", "d_model=16", "alike"]),
        ([(X, IDS, IDS), X], fx.ShapeError, ["batch 1", "without token ids", "with token ids"]),
        ([(X, IDS)], fx.ShapeError, ["batch 0", "no positions", "(x, ids, positions)"]),
        ([(X, IDS, IDS[:3])], fx.ShapeError, ["batch 0", "(3,)", "the same tokens", "[batch]"]),
        ([(X, IDS, IDS, IDS)], fx.ShapeError, ["batch 0", "expected x of (tokens, layers, d_model)"]),
        ([(X, X[:2])], fx.ShapeError, ["batch 0", "(2, 2, 16)", "the same tokens"]),
        ((X, X[:2], IDS), fx.ShapeError, ["batch 0", "(2, 2, 16)", "the same tokens"]),
        (["a text"], TypeError, ["a batch is x", "got str", "harvest the text first"]),
        ([IDS], TypeError, ["a batch is x", "floating point"]),
        ([X.numpy()], TypeError, ["a batch is x", "got ndarray", "torch.as_tensor"]),
        ([(X, IDS - 1, IDS)], ValueError, ["batch 0", "token id -1", "leave tokens out"]),
        ([torch.zeros(2, 16)], fx.ShapeError, ["batch 0", "(2, 16)", "(tokens, layers, d_model)"]),
        ([(X, IDS, IDS * POSITIONS)], ValueError, ["spans at most 1,048,576", "count each from 0"]),
    ],
)
def test_batches_that_do_not_fit_are_named(batches, error, words_said):
    with pytest.raises(error) as caught:
        list(passages(in_text_order(batches)))
    for word in words_said:
        assert word in str(caught.value)


def test_what_was_named_must_be_there():
    with pytest.raises(fx.ShapeError, match=r"layers=2, and the layers 1, 2, 3 were named"):
        OwnActivations([X], layers=(1, 2, 3))
    with pytest.raises(ValueError, match=r"without tokens, .* give batches of \(x, ids, positions\)"):
        top_tokens(CROSSCODER, [X], TOKENIZER)
    with pytest.raises(ValueError, match=r"without tokens"):
        OwnActivations([X]).contexts  # noqa: B018
    with pytest.raises(fx.ShapeError, match=r"from x of \(4, 2, 16\) the crosscoder rebuilds y of \(4, 1, 16\)"):
        measure_reconstruction(make_crosscoder(written=1), [X])
    with pytest.raises(fx.ShapeError, match=r"the crosscoder reads \(..., layers=2, d_model=16\), got \(3, 16\)"):
        top_tokens(CROSSCODER, [(X[:, :1].expand(4, 3, 16), IDS, IDS)], TOKENIZER)


def test_a_generator_is_read_once_and_a_list_as_often_as_you_like():
    once, often = OwnActivations(iter(TOKENS)), OwnActivations(TOKENS)
    assert (once.contexts.tokens, len(once.contexts)) == (0, 0)
    for read in (once, often, often):
        assert sum(len(x) for x, _, _ in whole_contexts(read, None)) == 4
        assert read.contexts.ids.tolist() == [[0, 1, 2, 3]]
    assert [(start, stop) for _, start, stop in often.in_order(1)] == [(0, 1)]
    with pytest.raises(ValueError, match=r"generator, which can be read once, .* give a list"):
        list(once.passages(1))


@pytest.mark.parametrize("batch", [X, (X,), [X, IDS, IDS], (X, IDS)])
def test_x_is_found_in_any_batch(batch):
    assert [side.shape for side in sides_of(batch)] == [X.shape]


def test_x_and_y_are_found_beside_tokens():
    assert len(sides_of((X, X))) == len(sides_of(((X, X), IDS, IDS))) == len(sides_of((X, X, IDS, IDS))) == 2
    assert OwnActivations([((X, X), IDS, IDS)]).is_pairs
    assert isinstance(PAIRS, ActivationPairs)
    assert re.search("layers 0, 2", repr(HARVESTED))
