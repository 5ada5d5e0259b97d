"""A judge's answers in a JSONL file, each written as soon as it is there, so that a stopped run can go on."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

VERSION = 1
_START = b'{"digest": "'


def digest(prompt: str, settings: Mapping[str, Any]) -> str:
    """The name of an answer: a hash of the prompt and of the endpoint's settings, such as model and temperature.

    The version of the file's form is in it too.
    """
    content = json.dumps({"version": VERSION, "prompt": prompt, "settings": dict(settings)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


class AnswerCache:
    """Answers by digest, in memory and in a file, where a line has a digest, the model's name and its answers.

    The last answer of a line counts. A last line without an end, which a killed run leaves, is cut off. For one process
    at a time. Raises ValueError, with file and line, for a line that is not an answer.

    ```python
    from fmxnn.metrics.judge.cache import AnswerCache, digest

    cache = AnswerCache("answers.jsonl")
    cache.add(digest("a prompt", {"model": "mine"}), "mine", ["an answer"])
    len(AnswerCache("answers.jsonl"))  # 1
    ```
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        self._answers: dict[str, str] = {}
        self._lock = Lock()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:  # fails here, not after the first answer was paid for
                file.seek(0)
                *lines, torn = file.read().split(b"\n")
                if not torn.startswith(_START[: len(torn)]):
                    lines.append(torn)  # no line of ours that was cut off, and not ours to take away
                self._answers = dict(_record(self.path, number, line) for number, line in enumerate(lines, 1))
                if torn:
                    file.truncate(file.seek(0, 2) - len(torn))

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, name: str) -> str | None:
        """The answer kept under a digest."""
        return self._answers.get(name)

    def add(self, name: str, model: str, answers: list[str]) -> None:
        """Keeps the last of `answers` under a digest, and writes its line; from any thread."""
        line = json.dumps({"digest": name, "model": model, "answers": answers}).encode() + b"\n"
        with self._lock:
            if self.path is not None:
                with self.path.open("ab") as file:
                    file.write(line)
            self._answers[name] = answers[-1]


def _record(path: Path, number: int, line: bytes) -> tuple[str, str]:
    try:
        record = json.loads(line)
        return str(record["digest"]), str(record["answers"][-1])
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(
            f"{path}, line {number}: no answer of a judge, which has a digest and answers; take the line out or name "
            "another cache"
        ) from error
