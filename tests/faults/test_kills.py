import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from attempts import attempt, tries

KILLS, TERMINATIONS = tries(ci=200, thorough=1_000), tries(ci=4, thorough=50)
SEED = tries(ci=7, thorough=random.SystemRandom().randrange(2**32))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder, script = tmp_path_factory.mktemp("kills"), Path(__file__).with_name("killing.py")
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, script, folder, str(SEED), str(KILLS), str(TERMINATIONS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    log = (folder / "log.txt").read_text()[-3000:] if (folder / "log.txt").exists() else ""
    assert done.returncode == 0, done.stderr + log
    made = json.loads(done.stdout)
    assert made["whole"] == 0, log
    return made | {"log": log}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(("how", "fault", "count"), [
    ("killed", "SIGKILL at a file operation or step of a run", KILLS),
    ("terminated", "SIGTERM at a file operation or step of a run", TERMINATIONS),
])  # fmt: skip
def test_a_run_stopped_at_any_write_or_step_ends_bit_for_bit_as_the_uninterrupted_one(result, how, fault, count):
    lives = result[how]
    for life in lives:
        for stop in life["stops"]:
            with attempt(fault, case=f"{stop['at']}, seed {SEED}: {life['wrong']}") as row:
                row.seconds = max(row.seconds, stop["seconds"])
                assert not life["wrong"], (SEED, life, result["log"])
    assert sum(len(life["stops"]) for life in lives) == count


def test_stops_are_drawn_from_steps_and_from_every_part_of_a_save(result):
    places = [stop["at"].split() for how in ("killed", "terminated") for life in result[how] for stop in life["stops"]]
    assert {kind for kind, *_ in places} == {"step", "file"}
    assert result["counts"] == {"step": 2 * 30, "file": result["counts"]["file"]}
    assert result["counts"]["file"] > 10 * 20  # ten saves and the end, each of some twenty operations
