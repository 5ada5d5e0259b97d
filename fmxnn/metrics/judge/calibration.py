"""Whether a judge tells meaning from form where the truth is known."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fmxnn.metrics.judge.panel import PseudoLatent
from fmxnn.metrics.judge.scores import COUNTED, Kind, Scores

MISSES = 1


@dataclass(frozen=True, repr=False)
class Calibration:
    """A judge's scores of every pseudo-latent, None where its answers were malformed.

    The panel is separated if the counts of a report can be trusted. Nothing may be counted as semantic or surface that
    is not, and of each of the two at most one may be missed (and at least one found). What is `neither` or `both` must
    not be counted at all.

    ```python
    from fmxnn.metrics.judge import PANEL, Calibration, Scores

    truth = {"semantic": (0.9, 0.1), "surface": (0.1, 0.9), "neither": (0.1, 0.1), "both": (0.9, 0.9)}
    Calibration({member: Scores(*truth[member.kind]) for member in PANEL}).separated  # True
    ```
    """

    scores: Mapping[PseudoLatent, Scores | None]

    @property
    def separated(self) -> bool:
        """Whether the judge may count."""
        shown = {kind: [self._counted(member) for member in self.scores if member.kind == kind] for kind in COUNTED}
        found = all(kind in counted and len(counted) - counted.count(kind) <= MISSES for kind, counted in shown.items())
        return found and not any(self._counted(member) not in ("other", member.kind) for member in self.scores)

    @property
    def missed(self) -> tuple[PseudoLatent, ...]:
        """The pseudo-latents that were counted wrongly, were not counted, or had no readable answer."""
        return tuple(
            member
            for member, scores in self.scores.items()
            if scores is None or scores.kind != (member.kind if member.kind in COUNTED else "other")
        )

    @property
    def verdict(self) -> str:
        """One sentence: separated or not, and what was missed."""
        if not self.scores:
            return "there was no calibration panel; give the Judge one"
        told = "; ".join(self._missed_as())
        outcome = "separates" if self.separated else "does not separate"
        return (
            f"the judge {outcome} the calibration panel, {len(self.scores) - len(self.missed)} of {len(self.scores)} "
            "right" + (f"; missed: {told}" if told else "")
        )

    def _missed_as(self) -> Iterator[str]:
        for member in self.missed:
            scores = self.scores[member]
            got = "malformed answers" if scores is None else f"semantic {scores.semantic:g}, surface {scores.surface:g}"
            yield f"{member.name!r} ({member.kind}) got {got}"

    def _counted(self, member: PseudoLatent) -> Kind:
        scores = self.scores[member]
        return "other" if scores is None else scores.kind

    def __repr__(self) -> str:
        return f"Calibration: {self.verdict}"


class CalibrationError(ValueError):
    """A judge's counts are asked for and it did not separate its panel; `calibration` holds the scores."""

    def __init__(self, message: str, calibration: Calibration):
        super().__init__(message)
        self.calibration = calibration
