"""Weight files made to hang, to run code or to lie: they are read as what they say, or refused in one sentence."""

import hashlib
import json
import pickle
import random
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from attempts import attempt, tries
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

import fmxnn as fx
from fmxnn import RecipeError
from fmxnn.core.errors import FormatError
from fmxnn.core.files.integrity import IntegrityError
from fmxnn.saving.formats.tensors import Tensors

HELD = {"W_enc": torch.arange(24.0).reshape(2, 3, 4), "b_enc": torch.arange(4.0)}
LAYOUT = {"W_enc": "layers d_model latents", "b_enc": "latents"}
REFUSALS = (FormatError, IntegrityError, RecipeError, MemoryError)
seeds = st.integers(0, 2**64 - 1)


def header(tree, body=b"\0" * 112, length=None):
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(dtype="F32", shape=(2, 3, 4), offsets=(0, 96)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BIAS = entry(shape=(4,), offsets=(96, 112))
GOOD = {"W_enc": entry(), "b_enc": BIAS}
LIES = {
    "a header of 2^63 bytes": header(GOOD, length=2**63),
    "a header longer than the file": header(GOOD, length=10_000),
    "a header of 17 MB": header({**GOOD, "__metadata__": {"a": "x" * 17_000_000}}),
    "no bytes": b"",
    "seven bytes": b"\1" * 7,
    "a file without numbers": header(GOOD, b""),
    "numbers too many": header(GOOD, b"\0" * 113),
    "offsets that overlap": header({"W_enc": entry(), "b_enc": entry(shape=(4,), offsets=(80, 96))}),
    "offsets that go back": header({"W_enc": entry(offsets=(96, 0)), "b_enc": BIAS}),
    "offsets beyond the file": header({"W_enc": entry(), "b_enc": entry(shape=(4,), offsets=(2**60, 2**60 + 16))}),
    "a hole": header({"W_enc": entry(), "b_enc": entry(shape=(4,), offsets=(97, 113))}),
    "a shape that overflows": header({"W_enc": entry(shape=(2**62, 2**62, 4)), "b_enc": BIAS}),
    "a shape below zero": header({"W_enc": entry(shape=(-2, -3, 4)), "b_enc": BIAS}),
    "a wrong shape": header({"W_enc": entry(shape=(2, 3, 5)), "b_enc": BIAS}),
    "an unknown type": header({"W_enc": entry("F31"), "b_enc": BIAS}),
    "float8": header({"W_enc": entry("F8_E4M3", (2, 3, 16)), "b_enc": BIAS}),
    "complex": header({"W_enc": entry("C64", (2, 3, 2)), "b_enc": BIAS}),
    "whole numbers": header({"W_enc": entry("I32"), "b_enc": BIAS}),
    "a name twice": header(
        json.dumps(GOOD).encode()[:-1] + b', "b_enc": ' + json.dumps(entry(shape=(4,), offsets=(0, 16))).encode() + b"}"
    ),
    "a deep header": header(b'{"a":' * 100_000),
    "a list": header([GOOD]),
    "invalid UTF-8": header(b'{"\xff": 1}'),
    "100,000 tensors": header({f"a{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(100_000)}, b""),
    "a name of 1 MB": header({"n" * 1_000_000: entry(), "b_enc": BIAS}),
}


def read(path):
    """Everything of a file, as a format reads it; what is read is as large as its header says."""
    tensors = Tensors(path)
    sizes = tensors.check(LAYOUT)
    for key in LAYOUT:
        into = torch.empty([sizes[word] for word in LAYOUT[key].split()])
        tensors.fill(into, key)
        torch.testing.assert_close(into, tensors.read(key).float(), equal_nan=True)


def refusal(path):
    with pytest.raises(REFUSALS) as caught:
        read(path)
    assert len(str(caught.value)) < 2500
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(LIES[lie])
    with attempt("a safetensors header that lies", case=lie, memory=True):
        assert str(path) in refusal(path)


def test_a_good_header_is_read(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(header(GOOD))
    read(tmp_path / "weights.safetensors")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours") / "module"
    fx.save_pretrained(
        fx.Crosscoder(
            fx.CrossLayerEncoder(fx.DenseWeight(2, 3, 4), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 3, 4))
        ),
        folder,
    )
    return folder


@pytest.mark.parametrize("lie", LIES)
def test_a_header_of_ours_that_lies_is_refused_before_a_tensor_is_made(lie, ours, tmp_path):
    folder = Path(shutil.copytree(ours, tmp_path / "module"))
    (folder / "model.safetensors").write_bytes(LIES[lie])
    with attempt("a header of ours that lies", case=lie, memory=True), pytest.raises(REFUSALS) as caught:
        fx.from_pretrained(folder, device="meta")
    assert len(str(caught.value)) < 2500


def test_our_own_header_is_capped_at_a_megabyte(ours, tmp_path):
    folder = Path(shutil.copytree(ours, tmp_path / "module"))
    (folder / "model.safetensors").write_bytes(header({"__metadata__": {"a": "x" * 1_100_000}}, b""))
    with pytest.raises(IntegrityError, match="header has 1,100,0.. bytes, and one has at most 1,000,000"):
        fx.from_pretrained(folder, device="meta")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int32])
def test_our_own_weights_have_a_plain_floating_type(dtype, ours, tmp_path):
    folder = Path(shutil.copytree(ours, tmp_path / "module"))
    module = fx.from_pretrained(ours)
    save_file({key: value.to(dtype) for key, value in module.state_dict().items()}, folder / "model.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["model.safetensors"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match="encoder.bias has the type .* and the recipe torch.float32"):
        fx.from_pretrained(folder, device="meta")


def changed(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data))
        match rng.randrange(3):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randint(1, 40)]
            case _:
                data[at:at] = rng.randbytes(rng.randint(1, 40))
    return bytes(data)


@given(seeds)
@settings(max_examples=tries(ci=60, thorough=5_000), deadline=None)
def test_a_changed_file_is_read_as_it_says_or_refused(tmp_path_factory, seed):
    rng = random.Random(seed)
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    data = save(HELD)
    path.write_bytes(changed(rng, data[:200]) + data[200:] if rng.random() < 0.7 else changed(rng, data))
    read_or_refused(path, "a changed safetensors file", seed)


def read_or_refused(path, fault, seed):
    with attempt(fault, case=seed, memory=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numbers that changed may be NaN
        try:
            read(path)
        except REFUSALS as error:
            assert len(str(error)) < 2500


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """A torch archive with its members changed, each with a checksum that is right."""
    with zipfile.ZipFile(path) as archive:
        members = [(member.filename, archive.read(member)) for member in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, body in members:
            archive.writestr(name, change(name, body))


def test_a_compressed_archive_is_refused_and_not_read_as_other_numbers(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(HELD, path)
    rewritten(path, lambda _, body: body, zipfile.ZIP_DEFLATED)
    with attempt("a deflated torch file", memory=True):
        assert "is a compressed archive" in refusal(path)


class Code:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_an_archive_with_code_is_refused_and_does_not_run_it(tmp_path):
    path, mark = tmp_path / "weights.pt", tmp_path / "ran"
    torch.save({**HELD, "extra": Code(mark)}, path)
    with attempt("a torch file with code", memory=True):
        assert "names code or classes" in refusal(path)
    path.write_bytes(pickle.dumps(Code(mark)))
    with attempt("a torch file with code", memory=True):
        assert "is a bare pickle" in refusal(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.zeros(2, 3, 4).to_sparse(), "sparse_coo"),
        (torch.zeros(2, 3, 4, device="meta"), "meta"),
        (torch.zeros(2, 3, 4, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, 3, 4).to(torch.float8_e5m2), "float8_e5m2"),
        (torch.zeros(2, 3, 4).to(torch.uint16), "uint16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_is_not_plain_is_named_with_its_kind(tensor, kind, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({**HELD, "W_enc": tensor}, path)
    with (
        attempt("a tensor that is not plain", case=kind, memory=True),
        pytest.raises(FormatError, match=f"{path} holds W_enc as {kind}, "),
    ):
        Tensors(path)


@given(seeds)
@settings(max_examples=tries(ci=60, thorough=5_000), deadline=None)
def test_a_changed_archive_is_read_as_it_says_or_refused(tmp_path_factory, seed):
    """Bytes of the archive, or those of the pickle in it under a checksum that is right."""
    rng = random.Random(seed)
    path = tmp_path_factory.getbasetemp() / "changed.pt"
    torch.save(HELD, path)
    if rng.random() < 0.7:
        rewritten(path, lambda name, body: changed(rng, body) if name.endswith("data.pkl") else body)
    else:
        path.write_bytes(changed(rng, path.read_bytes()))
    read_or_refused(path, "a changed torch file", seed)


@pytest.mark.parametrize("subfolder", ["/etc", "../other", "a/../../other", "link", "a\0b", "..", "a/link2"])
def test_a_subfolder_stays_inside_its_folder(subfolder, ours, tmp_path):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    shutil.copytree(ours, tmp_path / "other")
    (root / "link").symlink_to(tmp_path / "other")
    (root / "a" / "link2").symlink_to("../../other")
    with (
        attempt("a subfolder outside", case=subfolder),
        pytest.raises(IntegrityError, match=r"subfolder='.*' leads out of .*; give the name"),
    ):
        fx.from_pretrained(root, subfolder=subfolder)


def test_a_subfolder_inside_is_read_though_its_files_are_links(ours, tmp_path):
    (tmp_path / "root" / "a").mkdir(parents=True)
    for path in ours.iterdir():
        (tmp_path / "root" / "a" / path.name).symlink_to(path)
    (tmp_path / "linked").symlink_to(tmp_path / "root")
    for subfolder in ("a", "a/", "./a", "a/../a"):
        assert isinstance(fx.from_pretrained(tmp_path / "linked", subfolder=subfolder), fx.Crosscoder)
