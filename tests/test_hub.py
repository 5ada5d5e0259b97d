import ast
import errno
import io
import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import weights
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fmxnn as fx
import fmxnn.saving.hub
from fmxnn.core.files.integrity import IntegrityError, write_folder
from fmxnn.saving.formats import FORMATS, FormatError


def small(weight=None, k=2):
    made = weight or fx.CPWeight(2, 3, 5, rank=2)
    return fx.Crosscoder(
        fx.CrossLayerEncoder(made, fx.BatchTopK(k), mask=fx.LayerMask(0.1)),
        fx.CrossLayerDecoder(fx.DenseWeight(2, 3, 5)),
    )


def large():
    return fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(2, 9, 50), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 9, 50))
    )


@pytest.fixture
def saved(tmp_path):
    fx.save_pretrained(small(), tmp_path / "module")
    return tmp_path / "module"


def assert_same_bits(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key]), key
    assert fx.describe(one) == fx.describe(other)


@given(weights(), st.booleans())
def test_saving_and_loading_gives_the_same_bits(weight, shared):
    decoder = fx.CrossLayerDecoder(weight if shared else fx.DenseWeight(weight.layers, weight.d_model, weight.latents))
    module = fx.Crosscoder(fx.CrossLayerEncoder(weight, fx.BatchTopK(1)), decoder)
    module.double()(
        torch.randn(4, weight.layers, weight.d_model, dtype=torch.float64)
    )  # so that the threshold has moved
    with tempfile.TemporaryDirectory() as folder:
        fx.save_pretrained(module, Path(folder) / "m")
        again = fx.from_pretrained(Path(folder) / "m")
    assert_same_bits(module, again)
    assert not again.training
    assert (again.encoder.weight is again.decoder.weight) == shared
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_a_part_of_a_tensor_is_not_saved_as_the_whole(tmp_path):
    module = fx.DenseWeight(2, 3, 5)
    module.factors[0].full_tensor = None  # FSDP2's parameters have it
    with pytest.raises(fx.RecipeError, match="^factors.0 is sharded, and a folder holds whole tensors; gather"):
        fx.save_pretrained(module, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_several_shards_load_as_one(tmp_path):
    module = large()
    fx.save_pretrained(module, tmp_path / "m", max_shard_size="1KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()
    assert_same_bits(module, fx.from_pretrained(tmp_path / "m"))


def test_a_narrow_dtype_leaves_the_threshold_wide(saved):
    module = fx.from_pretrained(saved, dtype=torch.bfloat16)
    assert module.encoder.bias.dtype == torch.bfloat16
    assert module.encoder.sparsifier.threshold.dtype == torch.float32
    assert module.pretrained_from == str(saved)


class Mine(fx.Weight):
    """One vector a latent, the same at every layer."""

    def __init__(self, layers, d_model, latents):
        super().__init__()
        self.layers, self.d_model, self.latents = layers, d_model, latents
        self.rows = nn.Parameter(torch.randn(latents, d_model))

    def to_latents(self, x):
        return x.sum(-2) @ self.rows.T

    def to_layers(self, z):
        return (z @ self.rows).unsqueeze(-2).expand(*z.shape[:-1], self.layers, self.d_model)


def test_a_class_of_ones_own_loads_when_it_is_passed_and_is_refused_when_not(tmp_path):
    module = small(Mine(2, 3, 5))
    fx.save_pretrained(module, tmp_path / "m")
    assert_same_bits(module, fx.from_pretrained(tmp_path / "m", classes=[Mine]))
    with pytest.raises(fx.RecipeError) as caught:
        fx.from_pretrained(tmp_path / "m")
    assert str(caught.value) == "unknown class 'Mine' at 'encoder.weight'; if it is yours, pass it: classes=[Mine]"


class Made(nn.Module):
    """Makes a buffer that it does not save."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def test_a_buffer_that_is_made_and_not_saved_is_refused(tmp_path):
    module = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(2, 3, 5), Made()), fx.CrossLayerDecoder(fx.DenseWeight(2, 3, 5))
    )
    fx.save_pretrained(module, tmp_path / "m")
    with pytest.raises(fx.RecipeError) as caught:
        fx.from_pretrained(tmp_path / "m", classes=[Made])
    assert (
        str(caught.value)
        == "encoder.sparsifier.table of Crosscoder are made in a constructor and not saved; register them as "
        "persistent buffers"
    )


def test_a_tensor_tied_between_two_modules_is_refused_with_the_way_out(tmp_path):
    module = small(fx.DenseWeight(2, 3, 5))
    module.decoder.weight.factors = module.encoder.weight.factors
    fx.save_pretrained(module, tmp_path / "fine")  # the list of factors itself is shared, and loads as two
    module = small(fx.DenseWeight(2, 3, 5))
    module.decoder.weight.factors[0] = module.encoder.weight.factors[0]
    with pytest.raises(fx.RecipeError) as caught:
        fx.save_pretrained(module, tmp_path / "m")
    assert str(caught.value) == (
        "decoder.weight.factors.0 and encoder.weight.factors.0 are one tensor in two modules, which no recipe can say; "
        "share the module itself ('encoder.weight.factors')"
    )


def rewrite(folder, change):
    """The folder as somebody who changes config or weights on purpose would leave it: with a manifest that fits."""

    def fill(target):
        for path in folder.iterdir():
            if path.name != "manifest.json":
                shutil.copy(path, target)
        change(target)

    other = folder.parent / "rewritten"
    write_folder(other, fill)
    return other


def with_config(text):
    return lambda folder: (folder / "config.json").write_text(text)


def with_weights(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


RECIPE = json.dumps(fx.describe(small()))
DEEP = '{"fmxnn": "0.1.0", "module": ' + '{"a":' * 1000 + "1" + "}" * 1000 + "}"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (with_config(RECIPE), "{f}/config.json needs the keys fmxnn and module and no other, got Crosscoder"),
        (with_config("[]"), "{f}/config.json needs the keys fmxnn and module and no other, got list"),
        (
            with_config('{"fmxnn": "0.1.0", "module": {}, "extra": 1}'),
            "{f}/config.json needs the keys fmxnn and module and no other, got extra, fmxnn, module",
        ),
        (
            with_config(f'{{"fmxnn": "0.9.3", "module": {RECIPE}}}'),
            "{f}/config.json was written by fmxnn 0.9.3, and this is 0.1.0; upgrade: pip install -U fmxnn",
        ),
        (with_config(f'{{"fmxnn": 3, "module": {RECIPE}}}'), "{f}/config.json names no version of fmxnn, got 3"),
        (
            with_config('{"fmxnn": "0.1.0", "module": {"Unknown": {}}}'),
            "unknown class 'Unknown' at the top; if it is yours, pass it: classes=[Unknown]",
        ),
        (
            with_config('{"fmxnn": "0.1.0", "module": {"TopK": {"k": 1, "n": 2}}}'),
            "TopK at the top cannot be built: TopK got an unexpected keyword argument 'n'",
        ),
        (
            with_config('{"fmxnn": "0.1.0", "module": {"LayerMask": {"p": NaN}}}'),
            "{f}/config.json holds NaN, and numbers are finite; fetch or save it again",
        ),
        (
            with_config('{"fmxnn": "0.1.0", "module": {"TopK": {"k": 1, "k": 2}}}'),
            "{f}/config.json gives 'k' twice, and each name stands once; fetch or save it again",
        ),
        (
            with_config(DEEP),
            "{f}/config.json is nested deeper than the 17 levels that a config may have; fetch or save it again",
        ),
        (
            with_config('{"fmxnn":'),
            "{f}/config.json cannot be read: no JSON, Expecting value: line 1 column 10 (char 9); fetch or save it "
            "again",
        ),
        (
            with_config(" " * 1_000_001),
            "{f}/config.json has 1,000,001 bytes, and a config has at most 1,000,000; fetch or save it again",
        ),
        (
            with_weights(lambda t: t.pop("encoder.bias")),
            "the weights in {f} do not fit its config.json: encoder.bias is missing; save them together again",
        ),
        (
            with_weights(lambda t: t.update(other=torch.zeros(1))),
            "the weights in {f} do not fit its config.json: other is not of this recipe; save them together again",
        ),
        (
            with_weights(lambda t: t.update({"encoder.bias": torch.zeros(6)})),
            "the weights in {f} do not fit its config.json: encoder.bias has the shape (6,) and the recipe (5,); save "
            "them together again",
        ),
        (
            with_weights(lambda t: t.update({"encoder.bias": torch.zeros(5, dtype=torch.int64)})),
            "the weights in {f} do not fit its config.json: encoder.bias has the type I64 and the recipe "
            "torch.float32; save them together again",
        ),
    ],
)
def test_a_folder_that_does_not_fit_says_so(saved, change, sentence):
    folder = rewrite(saved, change)
    with pytest.raises(fx.RecipeError) as caught:
        fx.from_pretrained(folder)
    assert str(caught.value) == sentence.replace("{f}", str(folder))


def test_a_hostile_size_costs_no_memory(saved):
    text = '{"fmxnn": "0.1.0", "module": {"DenseWeight": {"layers": 4611686018427387904, "d_model": 8, "latents": 8}}}'
    folder = rewrite(saved, with_config(text))
    with pytest.raises(fx.RecipeError, match="^DenseWeight at the top cannot be built: "):
        fx.from_pretrained(folder)
    folder = rewrite(saved, with_config(text.replace("4611686018427387904", str(2**40))))  # 512 TB on the meta device
    with pytest.raises(fx.RecipeError, match="do not fit its config.json"):
        fx.from_pretrained(folder)


def test_a_folder_of_no_format_says_what_it_holds_and_what_was_looked_for(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(FormatError) as caught:
        fx.from_pretrained(tmp_path)
    first, *rest = str(caught.value).split("\n")
    assert first == f"{tmp_path} fits no known format, it holds weights.bin; give its subfolder= or format="
    assert rest[:2] == ["looked for:", "  fmxnn: config.json that names fmxnn, manifest.json, model.safetensors"]
    assert [line.split(":")[0].strip() for line in rest[2:]] == [known.name for known in FORMATS]


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(IntegrityError) as caught:
        fx.from_pretrained(saved)
    assert name in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(IntegrityError) as caught:
        fx.from_pretrained(tmp_path / "none")
    assert (
        str(caught.value)
        == f"there is no folder {str(tmp_path / 'none')!r}, and no Hub repository can have that name; give a folder "
        "or 'owner/name'"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../../model.safetensors", "names files that are no shards of this folder; fetch or save the folder again"),
        (
            "model-00009-of-00009.safetensors",
            "names model-00009-of-00009.safetensors, which manifest.json does not list; fetch or save",
        ),
    ],
)
def test_an_index_may_only_name_shards_of_its_folder(tmp_path, name, words):
    fx.save_pretrained(large(), tmp_path / "m", max_shard_size="1KB")
    index = "model.safetensors.index.json"
    folder = rewrite(
        tmp_path / "m", lambda folder: (folder / index).write_text(json.dumps({"weight_map": {"encoder.bias": name}}))
    )
    with pytest.raises(IntegrityError, match=re.escape(f"{folder / index} {words}")):
        fx.from_pretrained(folder)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_partial_manifest_is_refused(saved, device, missing):
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["sha256"][missing]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match=f"{missing}.*so nothing says "):
        fx.from_pretrained(saved, device=device)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_a_file_that_would_be_read_were_it_listed_is_named(saved, name):
    (saved / name).write_text("{}")
    with pytest.raises(
        IntegrityError, match=f"{name} is not in manifest.json, so nothing says whose it is; take it away, or "
    ):
        fx.from_pretrained(saved)


def test_files_of_ones_own_beside_a_save_stay_and_do_not_keep_it_from_loading(saved):
    (saved / "notes.txt").write_text("mine")
    (saved / "step-00000001").mkdir()
    (saved / "step-00000001" / "model.safetensors").write_text("a checkpoint")
    module = small(k=3)
    fx.save_pretrained(module, saved)
    assert_same_bits(module, fx.from_pretrained(saved))
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / "step-00000001" / "model.safetensors").read_text() == "a checkpoint"
    fx.save_pretrained(large(), saved, max_shard_size="1KB")
    assert not (saved / "model.safetensors").exists()
    assert (saved / "notes.txt").exists()
    fx.from_pretrained(saved)


def test_a_file_is_never_replaced_by_a_save(tmp_path):
    for name in ("m", "config.json"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(IntegrityError, match="m is a file, and no save replaces"):
        fx.save_pretrained(small(), tmp_path / "m")
    with pytest.raises(IntegrityError, match="holds config.json, which no save wrote, and it stays"):
        fx.save_pretrained(small(), tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"m": "mine", "config.json": "mine"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["encoder.weight.factors.0", "encoder.sparsifier.threshold"])
def test_what_is_not_finite_never_replaces_a_save_and_is_named_when_it_is_saved_and_loaded(saved, bad, key):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    module = small()
    module.state_dict()[key].view(-1)[0] = bad
    words = f"NaN or infinity in {key}"
    with pytest.raises(
        IntegrityError,
        match=f"Crosscoder holds {words}, and {saved} an earlier save, which stays; save into another folder",
    ):
        fx.save_pretrained(module, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    with pytest.warns(UserWarning, match=f"Crosscoder holds {words}"):
        fx.save_pretrained(module, saved.parent / "broken")
    with pytest.warns(UserWarning, match=f"broken holds {words}, and what is computed from it is wrong"):
        fx.from_pretrained(saved.parent / "broken")
    assert fx.from_pretrained(saved.parent / "broken", device="meta").encoder.bias.is_meta


def test_an_infinite_threshold_of_one_latent_is_sound(tmp_path):
    weight = fx.DenseWeight(2, 3, 4)
    weight.factors[0].data[1] = 0.0  # an atom of zeros is never chosen by its norm
    gate = fx.Scored(fx.BatchTopK(2), fx.SumNorm(weight))
    gate.sparsifier.threshold.fill_(0.5)
    assert gate.frozen().threshold.isinf().tolist() == [False, True, False, False]
    crosscoder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(2, 3, 4), gate.frozen()), fx.CrossLayerDecoder(weight)
    )
    for _ in range(2):
        fx.save_pretrained(crosscoder, tmp_path / "m")
    assert torch.equal(fx.from_pretrained(tmp_path / "m").encoder.sparsifier.threshold, gate.frozen().threshold)


def test_a_threshold_below_zero_is_named_and_one_never_set_is_not(saved):
    fx.from_pretrained(saved)
    folder = rewrite(saved, with_weights(lambda tensors: tensors["encoder.sparsifier.threshold"].fill_(-0.5)))
    with pytest.warns(UserWarning, match=r"holds a threshold below zero in encoder\.sparsifier\.threshold"):
        fx.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json"])
def test_a_file_that_may_not_be_read_is_named_with_the_way_out(saved, name, monkeypatch):
    opened = io.open

    def refuse(file, *args, **kwargs):
        if str(file) == str(saved / name):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", refuse)  # root may read everything, so rights alone would test nothing there
    with pytest.raises(
        IntegrityError, match=f"{name} may not be opened by you; change its rights .chmod., or ask its owner$"
    ):
        fx.from_pretrained(saved)


def test_a_full_disk_leaves_the_folder_as_it_was(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fmxnn.saving.hub, "save_file", full)
    with pytest.raises(
        IntegrityError, match="could not be written: .*No space left on device; nothing that stood there was changed$"
    ):
        fx.save_pretrained(small(), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["module"]


def test_saving_again_replaces_the_folder(saved):
    module = small(fx.TensorRingWeight(2, 3, 5, ranks=(1, 2, 2)))
    fx.save_pretrained(module, saved)
    assert_same_bits(module, fx.from_pretrained(saved))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_asked_for_where_there_is_none_is_one_sentence(saved):
    with pytest.raises(ValueError, match="^device 'cuda' was asked for and torch sees no GPU; load with device='cpu'$"):
        fx.from_pretrained(saved, device="cuda")


def test_the_card_holds_the_python_that_builds_the_module(saved):
    fx.save_pretrained(
        small(), saved, about={"base_model": "tiny's", "layers": [2, 3], "metrics": {"mse": 0.5}, "a|b": "<c>\nd"}
    )
    text = (saved / "README.md").read_text()
    assert 'base_model: "tiny\'s"\n' in text
    assert "| metrics | mse 0.5 |" in text
    assert "| a\\|b | &lt;c&gt;↵d |" in text
    code = re.findall(r"```python\n(import.*?)```", text, re.DOTALL)[0]
    made = {}
    exec(code, made)  # the card is what we wrote ourselves
    assert fx.describe(made["module"]) == fx.describe(small())


def test_a_card_of_parts_that_stand_twice_is_python():
    shared = fx.DenseWeight(2, 3, 5)
    gate = fx.Scored(fx.BatchTopK(2), fx.SumNorm(shared))
    module = fx.Crosscoder(fx.CrossLayerEncoder(fx.DenseWeight(2, 3, 5), gate), fx.CrossLayerDecoder(shared))
    outer = fx.Normalised(module, fx.Normalisation(2, 3))
    notes = {
        module: "weight=...,  # the same module as encoder.sparsifier.score.weight\n",
        outer: "output=...,  # the same module as normalisation\n",
        fx.SumWeight(shared, fx.DenseWeight(2, 3, 5), shared): "...,  # the same module as weights.0\n",
    }
    for made, note in notes.items():
        text = fmxnn.saving.card.python(fx.describe(made))
        assert note in text
        assert isinstance(ast.parse(text, mode="eval").body, ast.Call)


@given(weights())
def test_every_card_builds_its_weight(weight):
    made = eval(fmxnn.saving.card.python(fx.describe(weight)), {"fx": fx, "torch": torch})
    assert fx.describe(made) == fx.describe(weight)


def test_what_was_said_of_a_module_comes_back_with_it(tmp_path):
    about = {"base_model": "openai-community/gpt2", "layers": range(2, 4), "metrics": {"mse": 0.25, "ev": float("nan")}}
    fx.save_pretrained(fx.DenseWeight(1, 2, 3), tmp_path / "told", about=about)
    told = {"base_model": "openai-community/gpt2", "layers": [2, 3], "metrics": {"mse": 0.25, "ev": None}}
    assert fx.from_pretrained(tmp_path / "told").about == told
    fx.save_pretrained(fx.DenseWeight(1, 2, 3), tmp_path / "untold")
    assert fx.from_pretrained(tmp_path / "untold").about == {}


def nested(depth, inner=1):
    for _ in range(depth):
        inner = {"a": inner}
    return inner


CIRCULAR = {}
CIRCULAR["itself"] = CIRCULAR


@pytest.mark.parametrize(
    ("about", "sentence"),
    [
        (nested(17), "about cannot be saved: what is nested deeper than 16 levels is not read back; flatten it"),
        (nested(16, [1]), "deeper than 16 levels"),
        (nested(5000), "deeper than 16 levels"),
        (CIRCULAR, "deeper than 16 levels"),
        (
            {"notes": "x" * 1_000_000},
            "about takes 1,000,017 bytes as JSON, and at most 1,000,000 are read back; save what is large as a file "
            "of its own",
        ),
        ({"notes": "é" * 500_000}, "about takes 1,000,017 bytes"),
        (
            {"densities": [0] * 20_000},
            "about holds more than the 20,000 values that an about.json may hold; save what is large as a file of its "
            "own",
        ),
        ({"densities": torch.zeros(20_000)}, "about holds more than the 20,000 values"),
        (
            {"n": 10**999},
            "about cannot be saved: an integer of a thousand digits or more is not read back; write it as text",
        ),
        ({"n": -(10**5000)}, "an integer of a thousand digits"),
        (
            {1: "a", "1": "b"},
            "about cannot be saved: the name '1' stands twice, once as another type or with half a character; rename "
            "one",
        ),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "about",
)
def test_what_could_not_be_read_back_is_refused_before_anything_is_written(saved, about, sentence):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(fx.RecipeError) as caught:
        fx.save_pretrained(small(), saved, about=about)
    assert sentence in str(caught.value)
    with pytest.raises(fx.RecipeError):
        fx.save_pretrained(small(), saved.parent / "other", about=about)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["module"]


def test_what_is_just_small_enough_is_read_back(tmp_path):
    for about in (nested(16), {"notes": "x" * 999_900}, {"densities": [0] * 19_998}, {"n": 10**999 - 1}):
        fx.save_pretrained(fx.DenseWeight(1, 2, 3), tmp_path / "m", about=about)
        assert fx.from_pretrained(tmp_path / "m").about == about


def test_a_folder_from_before_about_was_written_loads(saved):
    folder = rewrite(saved, lambda folder: (folder / "about.json").unlink())
    assert fx.from_pretrained(folder).about == {}


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Identity(), nn.Identity(3, kept=True), fx.TopK(2)], ids=repr)
def test_a_module_without_tensors_is_described_built_saved_and_loaded(tmp_path, module):
    fx.save_pretrained(module, tmp_path / "saved")
    again = fx.from_pretrained(tmp_path / "saved")
    assert type(again) is type(module)
    assert fx.describe(again) == fx.describe(module) == fx.describe(fx.build(fx.describe(module), fx.saving.hub.KNOWN))
    x = torch.randn(3, 4)
    assert torch.equal(again(x), module(x))


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized(coder):
    parametrize.register_parametrization(coder.encoder.weight.factors, "0", Doubled())
    return "remove_parametrizations(module.get_submodule('encoder.weight.factors'), '0')"


def weight_normed(coder):
    parametrizations.weight_norm(coder.encoder, "bias", dim=None)
    return "remove_parametrizations(module.get_submodule('encoder'), 'bias')"


def normed_of_old(coder):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(coder.decoder, "bias")
    return "decoder.bias_g, decoder.bias_v; undo what changed them since, such as weight_norm (remove_weight_norm)"


def pruned(coder):
    prune.l1_unstructured(coder.decoder, "bias", 0.5)
    return "decoder.bias_mask, decoder.bias_orig; undo what changed them since"


@pytest.mark.parametrize("change", [parametrized, weight_normed, normed_of_old, pruned])
def test_what_could_never_be_loaded_is_refused_when_it_is_saved(tmp_path, change):
    weight = fx.CPWeight(2, 3, 5, rank=2)
    coder = fx.Crosscoder(fx.CrossLayerEncoder(weight, fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 3, 5)))
    way_out = change(coder)
    with pytest.raises(fx.RecipeError, match=re.escape(way_out)):
        fx.save_pretrained(coder, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_is_set_on_a_crosscoder_is_saved_with_it(tmp_path):
    coder = small()
    coder.backend, coder.folded_scale = "sparse", 0.25
    fx.save_pretrained(coder, tmp_path / "set")
    again = fx.from_pretrained(tmp_path / "set")
    assert (again.backend, again.folded_scale) == ("sparse", 0.25)
    assert 'backend="sparse"' in (tmp_path / "set" / "README.md").read_text().replace("'", '"')


def test_a_crosscoder_of_the_defaults_is_written_as_before_there_were_any(tmp_path):
    fx.save_pretrained(small(), tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert set(config["module"]["Crosscoder"]) == {"encoder", "decoder"}
    again = fx.from_pretrained(tmp_path / "plain")
    assert (again.backend, again.folded_scale) == ("auto", 1.0)
