"""What is wrong with a folder, said once: which file, which key, and the way out."""

from pathlib import Path

import foreign_crosscoders as foreign
import pytest
import torch
from safetensors.torch import load_file

import fmxnn as fx
from fmxnn.core.files.integrity import IntegrityError
from fmxnn.saving.formats import FORMATS, Format, FormatError, memory

SIZES = (2, 3, 4)
WRITTEN = {
    "ckkissane": (foreign.ckkissane, {}, "cc_weights.pt", "W_enc", "latents layers d_model"),
    "dictionary_learning_crosscoder": (
        foreign.dictionary_learning,
        {"scaled": "older"},
        "model.safetensors",
        "encoder.weight",
        "",
    ),
    "crosscode": (foreign.crosscode, {}, "model.pt", "_W_dec_LXoDo", ""),
    "llamascopium": (foreign.llamascopium, {}, "sae_weights.safetensors", "W_E", ""),
}
BIASES = {
    "ckkissane": "b_enc",
    "dictionary_learning_crosscoder": "encoder.bias",
    "crosscode": "b_enc_L",
    "llamascopium": "b_D",
}
unscaled = pytest.mark.filterwarnings("ignore:.*does not say by what each layer was multiplied")
every_format = pytest.mark.parametrize("name", WRITTEN)


class Code:
    """Loading this would run `Path.touch`."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def write(name, folder):
    folder.mkdir(exist_ok=True)
    writer, options, file, *_ = WRITTEN[name]
    writer(folder, *SIZES, torch.float32, **options)
    return folder / file


def change(path, how):
    held = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    how(held)
    foreign.save(held, path)


def complaint(folder, error=FormatError, **options):
    with pytest.raises(error) as caught:
        fx.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@every_format
def test_a_missing_tensor_is_named(name, tmp_path):
    path = write(name, tmp_path)
    change(path, lambda held: held.pop(BIASES[name]))
    expected = f"{path} does not fit its format: {BIASES[name]} is missing; name another: format=, or ask who wrote it"
    assert complaint(tmp_path) == expected


@every_format
def test_a_tensor_too_many_is_named(name, tmp_path):
    path = write(name, tmp_path)
    change(path, lambda held: held.update(surprise=torch.zeros(2)))
    assert (
        complaint(tmp_path)
        == f"{path} does not fit its format: surprise is unknown; name another: format=, or ask who wrote it"
    )


@every_format
def test_a_wrong_shape_is_named(name, tmp_path):
    path = write(name, tmp_path)
    change(path, lambda held: held.update({BIASES[name]: torch.zeros(7)}))
    expected = "(layers=2, d_model=3)" if name == "llamascopium" else "(latents=4)"
    assert complaint(tmp_path) == (
        f"{path} does not fit its format: {BIASES[name]} has the shape (7,), expected {expected}; name another: "
        "format=, or ask who wrote it"
    )


@every_format
def test_whole_numbers_are_no_weights(name, tmp_path):
    path = write(name, tmp_path)
    change(path, lambda held: held.update({BIASES[name]: torch.zeros_like(held[BIASES[name]], dtype=torch.int64)}))
    assert f"{path} does not fit its format: {BIASES[name]} holds int64, expected a floating type" in complaint(
        tmp_path
    )


@every_format
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_named(name, share, tmp_path):
    path = write(name, tmp_path)
    body = path.read_bytes()
    path.write_bytes(body[: int(share * len(body))])
    message = complaint(tmp_path, IntegrityError)
    assert message.startswith(f"{path} cannot be read: ")
    assert message.endswith("; fetch it again")


@every_format
def test_code_in_a_file_is_refused_and_does_not_run(name, tmp_path):
    path, mark = write(name, tmp_path), tmp_path / "ran"
    torch.save({"W_enc": Code(mark)}, path)
    if path.suffix == ".safetensors":
        assert complaint(tmp_path, IntegrityError).startswith(
            (f"{path} cannot be read: ", f"{path} says that its header has ")
        )
    else:
        assert complaint(tmp_path) == (
            f"{path} is a pickle that names code or classes and is refused: loading it would run them; ask for "
            "safetensors, "
            "or save its tensors alone where you trust it: torch.save(model.state_dict(), path)"
        )
    assert not mark.exists()


@pytest.mark.parametrize(
    ("held", "sentence"),
    [
        ([torch.zeros(2)], "{path} holds a list, expected tensors by name; save a state dict"),
        ({"W_enc": 3}, "{path} holds 'W_enc', a int, expected tensors by name; save a state dict"),
        ({"W_enc": {"x": torch.zeros(2)}}, "{path} holds 'W_enc', a dict, expected tensors by name; save a state dict"),
    ],
)
def test_a_torch_file_holds_tensors_by_name(held, sentence, tmp_path):
    path = write("ckkissane", tmp_path)
    torch.save(held, path)
    assert complaint(tmp_path) == sentence.format(path=path)


@every_format
@pytest.mark.parametrize("text", ["{", "[]", "\x00", "a: !!python/object/apply:os.system [ls]"])
def test_settings_that_cannot_be_read_are_named(name, text, tmp_path):
    write(name, tmp_path)
    config = next(path for path in tmp_path.iterdir() if path.suffix in (".json", ".yaml"))
    config.write_text(text)
    message = complaint(tmp_path, format=name)
    assert message.startswith(str(config))
    assert message.endswith(
        "; name another: format=" if text == "[]" else "; fetch it again"
    )  # what is whole is not mended by fetching


@unscaled
@every_format
def test_a_format_is_known_by_its_files_alone(name, tmp_path):
    write(name, tmp_path)
    assert [known.name for known in FORMATS if known.recognises(tmp_path)] == [name]
    assert fx.from_pretrained(tmp_path, device="meta").about["format"] == name


def test_a_folder_of_two_formats_asks_which(tmp_path):
    write("ckkissane", tmp_path)
    write("llamascopium", tmp_path)
    with pytest.raises(FormatError) as caught:
        fx.from_pretrained(tmp_path)
    first, *rest = str(caught.value).split("\n")
    assert first == f"{tmp_path} fits ckkissane and llamascopium; say which: format='ckkissane'"
    assert rest[0] == "looked for:"
    assert fx.from_pretrained(tmp_path, format="llamascopium").about["format"] == "llamascopium"


def test_a_foreign_file_beside_ours_asks_which(tmp_path):
    fx.save_pretrained(fx.DenseWeight(1, 2, 3), tmp_path / "ours")
    write("ckkissane", tmp_path / "ours")
    with pytest.raises(FormatError, match="fits fmxnn and ckkissane; say which: format='fmxnn'"):
        fx.from_pretrained(tmp_path / "ours")
    assert isinstance(fx.from_pretrained(tmp_path / "ours", format="fmxnn"), fx.DenseWeight)


def test_an_unknown_format_is_told_the_known_ones(tmp_path):
    known = ", ".join(["fmxnn", *(each.name for each in FORMATS)])
    assert complaint(tmp_path, format="safetensors") == f"unknown format 'safetensors'; known are {known}"


def test_every_format_says_what_it_looks_for():
    for known in FORMATS:
        assert isinstance(known, Format)
        assert known.name.isidentifier()
        assert known.files


def test_a_subfolder_is_read(tmp_path):
    (tmp_path / "blocks.14.hook_resid_pre").mkdir()
    write("crosscode", tmp_path / "blocks.14.hook_resid_pre")
    module = fx.from_pretrained(tmp_path, subfolder="blocks.14.hook_resid_pre")
    assert module.pretrained_from == f"{tmp_path}/blocks.14.hook_resid_pre"
    assert (
        complaint(tmp_path, IntegrityError, subfolder="other")
        == f"{tmp_path} has no folder 'other' with weights; subfolder= can be 'blocks.14.hook_resid_pre'"
    )


def test_several_versions_in_a_folder_are_listed(tmp_path):
    for stem in ("1", "2"):
        foreign.ckkissane(tmp_path, *SIZES, torch.float32, stem=stem)
    assert complaint(tmp_path) == (
        f"{tmp_path} needs one file of weights with its settings, got 1.pt, 2.pt; put one pair into a folder of its own"
    )


def test_a_scale_that_was_not_saved_is_asked_for(tmp_path):
    path = write("ckkissane", tmp_path)
    with pytest.warns(UserWarning, match="does not say") as caught:
        module = fx.from_pretrained(tmp_path)
    assert str(caught[0].message) == (
        f"{path} does not say by what each layer was multiplied in training, so this reads and writes x * input_scale; "
        "give it, sqrt(d_model) / mean norm of each layer: input_scale=torch.tensor([...])"
    )
    assert isinstance(module, fx.Crosscoder)
    scale = torch.ones(3)
    assert (
        complaint(tmp_path, input_scale=scale)
        == "input_scale is one number for each of the 2 layers, got the shape (3,)"
    )


def test_a_scale_is_refused_where_the_files_say_it(tmp_path):
    path = write("llamascopium", tmp_path)
    message = complaint(tmp_path, input_scale=torch.ones(2))
    assert message == f"{path} says itself how its input is scaled, got an input_scale; leave it out"


def test_a_threshold_that_was_never_set_is_said(tmp_path):
    foreign.dictionary_learning(tmp_path, *SIZES, torch.float32, threshold=-1.0)
    with pytest.warns(
        UserWarning, match="holds a threshold that was never set, threshold=-1.0, so every positive code is kept"
    ):
        module = fx.from_pretrained(tmp_path)
    x = torch.randn(6, 2, 3)
    inner = module.crosscoder
    assert torch.equal(module.encode(x), inner.encoder.pre_activations(module.normalisation(x)).relu())


def test_what_is_too_large_is_refused_before_it_is_allocated(tmp_path, monkeypatch):
    path = write("crosscode", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:       0 kB\n")
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "meminfo")
    numbers = 3 * 4 * 2 * 2 + 4 + 6 + 1 + 4
    with pytest.raises(MemoryError) as caught:
        fx.from_pretrained(tmp_path)
    assert str(caught.value) == (
        f"{path} needs {numbers * 4 / 1e9:.1f} GB as float32, and cpu has 0.0 GB free; look at it without its "
        "weights: python -m fmxnn inspect"
    )
    assert fx.from_pretrained(tmp_path, device="meta").encoder.bias.is_meta
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "none")
    assert fx.from_pretrained(tmp_path).encoder.bias.numel() == 4
