"""A byte that flips, or a file that is cut, in a saved folder: no such folder loads, and the file is named."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from attempts import attempt, tries
from hypothesis import given, settings
from hypothesis import strategies as st

import fmxnn as fx
from fmxnn.core.files.integrity import IntegrityError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    encoder = fx.CrossLayerEncoder(fx.CPWeight(2, 9, 50, rank=2), fx.BatchTopK(2), mask=fx.LayerMask(0.1))
    module, parent = (
        fx.Crosscoder(encoder, fx.CrossLayerDecoder(fx.DenseWeight(2, 9, 50))),
        tmp_path_factory.mktemp("saved"),
    )
    fx.save_pretrained(module, parent / "one", about={"base_model": "openai-community/gpt2"})
    fx.save_pretrained(module, parent / "sharded", max_shard_size="1KB")
    return parent


NAMES = ("config.json", "about.json", "README.md", "manifest.json", "model.safetensors.index.json", "*.safetensors")


def changed(body, how, place, byte):
    at = int(place * len(body))
    if how == "cut":
        return body[:at]
    if how == "grown":
        return body[:at] + bytes([byte]) + body[at:]
    return body[:at] + bytes([body[at] ^ (1 << byte % 8 if how == "bit" else byte or 1)]) + body[at + 1 :]


def same_list(one, other):
    """Space between the words of a manifest says nothing, and so nothing is wrong where it changes."""
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def refused(path, device):
    with pytest.raises((IntegrityError, fx.RecipeError)) as caught:
        fx.from_pretrained(path.parent, device=device)
    assert path.name in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("sort", ["one", "sharded"])
@pytest.mark.parametrize("how", ["bit", "byte", "cut", "grown"])
@settings(max_examples=tries(ci=15, thorough=2_000))
@given(
    name=st.sampled_from(NAMES),
    nth=st.integers(0, 99),
    place=st.floats(0, 1, exclude_max=True),
    byte=st.integers(0, 255),
)
def test_a_changed_file_never_loads_and_is_named(folders, sort, how, name, nth, place, byte):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(folders / sort, Path(parent) / "m"))
        found = sorted(folder.glob(name))
        if not found:
            return
        path = found[nth % len(found)]
        before = path.read_bytes()
        after = changed(before, how, place, byte)
        if path.name == "manifest.json" and same_list(before, after):
            return
        path.write_bytes(after)
        with attempt(f"a file of a save changed: {how}", case=(path.name, len(before), place, byte)):
            refused(path, "cpu")
            if (
                path.suffix != ".safetensors" and name != "manifest.json"
            ):  # there the headers alone are read of the weights
                refused(path, "meta")


@pytest.mark.parametrize("sort", ["one", "sharded"])
def test_every_bit_of_a_header_is_watched(folders, sort, tmp_path):
    folder = Path(shutil.copytree(folders / sort, tmp_path / "m"))
    path = sorted(folder.glob("*.safetensors"))[0]
    body = path.read_bytes()
    header = 8 + int.from_bytes(body[:8], "little")
    for at in range(0, header * 8, tries(ci=37, thorough=1)):
        path.write_bytes(body[: at // 8] + bytes([body[at // 8] ^ (1 << at % 8)]) + body[at // 8 + 1 :])
        with attempt("a bit of a header flipped", case=at):
            refused(path, "cpu")
