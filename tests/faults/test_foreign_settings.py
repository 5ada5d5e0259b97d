"""Settings of other libraries with values that no class wrote: a module, or one sentence."""

import json
import random
import warnings
from copy import deepcopy

import pytest
import yaml
from attempts import attempt, tries
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats_given import FORMATS, write_format

import fmxnn as fx
from fmxnn.core.files.integrity import IntegrityError
from fmxnn.saving.formats import FormatError

VALUES = [
    None,
    True,
    0,
    -1,
    3,
    2**70,
    10**300,
    1.5,
    -1e308,
    "",
    "x" * 3000,
    "relu",
    [],
    [1, 2],
    ["x"] * 3000,
    {},
    {"k": 1},
    {"a": ["x" * 500] * 9},
    [[]],
]
seeds = st.integers(0, 2**64 - 1)


@pytest.fixture(scope="module", params=FORMATS)
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = write_format(request.param, folder)
    return request.param, config, yaml.unsafe_load(config.read_text())


def places(tree):
    """Each dictionary or list in a tree with each of its keys."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from places(tree[key])


@given(seeds)
@settings(max_examples=tries(ci=25, thorough=1_000), deadline=None)
def test_values_that_no_class_wrote_are_one_sentence(written, seed):
    name, config, said = written
    rng = random.Random(seed)
    said = json.loads(json.dumps(said))
    for _ in range(rng.randint(1, 3)):
        found = list(places(said))
        if not found:
            break
        tree, key = rng.choice(found)
        tree[key] = deepcopy(rng.choice(VALUES))
    config.write_text(json.dumps(said))  # which is YAML too
    with attempt(f"settings of {name}", case=seed, memory=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fx.from_pretrained(config.parent, format=name, device="meta")
        except (FormatError, IntegrityError, MemoryError) as error:
            assert len(str(error)) < 1500
