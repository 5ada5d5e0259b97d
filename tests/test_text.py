import json
import re
from pathlib import Path
from pydoc_data.topics import topics
from unittest.mock import patch

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language import make_tokenizer, words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fmxnn.activations import pieces, textfiles
from fmxnn.activations.text import SEPARATOR, contexts, documents, separate_contexts

TINY = Path(__file__).parent.parent / "examples" / "tiny-lm"
PROSE = " ".join(topics.values())[:60_000]


def test_documents_come_from_files_lists_datasets_and_strings(tmp_path):
    plain, lines, code = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.py"
    plain.write_text("one<|endoftext|>two<|endoftext|>\n")
    lines.write_text('{"text": "three", "label": 1}\n{"text": "four"}\n')
    code.write_text("x = 5\n")
    assert list(documents(plain)) == list(documents(str(plain))) == ["one", "two"]
    assert list(documents([plain, lines, code])) == ["one", "two", "three", "four", "x = 5\n"]
    assert list(documents(text for text in ("five", "six"))) == ["five", "six"]
    assert list(documents(datasets.Dataset.from_dict({"text": ["seven", "eight"]}))) == ["seven", "eight"]


def test_a_source_that_cannot_be_read_is_named(tmp_path):
    missing = tmp_path / "none.txt"
    with pytest.raises(FileNotFoundError) as caught:
        list(documents(str(missing)))
    said = "a string that stands alone is a path; give the path of a file, or texts as a list of strings"
    assert str(caught.value) == f"there is no text file {str(missing)!r}, and {said}"
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match="line 2: no JSON") as caught:
        list(documents(broken))
    assert str(caught.value).startswith(f"{broken}, line 2: no JSON (")
    broken.write_text(json.dumps({"label": 1}))
    with pytest.raises(ValueError, match="line 1") as caught:
        list(documents(broken))
    assert str(caught.value).startswith(
        f'{broken}, line 1: a record needs a column "text" that is a string, got the columns label; '
    )
    with pytest.raises(ValueError, match="column") as caught:
        list(documents([{"body": "x", "label": 1}]))
    assert str(caught.value) == (
        'document 0: a record needs a column "text" that is a string, got the columns body, label; name the one with '
        "the text by column="
    )


def test_a_column_of_another_name_is_read_where_it_is_named(tmp_path):
    dataset = datasets.Dataset.from_dict({"body": ["one", "two"], "label": [0, 1]})
    lines = tmp_path / "a.jsonl"
    dataset.to_json(lines)
    assert list(documents(dataset, column="body")) == list(documents(lines, column="body")) == ["one", "two"]
    assert list(documents([lines, {"body": "three"}, "four"], column="body")) == ["one", "two", "three", "four"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=5), st.booleans(), st.data())
def test_a_json_file_of_a_list_or_of_lines_has_the_texts_that_were_written(tmp_path_factory, texts, lines, data):
    file = tmp_path_factory.getbasetemp() / "texts.json"
    records = [{"text": text} if lines or data.draw(st.booleans()) else text for text in texts]
    start, indent = data.draw(st.sampled_from(["", " \n"])), data.draw(st.sampled_from([None, 2]))
    whole = "\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=indent)
    file.write_text(start + whole, encoding="utf-8")
    assert list(documents(file)) == texts


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ('["fine", 5]', ', entry 1: a record needs a column "text" that is a string, got int; name'),
        ('["fine", "\\ud800"]', ", entry 1: half of a surrogate pair (U+D800 at character 1)"),
        ('["fine",', ": no JSON (Expecting value"),
        ("[" * 100_000, ": a record is nested too deep to be read"),
        ('[{"text": 1}]\n[{"text": 2}]', ": no JSON (Extra data"),
        ('{"data": ["one"]}', ', line 1: a record needs a column "text" that is a string, got the columns data; name'),
    ],
)
def test_a_broken_json_file_is_named(tmp_path, written, sentence):
    file = tmp_path / "broken.json"
    file.write_text(written)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{file}{sentence}')}"):
        list(documents(file))


def test_the_name_of_a_file_is_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a story").write_text("once upon a time")
    for name in ("a story", "b.jsonl", str(tmp_path / "c.json")):
        with pytest.raises(ValueError, match=r"document 0 .*names a file.*Path\("):
            list(documents([name, "more"]))
    assert list(documents([Path("a story"), "b.txt"])) == ["once upon a time", "b.txt"]
    for text in ("it is in b.txt", "once\nb.txt", ".", ""):
        assert list(documents([text])) == [text]


def test_a_folder_is_no_text_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text file .*, which is a folder; give the path of a file"):
        list(documents(tmp_path))


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(2, 7), st.booleans(), st.integers(0, 99))
def test_contexts_are_the_joined_documents_behind_a_first_token_each(lengths, context, has_bos, seed):
    tokenizer = make_tokenizer(**({"eos_token": "<eos>", "bos_token": "<bos>"} if has_bos else {"eos_token": "<eos>"}))
    texts = [words(length, seed + i) for i, length in enumerate(lengths)]
    flat = [token for text in texts for token in [*(int(word[1:]) for word in text.split()), 0]]
    rows = len(flat) // (context - 1)
    if not rows:
        return
    made = contexts(texts, tokenizer, context=context)
    expected = [[2 if has_bos else 0, *flat[i * (context - 1) : (i + 1) * (context - 1)]] for i in range(rows)]
    assert made.ids.tolist() == expected
    assert made.ids.dtype == torch.int32
    assert made.keep.tolist() == [
        [at > 0 and token not in (0, 2 if has_bos else 0) for at, token in enumerate(row)] for row in expected
    ]
    assert made.tokens == sum(map(sum, made.keep.tolist()))


def test_reading_stops_after_the_tokens_asked_for():
    def endless():
        while True:
            yield words(10)

    made = contexts(endless(), make_tokenizer(), context=9, tokens=100)
    assert made.tokens >= 100 > made.keep[:-1].sum()


@given(st.integers(1, 60))
def test_a_split_leaves_at_least_the_tokens_asked_for_in_front(tokens):
    made = contexts([words(100)], make_tokenizer(), context=8)
    front, rest = made.split(tokens)
    assert tokens <= front.tokens < tokens + 7
    assert torch.equal(torch.cat([front.ids, rest.ids]), made.ids)


def test_too_little_text_says_how_much_there_is_and_is_needed():
    with pytest.raises(ValueError, match="text gives") as caught:
        contexts(["w3 w4"], make_tokenizer(), context=16)
    assert str(caught.value) == "the text gives 3 tokens, and one context needs 15; give more text or a shorter context"
    with pytest.raises(ValueError, match="text gives") as caught:
        contexts([], make_tokenizer(), context=16)
    assert str(caught.value) == "the text gives 0 tokens, and one context needs 15; give more text or a shorter context"
    with pytest.raises(ValueError, match="split") as caught:
        contexts([words(100)], make_tokenizer(), context=8).split(5000)
    assert (
        str(caught.value)
        == "a split at 5,000 tokens needs more than that, and the text gives 98; give more text or split earlier"
    )


def test_a_tokenizer_without_a_first_token_and_a_context_of_one_are_refused():
    with pytest.raises(ValueError, match="BOS") as caught:
        contexts(["w3"], make_tokenizer(unk_token="<unk>"), context=4)
    assert (
        str(caught.value)
        == "contexts needs a tokenizer with a BOS or an EOS token to put before each context; set tokenizer.eos_token"
    )
    with pytest.raises(ValueError, match="context=1") as caught:
        contexts(["w3"], make_tokenizer(), context=1)
    assert str(caught.value) == "a context holds a first token and at least one more, got context=1"


def metaspace():
    """Puts a space before each text, as SentencePiece does."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        decoders.Metaspace(prepend_scheme="always"),
    )
    made.train_from_iterator(
        [PROSE[:20_000]], trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>", "<unk>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>")


TOKENIZERS = {
    "words": make_tokenizer(),
    "bytes": PreTrainedTokenizerFast.from_pretrained(TINY),
    "metaspace": metaspace(),
}


def whole(text, tokenizer):
    return tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    st.integers(0, 50_000), st.integers(0, 6_000), st.integers(300, 3_000), st.sampled_from([" ", "", "\n", "\n\n    "])
)
def test_a_long_document_has_the_tokens_of_the_whole(name, start, length, longest, space):
    tokenizer, text = TOKENIZERS[name], PROSE[start : start + length].replace("  ", space) + " the end"
    with patch.object(pieces, "LONGEST", longest):
        made = list(pieces.tokenised(pieces.parts(text), tokenizer))
    assert [token for some in made for ids, _ in some for token in ids] == whole(text, tokenizer)
    assert [last for some in made for _, last in some].count(True) == 1
    assert len(made) >= len(text) // longest


@given(st.text(st.sampled_from("ab \n\u3042\U0001f600"), max_size=900))
def test_a_long_text_without_a_place_to_cut_is_cut_and_nothing_of_it_lost(text):
    tokenizer = TOKENIZERS["bytes"]
    with patch.object(pieces, "LONGEST", 150):
        made = [ids for some in pieces.tokenised(pieces.parts(text), tokenizer) for ids, _ in some]
    assert tokenizer.decode([token for ids in made for token in ids]) == text


class Watched:
    """A tokenizer that keeps how many texts and characters it was given at once."""

    bos_token_id, eos_token_id, all_special_ids = None, 0, [0]

    def __init__(self):
        self.calls = []

    def __call__(self, texts, **_):
        self.calls.append((len(texts), sum(map(len, texts))))
        return {"input_ids": [[5] * len(text.split()) for text in texts]}


@given(st.lists(st.integers(0, 400), max_size=30), st.integers(150, 500))
def test_documents_are_tokenised_a_bounded_number_of_characters_at_once(lengths, longest):
    watched = Watched()
    with patch.object(pieces, "LONGEST", longest), patch.object(pieces, "_DOCUMENTS", 4):
        made = list(pieces.tokenised((part for length in lengths for part in pieces.parts("w " * length)), watched))
    assert all(len(some) <= 4 for some in made)
    assert all(
        size <= longest if count <= 4 else size < 20_000 for count, size in watched.calls
    )  # or is a try of where to cut
    assert sum(last for some in made for _, last in some) == len(lengths)
    assert sum(len(ids) for some in made for ids, _ in some) == sum(lengths)


def test_no_more_is_read_than_the_tokens_asked_for_need(tmp_path):
    watched, file = Watched(), tmp_path / "one-line.txt"
    file.write_text("word " * 2_000_000)
    made = contexts(file, watched, context=64, tokens=1000)
    assert made.tokens < 1000 + 64
    assert sum(size for _, size in watched.calls) < 2 * pieces.LONGEST


def test_a_text_alone_is_read_over_its_pieces():
    text = words(400)
    with patch.object(pieces, "LONGEST", 200):
        made, cut = separate_contexts([text, "w3", text], make_tokenizer(), context=300)
        assert separate_contexts([words(299)], make_tokenizer(), context=300)[1] == 0
    assert made.ids[0].tolist() == made.ids[2].tolist() == [0, *whole(text, make_tokenizer())[:299]]
    assert made.ids[1, :3].tolist() == [0, 3, 0]
    assert cut == 2


PARTS = ["<|endoftext|>", "<|endof", "text|>", "<|", "a", "b c", " ", "\n", "\r\n", "é", "\U0001f600"]


@given(st.lists(st.sampled_from(PARTS), max_size=40).map("".join), st.integers(1, 60))
def test_a_file_read_in_pieces_has_the_documents_of_the_whole(tmp_path_factory, text, at_once):
    file = tmp_path_factory.getbasetemp() / "pieces.txt"
    file.write_bytes(text.encode())
    expected = [part for part in file.read_text(encoding="utf-8").split(SEPARATOR) if part.strip()]
    assert list(documents(file)) == expected
    found, document = [], ""
    for piece, last in textfiles.separated(file, SEPARATOR, at_once=at_once):
        assert len(piece) <= at_once + max(at_once, len(SEPARATOR))
        document += piece
        if last:
            found.append(document)
            document = ""
    assert [each.lstrip() for each in found] == [each.lstrip() for each in expected]  # a long blank start is shortened


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"text": "caf\xe9"}', "byte 0xe9 at character 14 is no UTF-8; save the file as UTF-8"),
        (
            b'{"text": "a\\ud800b"}',
            "half of a surrogate pair (U+D800 at character 2) stands for no character; mend or take it out",
        ),
        (
            b'{"text": "a", "more": ' + b"[" * 100_000,
            "a record is nested too deep to be read; give records that are flat",
        ),
        (
            b'{"text": "a", "more": ' + b"1" * 5000 + b"}",
            "no JSON (Exceeds the limit (4300 digits) for integer string conversion",
        ),
        (b'["text"]', 'a record needs a column "text" that is a string, got list; name'),
        (b"\0\0\0\0", "no JSON (Expecting value: line 1 column 1 (char 0))"),
    ],
)
def test_a_broken_line_is_named_with_its_file(tmp_path, line, sentence):
    file = tmp_path / "broken.jsonl"
    file.write_bytes(b'{"text": "fine"}\r\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(ValueError, match=f"^{re.escape(f'{file}, line 3: {sentence}')}") as caught:
        list(documents(file))
    assert len(str(caught.value)) < 300 + len(str(file))


def test_blank_lines_are_left_out(tmp_path):
    file = tmp_path / "blank.jsonl"
    file.write_text('\n{"text": "one"}\n  \n\t\n{"text": ""}\n{"text": "two"}\n\n \n')
    assert list(documents(file)) == ["one", "", "two"]


def test_a_line_that_is_too_long_is_named_before_it_is_read_to_its_end(tmp_path):
    file = tmp_path / "long.jsonl"
    file.write_text(
        json.dumps({"text": "a" * (textfiles.LONGEST_LINE - 13)})
        + "\n"
        + json.dumps({"text": "a" * textfiles.LONGEST_LINE})
    )
    stream = documents(file)
    assert len(next(stream)) == textfiles.LONGEST_LINE - 13
    with pytest.raises(
        ValueError,
        match="line 2: a record has at most 16,777,216 characters, and this one more; give its text as a .txt file",
    ):
        next(stream)


@pytest.mark.parametrize(
    "text", ["a long text " * 1000, "x" * 5000, "two\nlines", "a\0b", "a/" * 3000, "\U0001f600" * 300, "", "\ud800"]
)
def test_a_text_that_is_no_path_says_that_a_string_is_one(text):
    with pytest.raises(
        FileNotFoundError, match="a string that stands alone is a path; .* texts as a list of strings"
    ) as caught:
        list(documents(text))
    assert len(str(caught.value)) < 350


ONE = datasets.Dataset.from_dict({"text": ["a"]})


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (datasets.DatasetDict(train=ONE, test=ONE), "text is a path or an iterable of documents, got DatasetDict "
            "with the splits train, test; give one of them, such as data['train']"),
        ({"text": "a"}, "text is a path or an iterable of documents, got dict with the entries text; give one of "
            "them, such as data['text']"),
        (["fine", 5], 'document 1 is a string, a path, or a record with a "text", got int'),
        (b"bytes", 'document 0 is a string, a path, or a record with a "text", got int'),
        (["fine", "\ud800"], "document 1: half of a surrogate pair (U+D800 at character 1) stands for no character; "
            "mend or take it out"),
        ([{"x" * 500: 1}], 'document 0: a record needs a column "text" that is a string, got the columns xxx'),
        (ONE.rename_column("text", "body"), 'document 0: a record needs a column "text" that is a string, got the '
            "columns body; name the one with the text by column="),
        (["notes.txt"], "document 0 is the string 'notes.txt', which names a file and would be read as the text; give "
            "Path('notes.txt') to read the file"),
    ],
)  # fmt: skip
def test_what_is_no_document_is_named(source, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}") as caught:
        contexts(source, make_tokenizer(), context=8)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("tokens", [0, -5])
def test_no_tokens_are_refused(tokens):
    with pytest.raises(
        ValueError, match=f"contexts reads at least one token, got tokens={tokens}; leave it out to read all"
    ):
        contexts([words(100)], make_tokenizer(), context=8, tokens=tokens)
