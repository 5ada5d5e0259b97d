import json

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language import make_tokenizer, words

from fmxnn.text import contexts, documents


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
    assert str(caught.value) == f"there is no text file {str(missing)!r}; give the path of a file, or texts as a list of strings"
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match="line 2: no JSON") as caught:
        list(documents(broken))
    assert str(caught.value).startswith(f"{broken}, line 2: no JSON (")
    broken.write_text(json.dumps({"label": 1}))
    with pytest.raises(ValueError, match="line 1") as caught:
        list(documents(broken))
    assert str(caught.value) == f'{broken}, line 1: a record needs a "text" that is a string'
    with pytest.raises(ValueError, match="column") as caught:
        list(documents([{"body": "x", "label": 1}]))
    assert str(caught.value) == 'a dataset needs a column "text" of strings, got the columns body, label'


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
    assert made.keep.tolist() == [[at > 0 and token not in (0, 2 if has_bos else 0) for at, token in enumerate(row)] for row in expected]
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
    assert str(caught.value) == "a split at 5,000 tokens needs more than that, and the text gives 98; give more text or split earlier"


def test_a_tokenizer_without_a_first_token_and_a_context_of_one_are_refused():
    with pytest.raises(ValueError, match="BOS") as caught:
        contexts(["w3"], make_tokenizer(unk_token="<unk>"), context=4)
    assert str(caught.value) == "contexts needs a tokenizer with a BOS or an EOS token to put before each context; set tokenizer.eos_token"
    with pytest.raises(ValueError, match="context=1") as caught:
        contexts(["w3"], make_tokenizer(), context=1)
    assert str(caught.value) == "a context holds a first token and at least one more, got context=1"
