"""What answers a judge's prompt: the protocol, and a script in its place."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol


class EndpointError(RuntimeError):
    """An endpoint gave no answer, and waiting longer would not help now."""


class Endpoint(Protocol):
    """A language model behind one call; write your own with these three methods.

    `answer` is called from `in_flight` threads.
    """

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything but the prompt that decides an answer, as JSON: `model`, `temperature` and the like.

        Answers are kept under it.
        """
        ...

    @property
    def in_flight(self) -> int:
        """How many prompts may be answered at the same time."""
        ...

    def answer(self, prompt: str) -> str:
        """The answer to a prompt, whatever it says. Raises EndpointError where there is none."""
        ...


class ScriptedEndpoint:
    """A judge that is a function of the prompt, for tests and for rules written by hand.

    `name` stands in place of a model's.

    ```python
    from fmxnn.metrics.judge import Judge, ScriptedEndpoint

    endpoint = ScriptedEndpoint(lambda prompt: '{"semantic_score": 0.9, "surface_score": 0.1}')
    Judge(endpoint, panel=())
    ```
    """

    def __init__(self, script: Callable[[str], str], *, name: str = "scripted", in_flight: int = 1):
        self.script, self.name, self.in_flight = script, name, in_flight

    @property
    def settings(self) -> Mapping[str, Any]:
        """The script's name."""
        return {"model": self.name, "temperature": 0}

    def answer(self, prompt: str) -> str:
        """What the script says."""
        return self.script(prompt)
