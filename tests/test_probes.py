import json
import re
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from language import VOCABULARY, make_model, make_tokenizer, words
from torch.testing import assert_close

import fmxnn as fx
from fmxnn.activations.layer_reader import LayerReader
from fmxnn.metrics.probing import data_sets
from fmxnn.metrics.probing.own_codes import pooled_own_codes
from fmxnn.metrics.probing.pooling import pooled_codes
from fmxnn.metrics.probing.tasks import LabelledTexts, load_probes

MODEL, TOKENIZER = make_model(), make_tokenizer(eos_token="<eos>", bos_token="<bos>")
TEXTS = [words(length, length) for length in (3, 1, 7, 12, 2, 9, 1)]


def make_crosscoder(layers=2, d_model=16, sparsifier=None):
    torch.manual_seed(1)
    weights = [fx.CPWeight(layers, d_model, 11, rank=9) for _ in range(2)]
    encoder = fx.CrossLayerEncoder(weights[0], sparsifier or fx.TopK(4), mask=fx.LayerMask(0.5))
    return fx.Crosscoder(encoder, fx.CrossLayerDecoder(weights[1])).double()


def pool(texts=TEXTS, crosscoder=None, model=MODEL, tokenizer=TOKENIZER, layers=(0, 2), **more):
    return pooled_codes(
        crosscoder or make_crosscoder(), model, tokenizer, texts, **{"layers": layers, "context": 9} | more
    )


def text_by_text(crosscoder, texts, how, context=9):
    """Each text alone through the model, its codes token by token, pooled in Python."""
    crosscoder.eval()
    rows, read = [], LayerReader(MODEL, (0, 2))
    for text in texts:
        ids = [2, *(int(word[1:]) for word in text.split() if word != "<eos>")][:context]
        codes = [crosscoder.encode(x).tolist() for x in read(torch.tensor([ids]))[0, 1:]]
        columns = list(zip(*codes, strict=True))
        rows.append([{"mean": sum(c) / len(c), "max": max(c), "last": c[-1]}[how] for c in columns])
    return torch.tensor(rows).double()


@pytest.mark.parametrize("how", ["mean", "max", "last"])
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 60), st.integers(0, 99))
def test_pooled_codes_are_those_of_each_text_alone_however_texts_are_batched(how, lengths, tokens, seed):
    texts = [words(length, seed + i) for i, length in enumerate(lengths)]
    with torch.no_grad():
        expected = text_by_text(make_crosscoder(), texts, how)
    made = pool(texts, pool=how, tokens=tokens)
    assert_close(made.codes, expected)
    assert made.tokens.tolist() == [min(length, 8) for length in lengths]
    assert made.cut == sum(length > 8 for length in lengths)


@pytest.mark.parametrize("how", ["mean", "max", "last"])
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.lists(st.integers(0, 60), max_size=5), st.booleans())
def test_own_activations_pool_as_the_texts_do_however_tokens_are_cut_and_mixed(how, lengths, at, mixed):
    texts = [words(length, i) for i, length in enumerate(lengths)]
    reader, crosscoder = LayerReader(MODEL, (0, 2)), make_crosscoder(sparsifier=torch.nn.Tanh())
    rows = [reader(torch.tensor([[2, *(int(word[1:]) for word in text.split())]]))[0, 1:9] for text in texts]
    x, numbers = torch.cat(rows), torch.cat([torch.full((len(row),), i) for i, row in enumerate(rows)])
    if mixed:  # the first tokens of all texts, then the second, ...
        order = torch.cat([torch.arange(len(row)) for row in rows]).argsort(stable=True)
        x, numbers = x[order], numbers[order]
    bounds = [0, *sorted(min(place, len(x)) for place in at), len(x)]
    batches = ((x[start:stop], numbers[start:stop]) for start, stop in pairwise(bounds))
    made = pooled_own_codes(crosscoder, batches, pool=how)
    expected = pool(texts, crosscoder, pool=how)
    assert_close(made.codes, expected.codes)
    assert torch.equal(made.tokens, expected.tokens)
    assert crosscoder.training


OWN, OF = torch.zeros(3, 2, 16), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("batches", "how", "error", "words_said"),
    [
        ([(OWN, OF)], "median", ValueError, ["pooled_own_codes knows pool mean, max, last", "'median'"]),
        ([(OWN, OF * 2)], "mean", ValueError, ["text 1 has none", "number the texts 0, 1, 2"]),
        ([(OWN[:0], OF[:0])], "last", ValueError, ["there is no text"]),
        ([(OWN, OF - 1)], "mean", ValueError, ["batch 0", "text -1", "leave tokens of none out"]),
        ([(OWN, OF), (OWN, OF[:2])], "mean", fx.ShapeError, ["batch 1", "(3, 2, 16)", "(2,)", "give (x, texts)"]),
        ([OWN], "mean", fx.ShapeError, ["batch 0", "(3, 2, 16)", "give (x, texts)"]),
        ([(OWN, OF.double())], "mean", fx.ShapeError, ["torch.float64", "give (x, texts)"]),
        ([(OWN[:, :1], OF)], "mean", fx.ShapeError, ["layers=2", "(3, 1, 16)"]),
    ],
)
def test_own_activations_that_cannot_be_pooled_are_named(batches, how, error, words_said):
    with pytest.raises(error) as caught:
        pooled_own_codes(make_crosscoder(), batches, pool=how)
    for word in words_said:
        assert word in str(caught.value)


def test_special_tokens_inside_a_text_are_dropped_from_the_pool():
    made = pool(["w5 <eos> w6 <eos>"], pool="last")
    x = LayerReader(MODEL, (0, 2))(torch.tensor([[2, 5, 0, 6]]))
    assert_close(made.codes, make_crosscoder().eval().encode(x[:, 3]))
    assert made.tokens.tolist() == [2]


@pytest.mark.parametrize("how", ["mean", "max"])
def test_negative_codes_and_half_precision_are_pooled_too(how):
    crosscoder = make_crosscoder(sparsifier=torch.nn.Tanh())
    with torch.no_grad():
        assert_close(pool(crosscoder=crosscoder, pool=how).codes, text_by_text(crosscoder, TEXTS, how))
    assert pool(crosscoder=crosscoder.bfloat16(), pool=how).codes.dtype == torch.float32


def test_modes_are_put_back():
    crosscoder, model = make_crosscoder(), make_model().train()
    assert_close(pool(crosscoder=crosscoder, model=model).codes, pool().codes)
    assert crosscoder.training
    assert model.training
    with pytest.raises(fx.ShapeError):
        pool(crosscoder=make_crosscoder(layers=3), model=model)
    assert model.training


def test_padding_is_no_token_even_where_the_tokenizer_does_not_call_it_special():
    class Bare:
        bos_token_id, eos_token_id, all_special_ids = None, 0, ()

        def __call__(self, texts, **_):
            return {"input_ids": [list(map(len, text.split())) for text in texts]}

    assert pool(["aaa bbbb", "aaa", "aaa bb cccc d"], tokenizer=Bare()).tokens.tolist() == [2, 1, 4]


class Foreign:
    bos_token_id, eos_token_id, all_special_ids = None, 0, (0,)

    def __call__(self, texts, **_):
        return {"input_ids": [[VOCABULARY + 9] * 3 for _ in texts]}


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        (ValueError, {"pool": "sum"}, "pooled_codes knows pool mean, max, last, got 'sum'"),
        (
            ValueError,
            {"context": 17},
            "GPT2LMHeadModel reads at most 16 tokens at once, got context=17; take context <= 16",
        ),
        (ValueError, {"context": 1}, "a context holds a first token and at least one more, got context=1"),
        (ValueError, {"texts": []}, "separate_contexts needs at least one text, got none"),
        (
            ValueError,
            {"texts": ["w3", " "]},
            "text 1 has no tokens besides BOS, EOS and padding: ' '; take it out, and its label",
        ),
        (
            ValueError,
            {"tokenizer": Foreign()},
            "GPT2LMHeadModel knows the token ids 0 to 63, got 73; use the model's own tokenizer",
        ),
        (ValueError, {"layers": (0, 4)}, "GPT2LMHeadModel has the layers 0 to 3, got 4; name layers among these"),
    ],
)
def test_pooling_says_what_is_wrong(kind, change, sentence):
    with pytest.raises(kind, match=f"^{re.escape(sentence)}$"):
        pool(**change)


def write(folder, name, *records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text(
        "".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records)
    )


def record(text, label):
    return {"text": text, "label": label}


def test_a_folder_is_a_task_and_a_folder_of_folders_many(tmp_path):
    for name in ("topic", "author"):
        write(tmp_path / name, "train", record("one", "a"), record("two", 1), record(" \n", "a"))
        write(tmp_path / name, "test", record("three", "a"))
    (tmp_path / "notes").mkdir()
    author, topic = load_probes(tmp_path)
    assert (author.name, topic.name) == ("author", "topic")
    assert topic.train == LabelledTexts(["one", "two"], ["a", "1"], empty=1)
    assert (len(topic.train), len(topic.test)) == (2, 1)
    assert load_probes(str(tmp_path / "topic")) == [topic]


def test_records_and_datasets_are_labelled_texts():
    records = [record("one", "a"), record("", "b"), record("two", 3)]
    assert LabelledTexts.of(records) == LabelledTexts(["one", "two"], ["a", "3"], empty=1)
    assert LabelledTexts.of(Dataset.from_list([record("one", 0)])) == LabelledTexts(["one"], ["0"])
    with pytest.raises(
        ValueError,
        match=r'^record 1: a record needs a "text" that is a string and a "label" that is a string or a number$',
    ):
        LabelledTexts.of([record("one", "a"), {"text": "two"}])


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            '{"text": "x", ',
            "no JSON (Expecting property name enclosed in double quotes: line 2 column 1 (char 15)); mend it, or "
            "give a file with one record a line",
        ),
        (
            '{"text": 3, "label": "a"}',
            'a record needs a "text" that is a string and a "label" that is a string or a number',
        ),
        (
            '{"text": "x", "label": null}',
            'a record needs a "text" that is a string and a "label" that is a string or a number',
        ),
        ("[1]", 'a record needs a "text" that is a string and a "label" that is a string or a number'),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, sentence):
    write(tmp_path, "train", record("one", "a"), line)
    write(tmp_path, "test", record("one", "a"))
    with pytest.raises(ValueError, match=f"^{re.escape(f'{tmp_path}/train.jsonl, line 2: {sentence}')}$"):
        load_probes(tmp_path)


def test_a_missing_file_or_folder_is_named(tmp_path):
    write(tmp_path / "topic", "train", record("one", "a"))
    sentence = (
        f"there is no '{tmp_path}/topic/test.jsonl'; a probe is a folder with train.jsonl and test.jsonl of "
        f'{{"text", "label"}}'
    )
    for folder in (tmp_path, tmp_path / "topic"):
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(sentence)}$"):
            load_probes(folder)
    with pytest.raises(
        FileNotFoundError,
        match=r"^there is no folder 'nowhere' of train.jsonl and test.jsonl, and no data set of that name; the",
    ):
        load_probes("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"^there is no '.*empty/train.jsonl'; a probe is a folder"):
        load_probes(tmp_path / "empty")


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A place where `datasets` finds a folder under a Hub name before it asks the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "folder", "text", "label", "wanted", "other"),
    [
        ("LabHC/bias_in_bios", "LabHC/bias_in_bios", "hard_text", "profession", [0, 6], 7),
        (
            "canrager/amazon_reviews_mcauley_1and5",
            "canrager/amazon_reviews_mcauley_1and5",
            "text",
            "category",
            [1, 5],
            4,
        ),
        (
            "canrager/amazon_reviews_mcauley_1and5_sentiment",
            "canrager/amazon_reviews_mcauley_1and5",
            "text",
            "rating",
            [1.0, 5.0],
            3.0,
        ),
        ("fancyzhx/ag_news", "fancyzhx/ag_news", "text", "label", [0, 3], 4),
    ],
)
def test_a_data_set_with_splits_is_drawn_by_its_columns(local, name, folder, text, label, wanted, other):
    for split in ("train", "test"):
        write(
            local / folder,
            split,
            *({text: f"{split} {i} of {y}", label: y, "more": 1} for i in range(9) for y in (*wanted, other)),
        )
    (task,) = load_probes(name, train=4, test=2)
    assert task.name == name
    assert sorted(task.train.labels) == [str(wanted[0])] * 4 + [str(wanted[1])] * 4
    assert sorted(task.test.labels) == [str(wanted[0])] * 2 + [str(wanted[1])] * 2
    for split, made in (("train", task.train), ("test", task.test)):
        assert len(set(made.texts)) == len(made)
        assert all(
            re.fullmatch(rf"{split} \d of {label}", text) for text, label in zip(made.texts, made.labels, strict=True)
        )
    assert load_probes(name, train=4, test=2) == [task]
    assert load_probes(name, train=4, test=2, seed=1) != [task]


def test_a_data_set_of_other_columns_is_refused(local):
    for split in ("train", "test"):
        write(local / "fancyzhx/ag_news", split, {"body": "x", "label": 1})
    with pytest.raises(
        ValueError, match=r"^fancyzhx/ag_news has no column text, but body, label; it is not the data set it was$"
    ):
        load_probes("fancyzhx/ag_news")


def test_europarl_gives_each_language_from_a_pair_of_its_own(local):
    pairs = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
    for pair in pairs.values():
        write(
            local / "Helsinki-NLP/europarl" / pair,
            "train",
            *({"translation": {side: f"{side} {i}" for side in pair.split("-")}} for i in range(20)),
        )
    configs = "".join(f"- config_name: {pair}\n  data_files: {pair}/train.jsonl\n" for pair in pairs.values())
    (local / "Helsinki-NLP/europarl/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    (task,) = load_probes("Helsinki-NLP/europarl", train=6, test=2)
    assert task.train.texts == [f"{language} {i}" for language in pairs for i in (0, 1, 2, 3, 5, 6)]
    assert task.test.texts == [f"{language} {i}" for language in pairs for i in (4, 9)]
    assert task.test.labels == [language for language in pairs for _ in range(2)]


def test_code_is_told_by_its_suffix_behind_its_header(local, monkeypatch):
    suffixes = {"C": "c", "HTML": "html", "Java": "java", "PHP": "php", "Python": "py"}
    header, body = "h" * 150, "b" * 400
    rows = [
        {"path": f"a/{i}.{suffix}", "content": f"{header}{i}{body}"}
        for i in range(10)
        for suffix in (*suffixes.values(), "txt")
    ]
    rows.insert(0, {"path": "short.py", "content": "x = 1"})
    Dataset.from_list(rows).to_parquet(local / "code.parquet")
    monkeypatch.setattr(data_sets, "CODE_FILES", str(local / "*.parquet"))
    (task,) = load_probes("codeparrot/github-code", train=3, test=2)
    assert sorted(task.train.labels) == sorted([*suffixes] * 3)
    assert sorted(task.train.texts) == sorted(f"{i}{body}" for i in (0, 1, 2) for _ in suffixes)
    assert sorted(task.test.texts) == sorted(f"{i}{body}" for i in (4, 9) for _ in suffixes)


def test_codes_are_pooled_at_any_place():
    texts, crosscoder = TEXTS[:3], make_crosscoder().eval()
    reader = LayerReader(MODEL, (0, 2), at="mlp_in")
    found = pool(texts, crosscoder, at="mlp_in", pool="last", context=16)
    for text, code in zip(texts, found.codes, strict=True):
        x = reader(torch.tensor([[2, *(int(word[1:]) for word in text.split())]]))
        assert_close(code, crosscoder.encode(x[0, -1]))
