"""What a user gets wrong in reading activations is one sentence, at once; and what takes long shows how far it is."""

import re

import pytest
import torch
import transformers as tf
from language import make_model, make_tokenizer, words
from torch.testing import assert_close

import fmxnn as fx
from fmxnn.activations import (
    ActivationPairs,
    Activations,
    Contexts,
    activation_scale,
    contexts,
    conversations,
    harvest,
    rebatch,
    statistics,
)
from fmxnn.activations.growing import GrowingContexts, Parts
from fmxnn.activations.layer_reader import LayerReader
from fmxnn.activations.models import open_config, open_model, open_tokenizer
from fmxnn.activations.own import passages
from fmxnn.metrics import progress, spliced_loss, top_tokens
from fmxnn.metrics.latents_of import latents_of
from fmxnn.metrics.probing import pooled_codes, pooled_own_codes
from fmxnn.reports.command_line import main

MODEL, TOKENIZER, LAYERS = make_model(), make_tokenizer(), (0, 2)
TEXT = [words(20, 0), words(7, 1), words(31, 2)]
X, IDS = torch.randn(12, 2, 16, generator=torch.Generator().manual_seed(0)), torch.arange(12)
TALK = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Pip."}]
CHAT = "examples/tiny-lm-chat"


def crosscoder(layers=2, d_model=16):
    return fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(layers, d_model, 8), fx.TopK(2)),
        fx.CrossLayerDecoder(fx.DenseWeight(layers, d_model, 8)),
    )


CODER = crosscoder()


def read(text=TEXT, model=MODEL, **more):
    return harvest(model, text, layers=LAYERS, **{"tokenizer": TOKENIZER, "context": 9, "batch": 8} | more)


def growing(asked=None):
    """Contexts of a text that is read while it is used; `asked` notes which of its parts were made."""
    whole = contexts([words(400, 3)], TOKENIZER, context=9)

    def parts():
        for start in range(0, len(whole), 5):
            if asked is not None:
                asked.append(start)
            yield whole[start : start + 5]

    return GrowingContexts(Parts(parts()))


# ---- a model that is not there


@pytest.fixture
def nothing_opens(monkeypatch):
    def opened(*_, **__):
        raise AssertionError("something was opened")

    for auto in (tf.AutoConfig, tf.AutoModelForCausalLM, tf.AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", opened)


@pytest.mark.usefixtures("nothing_opens")
@pytest.mark.parametrize(
    "use",
    [
        lambda name: harvest(name, TEXT, layers=LAYERS),
        lambda name: harvest([name, name], TEXT, layers=LAYERS),
        lambda name: harvest([MODEL, name], TEXT, layers=LAYERS, tokenizer=TOKENIZER),
        lambda name: conversations([TALK], name),
        lambda name: fx.evaluate(crosscoder(), TEXT, model=name, layers=LAYERS),
        lambda name: fx.evaluate(crosscoder(), X, model=name),
        lambda name: latents_of(crosscoder(), name, None, TEXT[0], layers=LAYERS),
    ],
)
def test_a_missing_folder_is_said_before_anything_is_looked_up(use):
    with pytest.raises(
        FileNotFoundError, match=r"there is no folder '/no/such/model', '/no' is missing; give a folder"
    ):
        use("/no/such/model")


@pytest.mark.usefixtures("nothing_opens")
def test_a_missing_folder_ends_the_command(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT[0])
    fx.save_pretrained(crosscoder(), tmp_path / "saved")
    given = ["--model", "/no/such/model", "--layers", "0", "2", "--text", str(tmp_path / "text.txt")]
    assert main(["evaluate", str(tmp_path / "saved"), *given, "--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: there is no folder '/no/such/model', '/no' is missing")


@pytest.mark.parametrize("open_it", [open_model, open_tokenizer, open_config])
def test_what_the_hub_does_not_give_is_one_sentence(open_it, monkeypatch):
    def refused(*_, **__):
        raise OSError("We couldn't connect to the Hub.\nCheck your internet connection or see how to run offline.")

    for auto in (tf.AutoConfig, tf.AutoModelForCausalLM, tf.AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", refused)
    with pytest.raises(
        FileNotFoundError, match=r"no folder 'org/modle' here, and the Hub .*couldn't connect.*; mend"
    ) as e:
        open_it("org/modle")
    assert "\n" not in str(e.value)


def test_what_a_folder_lacks_is_said_by_what_reads_it(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError("no weights in this folder")

    MODEL.config.save_pretrained(tmp_path)
    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", refused)
    with pytest.raises(OSError, match="^no weights in this folder$"):
        open_model(tmp_path, TOKENIZER)


# ---- layers


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"layers": 3}, TypeError, "layers is a list, got 3; write layers=[3]"),
        ({"layers": [0, 9]}, ValueError, "saved has the layers 0 to 3, got 9; name layers among these"),
        ({"layers": [0, 0]}, ValueError, "0 and 0 in layers are one place; leave one out"),
        ({"layers": [0, 1], "at": "mlp"}, ValueError, "at and to are one of block_out"),
        ({"layers": [0, 1], "to": "mlp"}, ValueError, "at and to are one of block_out, .*got 'mlp'; write one"),
    ],
)
def test_evaluate_looks_at_layers_before_it_opens_weights(given, error, sentence, tmp_path, monkeypatch):
    MODEL.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(error, match=re.escape(sentence) if ".*" not in sentence else sentence):
        fx.evaluate(crosscoder(), TEXT, model=tmp_path / "saved", tokenizer=TOKENIZER, **given)


def test_layers_of_own_activations_are_a_list():
    for text in (X, [(X, IDS, IDS)], read()):
        with pytest.raises(TypeError, match=r"layers is a list, got 3; write layers=\[3\]"):
            fx.evaluate(crosscoder(), text, layers=3)


def test_a_layer_of_one_of_several_models_is_named_once(tmp_path):
    MODEL.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="^saved has the layers 0 to 3, got 7; name layers among these$"):
        harvest([tmp_path / "saved", MODEL], TEXT, layers=[7], tokenizer=TOKENIZER)


def test_evaluate_says_how_long_a_context_may_be():
    with pytest.raises(ValueError, match="reads at most 16 tokens at once, got context=4000; take context <= 16"):
        fx.evaluate(crosscoder(), TEXT, model=MODEL, layers=LAYERS, tokenizer=TOKENIZER, context=4000)


# ---- a text, a tokenizer, a model


def test_evaluate_reads_the_column_that_is_named():
    given = dict(model=MODEL, layers=LAYERS, tokenizer=TOKENIZER, context=9, parts=["reconstruction"])
    records = [{"body": text} for text in TEXT]
    with pytest.raises(ValueError, match="got the columns body; name the one with the text by column="):
        fx.evaluate(crosscoder(), records, **given)
    coder = crosscoder()
    assert fx.evaluate(coder, records, column="body", **given).numbers() == fx.evaluate(coder, TEXT, **given).numbers()


@pytest.mark.parametrize("tokenizer", [CHAT, 7, None])
def test_what_is_no_tokenizer_is_named(tokenizer):
    for use in (lambda: contexts(TEXT, tokenizer, context=9), lambda: top_tokens(crosscoder(), read(), tokenizer)):
        with pytest.raises(TypeError, match=rf"needs a tokenizer, got {tokenizer!r}; open one: .*open_tokenizer\(name"):
            use()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_tokenizer_may_be_given_by_its_name(count, tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    named, opened = (read(model=[MODEL] * count or MODEL, tokenizer=each) for each in (tmp_path, TOKENIZER))
    assert torch.equal(named.contexts.ids, opened.contexts.ids)
    pages = [fx.evaluate(CODER, read(), tokenizer=each, latents=[1]).page for each in (tmp_path, TOKENIZER)]
    assert repr([*pages[0].features]) == repr([*pages[1].features])


@pytest.mark.parametrize(
    "use",
    [
        lambda: LayerReader("gpt2", LAYERS),
        lambda: spliced_loss(crosscoder(), "gpt2", contexts(TEXT, TOKENIZER, context=9), layers=LAYERS),
        lambda: pooled_codes(crosscoder(), "gpt2", TOKENIZER, TEXT, layers=LAYERS),
    ],
)
def test_what_reads_a_module_says_that_a_name_is_none(use):
    with pytest.raises(TypeError, match=r"a model is read that is opened, got 'gpt2'; open it: .*open_model\(name\)"):
        use()


def test_contexts_keep_a_bool_for_each_token():
    ids = torch.zeros(2, 5, dtype=torch.int32)
    for keep in (ids, ids[:, :3] == 0):
        with pytest.raises(
            ValueError, match=r"Contexts needs keep as a bool for each token id, \(2, 5\), got .*; compare"
        ):
            Contexts(ids, keep)


def test_a_negative_token_id_is_none_of_the_model():
    ids = torch.full((9, 9), -3, dtype=torch.int32)
    with pytest.raises(ValueError, match="knows the token ids 0 to 63, got -3; use the model's own tokenizer"):
        read(Contexts(ids, ids < 0))


# ---- several models, or one at a revision


@pytest.mark.parametrize(("kind", "to"), [(Activations, None), (ActivationPairs, "mlp_out")])
def test_a_stream_of_several_models_says_that_it_has_no_single_one(kind, to):
    stream = read(model=[MODEL, MODEL], to=to)
    assert isinstance(stream, kind)
    assert not hasattr(stream, "model")
    for what in ("model", "reader") if to is None else ("model",):
        with pytest.raises(AttributeError, match=rf"GPT2LMHeadModel-1, .* no single {what}.*source\.sources has each"):
            getattr(stream, what)
    assert [source.model for source in stream.source.sources.values()] == [MODEL, MODEL]
    assert read(to=to).model is MODEL


def test_a_single_model_at_a_revision_says_so(monkeypatch):
    def opened(name, **given):
        model = make_model()
        model.config.name_or_path = name
        return model

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", opened)
    monkeypatch.setattr(tf.AutoConfig, "from_pretrained", lambda name, **given: MODEL.config)
    assert read(model="org/model@step1000").name == "org/model@step1000"
    assert read(model="org/model").name == "org/model"
    model, _ = open_model("org/model@refs/pr/1", TOKENIZER)
    assert read(model=[model, MODEL]).layers[0] == "model@refs/pr/1:0"
    report = fx.evaluate(
        crosscoder(), TEXT, model="org/model@step7", layers=LAYERS, tokenizer=TOKENIZER, context=9, parts=["coherence"]
    )
    assert report.model == "org/model@step7"


# ---- activations of one's own


def test_one_batch_with_tokens_needs_no_list():
    coder, batch = CODER, (X, IDS, IDS % 4)
    assert [len(each.text) for each in passages(fx.activations.OwnActivations(batch), 1)] == [1, 1, 1]
    assert top_tokens(coder, batch, TOKENIZER) == top_tokens(coder, [batch], TOKENIZER)
    for given in (batch, ((X, X), IDS, IDS % 4)):
        one, other = (fx.evaluate(coder, each, tokenizer=TOKENIZER, latents=[1]) for each in (given, [given]))
        assert repr([*one.page.features]) == repr([*other.page.features])
        assert one.reconstruction.numbers() == other.reconstruction.numbers()


def test_what_is_neither_a_text_nor_activations_is_said_to_be_none():
    with pytest.raises(TypeError, match=r"a batch is x, .*got ndarray; make a tensor of it, .* or harvest the text"):
        fx.evaluate(crosscoder(), [X.numpy()])
    for text in (TEXT, "text.txt", contexts(TEXT, TOKENIZER, context=9)):
        with pytest.raises(TypeError, match="a batch is x, .* or harvest the text first"):
            top_tokens(crosscoder(), text, TOKENIZER)


def test_statistics_and_the_scale_are_those_of_x_whatever_stands_beside_it():
    y = 3 * X
    for batches in ([X], [(X, IDS, IDS)], [((X, y), IDS, IDS)], [(X, y)], [(X.view(3, 4, 2, 16), IDS.view(3, 4))]):
        assert activation_scale(batches) == activation_scale([X])
        assert_close(statistics(batches).all().mean, statistics([X]).all().mean)
    assert_close(statistics([(X, y)], side=1).all().mean, statistics([y]).all().mean)
    with pytest.raises(ValueError, match=r"x \(side=0\), and of pairs y \(side=1\), got side=1 of 1; read targets"):
        statistics([X], side=1)
    with pytest.raises(TypeError, match=r"rebatch cuts activations x, got tuple as batch 1; give x alone, as in"):
        list(rebatch([X, (X, IDS)], 5))
    with pytest.raises(TypeError, match="a batch is x"):
        activation_scale(contexts(TEXT, TOKENIZER, context=9))


# ---- a text that is read while it is used


def test_evaluate_and_statistics_of_a_growing_text_are_those_of_the_whole():
    coder, whole = crosscoder(), growing()[:10_000]
    given = dict(model=MODEL, layers=LAYERS, tokenizer=TOKENIZER, latents=[1])
    reports = [fx.evaluate(coder, text, **given) for text in (growing(), whole)]
    assert reports[0].numbers() == reports[1].numbers()
    assert repr([*reports[0].page.features]) == repr([*reports[1].page.features])
    one, other = (statistics(read(text)).all() for text in (growing(), whole))
    assert torch.equal(one.mean, other.mean)
    one, other = (top_tokens(coder, read(text), TOKENIZER) for text in (growing(), whole))
    assert one == other


def test_passages_wait_for_no_more_of_a_text_than_they_hold():
    asked = []
    stream = read(growing(asked))
    next(passages(stream, at_once=5))
    assert asked[-1] <= 10


# ---- how far it is


def test_what_takes_long_shows_how_far_it_is():
    shown = []

    def bar(items, *, desc, total):
        items = list(items)
        shown.append((desc, total, len(items)))
        return items

    coder, text = crosscoder(), contexts(TEXT, TOKENIZER, context=9)
    portions = -(-len(text) // 2)
    conversations([TALK] * 3, CHAT, progress=bar)
    conversations((talk for talk in [TALK]), CHAT, progress=bar)
    statistics(read(text, block=2), progress=bar)
    statistics([X, X], progress=bar)
    statistics((x for x in [X]), progress=bar)
    top_tokens(coder, read(text), TOKENIZER, progress=bar)
    top_tokens(coder, [(X, IDS, IDS)], TOKENIZER, progress=bar)
    spliced_loss(coder, MODEL, text, layers=LAYERS, batch=2, progress=bar)
    pooled_codes(coder, MODEL, TOKENIZER, TEXT, layers=LAYERS, context=9, tokens=9, progress=bar)
    pooled_own_codes(coder, [(X, IDS)], progress=bar)
    assert shown == [
        ("conversations", 3, 3),
        ("conversations", None, 1),
        ("statistics", portions, portions),
        ("statistics", 2, 2),
        ("statistics", None, 1),
        ("top tokens", 1, 1),
        ("top tokens", None, 1),
        ("means", portions, portions),
        ("spliced loss", portions, portions),
        ("pooled codes", 3, 3),
        ("pooled codes", 1, 1),
    ]
    assert list(progress.silently([1, 2], desc="", total=None)) == [1, 2]
