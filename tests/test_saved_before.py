"""Folders that an earlier version saved, before the rooms were moved: they load, and give the same numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import fmxnn as fx
from fmxnn.training import AuxiliaryLoss, Trainer, load_checkpoint

SAVED = Path(__file__).parent / "saved_before"
NAMES = sorted(path.stem for path in SAVED.glob("*.safetensors") if path.stem != "run")


def state(held):
    return {key.removeprefix("state."): value for key, value in held.items() if key.startswith("state.")}


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_the_version_before_gives_the_same_bits_and_codes(name):
    held, module = load_file(SAVED / f"{name}.safetensors"), fx.from_pretrained(SAVED / name)
    found = module.state_dict()
    assert found.keys() == state(held).keys()
    assert all(torch.equal(found[key], value) for key, value in state(held).items())
    assert torch.equal(module.encode(held["x"]) != 0, held["z"] != 0)
    assert_close(module.encode(held["x"]), held["z"])
    assert_close(module(held["x"]), held["x_hat"])


def test_all_kinds_of_parts_are_among_them():
    assert len(NAMES) == 9


def test_a_run_of_the_version_before_goes_on():
    held = load_file(SAVED / "run.safetensors")
    encoder = fx.CrossLayerEncoder(
        fx.TensorRingWeight(2, 3, 6, ranks=(2, 2, 2)), fx.BatchTopK(2), mask=fx.LayerMask(0.25)
    )
    crosscoder = fx.Crosscoder(encoder, fx.CrossLayerDecoder(fx.TensorRingWeight(2, 3, 6, ranks=(2, 2, 2)))).double()
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=1e-2)
    trainer = Trainer(crosscoder, optimizer, seed=3, auxiliary=AuxiliaryLoss(k=2, after=8))
    load_checkpoint(SAVED / "run", trainer, arguments={"lr": 0.01})
    for x in held["data"][trainer.steps :]:
        trainer.step(x)
    found = crosscoder.state_dict()
    for key, value in state(held).items():
        assert_close(found[key], value)
    assert torch.equal(trainer.silent, held["silent"])
