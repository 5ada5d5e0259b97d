"""JSON that is written can be read strictly, whatever was given."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmxnn import RecipeError
from fmxnn.core.files.strict_json import strict_json, to_json

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_what_is_plain_comes_back_as_it_was(value):
    assert json.loads(to_json(value)) == value


def test_tensors_are_lists_and_what_is_not_finite_is_null(tmp_path):
    (tmp_path / "a.json").write_text(
        to_json({"x": torch.tensor([1.0, float("nan")]), 3: (float("inf"), range(2)), "path": tmp_path})
    )
    assert strict_json(tmp_path / "a.json") == {"x": [1.0, None], "3": [None, [0, 1]], "path": str(tmp_path)}


def test_a_key_given_twice_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(RecipeError) as error:
        strict_json(tmp_path / "a.json")
    assert str(error.value) == f"{tmp_path}/a.json gives 'a' twice, and each name stands once; fetch or save it again"
