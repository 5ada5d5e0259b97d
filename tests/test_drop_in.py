"""The comparison with tensorly-torch: what it says where that is not installed, and that its own half runs."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "drop_in.py"


@pytest.fixture
def drop_in():
    spec = importlib.util.spec_from_file_location("drop_in", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_says_in_one_sentence_that_the_peer_is_not_installed(drop_in, monkeypatch, capsys):
    monkeypatch.setattr(drop_in, "PEER", "no_such_peer")
    monkeypatch.setattr(sys, "argv", ["drop_in.py", "--quick"])
    assert drop_in.main() == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "tensorly-torch is not installed" in said.err
    assert "pip install" in said.err


def test_ratios_are_of_the_faster_of_the_peers_ways(drop_in, monkeypatch):
    clock = iter([0, 9, 9, 9, 9, 9] + 3 * [0, 2, 10, 14, 20, 28])  # the first round warms up: 2 s, 4 s, 8 s
    monkeypatch.setattr(drop_in.time, "perf_counter", lambda: next(clock))
    loss = drop_in.torch.zeros((), requires_grad=True)
    runs = {name: (lambda: loss * 1, 5) for name in ("ours", "slow", "slower")}
    row = drop_in.measured("row", runs, 3)
    assert row == ["row", "5 / 5", 2000, 4000, "slow", 2.0, "2 to 2", None]
