import foreign_crosscoders as foreign
import pytest
import torch

import fmxnn as fx
from fmxnn.cli import main
from fmxnn.formats import room


@pytest.mark.parametrize(
    ("write", "options", "gate", "folded"),
    [
        (foreign.ckkissane, {}, "torch.nn.ReLU(inplace=False)", "nothing"),
        (
            foreign.dictionary_learning,
            {},
            "fx.Scored(sparsifier=fx.BatchTopK(k=2, decay=0.99), score=fx.SumNorm(",
            "nothing; mean and scale are kept",
        ),
        (foreign.crosscode, {"activation": "TopkActivation", "k": 3}, "fx.SignedTopK(k=3)", "scaling factors of every input and output"),
        (foreign.llamascopium, {"act": "jumprelu"}, "fx.Decoupled(", "the encoder's biases, one a layer, into their sum"),
    ],
)
def test_inspect_says_what_a_foreign_folder_holds_and_reads_no_weights(write, options, gate, folded, tmp_path, capsys, monkeypatch):
    write(tmp_path, 2, 3, 4, torch.float32, **options)
    (tmp_path / "meminfo").write_text("MemAvailable: 0 kB")
    monkeypatch.setattr(room, "MEMORY", tmp_path / "meminfo")
    assert main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    facts = dict(line.split("  ", 1) for line in said.split("\n\n")[1].splitlines() if not line.startswith("note: "))
    assert facts["gate"].strip().startswith(gate)
    assert facts["folded"].strip().startswith(folded)
    assert any("layers=2, d_model=3, latents=4" in fact for fact in facts.values())
    assert ("note: " in said) == (write is foreign.ckkissane)


def test_inspect_says_what_ours_holds(tmp_path, capsys):
    module = fx.Crosscoder(fx.CrossLayerEncoder(fx.CPWeight(2, 3, 5, rank=2), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 3, 5)))
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
