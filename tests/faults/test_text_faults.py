"""Files of text that are broken, hostile or far larger than what is asked of them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random
from unittest.mock import patch

import pytest
from attempts import attempt, tries
from hypothesis import given, settings
from hypothesis import strategies as st
from language import make_tokenizer, words
from transformers import PreTrainedTokenizerFast

from fmxnn.activations import pieces
from fmxnn.activations.text import SEPARATOR, contexts, documents

seeds = st.integers(0, 2**32)
MIB = 2**20
TINY = Path(__file__).parents[2] / "examples" / "tiny-lm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


def record(random):
    text = words(random.randrange(1, 60), random.randrange(999)) + random.choice(
        ["", "é", "\U0001f600", "\n", '"', "\\"]
    )
    return json.dumps({"text": text, "n": random.random()}, ensure_ascii=random.random() < 0.5).encode()


def flipped(line, random):
    at = random.randrange(len(line))
    return line[:at] + bytes([random.randrange(256)]) + line[at + 1 :]


BREAKS = {
    "a byte that is changed": flipped,
    "bytes that are no UTF-8": lambda line, random: (
        line[:9] + random.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88"]) + line[9:]
    ),
    "half of a surrogate pair": lambda line, random: b'{"text": "w3 \\u%04x"}' % random.randrange(0xD800, 0xE000),
    "depth": lambda line, random: (
        line[:-1] + b', "m": ' + random.choice([b"[", b'{"a":']) * random.randrange(2_000, 200_000)
    ),
    "a number of many digits": lambda line, random: (
        line[:-1] + b', "m": ' + b"9" * random.randrange(4_400, 200_000) + b"}"
    ),
    "an end that is missing": lambda line, random: line[: random.randrange(1, len(line))],
    "holes of zeros": lambda line, random: b"\0" * random.randrange(1, 10_000),
    "no record": lambda line, random: random.choice([b"[]", b"3", b'"text"', b"null", b"{}", b'{"text": '
        b'3}', b"NaN", b"<html>", b"\xef\xbb\xbf" + line]),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
@given(seeds)
@settings(max_examples=tries(ci=12, thorough=1_000))
def test_a_broken_line_is_read_or_named(folder, name, seed):
    random, file = Random(seed), folder / "broken.jsonl"
    lines = [record(random) for _ in range(random.randrange(2, 40))]
    at = random.randrange(len(lines))
    lines[at] = BREAKS[name](lines[at], random)
    file.write_bytes(b"\n".join(lines) + b"\n" * random.randrange(3))
    with attempt(f"JSONL: {name}", case=seed, memory=True) as row:
        try:
            contexts(file, make_tokenizer(), context=2)
        except ValueError as error:
            number = re.match(f"{re.escape(str(file))}, line ([0-9]+): ", str(error))
            assert number, error
            assert int(number[1]) - 1 in (at, at + 1)  # the byte may have become the end of a line
            assert len(str(error)) < 400 + len(str(file))
    assert row.mib < 30


KINDS = [
    b"w3 w4 w5\n",
    b"a",
    b" ",
    b"\n",
    b"\0",
    b"\xff\xfe",
    b"\xe3\x81\x82",
    b"\xf0\x9f\x98\x80",
    b"\r",
    b"\x85",
    b"w7  ",
]
KINDS += [SEPARATOR.encode(), SEPARATOR.encode()[:9]]


def hostile(random):
    """Text of any kind, up to a few million bytes, with many or no places to cut it."""
    runs = [random.choice(KINDS) * int(10 ** random.uniform(0, 5)) for _ in range(random.randrange(1, 12))]
    return b"".join(runs)[: 3 * MIB]


@given(seeds)
@settings(max_examples=tries(ci=12, thorough=500))
def test_a_hostile_text_file_is_read_in_little_memory(folder, seed):
    random, file = Random(seed), folder / "hostile.txt"
    file.write_bytes(hostile(random) + words(5, 1).encode())
    with attempt("text: any bytes, any length", case=seed, memory=True) as row:
        made = contexts(file, make_tokenizer(), context=2, tokens=random.choice([1, 1_000]))
        assert made.tokens <= 1_001
    assert row.mib < 60


@given(seeds, st.sampled_from([2**10, 2**13, pieces.LONGEST]))
@settings(max_examples=tries(ci=8, thorough=150))
def test_of_a_hostile_text_file_nothing_is_lost(folder, seed, longest):
    file = folder / "equal.txt"
    file.write_bytes(hostile(Random(seed))[: MIB // 4] + words(5, 1).encode())
    whole = [text for text in file.read_text(encoding="utf-8", errors="replace").split(SEPARATOR) if text.strip()]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY)
    with attempt("text: read in pieces, against read whole", case=seed), patch.object(pieces, "LONGEST", longest):
        assert list(documents(file)) == whole
        ids = contexts(file, tokenizer, context=2).ids[:, 1]
        assert tokenizer.decode(ids) == "".join(text + SEPARATOR for text in whole)


@given(st.text(max_size=300).map(lambda text: text * 40) | st.text(max_size=20), st.booleans())
@settings(max_examples=tries(ci=100, thorough=5_000))
def test_any_text_in_place_of_a_path_is_one_sentence(text, spaced):
    with (
        attempt("a text in place of a path", case=text, memory=True),
        pytest.raises(FileNotFoundError, match="texts as a list") as caught,
    ):
        list(documents(text + " and so on " * spaced))
    assert len(str(caught.value)) < 400


PEAK = """
import re, sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from fmxnn.activations.text import contexts
def mib(word): return int(re.search(word + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
contexts(["warm up " * 1000], tokenizer, context=64)
for file in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")
    before = mib("VmRSS")
    made = contexts(Path(file), tokenizer, context=64, tokens=10_000)
    print(made.tokens, mib("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_a_file_far_larger_than_what_is_asked_of_it_costs_little(folder):
    megabytes = tries(ci=24, thorough=100)
    line, files = b"the cat sat on a mat; ", [folder / "line.txt", folder / "line.jsonl", folder / "documents.jsonl"]
    files[0].write_bytes(line * (megabytes * 10**6 // len(line)))
    files[1].write_bytes(b'{"text": "' + line * (15 * 10**6 // len(line)) + b'"}\n')
    files[2].write_bytes((b'{"text": "' + line * 4_500 + b'"}\n') * (megabytes * 10))
    with attempt("10,000 tokens of a file of many megabytes") as row:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PEAK, TINY, *files], capture_output=True, text=True, check=True
        )
        for found in done.stdout.splitlines():
            tokens, peak = map(float, found.split())
            row.mib = max(row.mib, peak)
            assert 10_000 <= tokens < 10_064
            assert peak < 200
        assert len(done.stdout.splitlines()) == len(files)
