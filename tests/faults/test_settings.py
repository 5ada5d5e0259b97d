"""Settings, recipes and patterns made to hang, to fill the memory or to lie: each is read, or refused in one short
sentence and little memory.
"""

import json
import random
import tracemalloc

import pytest
import torch
from attempts import attempt, tries
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import CLASSES

import fmxnn as fx
from fmxnn import Contraction, EinsumWeight, PatternError, RecipeError, build, describe
from fmxnn.core import ordering
from fmxnn.core.errors import FormatError
from fmxnn.core.files.strict_json import ABOUT_LIMITS, parse_json, read_bytes, strict_json
from fmxnn.core.recipe import check_tree
from fmxnn.saving.formats.format import SETTINGS_LIMITS
from fmxnn.saving.formats.plain_yaml import parse_yaml

CODER = fx.Crosscoder(
    fx.CrossLayerEncoder(fx.CPWeight(2, 3, 5, rank=2), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 3, 5))
)
CONFIG = json.dumps({"fmxnn": "0.1.0", "module": describe(CODER)}, indent=1).encode()
PIECES = [
    *(
        b'"',
        b'\\"',
        b"\\",
        b"[",
        b"]",
        b"{",
        b"}",
        b'{"a":',
        b'[{"a":',
        b"1,",
        b"1",
        b'"a":1,',
        b'"":',
        b",",
        b" ",
        b"\n",
        b"\t",
        b":",
        b"-",
    ),
    *(
        b"\\u4e00",
        b"\\ud800",
        "\U0001f600".encode(),
        "\x85".encode(),
        b"\xff",
        b"\x00",
        b"NaN,",
        b"1e999,",
        b"[],",
        b"{},",
        b"9",
        b"0.",
        b"null,",
    ),
    *(
        b"&a ",
        b"*a,",
        b"*a ",
        b"- ",
        b"- 1\n",
        b"? ",
        b"a: 1\n",
        b"a: ",
        b"!",
        b"!!str ",
        b"# a\n",
        b"---\n",
        b"%TAG ",
        b"1:",
        b"'",
        b"''",
        b">\n x\n",
    ),
    *(b"_", b"0x", b"<<: {a: 1}\n", b"a: &a [", b"x", b"true ", b".inf,", b"2020-01-01,", b"\r", b"|\n", b"@", b"`"),
]
FRAMES = [
    (b"", b""),
    (b"[", b"]"),
    (b'{"a": [', b"1]}"),
    (b'{"a": "', b'"}'),
    (b'"', b'"'),
    (b"a: ", b""),
    (b"a: [", b"]"),
    (b"{", b"}"),
]
MOST = 10 * 2**20
seeds = st.integers(0, 2**64 - 1)


def size(rng, most):
    return int(most ** rng.random())


def repeated(rng):
    before, after = rng.choice(FRAMES)
    piece = b"".join(rng.choices(PIECES, k=rng.choice([1, 1, 1, 2, 3])))
    return before + piece * (size(rng, 1_100_000) // len(piece) + 1) + after


def mixed(rng):
    before, after = rng.choice(FRAMES)
    return before + b"".join(rng.choices(PIECES, k=size(rng, 50_000))) + after


def changed(rng):
    data = bytearray(CONFIG)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + size(rng, 50)]
            case 2:
                data[at:at] = rng.choice(PIECES) * size(rng, 100_000)
            case _:
                data[at:at] = data[rng.randrange(len(data)) :]
    return bytes(data)


def many_names(rng):
    count, length = size(rng, 60_000), size(rng, 20)
    return json.dumps({f"{'n' * length}{rng.randrange(2 * count)}": rng.random() for _ in range(count)}).encode()


def long_names(rng):
    return json.dumps({"n" * size(rng, 900_000): {"n" * size(rng, 90_000): [{"n": 1}] * size(rng, 4000)}}).encode()


def noise(rng):
    return rng.randbytes(size(rng, 100_000))


MAKERS = [repeated, repeated, mixed, changed, many_names, long_names, noise]


def refused(call, error):
    """Calls it; where it refuses, in a short sentence and in little memory. Tells whether it did."""
    try:
        call()
    except error as caught:
        assert tracemalloc.get_traced_memory()[1] < MOST
        assert len(str(caught)) < 1000
        assert "\n" not in str(caught)
        return True
    return False


@given(seeds)
@settings(max_examples=tries(ci=50, thorough=2_500), deadline=None)
def test_settings_are_read_or_refused_in_little_memory(tmp_path_factory, seed):
    rng = random.Random(seed)
    data = rng.choice(MAKERS)(rng)
    path = tmp_path_factory.getbasetemp() / "hostile.json"
    path.write_bytes(data)
    readers = {
        "hostile config.json": (lambda: check_tree(strict_json(path)), RecipeError),
        "hostile about.json": (lambda: strict_json(path, ABOUT_LIMITS), RecipeError),
        "hostile settings in JSON": (
            lambda: parse_json(read_bytes(path, SETTINGS_LIMITS), path, SETTINGS_LIMITS),
            FormatError,
        ),
        "hostile settings in YAML": (
            lambda: parse_yaml(read_bytes(path, SETTINGS_LIMITS), path, SETTINGS_LIMITS),
            FormatError,
        ),
    }
    for fault, (call, error) in readers.items():
        with attempt(fault, case=seed, memory=True):
            refused(call, error)


@pytest.mark.parametrize("kind", ["aliases", "anchor", "tag", "deep", "long", "wide"])
def test_yaml_that_grows_is_refused(kind):
    text = {
        "aliases": "a: &a [x, x]\n"
        + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)),
        "anchor": "a: &a 1",
        "tag": "a: !!python/name:os.system ''",
        "deep": "[" * 100_000,
        "long": "a: 1" + ":1" * 100_000,
        "wide": "- 1\n" * 50_000,
    }[kind]
    with attempt(f"YAML of {kind}", memory=True):
        assert refused(lambda: parse_yaml(text.encode(), "x.yaml", SETTINGS_LIMITS), FormatError)


def test_a_string_that_never_ends_is_looked_at_once():
    """An expression that goes back needed 7 s for 40 KB; this one takes each character once, so ten times the text is
    no more than as many tokens.
    """
    for piece in ('"', '"\\', '\\"', "\\", '"a', " ", ",", "[ ", '"\\"'):
        for count in (1_000, 300_000):
            with attempt("a string that never ends", memory=True):
                assert refused(
                    lambda piece=piece, count=count: parse_json(b'"' + piece.encode() * count, "x"), RecipeError
                )


HUGE = 10**5000
leaves = st.none() | st.booleans()
leaves |= (
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**40, 1e308, "", "x" * 300, "same"])
    | st.text(max_size=4)
    | st.builds(lambda: HUGE)
)
names = st.sampled_from(
    [cls.__name__ for cls in CLASSES] + ["same", "weight", "weights", "k", "layers", "pattern", "n" * 201]
)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=20
)


@given(trees)
@settings(max_examples=tries(ci=100, thorough=5_000), deadline=None)
def test_a_hostile_recipe_makes_a_module_or_one_short_sentence(tree):
    with attempt("a hostile recipe", memory=True), torch.device("meta"):
        refused(lambda: build(tree, CLASSES), RecipeError)


def ring(value):
    loop = [value]
    loop.append(loop)
    return loop


def shared(depth):
    tree = [1]
    for _ in range(depth):
        tree = [tree] * 50
    return tree


LONG = {"ConcatWeight": {"n" * 500_000: [{"TopK": {"k": 1}}] * 4000}}


GROWING = {
    **{
        "ring": ring(1),
        "shared": shared(12),
        "wide": [0] * 2_000_000,
        "long names": LONG,
        "text": {"TopK": {"k": "x" * 10**6}},
    },
    **{"a huge number": {"TopK": {"k": HUGE}}, "a number for a name": {HUGE: 4}},
}


@pytest.mark.parametrize("name", GROWING)
def test_a_recipe_that_grows_is_refused_before_it_does(name):
    with attempt("a recipe that grows", memory=True):
        assert refused(lambda: build(GROWING[name], CLASSES), RecipeError)


@st.composite
def patterns(draw):
    rng = random.Random(draw(seeds))
    words = ["layers", "d_model", "latents", *(f"r{i}" for i in range(rng.choice([2, 8, 48, 60])))]
    terms = [rng.sample(words, min(size(rng, 60), len(words))) for _ in range(size(rng, 60))]
    used = {word for term in terms for word in term}
    return ", ".join(" ".join(term) for term in terms), {word: rng.choice([1, 2, 8, 2**20, 2**62]) for word in used}


@given(
    patterns()
    | st.tuples(st.text(max_size=40), st.just({"a": 1}))
    | st.tuples(seeds.map(lambda n: mixed(random.Random(n)).decode("latin1")), st.just({}))
)
@settings(max_examples=tries(ci=12, thorough=500), deadline=None)
def test_a_hostile_pattern_is_planned_in_bounded_work_or_refused(drawn):
    pattern, sizes = drawn
    looked = []
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        compare = ordering.compare_flops
        patch.setattr(ordering, "compare_flops", lambda *pair: [looked.append(len(pair[2])), compare(*pair)])
        with attempt("a hostile pattern of a sum", memory=True):
            refused(lambda: Contraction(f"{pattern} -> ", **sizes), PatternError)
        with attempt("a hostile pattern of a weight", memory=True):
            refused(lambda: build({"EinsumWeight": {"pattern": pattern, **sizes}}, [EinsumWeight]), RecipeError)
    assert sum(looked) <= 6 * ordering.WORK
