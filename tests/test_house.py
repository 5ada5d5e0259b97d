"""The measures of the house, read from the source; and the shapes that docstrings promise, run."""

import ast
import importlib
import inspect
import json
import math
import re
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest
import torch

import fmxnn
from fmxnn.core.recipe import build, describe

PACKAGE = Path(fmxnn.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
ORDER = [
    "core",
    "sparse",
    "weights",
    "gates",
    "coders",
    "activations",
    "training",
    "saving",
    "metrics",
    "diffing",
    "reports",
]
"""A folder imports only folders before it."""
FORBIDDEN = {"print", "eval", "exec", "__import__"}
UNSAFE = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def folder(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (
                f"{node.module}.{alias.name}" if node.module == "fmxnn" else str(node.module) for alias in node.names
            )


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def files_of(path):
    """The files of the package that a file imports; a folder stands for its `__init__.py`."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fmxnn"):
            at = PACKAGE.joinpath(*node.module.split(".")[1:])
            for name in (at / alias.name for alias in node.names):
                found = next(
                    (
                        file
                        for file in (name.with_suffix(".py"), name / "__init__.py", at.with_suffix(".py"))
                        if file in TREES
                    ),
                    None,
                )
                yield found or at / "__init__.py"


@every_file
def test_a_folder_imports_only_folders_before_it(path):
    here = folder(path)
    if path.parent == PACKAGE:
        return
    assert here in ORDER, f"{here} has no place in the order of the folders"
    wrong = [
        there for there in map(folder, files_of(path)) if there not in ORDER or ORDER.index(there) > ORDER.index(here)
    ]
    assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}"


def test_no_files_import_each_other_in_a_circle():
    sorter = TopologicalSorter(
        {path: {file for file in files_of(path) if file.name != "__init__.py"} for path in FILES}
    )
    sorter.prepare()  # raises CycleError, which names the files


@every_file
def test_a_file_has_at_most_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


@every_file
def test_a_function_has_at_most_45_lines(path):
    long = [node.name for node in functions(TREES[path]) if node.end_lineno - node.lineno + 1 > 45]
    assert not long


@every_file
def test_a_constructor_has_at_most_five_arguments(path):
    for node in functions(TREES[path]):
        if node.name == "__init__":
            a = node.args
            count = len(a.posonlyargs + a.args + a.kwonlyargs) - 1 + bool(a.vararg) + bool(a.kwarg)
            assert count <= 5, f"line {node.lineno}: {count} arguments"


@every_file
def test_imports_stand_at_the_top(path):
    for node in functions(TREES[path]):
        assert not any(isinstance(inner, (ast.Import, ast.ImportFrom)) for inner in ast.walk(node)), node.name


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


def undocumented(node, prefix=""):
    for inner in getattr(node, "body", []):
        if isinstance(inner, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not inner.name.startswith("_"):
            if not ast.get_docstring(inner):
                yield prefix + inner.name
            if isinstance(inner, ast.ClassDef):
                yield from undocumented(inner, f"{inner.name}.")


@every_file
def test_every_public_name_is_documented(path):
    assert ast.get_docstring(TREES[path])
    assert not list(undocumented(TREES[path]))


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
        dense, cp, fmxnn.TensorRingWeight(*axes), fmxnn.FactorizedWeight("latents layers d_model", layers=2, d_model=3, latents=5),
        fmxnn.EinsumWeight("latents r, layers d_model r", layers=2, d_model=3, latents=5, r=2), fmxnn.SumWeight(dense, cp),
        fmxnn.ConcatWeight(fmxnn.DenseWeight(2, 3, 2), fmxnn.CPWeight(2, 3, 3)), fmxnn.LayerMask(0.5), fmxnn.TopK(2), fmxnn.BatchTopK(2),
        fmxnn.JumpReLU(5), encoder, decoder, fmxnn.Crosscoder(encoder, decoder), *gates(dense), *connectivity(dense), *polynomials(dense),
        fmxnn.FactorizedLinear(cp, 1), fmxnn.SkipCrosscoder(fmxnn.Crosscoder(encoder, decoder)), fmxnn.Normalisation(2, 3),
        fmxnn.Normalised(fmxnn.Crosscoder(encoder, decoder), fmxnn.Normalisation(2, 3)),
        fmxnn.factorize(fmxnn.Crosscoder(encoder, decoder), lambda *sizes: fmxnn.CPWeight(*sizes, rank=2), sweeps=1),
    ]  # fmt: skip


def gates(dense):
    decoupled = fmxnn.Decoupled(fmxnn.BatchTopK(2), fmxnn.BatchTopK(2), weight=dense)
    scores = [fmxnn.SumNorm(dense), fmxnn.ConcatNorm(dense), fmxnn.MixedNorm(dense)]
    return [
        *scores, fmxnn.Scored(fmxnn.BatchTopK(2), scores[0]), decoupled, fmxnn.DecoupledDecoder(dense, decoupled), fmxnn.TrainedJumpReLU(5),
        fmxnn.GroupMax(5, 5), fmxnn.SignedTopK(2), fmxnn.SignedBatchTopK(2), fmxnn.SignedGroupMax(5, 5),
        fmxnn.SplitGate(fmxnn.TopK(1), fmxnn.BatchTopK(1), runs=(2, 3)),
    ]  # fmt: skip


def connectivity(dense):
    ring = fmxnn.TensorRingWeight(2, 3, 5)
    return [
        fmxnn.PlacedWeight(fmxnn.CPWeight(1, 2, 5, rank=4), layers=2, at=1, d_model=3), fmxnn.RestrictedWeight(ring, at=[[0], [1], [0, 1], [0], [1]]),
        fmxnn.windowed_weight(fmxnn.DenseWeight, layers=2, d_model=3, latents=5, window=2), fmxnn.RaggedWeight(dense, widths=(3, 2)),
    ]  # fmt: skip


def polynomials(dense):
    projection, other = fmxnn.Projection(5, 4), fmxnn.Projection(5, 4)
    square = fmxnn.PowerTerm(fmxnn.DenseWeight(2, 3, 4), degree=2, start=0.5)
    product = fmxnn.ProductTerm(projection, other, weight=fmxnn.DenseWeight(2, 3, 4), start=0.5)
    return [
        projection, fmxnn.ProjectedWeight(projection, fmxnn.DenseWeight(2, 3, 4)), square, product,
        fmxnn.PolynomialDecoder(square, weight=dense, projection=projection), fmxnn.MultilinearDecoder(product, weight=dense),
    ]  # fmt: skip


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
