import subprocess
import sys

import foreign_crosscoders as foreign
import pytest
import torch

import fmxnn as fx
from fmxnn.reports.command_line import main
from fmxnn.reports.evaluating import PARTS
from fmxnn.saving.card import python
from fmxnn.saving.formats import memory

PLAIN = """
import sys

class Extras:
    def find_spec(self, name, path=None, target=None):
        if name in {"datasets", "jinja2", "matplotlib", "scipy", "sklearn", "tabulate", "transformers", "tyro"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Extras())
from fmxnn.reports.command_line import main
sys.exit(main(sys.argv[1:]))
"""


def run_without_extras(*words):
    return subprocess.run([sys.executable, "-c", PLAIN, *map(str, words)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("write", "options", "gate", "folded"),
    [
        (foreign.ckkissane, {}, "torch.nn.ReLU(inplace=False)", "nothing"),
        (
            foreign.dictionary_learning,
            {},
            "fx.Scored(sparsifier=fx.BatchTopK(k=2, decay=0.9), score=fx.SumNorm(",
            "nothing; mean and scale are kept",
        ),
        (
            foreign.crosscode,
            {"activation": "TopkActivation", "k": 3},
            "fx.SignedTopK(k=3)",
            "scaling factors of every input and output",
        ),
        (
            foreign.llamascopium,
            {"act": "jumprelu"},
            "fx.Decoupled(",
            "the encoder's biases, one a layer, into their sum",
        ),
    ],
)
def test_inspect_says_what_a_foreign_folder_holds_and_reads_no_weights(
    write, options, gate, folded, tmp_path, capsys, monkeypatch
):
    write(tmp_path, 2, 3, 4, torch.float32, **options)
    (tmp_path / "meminfo").write_text("MemAvailable: 0 kB")
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "meminfo")
    assert main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    facts = dict(line.split("  ", 1) for line in said.split("\n\n")[1].splitlines() if not line.startswith("note: "))
    assert facts["gate"].strip().startswith(gate)
    assert facts["folded"].strip().startswith(folded)
    assert any("layers=2, d_model=3, latents=4" in fact for fact in facts.values())
    assert ("note: " in said) == (write is foreign.ckkissane)


def test_inspect_says_what_ours_holds(tmp_path, capsys):
    module = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.CPWeight(2, 3, 5, rank=2), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 3, 5))
    )
    fx.save_pretrained(module, tmp_path / "ours", about={"base_model": "gpt2"})
    assert main(["inspect", str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    assert "weight=fx.CPWeight(layers=2, d_model=3, latents=5, rank=2)" in said
    assert "base_model      gpt2" in said
    assert "format          fmxnn" in said


def test_a_mistake_is_one_message(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(
        f"error: {tmp_path} fits no known format, it holds nothing; give its subfolder= or format=\nlooked for:"
    )


def test_inspect_needs_nothing_but_the_plain_package(tmp_path):
    fx.save_pretrained(fx.DenseWeight(1, 2, 3), tmp_path)
    done = run_without_extras("inspect", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("fx.DenseWeight(layers=1, d_model=2, latents=3)\n")


def test_evaluate_without_its_packages_names_the_extra():
    done = run_without_extras("evaluate", "anything", "--text", "anything")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: evaluate needs transformers, which is not installed; pip install 'fmxnn[evaluate]'\n"


def test_the_help_of_evaluate_names_every_part_that_a_command_line_can_measure(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert ", ".join(PARTS[:-1]) in " ".join(capsys.readouterr().out.split())


def test_parts_side_by_side_stand_one_below_the_other():
    part = fx.DenseWeight(2, 3, 4)
    assert python(fx.describe(fx.ConcatWeight(part, fx.CPWeight(2, 3, 5, rank=2), part))) == (
        "fx.ConcatWeight(\n"
        "    fx.DenseWeight(layers=2, d_model=3, latents=4),\n"
        "    fx.CPWeight(layers=2, d_model=3, latents=5, rank=2),\n"
        "    ...,  # the same module as weights.0\n"
        ")"
    )
