"""How many latents a judge finds semantic and surface, and what share of the judged and of the alive that is."""

import math
from dataclasses import dataclass
from statistics import NormalDist

from fmxnn.metrics.judge.calibration import CalibrationError
from fmxnn.metrics.judge.judge import Judgements
from fmxnn.metrics.judge.scores import COUNTED, Counted

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Share:
    """`count` of `total`, as a share with its 95 % interval (Wilson's); nan where `total` is 0.

    ```python
    from fmxnn.metrics.judge import Share

    str(Share(30, 100))  # '30.0% (21.9% to 39.6%)'
    ```
    """

    count: int
    total: int

    @property
    def value(self) -> float:
        """The count over the total."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Where the share of all latents lies, these being drawn from them at random, in 95 of 100 draws."""
        if not self.total:
            return math.nan, math.nan
        weight = self.total + _Z**2
        centre = (self.count + _Z**2 / 2) / weight
        reach = _Z / weight * math.sqrt(self.count * (self.total - self.count) / self.total + _Z**2 / 4)
        return min(self.value, max(0.0, centre - reach)), max(
            self.value, min(1.0, centre + reach)
        )  # against rounding at 0 and 1

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} ({low:.1%} to {high:.1%})"


@dataclass(frozen=True)
class JudgeReport:
    """Counts of `semantic` and `surface` latents among the `judged`; `invalid` have no score; `alive` fire at all.

    Dead latents cannot be judged, so counts fall with them. Compare dictionaries by shares, of the judged and of the
    alive.

    ```python
    from fmxnn.metrics.judge import JudgeReport

    report = JudgeReport("my-model", semantic=30, surface=10, judged=100, invalid=2, alive=120)
    report.of_alive("semantic").value  # 0.25
    ```
    """

    model: str
    semantic: int
    surface: int
    judged: int
    invalid: int
    alive: int

    @property
    def complete(self) -> bool:
        """Whether every alive latent was judged; if not, a share of the alive is the least that it can be."""
        return self.judged == self.alive

    def of_judged(self, kind: Counted) -> Share:
        """The share of a kind among latents with a score."""
        return Share(getattr(self, kind), self.judged)

    def of_alive(self, kind: Counted) -> Share:
        """The share of a kind among all alive latents, those without a score counted as neither."""
        return Share(getattr(self, kind), self.alive)

    def numbers(self) -> dict[str, float]:
        """Every number by name, for a log line or a table."""
        counts = {name: float(getattr(self, name)) for name in ("semantic", "surface", "judged", "invalid", "alive")}
        judged = {f"{kind}_of_judged": self.of_judged(kind).value for kind in COUNTED}
        return {**counts, **judged, **{f"{kind}_of_alive": self.of_alive(kind).value for kind in COUNTED}}

    def __str__(self) -> str:
        lines = [
            f"{self.judged:,} of {self.alive:,} alive latents judged by {self.model}, {self.invalid:,} answers invalid"
        ]
        for kind in COUNTED:
            least = "" if self.complete else "at least "
            of_alive = str(self.of_alive(kind)) if self.complete else f"{self.of_alive(kind).value:.1%}"
            lines.append(
                f"{kind:>8}: {getattr(self, kind):,}; {self.of_judged(kind)} of the judged, {least}{of_alive} of the "
                "alive"
            )
        return "\n".join(lines)


def summarise(judgements: Judgements, *, alive: int) -> JudgeReport:
    """Counts and shares of semantic and surface latents.

    `alive` is how many latents fired on the text from which the top tokens come. Raises CalibrationError where the
    judge did not separate its panel. Raises ValueError where fewer latents are alive than were asked about.
    """
    calibration = judgements.calibration
    if not calibration.separated:
        raise CalibrationError(f"no counts are reported for {judgements.model}: {calibration.verdict}", calibration)
    judged, invalid = len(judgements.scores), len(judgements.invalid)
    if alive < judged + invalid:
        raise ValueError(
            f"summarise got alive={alive} and {judged + invalid} latents that a judge was asked about; count the "
            "alive on the same text, all of them"
        )
    kinds = [scores.kind for scores in judgements.scores.values()]
    return JudgeReport(judgements.model, kinds.count("semantic"), kinds.count("surface"), judged, invalid, alive)
