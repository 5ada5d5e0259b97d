"""Six public data sets of labelled texts by their Hub names; needs datasets (`pip install 'fmxnn[metrics]'`)."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, Literal, cast

from datasets import load_dataset

SplitName = Literal["train", "test"]
Pairs = Iterator[tuple[str, str]]
Reader = Callable[[SplitName, int, int], Pairs]

CODE_FILES = "hf://datasets/codeparrot/github-code/data/*.parquet"
"""The set's own script no longer runs in datasets 4, so its files are read."""
_LANGUAGES = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
_SUFFIXES = {".c": "C", ".html": "HTML", ".java": "Java", ".php": "PHP", ".py": "Python"}
_HEADER, _BODY = 150, 384  # characters: a licence stands at the top of many files, and a context of code follows it
_TEST_SHARE = 5  # where there is no test split, every fifth text of a label is a test text


def _columns(name: str, text: str, label: str, labels: str) -> Reader:
    """A set with splits, shuffled."""

    def read(split: SplitName, seed: int, each: int) -> Pairs:
        data = cast("Any", load_dataset(name, split=split)).shuffle(seed=seed)
        records = data.select_columns(_present(name, data.column_names, text, label))
        return _first(((record[text], str(record[label])) for record in records), labels.split(), each)

    return read


def _europarl(split: SplitName, seed: int, each: int) -> Pairs:
    for language, pair in _LANGUAGES.items():
        data = cast("Any", load_dataset("Helsinki-NLP/europarl", pair, split="train", streaming=True))
        yield from _first(
            _part(((record["translation"][language], language) for record in data), split), [language], each
        )


def _code(split: SplitName, seed: int, each: int) -> Pairs:
    return _first(_part(_files(), split), _SUFFIXES.values(), each)


def _files() -> Pairs:
    for record in cast("Any", load_dataset("parquet", data_files=CODE_FILES, split="train", streaming=True)):
        path, content = (record[column] for column in _present(CODE_FILES, list(record), "path", "content"))
        language = _SUFFIXES.get(PurePosixPath(path).suffix)
        if language and len(content) > _HEADER + _BODY:
            yield content[_HEADER:], language


def _first(pairs: Pairs, labels: Iterable[str], each: int) -> Pairs:
    """Up to `each` texts of each of these labels, blank ones not counted; reads no further than it must."""
    left = dict.fromkeys(labels, each)
    for text, label in pairs:
        if left.get(label, 0) > 0:
            yield text, label
            left[label] -= bool(text.strip())
            if not any(left.values()):
                return


def _part(pairs: Pairs, split: SplitName) -> Pairs:
    counts = Counter[str]()
    for text, label in pairs:
        counts[label] += 1
        if (counts[label] % _TEST_SHARE == 0) == (split == "test"):
            yield text, label


def _present(name: str, columns: list[str], *wanted: str) -> list[str]:
    if missing := [column for column in wanted if column not in columns]:
        raise ValueError(
            f"{name} has no column {', '.join(missing)}, but {', '.join(columns)}; it is not the data set it was"
        )
    return list(wanted)


DATA_SETS: Mapping[str, Reader] = {
    "LabHC/bias_in_bios": _columns("LabHC/bias_in_bios", "hard_text", "profession", "0 1 2 6 9"),
    "canrager/amazon_reviews_mcauley_1and5": _columns(
        "canrager/amazon_reviews_mcauley_1and5", "text", "category", "1 2 3 5 6"
    ),
    "canrager/amazon_reviews_mcauley_1and5_sentiment": _columns(
        "canrager/amazon_reviews_mcauley_1and5", "text", "rating", "1.0 5.0"
    ),
    "codeparrot/github-code": _code,
    "fancyzhx/ag_news": _columns("fancyzhx/ag_news", "text", "label", "0 1 2 3"),
    "Helsinki-NLP/europarl": _europarl,
}
"""The six of SAEBench's sparse probing (Karvonen et al. 2025), with its columns and classes, of biographies its first
set of classes; its draws, and its balance over the second attribute of biographies and reviews, are not repeated.
"""
