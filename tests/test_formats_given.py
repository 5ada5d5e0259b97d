"""What a caller gives, and what a folder lacks: a wrong name, type or place is one sentence with the way out."""

import foreign_crosscoders as foreign
import foreign_sae
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_formats_faults import WRITTEN, complaint, write
from test_formats_sae import NAMES, write_any

import fmxnn as fx
from fmxnn.core.files.integrity import IntegrityError
from fmxnn.reports.command_line import main
from fmxnn.saving.formats import FormatError

FORMATS = (*WRITTEN, *NAMES)
BY_LAYER = ("saelens", "polysae", "sparsify", "ckkissane")
SETTINGS = {"circuit_tracer": "config.yaml", "crosscode": "model_cfg.yaml"} | dict.fromkeys(BY_LAYER, "cfg.json")


def write_format(name, folder):
    """The file of settings of a folder in this format."""
    if name in WRITTEN:
        write(name, folder)
    else:
        write_any(folder, name)
    return folder / SETTINGS.get(name, "config.json")


@pytest.mark.parametrize("name", FORMATS)
def test_settings_that_are_broken_are_named_where_they_hide_the_format_too(name, tmp_path):
    config = write_format(name, tmp_path)
    config.write_text('{"a": ')
    with pytest.raises(FormatError) as caught:
        fx.from_pretrained(tmp_path)
    first, *rest = str(caught.value).split("\n")
    assert f"{config} cannot be read: " in first
    assert first.endswith("; fetch it again")
    assert rest[:1] == ([] if first.startswith(str(config)) else ["looked for:"])


@pytest.mark.parametrize(
    "name", [name for name in FORMATS if name not in ("ckkissane", "dictionary_learning_crosscoder")]
)
def test_settings_that_are_missing_are_named(name, tmp_path):
    config = write_format(name, tmp_path)
    config.unlink()
    assert (
        complaint(tmp_path, IntegrityError, format=name)
        == f"{config} is missing; fetch it again, or name another: format="
    )


NOT_THE_FILE = {
    "is empty; fetch it again": b" \n",
    "is a web page; fetch the file itself": b"\n<!DOCTYPE html><html><title>429 Too Many Requests</title>"
    + b" " * 2000,
    "is a Git LFS pointer to the file; fetch that: git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid "
    b"sha256:4d7a\nsize 12345\n",
}


@pytest.mark.parametrize("said", NOT_THE_FILE)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_the_file_is_called_what_it_is(name, said, tmp_path):
    write_format(name, tmp_path)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(NOT_THE_FILE[said])
        with pytest.raises((IntegrityError, FormatError), match=f"{path} cannot be read: it {said}"):
            fx.from_pretrained(tmp_path)
        path.write_bytes(whole)


@pytest.mark.parametrize("scale", [2.0, [1.0, 2.0]])
def test_a_scale_that_is_no_tensor_is_wrapped_by_the_caller(scale, tmp_path):
    write("ckkissane", tmp_path)
    sentence = f"input_scale needs a tensor, one number for each layer, got {scale!r}; wrap it: torch.tensor([...])"
    assert complaint(tmp_path, TypeError, input_scale=scale) == sentence


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int32])
def test_a_dtype_is_a_floating_one_of_torch(dtype, tmp_path):
    fx.save_pretrained(fx.DenseWeight(1, 2, 3), tmp_path)
    assert (
        complaint(tmp_path, TypeError, dtype=dtype)
        == f"dtype needs a floating torch.dtype, got {dtype!r}; for example dtype=torch.bfloat16"
    )


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_a_number_that_is_no_scale_is_named_with_who_gave_it(value, tmp_path):
    write("ckkissane", tmp_path / "given")
    scale = torch.tensor([1.0, value])
    said = f": a normalisation needs finite scales > 0, got [{value}] at layers axis [1]; 1 leaves a layer as it is"
    assert complaint(tmp_path / "given", input_scale=scale) == f"input_scale{said}"
    path = write("dictionary_learning_crosscoder", tmp_path / "read")
    foreign.dictionary_learning(tmp_path / "read", 2, 3, 4, torch.float32)
    foreign.save(load_file(path) | {"activation_global_scale": scale}, path)
    assert complaint(tmp_path / "read") == f"{path}{said}"


def test_ours_keeps_its_scales_itself(tmp_path):
    fx.save_pretrained(fx.DenseWeight(1, 2, 3), tmp_path)
    sentence = f"{tmp_path} says itself how its input is scaled, got an input_scale; leave it out"
    assert complaint(tmp_path, input_scale=torch.ones(1)) == sentence


@pytest.mark.filterwarnings("ignore:.*does not say by what each layer was multiplied")
def test_a_transcoder_that_was_not_folded_needs_two_scales(tmp_path):
    foreign.crosscode(tmp_path, 2, 3, 4, torch.float32, folded=False, transcoder=True)
    assert complaint(tmp_path, input_scale=torch.ones(1)) == (
        f"{tmp_path / 'model.pt'} reads layers=1 and writes layers=2, which one input_scale cannot be for; leave it "
        "out and give a scale to each: "
        "fx.Normalised(crosscoder, normalisation, output=...)"
    )
    read, written = (fx.Normalisation.of(torch.ones(layers), torch.zeros(layers, 3)) for layers in (1, 2))
    assert fx.Normalised(fx.from_pretrained(tmp_path), read, output=written)(torch.ones(5, 1, 3)).shape == (5, 2, 3)


def test_folders_with_weights_are_listed_where_the_one_given_has_none(tmp_path):
    for layer in (8, 9):
        write_any(tmp_path / "saes" / f"layer_{layer}", "saelens")
    (tmp_path / "notes").mkdir()
    assert (
        complaint(tmp_path, IntegrityError)
        == f"{tmp_path} holds no weights; subfolder= can be 'saes/layer_8', 'saes/layer_9'"
    )
    said = complaint(tmp_path, IntegrityError, subfolder="layer_9")
    assert said == f"{tmp_path} has no folder 'layer_9' with weights; subfolder= can be 'saes/layer_9', 'saes/layer_8'"
    assert complaint(tmp_path / "notes", IntegrityError, subfolder="x") == (
        f"{tmp_path / 'notes'} has no folder 'x' with weights; no folder of it holds any"
    )


def test_a_file_is_told_its_folder(tmp_path):
    path = write("crosscode", tmp_path)
    assert complaint(path, IntegrityError) == f"{path} is a file; give the folder that it is in: {str(tmp_path)!r}"


def test_a_bare_pickle_is_refused_without_a_look_inside(tmp_path):
    path = write("crosscode", tmp_path)
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    assert complaint(tmp_path) == (
        f"{path} is a bare pickle, not an archive of torch.save, and is refused: loading it may run code; ask for "
        "safetensors, "
        "or save its tensors anew where you trust it: torch.save(torch.load(path, weights_only=True), path)"
    )
    torch.save(torch.load(path, weights_only=True), path)
    assert isinstance(fx.from_pretrained(tmp_path), fx.Crosscoder)


def test_nan_in_what_is_subtracted_from_every_input_is_refused(tmp_path):
    (file,) = write_any(tmp_path, "saelens")
    held = load_file(tmp_path / file)
    held["b_dec"][-1] = torch.nan
    save_file(held, tmp_path / file)
    assert complaint(tmp_path).startswith(
        f"{tmp_path / file}, b_dec: a normalisation needs finite means, got NaN or infinity"
    )


@pytest.mark.parametrize("key", ["W_enc", "b_enc", "W_dec", "threshold"])
def test_nan_in_a_file_is_named(key, tmp_path):
    (file,) = write_any(tmp_path, "saelens")
    held = load_file(tmp_path / file)
    held[key].view(-1)[-1] = torch.nan
    save_file(held, tmp_path / file)
    with pytest.warns(UserWarning, match="holds NaN") as caught:
        fx.from_pretrained(tmp_path)
    said = (
        f"{tmp_path / file} holds NaN in {key}, and what is computed from it is NaN; fetch it again, or ask who made it"
    )
    assert [str(warning.message) for warning in caught] == [said]


def test_what_lacks_a_scale_can_be_looked_at_and_says_so(tmp_path, capsys):
    tensors = foreign_sae.saelens_tensors(3, 5, threshold=True)
    foreign_sae.write_saelens(tmp_path, tensors, "jumprelu", normalize_activations="expected_average_only_in")
    lacking = complaint(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(f"\nnote: {lacking}\n")
