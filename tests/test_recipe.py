import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import CLASSES, crosscoders, randn
from torch import nn

from fmxnn import (
    Crosscoder,
    CrossLayerDecoder,
    CrossLayerEncoder,
    DenseWeight,
    EinsumWeight,
    RecipeError,
    SumWeight,
    TopK,
    build,
    describe,
)

CODER = describe(Crosscoder(CrossLayerEncoder(DenseWeight(2, 3, 5), TopK(2)), CrossLayerDecoder(DenseWeight(2, 3, 5))))


class Mine(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module | None = None, *, names: tuple = ()):
        super().__init__()
        self.left, self.right, self.names = left, right, names


class Forgets(nn.Module):
    def __init__(self, k: int):
        super().__init__()


@given(crosscoders())
def test_building_a_description_gives_the_same_module(coder):
    recipe = describe(coder)
    again = build(json.loads(json.dumps(recipe)), CLASSES).double()
    assert describe(again) == recipe
    assert repr(again) == repr(coder)
    again.load_state_dict(coder.state_dict())
    x = randn(3, coder.encoder.weight.layers, coder.encoder.weight.d_model)
    assert torch.equal(again.eval()(x), coder.eval()(x))


def test_the_description_is_the_nested_constructor_call():
    weight = {"DenseWeight": {"layers": 2, "d_model": 3, "latents": 5}}
    encoder = {"weight": weight, "sparsifier": {"TopK": {"k": 2}}, "mask": {"LayerMask": {"p": 0.0}}}
    assert {
        "Crosscoder": {"encoder": {"CrossLayerEncoder": encoder}, "decoder": {"CrossLayerDecoder": {"weight": weight}}}
    } == CODER


def test_a_shared_module_stays_shared():
    weight = DenseWeight(2, 3, 5)
    coder = Crosscoder(CrossLayerEncoder(SumWeight(weight, weight), TopK(2)), CrossLayerDecoder(weight))
    recipe = describe(coder)
    assert recipe["Crosscoder"]["decoder"]["CrossLayerDecoder"]["weight"] == {"same": "encoder.weight.weights.0"}
    again = build(recipe, CLASSES)
    assert again.decoder.weight is again.encoder.weight.weights[0] is again.encoder.weight.weights[1]


def test_a_users_class_is_built_only_when_it_is_passed():
    recipe = describe(Mine(TopK(2), names=("a", 1, None, 0.5, True)))
    assert recipe == {"Mine": {"left": {"TopK": {"k": 2}}, "right": None, "names": ["a", 1, None, 0.5, True]}}
    assert build(recipe, [Mine, TopK]).names == ("a", 1, None, 0.5, True)
    with pytest.raises(RecipeError) as error:
        build(recipe, CLASSES)
    assert str(error.value) == "unknown class 'Mine' at the top; if it is yours, pass it: classes=[Mine]"


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Mine(Forgets(3)),
            "Forgets at 'left' takes the argument 'k' and has no attribute of that name; keep it: self.k = k",
        ),
        (
            Forgets(3),
            "Forgets at the top takes the argument 'k' and has no attribute of that name; keep it: self.k = k",
        ),
        (Mine(TopK(1), names=(1, {2})), "a recipe holds numbers, strings, lists and modules, got set at 'names.1'"),
        (
            Mine(TopK(1), names=(float("nan"),)),
            "a recipe holds numbers, strings, lists and modules, got float at 'names.0'",
        ),
    ],
)
def test_a_module_that_has_no_description_says_why(module, message):
    with pytest.raises(RecipeError) as error:
        describe(module)
    assert str(error.value) == message


def inside(weight):
    return {"CrossLayerDecoder": {"weight": weight}}


def nested(depth):
    tree = {"TopK": {"k": 1}}
    for _ in range(depth):
        tree = inside(tree)
    return tree


DENSE = "DenseWeight at 'weight' cannot be built: "
BAD = [
    (inside({"Nope": {}}), "unknown class 'Nope' at 'weight'; if it is yours, pass it: classes=[Nope]"),
    (inside({"os.system": {}}), "unknown class 'os.system' at 'weight'; if it is yours, pass it: classes=[...]"),
    (
        inside({"N" * 99: {}}),
        "unknown class '" + "N" * 76 + "... at 'weight'; if it is yours, pass it: classes=[" + "N" * 99 + "]",
    ),
    ({"TopK": {"k": float("nan")}}, "a recipe holds finite numbers, got nan at 'TopK.k'"),
    ({"TopK": {"k": [1, float("inf")]}}, "a recipe holds finite numbers, got inf at 'TopK.k.1'"),
    ({"TopK": {"k": 0}}, "TopK at the top cannot be built: TopK needs a whole k >= 1, got k=0"),
    ({"TopK": {"k": "x"}}, "TopK at the top cannot be built: TopK needs a whole k >= 1, got k='x'"),
    ({"TopK": {"j": 1}}, "TopK at the top cannot be built: TopK got an unexpected keyword argument 'j'"),
    ({"TopK": {}}, "TopK at the top cannot be built: TopK missing 1 required positional argument: 'k'"),
    ({"TopK": [1]}, "TopK at the top needs its arguments as an object, got [1]"),
    ({}, "a recipe names one class and its arguments, got {} at the top"),
    ([], "a recipe names one class and its arguments, got [] at the top"),
    (None, "a recipe names one class and its arguments, got None at the top"),
    ("TopK", "a recipe names one class and its arguments, got 'TopK' at the top"),
    (
        inside({"TopK": {}, "JumpReLU": {}}),
        "a recipe names one class and its arguments, got {'JumpReLU': {}, 'TopK': {}} at 'weight'",
    ),
    ({"same": "a"}, "'same' at the top points to 'a', where no module stands before it"),
    (inside({"same": "weight"}), "'same' at 'weight' points to 'weight', where no module stands before it"),
    (
        inside({"DenseWeight": {"layers": 0, "d_model": 1, "latents": 1}}),
        DENSE + "the pattern 'latents layers d_model' needs whole sizes of 1 or more, got layers=0",
    ),
    (
        inside({"DenseWeight": {"layers": 1.5, "d_model": 1, "latents": 1}}),
        DENSE + "the pattern 'latents layers d_model' needs whole sizes of 1 or more, got layers=1.5",
    ),
    (inside(3), "CrossLayerDecoder at the top cannot be built: 'int' object has no attribute 'layers'"),
    (
        {"SumWeight": {"weights": [{"TopK": {"k": 0}}]}},
        "TopK at 'weights.0' cannot be built: TopK needs a whole k >= 1, got k=0",
    ),
    (
        nested(1000),
        "a recipe has at most 16 levels and 4096 values, got more at "
        + repr(".".join(["CrossLayerDecoder.weight"] * 8)),
    ),
    (
        {"SumWeight": {"weights": [0] * 5000}},
        "a recipe has at most 16 levels and 4096 values, got more at 'SumWeight.weights.0'",
    ),
]


@pytest.mark.parametrize(("recipe", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_recipe_says_what_is_wrong_and_where(recipe, message):
    with pytest.raises(RecipeError) as error:
        build(recipe, CLASSES)
    assert str(error.value) == message


@pytest.mark.parametrize("target", [[], ["weight"], {}, None, 3, True])
def test_same_needs_a_path(target):
    with pytest.raises(RecipeError, match="^'same' at the top points to "):
        build({"same": target}, CLASSES)


@pytest.mark.parametrize(
    "recipe",
    [
        {"TopK": {"k": 2.5}},
        {"BatchTopK": {"k": 2.5}},
        {"TopK": {"k": True}},
        {"CrossLayerEncoder": {"weight": {"DenseWeight": {"layers": 1, "d_model": 1, "latents": 2}}, "sparsifier": 3}},
        {
            "CrossLayerEncoder": {
                "weight": {"DenseWeight": {"layers": 1, "d_model": 1, "latents": 2}},
                "sparsifier": {"TopK": {"k": 1}},
                "mask": "x",
            }
        },
        {
            "CrossLayerDecoder": {
                "weight": {"CrossLayerDecoder": {"weight": {"DenseWeight": {"layers": 1, "d_model": 1, "latents": 2}}}}
            }
        },
    ],
    ids=[
        "k is a float",
        "batch k is a float",
        "k is a truth value",
        "sparsifier is a number",
        "mask is a string",
        "weight is a decoder",
    ],
)
def test_an_argument_of_the_wrong_type_is_refused(recipe):
    with pytest.raises(RecipeError):
        build(recipe, CLASSES)


@pytest.mark.parametrize("size", [2**62, 2**63, 2**64, 10**30, 10**400])
@pytest.mark.parametrize("name", ["DenseWeight", "CPWeight", "TensorRingWeight", "JumpReLU"])
def test_a_huge_size_is_refused_at_once_on_the_meta_device(name, size):
    arguments = {"latents": size} if name == "JumpReLU" else {"layers": 2, "d_model": 2, "latents": size}
    start = time.perf_counter()
    with torch.device("meta"), pytest.raises(RecipeError, match=f"^{name} at the top cannot be built: "):
        build({name: arguments}, CLASSES)
    assert time.perf_counter() - start < 0.5


def test_a_large_module_costs_no_memory_on_the_meta_device():
    with torch.device("meta"):
        build(
            {"DenseWeight": {"layers": 1, "d_model": 1, "latents": 1}}, CLASSES
        )  # torch imports its meta kernels at their first use
    start = time.perf_counter()
    with torch.device("meta"):
        weight = build({"DenseWeight": {"layers": 32, "d_model": 8192, "latents": 2**24}}, CLASSES)
    assert weight.factors[0].is_meta
    assert time.perf_counter() - start < 0.5


def test_a_pattern_from_a_file_reaches_no_code():
    with pytest.raises(RecipeError, match="^EinsumWeight at the top cannot be built: the pattern "):
        build({"EinsumWeight": {"pattern": "__import__('os') latents", "latents": 1}}, CLASSES)
    assert EinsumWeight.__name__ in {cls.__name__ for cls in CLASSES}


def places(tree, path=()):
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def replaced(tree, path, value):
    if not path:
        return value
    inner = replaced(tree[path[0]], path[1:], value)
    return (
        {**tree, path[0]: inner}
        if isinstance(tree, dict)
        else [inner if i == path[0] else old for i, old in enumerate(tree)]
    )


names = st.sampled_from(
    [cls.__name__ for cls in CLASSES]
    + ["same", "weight", "k", "layers", "pattern", "weights", "self", "nope", "", "encoder.weight"]
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**62, 10**40]),
    st.floats(),
    names,
    st.text(max_size=5),
)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)


@given(crosscoders().map(describe), st.data())
def test_a_mutated_recipe_raises_nothing_but_a_recipe_error(recipe, data):
    for _ in range(data.draw(st.integers(1, 3))):
        recipe = replaced(recipe, data.draw(st.sampled_from(list(places(recipe)))), data.draw(trees))
    try:
        with torch.device("meta"):
            built = build(recipe, CLASSES)
    except RecipeError as error:
        assert str(error)
    else:
        assert isinstance(built, nn.Module)


@given(trees)
def test_no_tree_raises_anything_but_a_recipe_error(tree):
    with torch.device("meta"):
        try:
            built = build(tree, CLASSES)
        except RecipeError:
            return
    assert isinstance(built, nn.Module)
