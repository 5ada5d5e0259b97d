"""Every training loop of docs/frameworks.md, run from the page, gives the parameters that `Trainer` gives."""

import json
import os
import re
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fmxnn as fx

PAGE = Path(__file__).parent.parent / "docs" / "frameworks.md"
SECTIONS = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)
BLOCKS = {
    title: re.findall(r"```py(?:thon)?\n(.*?)```", text, re.DOTALL)[0]
    for title, text in zip(SECTIONS[1::2], SECTIONS[2::2])
}
SETUP = re.findall(r"```python\n(.*?)```", SECTIONS[0], re.DOTALL)[0]
ONE_PROCESS = {
    "torch.compile": "compiled",
    "accelerate": "accelerate",
    "Hugging Face Trainer": "transformers",
    "Lightning": "lightning",
}
TWO_PROCESSES = {"DistributedDataParallel": "ddp", "FSDP2": "fsdp"}
TOLERANCE = 1e-12


def run(title, folder):
    page = ModuleType("a_block_of_the_page")  # compilers and classes ask for the module of their code
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, page.__name__, page)
        exec(SETUP, vars(page))
        exec(BLOCKS[title], vars(page))
    return page.objective


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return run("Trainer", tmp_path_factory.mktemp("trainer")).crosscoder.state_dict()


def assert_equal(crosscoder, expected):
    for name, value in crosscoder.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("title", BLOCKS)
def test_a_training_loop_takes_at_most_15_lines(title):
    assert len([line for line in BLOCKS[title].splitlines() if line]) <= 15


@pytest.mark.filterwarnings(
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"
)  # Lightning's own
@pytest.mark.parametrize("title", ONE_PROCESS)
def test_a_loop_in_one_process_equals_the_trainer(title, expected, tmp_path):
    torch.compiler.reset()  # what other tests compiled counts towards the limit after which torch compiles no more
    objective = run(title, tmp_path)
    assert_equal(objective.crosscoder, expected)
    assert_equal(fx.from_pretrained(tmp_path / ONE_PROCESS[title]), expected)
    assert objective.silent.max() > 64


def test_two_processes_equal_the_trainer_and_keep_their_laws(expected, tmp_path):
    (tmp_path / "blocks.json").write_text(json.dumps({name: [SETUP, BLOCKS[name]] for name in TWO_PROCESSES}))
    script = Path(__file__).parent / "two_ranks.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)[-6000:]
    for folder in TWO_PROCESSES.values():
        assert_equal(fx.from_pretrained(tmp_path / folder), expected)
