"""The measures of the house, asserted room by room; and the shapes that docstrings promise, run."""

import ast
import importlib
import inspect
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from house import FILES, MEASURES, PACKAGE, ROOMS, ROOT, TREES, table

import fmxnn
from fmxnn.core.recipe import build, describe

FORBIDDEN = {"print", "eval", "exec", "__import__"}
UNSAFE = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


@pytest.mark.parametrize("where", ROOMS)
@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_a_room_meets_the_measures_of_the_house(measure, where):
    broken = measure.broken(where)
    assert not broken, f"{measure.name} {measure.goal}:\n" + "\n".join(broken)


BROKEN = {
    "lines of a file": "x = 1\n" * 301,
    "characters of a line": f"x = {'1' * 120}\n",
    "lines of a function": "def f():\n" + "    x = 1\n" * 45,
    "arguments of a constructor": "class A:\n    def __init__(self, a, b, c, *, d, e, **f):\n        pass\n",
    "isinstance in a function": "def f(x):\n    return isinstance(x, A) or isinstance(x, B) or isinstance(x, C)\n",
    "imports in functions": "def f():\n    import os\n",
    "places that open models": "tokenizer = AutoTokenizer.from_pretrained(name)\n",
    "documented": '"""A file."""\ndef f():\n    pass\n',
    "annotated": "def f(x) -> int:\n    pass\n",
    "opening of a docstring": f"def f():\n    {chr(34) * 3}{'a' * 111}{chr(34) * 3}\n",
    "docstrings that say nothing": 'def sizes():\n    """The sizes."""\n',
    "exported classes without example": 'class Crosscoder:\n    """A crosscoder."""\n',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_measure_finds_what_is_beyond_it(name, tmp_path, monkeypatch):
    path = tmp_path / "broken.py"
    path.write_text(BROKEN[name])
    monkeypatch.setitem(TREES, path, ast.parse(BROKEN[name]))
    (measure,) = (each for each in MEASURES if each.name == name)
    assert any(value > measure.limit for value, _ in measure.find(path))


def test_a_dataclass_counts_by_its_fields_unless_it_is_a_result(tmp_path, monkeypatch):
    fields = "".join(f"    {name}: int\n" for name in "abcdef")
    monkeypatch.setattr("house._made", lambda: {"Result": 1, "Twice": 2})
    (measure,) = (each for each in MEASURES if each.name == "arguments of a constructor")
    for head, count in (
        ("@dataclass(frozen=True)\nclass Result:\n", 0),
        ("@dataclass(frozen=True)\nclass Twice:\n", 6),
        ("@dataclass\nclass Result:\n", 6),
    ):
        path = tmp_path / "one.py"
        monkeypatch.setitem(TREES, path, ast.parse(head + fields))
        assert [value for value, _ in measure.find(path)] == [count]


def test_one_command_prints_goal_and_now_side_by_side():
    done = subprocess.run([sys.executable, "tests/house.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["measure", "goal", "now", "beyond", "the", "goal"]
    assert [row.startswith(measure.name) for row, measure in zip(rows, MEASURES, strict=True)]
    assert done.stdout.rstrip() == table()


def test_examples_of_every_file_are_run():
    """conftest.py collects docstrings of files in the package, in its folders, and in theirs."""
    assert max(len(path.relative_to(PACKAGE).parts) for path in FILES) <= 3


@every_file
def test_the_source_holds_nothing_forbidden(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Assert):
            assert path.name == "laws.py", f"line {node.lineno}: assert"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN, f"line {node.lineno}: {node.func.id}"
        if isinstance(node, ast.ExceptHandler):
            names = (
                {inner.id for inner in ast.walk(node.type) if isinstance(inner, ast.Name)} if node.type else {"bare"}
            )
            assert not names & {"bare", "Exception", "BaseException"}, f"line {node.lineno}: broad except"
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
            and node.attr == "load"
        ):
            calls = [call for call in ast.walk(TREES[path]) if isinstance(call, ast.Call) and call.func is node]
            told = {word.arg: word.value for call in calls for word in call.keywords}
            safe = isinstance(told.get("weights_only"), ast.Constant) and told["weights_only"].value is True
            assert safe, f"line {node.lineno}: torch.load that may run code"
            assert path.parent.name == "formats", f"line {node.lineno}: torch.load"
        if isinstance(node, ast.Import) or (
            isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] != ["UnpicklingError"]
        ):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            assert not {name.split(".")[0] for name in names} & UNSAFE, f"line {node.lineno}: {names}"


def test_every_constructor_argument_is_kept_under_its_name():
    for module in examples():
        kept_as = getattr(type(module), "kept_as", {})
        for name in inspect.signature(type(module)).parameters:
            assert hasattr(module, kept_as.get(name, name)), f"{type(module).__name__}.{name}"


def as_numpy(tree):
    """The same recipe with every whole number as numpy has it."""
    if isinstance(tree, dict):
        return {key: as_numpy(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [as_numpy(value) for value in tree]
    return np.int64(tree) if isinstance(tree, int) else tree


def test_whole_numbers_may_be_numpys():
    known = {type(part) for module in examples() for part in module.modules()}
    for module in examples():
        made = build(as_numpy(describe(module)), known)
        assert json.loads(json.dumps(describe(made))) == describe(module)


SIZES = {"layers": 2, "d_model": 3, "latents": 5, "tokens": 4, "rank": 4, "in_features": 3, "out_features": 5}
PATTERN = re.compile(r"`([^`]*->[^`]*)`")


def examples():
    axes = (2, 3, 5)
    dense, cp = fmxnn.DenseWeight(*axes), fmxnn.CPWeight(*axes, rank=4)
    encoder, decoder = fmxnn.CrossLayerEncoder(cp, fmxnn.TopK(2)), fmxnn.CrossLayerDecoder(dense)
    return [
        dense,
        cp,
        fmxnn.TensorRingWeight(*axes),
        fmxnn.FactorizedWeight("latents layers d_model", layers=2, d_model=3, latents=5),
        fmxnn.EinsumWeight("latents r, layers d_model r", layers=2, d_model=3, latents=5, r=2),
        fmxnn.SumWeight(dense, cp),
        fmxnn.ConcatWeight(fmxnn.DenseWeight(2, 3, 2), fmxnn.CPWeight(2, 3, 3)),
        fmxnn.LayerMask(0.5),
        fmxnn.TopK(2),
        fmxnn.BatchTopK(2),
        fmxnn.JumpReLU(5),
        encoder,
        decoder,
        fmxnn.Crosscoder(encoder, decoder),
        *gates(dense),
        *connectivity(dense),
        *polynomials(dense),
        fmxnn.FactorizedLinear(cp, 1),
        fmxnn.SkipCrosscoder(fmxnn.Crosscoder(encoder, decoder)),
        fmxnn.Normalisation(2, 3),
        fmxnn.Normalised(fmxnn.Crosscoder(encoder, decoder), fmxnn.Normalisation(2, 3)),
        fmxnn.factorize(fmxnn.Crosscoder(encoder, decoder), lambda *sizes: fmxnn.CPWeight(*sizes, rank=2), sweeps=1),
    ]


def gates(dense):
    decoupled = fmxnn.Decoupled(fmxnn.BatchTopK(2), fmxnn.BatchTopK(2), weight=dense)
    scores = [fmxnn.SumNorm(dense), fmxnn.ConcatNorm(dense), fmxnn.MixedNorm(dense)]
    return [
        *scores,
        fmxnn.Scored(fmxnn.BatchTopK(2), scores[0]),
        decoupled,
        fmxnn.DecoupledDecoder(dense, decoupled),
        fmxnn.TrainedJumpReLU(5),
        fmxnn.GroupMax(5, 5),
        fmxnn.SignedTopK(2),
        fmxnn.SignedBatchTopK(2),
        fmxnn.SignedGroupMax(5, 5),
        fmxnn.SplitGate(fmxnn.TopK(1), fmxnn.BatchTopK(1), runs=(2, 3)),
    ]


def connectivity(dense):
    ring = fmxnn.TensorRingWeight(2, 3, 5)
    return [
        fmxnn.PlacedWeight(fmxnn.CPWeight(1, 2, 5, rank=4), layers=2, at=1, d_model=3),
        fmxnn.RestrictedWeight(ring, at=[[0], [1], [0, 1], [0], [1]]),
        fmxnn.windowed_weight(fmxnn.DenseWeight, layers=2, d_model=3, latents=5, window=2),
        fmxnn.RaggedWeight(dense, widths=(3, 2)),
    ]


def polynomials(dense):
    projection, other = fmxnn.Projection(5, 4), fmxnn.Projection(5, 4)
    square = fmxnn.PowerTerm(fmxnn.DenseWeight(2, 3, 4), degree=2, start=0.5)
    product = fmxnn.ProductTerm(projection, other, weight=fmxnn.DenseWeight(2, 3, 4), start=0.5)
    return [
        projection,
        fmxnn.ProjectedWeight(projection, fmxnn.DenseWeight(2, 3, 4)),
        square,
        product,
        fmxnn.PolynomialDecoder(square, weight=dense, projection=projection),
        fmxnn.MultilinearDecoder(product, weight=dense),
    ]


def promised():
    """Every method or function whose docstring opens with a pattern `inputs -> output`."""
    for module in examples():
        for name, method in inspect.getmembers(module, inspect.ismethod):
            found = PATTERN.match(inspect.getdoc(method) or "")
            if (
                found
                and type(module).__module__.startswith("fmxnn")
                and method.__func__.__module__.startswith("fmxnn")
                and not name.startswith("_")
            ):
                yield pytest.param(module, method, found[1], id=f"{type(module).__name__}.{name}")
    for file in ("training.losses", "sparse.codes", "weights.ragged", "coders.normalisation"):
        for name, function in inspect.getmembers(importlib.import_module(f"fmxnn.{file}"), inspect.isfunction):
            found = PATTERN.match(inspect.getdoc(function) or "")
            if found and function.__module__ == f"fmxnn.{file}":
                yield pytest.param(examples()[0], function, found[1], id=f"{file}.{name}")


def shape(term, batch, sizes):
    return tuple(size for word in term.split() for size in (batch if word == "..." else (sizes[word],)))


@pytest.mark.parametrize("batch", [(), (4,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(("module", "call", "pattern"), list(promised()))
def test_a_docstrings_pattern_holds(module, call, pattern, batch):
    table = next(
        (part.table for part in (module, getattr(module, "weight", None)) if getattr(part, "table", None) is not None),
        None,
    )
    sizes = {**SIZES, "bonds": 7 if table is None else table.shape[1]}
    left, right = pattern.split("->")
    if "..." in left:
        sizes["tokens"] = math.prod(batch)
    names = list(inspect.signature(call).parameters)
    terms = [term for term in left.split(",") if term.strip()]
    given = [torch.rand(shape(term, batch, sizes)) for term in terms]
    for i, name in enumerate(names[: len(terms)]):
        given[i] = given[i] > 0.5 if name == "dead" else given[i]
        given[i] = fmxnn.sparse.codes.to_csr(given[i]) if call.__name__ == "to_codes" else given[i]
    known = {
        "to_layers": getattr(module, "to_layers", None),
        "k_aux": 2,
        "rule": "each",
        "amount": 2,
        "count": 2,
        "prefixes": (2, 4),
    }
    known |= {
        "decoder": fmxnn.CrossLayerDecoder(examples()[0]),
        "widths": (3, 2),
        "activations": [torch.rand(*batch, width) for width in (3, 2)],
    }
    more = {name: known[name] for name in names[len(terms) :] if name in known}
    if call.__name__ == "fit_normalisation":
        given = [given]
        batch or pytest.skip("one token has no size to be brought to")
    out = call(*given, **more)
    if not isinstance(out, (torch.Tensor, fmxnn.sparse.codes.Codes)):
        assert not right.strip()
    else:
        assert tuple(out.shape) == shape(right, batch, sizes)


def test_the_docstrings_promise_enough_patterns():
    ids = [case.id for case in promised()]
    promises = [
        "DenseWeight.to_bonds",
        "CPWeight.from_bonds",
        "SumWeight.to_layers",
        "TopK.forward",
        "BatchTopK.select",
        "BatchTopK.calibrate",
        "LayerMask.forward",
        "CrossLayerEncoder.pre_activations",
        "Crosscoder.encode",
        "training.losses.dead_latent_loss",
        "sparse.codes.sum_rows",
        "Scored.choose",
        "MixedNorm.combine",
        "DecoupledDecoder.forward",
        "GroupMax.forward",
        "training.losses.matryoshka_loss",
        "ConcatWeight.from_bonds",
        "PlacedWeight.to_bonds",
        "RestrictedWeight.to_layers",
        "RaggedWeight.from_bonds",
        "weights.ragged.unpad_layers",
        "ProductTerm.forward",
        "SkipCrosscoder.decode",
        "SplitGate.forward",
        "Normalised.encode",
        "ProjectedWeight.to_bonds",
        "FactorizedLinear.forward",
    ]
    for name in promises:
        assert name in ids
