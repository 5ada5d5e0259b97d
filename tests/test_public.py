"""What a user of the package sees: its names, with and without the extras, and its types."""

import json
import subprocess
import sys
from inspect import isabstract
from pathlib import Path

import pytest
from torch import nn

import fmxnn as fx
from fmxnn.saving.card import python
from fmxnn.saving.known import KNOWN

ROOT = Path(fx.__file__).parent.parent
WITHOUT_EXTRAS = """
import sys

class Extras:
    def find_spec(self, name, path=None, target=None):
        if name in {"datasets", "jinja2", "matplotlib", "scipy", "sklearn", "tabulate", "transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Extras())
"""
READ_BEFORE = """BatchTopK ConcatNorm ConcatWeight Contraction CPWeight Crosscoder CrossLayerDecoder CrossLayerEncoder
Decoupled DecoupledDecoder DenseWeight EinsumWeight GroupMax Identity JumpReLU LayerMask MixedNorm MultilinearDecoder
Normalisation Normalised PlacedWeight PolynomialDecoder PowerTerm ProductTerm ProjectedWeight Projection RaggedWeight
ReLU RestrictedWeight Scored SignedBatchTopK SignedGroupMax SignedTopK SkipCrosscoder SplitGate SumNorm SumWeight
TensorRingWeight TopK TrainedJumpReLU"""
"""What version 0.1.0 read without `classes=`."""
USER = '''"""A user's file under strict types."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fmxnn as fx
from fmxnn.activations import activation_scale, harvest, rebatch
from fmxnn.metrics import TopToken, functional_coherence, measure_reconstruction, norm_coherence, top_tokens
from fmxnn.reports import Evaluation, compare


class Mine(fx.Weight):
    def __init__(self, layers: int, d_model: int, latents: int):
        super().__init__()
        self.layers, self.d_model, self.latents = layers, d_model, latents
        self.numbers = nn.Parameter(torch.randn(layers, d_model, latents))

    def to_latents(self, x: Tensor) -> Tensor:
        return torch.einsum("...lm,lmn->...n", x, self.numbers)

    def to_layers(self, z: Tensor) -> Tensor:
        return torch.einsum("...n,lmn->...lm", z, self.numbers)


def dictionary(layers: int, d_model: int, latents: int) -> fx.Crosscoder:
    ring = fx.TensorRingWeight(layers, d_model, latents)
    encoder = fx.CrossLayerEncoder(ring, fx.BatchTopK(8), mask=fx.LayerMask(0.05))
    return fx.Crosscoder(encoder, fx.CrossLayerDecoder(fx.CPWeight(layers, d_model, latents, rank=4)))


def batches() -> Iterator[Tensor]:
    for _ in range(3):
        yield torch.randn(64, 2, 16)


def train(model: fx.Crosscoder) -> float:
    fx.data_start(model, torch.randn(64, 2, 16))
    losses: list[Tensor] = []
    for x in rebatch(batches(), 32):
        z = model.encode(x * activation_scale(batches()))
        losses.append(fx.reconstruction_loss(x, model.decode(z)) + fx.l1_penalty(z, model.decoder.weight.norms()))
    return float(torch.stack(losses).sum()) + norm_coherence(model.decoder.weight).mean


def look(model: fx.Crosscoder) -> Evaluation:
    first: Tensor = next(iter(harvest("model", ["text"], layers=[0, 1], batch=64)))
    numbers = measure_reconstruction(model, batches()).numbers() | functional_coherence(model, [first]).numbers()
    fx.save_pretrained(model, "folder", about={"metrics": numbers})
    again: nn.Module = fx.from_pretrained("folder", classes=[Mine])
    report = fx.evaluate(model, "text.txt", model="model", layers=[0, 1], parts=["reconstruction"])
    report = fx.evaluate(model, batches(), layers=[0, 1]) if report.splice else report
    fx.latents_of(model, "model", None, "text", layers=[0, 1]).show()
    own = ((x, torch.arange(64), torch.arange(64)) for x in batches())
    top: dict[int, list[TopToken]] = top_tokens(model, own, None)
    numbers |= {"latents": float(len(top))}
    text: str = compare([report]) + str(fx.describe(again))
    return report if text else fx.evaluate(model, "text.txt")
'''


def test_every_name_of_the_face_is_there():
    names = {}
    exec("from fmxnn import *", names)
    assert set(fx.__all__) <= names.keys()
    assert len(fx.__all__) == len(set(fx.__all__))
    assert {"evaluate", "latents_of", "Crosscoder", "from_pretrained"} <= set(fx.__all__)
    assert fx.evaluate.__module__ == "fmxnn.reports.evaluating"
    assert fx.latents_of.__module__ == "fmxnn.metrics.latents_of"


@pytest.mark.parametrize("room", ["fmxnn", "fmxnn.activations", "fmxnn.reports"])
def test_without_extras_a_room_gives_all_its_names(room):
    script = f"{WITHOUT_EXTRAS}\nimport {room} as room\nfrom {room} import *\nassert set(room.__all__) <= set(dir())\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("call", "extra"),
    [
        ("fmxnn.evaluate(None, '')", "evaluate"),
        ("fmxnn.latents_of(None, 'm', None, 't')", "harvest"),
        ("fmxnn.activations.harvest('m', 't', layers=[0])", "harvest"),
    ],
)
def test_a_name_whose_packages_are_missing_says_so_when_it_is_called(call, extra):
    script = f"{WITHOUT_EXTRAS}\nimport fmxnn, fmxnn.activations\n{call}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    for word in ("ImportError", extra, "transformers", "not installed", f"pip install 'fmxnn[{extra}]'"):
        assert word in last


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="evaluat"):
        fx.evaluat  # noqa: B018


def test_the_known_classes_are_the_modules_of_the_face():
    """No list of its own: a class that a room exports is known, and what is known is exported."""
    exported = [getattr(fx, name) for name in fx.__all__]
    parts = {each for each in exported if isinstance(each, type) and issubclass(each, nn.Module)}
    assert {each for each in parts if not isabstract(each)} | {nn.ReLU, nn.Identity} == set(KNOWN)
    assert set(READ_BEFORE.split()) <= {each.__name__ for each in KNOWN}
    assert len({each.__name__ for each in KNOWN}) == len(KNOWN)


def test_a_card_calls_each_class_where_it_is():
    class Gate(nn.Module):
        def __init__(self, k: int):
            super().__init__()
            self.k = k

    dense = fx.DenseWeight(2, 3, 4)
    assert python(fx.describe(fx.CrossLayerEncoder(dense, Gate(2)))).count("fx.") == 3  # encoder, weight, mask
    assert "sparsifier=Gate(k=2)" in python(fx.describe(fx.CrossLayerEncoder(dense, Gate(2))))
    assert "torch.nn.ReLU(" in python(fx.describe(fx.CrossLayerEncoder(dense, nn.ReLU())))


def test_a_users_file_is_sound_under_strict_types(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}))
    words = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson", "."]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == 1
    wrong = [f"{each['range']['start']['line'] + 1}: {each['message']}" for each in found["generalDiagnostics"]]
    assert not wrong
