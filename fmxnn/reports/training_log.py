"""What a training run says of itself, line by line."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path


class Log:
    """A line of JSON a record in the file `path`, and the same to trackio or wandb where asked.

    - `step`: where the run goes on; records of later steps are taken out, since they are made again
    - `logger`: "none", "trackio" or "wandb"; `config` is what it is told of the run

    ```python
    from fmxnn.reports.training_log import Log

    log = Log(Path("log.jsonl"), step=0)
    log.write(50, {"loss": 0.5})
    log.close()
    ```
    """

    def __init__(self, path: Path, step: int, logger: str = "none", config: Mapping[str, object] | None = None):
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        kept = [line for line in lines if self.stays(json.loads(line), step)]
        fresh = path.with_suffix(".new")  # renamed, so that a kill leaves the old lines or the new
        fresh.write_text("".join(line + "\n" for line in kept))
        fresh.replace(path)
        self.file = path.open("a", buffering=1)
        self.logger = None if logger == "none" else importlib.import_module(logger)
        if self.logger:
            self.logger.init(project="fmxnn", name=path.parent.name, config=dict(config or {}))

    @staticmethod
    def stays(record: Mapping[str, float], step: int) -> bool:
        """Whether a resumed run keeps it: later records are made again, and so is the last evaluation."""
        return record["step"] <= step and "heldout/functional_coherence" not in record

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds a record of a step, which is on disk at once."""
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")
        if self.logger:
            self.logger.log(dict(numbers), step=step)

    def close(self) -> None:
        """Closes the file, and ends the run of trackio or wandb."""
        self.file.close()
        if self.logger:
            self.logger.finish()
