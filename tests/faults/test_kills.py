import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 20


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_run_killed_twenty_times_ends_bit_for_bit_as_the_uninterrupted_one(tmp_path):
    script = Path(__file__).parent / "killing.py"
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, script, tmp_path, str(KILLS)], capture_output=True, text=True, env=environment, check=False)
    log = tmp_path / "log.txt"
    assert done.returncode == 0, done.stderr + (log.read_text()[-3000:] if log.exists() else "")
    result = json.loads(done.stdout)
    assert (result["whole"], result["final"], result["terminated"]) == (0, 0, [143, 0]), log.read_text()[-3000:]
    assert result["resumable"] > 0
    whole = tmp_path / "model" / "whole"
    newest = sorted(whole.glob("step-*"))[-1].name
    for other in (tmp_path / "model" / "killed", tmp_path / "model" / "terminated"):
        for name in (f"{newest}/crosscoder.safetensors", f"{newest}/trainer.safetensors", "crosscoder/model.safetensors"):
            assert (other / name).read_bytes() == (whole / name).read_bytes(), f"{other.name}/{name}"
        lines = [json.loads(line) for line in (other / "log.jsonl").read_text().splitlines()]
        assert lines == [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
