"""Whatever is said of a module is refused when it is saved, or comes back, and leaves its card a card."""

import math
import re
import tempfile
from pathlib import Path

import yaml
from attempts import attempt, tries
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

import fmxnn as fx
from fmxnn.core.cells import cell, literal, visible

BREAKING = [
    "\r",
    "\n",
    "\r\n",
    "\x00",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1e",
    "\x7f",
    "\x85",
    "\u2028",
    "\u2029",
    "\ud800",
    "\udfff",
    "\ud83d\ude00",
    "😀",
]
MARKUP = [
    "---",
    "\n---\n",
    "...",
    ": ",
    " #",
    "'",
    '"',
    "|",
    "`",
    "```",
    "\\",
    "<script>",
    "</td>",
    "<!--",
    "&lt;",
    "%TAG",
    "!!python/name:os.system",
    "*a",
    "&a",
]
NASTY = st.lists(st.one_of(st.sampled_from(BREAKING), st.sampled_from(MARKUP), st.text(max_size=6)), max_size=6).map(
    "".join
)
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-(10**1010), 10**1010), st.floats(), NASTY)
TREES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NASTY, inner, max_size=4)),
    max_leaves=30,
)
DEEP = st.builds(lambda inner, depth: [inner] if depth == 0 else nest(inner, depth), TREES, st.integers(0, 25))
ABOUTS = st.dictionaries(
    st.one_of(NASTY, st.sampled_from(["base_model", "layers", "metrics", "text"])),
    st.one_of(NASTY, TREES, DEEP),
    max_size=5,
)
MODULE = fx.DenseWeight(1, 2, 3)
LINES = 26  # of its card where nothing is said: front matter without base_model, Python, how to load it, one row


def nest(inner, depth):
    for _ in range(depth):
        inner = {"a": inner}
    return inner


def as_json(value):
    """What JSON and UTF-8 leave of a value."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {as_json(key): as_json(inner) for key, inner in value.items()}
    return [as_json(inner) for inner in value] if isinstance(value, list) else value


@given(ABOUTS)
@settings(max_examples=tries(ci=100, thorough=3_000))
def test_what_is_said_of_a_module_is_refused_or_comes_back_and_its_card_parses(about):
    with tempfile.TemporaryDirectory() as parent, attempt("anything said of a module", case=about):
        folder = Path(parent) / "m"
        try:
            fx.save_pretrained(MODULE, folder, about=about)
        except fx.RecipeError as error:
            assert "not read back" in str(error) or "stands twice" in str(error)
            assert not list(Path(parent).iterdir())
            return
        assert fx.from_pretrained(folder).about == as_json(about)
        text = (folder / "README.md").read_bytes().decode()
        based = isinstance(about.get("base_model"), str)
        assert len(text.splitlines()) == len(text.split("\n")) - 1 == LINES + len(about) + based
        front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
        assert list(front) == ["library_name", "tags", *(["base_model"] if based else [])]
        assert front.get("base_model") == (about["base_model"] if based else None)
        assert ModelCard(text).data.library_name == "fmxnn"
        body = text.split("\n---\n", 1)[1]
        assert "<" not in body.replace("|---|---|", "")
        for row in body.splitlines()[-len(about) - 1 :]:
            assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3


@given(NASTY)
@settings(max_examples=tries(ci=200, thorough=20_000))
def test_any_text_stays_in_its_cell(text):
    with attempt("any text in a cell", case=text.encode(errors="backslashreplace")):
        for written in (visible(text), cell(text), literal(text)):
            written.encode()
            assert written.isprintable() or not set(written) & set("".join(BREAKING[:12]))
            assert len(written.splitlines()) <= 1
        for written in (cell(text), literal(text)):
            assert not re.search(r"[<>]|&(?!(amp|lt|gt);)", written)
            assert not re.search(r"(?<!\\)(\\\\)*[|`]", written)
