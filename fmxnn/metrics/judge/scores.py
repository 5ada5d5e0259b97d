"""The two scores of a latent, read from whatever a judge answers."""

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

Counted = Literal["semantic", "surface"]
Kind = Literal["semantic", "surface", "other"]
COUNTED: tuple[Counted, ...] = ("semantic", "surface")
HIGH, LOW = 0.7, 0.3
LONGEST_ANSWER = 20_000
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Scores:
    """How strongly a latent's tokens share one meaning, and how strongly one form, each from 0 to 1.

    Neither depends on the other.

    ```python
    from fmxnn.metrics.judge import Scores

    Scores(semantic=0.9, surface=0.1).kind  # 'semantic'
    ```
    """

    semantic: float
    surface: float

    @property
    def kind(self) -> Kind:
        """`semantic` where semantic > 0.7 and surface < 0.3, `surface` the other way round, else `other`.

        (fmxcoders, appendix E)
        """
        if self.semantic > HIGH and self.surface < LOW:
            return "semantic"
        return "surface" if self.surface > HIGH and self.semantic < LOW else "other"


def read_scores(answer: str) -> Scores | None:
    """The scores of an answer, or None where it is malformed.

    The last JSON object that holds "semantic_score" and "surface_score" decides: alone, in a code fence, after prose,
    or inside another object; of an answer beyond 20,000 characters the end is read. A score is a number or a string of
    one, clipped to [0, 1]; null, NaN, an infinity, true or false make the answer malformed.
    """
    answer = answer[-LONGEST_ANSWER:]
    at = min(answer.rfind('"semantic_score"'), answer.rfind('"surface_score"'))  # its object begins before both
    while (at := answer.rfind("{", 0, max(at, 0))) >= 0:
        try:
            value = _DECODER.raw_decode(answer, at)[0]
        except ValueError:
            value = None
        except RecursionError:
            return None  # an answer is not so deep, and all that stands before would be read as far again
        if isinstance(value, dict) and "semantic_score" in value and "surface_score" in value:
            semantic, surface = _score(value["semantic_score"]), _score(value["surface_score"])
            return None if semantic is None or surface is None else Scores(semantic, surface)
    return None


def _score(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return min(max(number, 0.0), 1.0) if math.isfinite(number) else None
