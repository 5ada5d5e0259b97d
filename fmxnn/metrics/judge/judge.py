"""The judge: prompts out, scores in, and nothing asked twice."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Event

from fmxnn.metrics.firing import TopToken
from fmxnn.metrics.judge.cache import AnswerCache, digest
from fmxnn.metrics.judge.calibration import Calibration, CalibrationError
from fmxnn.metrics.judge.endpoint import Endpoint, EndpointError
from fmxnn.metrics.judge.panel import PANEL, PseudoLatent
from fmxnn.metrics.judge.prompt import REMINDER, Prompt
from fmxnn.metrics.judge.scores import Scores, read_scores

RETRIES = 2
BYTES_PER_TOKEN = 3
ANSWER_TOKENS = 40
Progress = Callable[[int, int], object]


@dataclass(frozen=True, repr=False)
class Judgements:
    """What a judge said of latents: `scores` by latent, in the order given.

    The answers about `invalid` latents stayed malformed. `silent` ones have no top token and were not asked about.

    ```python
    from fmxnn.metrics import TopToken
    from fmxnn.metrics.judge import Judge, ScriptedEndpoint

    endpoint = ScriptedEndpoint(lambda prompt: '{"semantic_score": 0.9, "surface_score": 0.1}')
    judgements = Judge(endpoint, panel=()).score({3: [TopToken(" whale", 2.5, ())], 4: []})
    judgements.scores[3].kind, judgements.silent  # 'semantic', (4,)
    ```
    """

    model: str
    scores: Mapping[int, Scores]
    invalid: tuple[int, ...]
    silent: tuple[int, ...]
    calibration: Calibration

    def __repr__(self) -> str:
        counts = f"{len(self.scores):,} latents scored, {len(self.invalid):,} invalid, {len(self.silent):,} silent"
        return f"Judgements by {self.model}: {counts}; {self.calibration.verdict}"


@dataclass(frozen=True)
class Estimate:
    """What is still to be asked, and at most three times that where every answer is malformed.

    Tokens are guessed. A prompt has its bytes / 3, which is rather much for English. An answer has 40, which is too
    little for a model that thinks aloud. `cost` is in the currency of the prices, None without any.

    ```python
    from fmxnn.metrics.judge import Judge, ScriptedEndpoint

    str(Judge(ScriptedEndpoint(str)).estimate({}, prices=(2.0, 8.0)))
    ```
    """

    requests: int
    answered: int
    prompt_tokens: int
    answer_tokens: int
    cost: float | None

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", cost about {self.cost:,.2f}"
        tokens = f"about {self.prompt_tokens:,} prompt and {self.answer_tokens:,} answer tokens"
        return f"{self.requests:,} requests ({self.answered:,} answered already), {tokens}{cost}; at most 3 times that"


class Judge:
    """Asks an endpoint for the scores of latents, each prompt once, and keeps every answer.

    - `endpoint`: who is asked; see `Endpoint`
    - `cache`: the JSONL file of answers, None for memory alone
    - `prompt`: what is asked
    - `panel`: pseudo-latents that the judge has to tell apart first; with `panel=()` nothing can be counted

    A malformed answer is asked for twice more. Then its latent is invalid; that answer is not kept, so the next run
    asks again.

    ```python
    from fmxnn.metrics import TopToken
    from fmxnn.metrics.judge import Judge, ScriptedEndpoint

    judge = Judge(ScriptedEndpoint(lambda prompt: '{"semantic_score": 0.9, "surface_score": 0.1}'), panel=())
    judge.score({3: [TopToken(" whale", 2.5, ("we saw the << whale>> again",))]})
    ```
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        cache: str | Path | None = None,
        prompt: Prompt | None = None,
        panel: Sequence[PseudoLatent] = PANEL,
    ):
        self.endpoint, self.prompt, self.panel = endpoint, prompt or Prompt(), tuple(panel)
        self.cache = AnswerCache(cache)

    def estimate(
        self, latents: Mapping[int, Sequence[TopToken]], *, prices: tuple[float, float] | None = None
    ) -> Estimate:
        """What `score(latents)` will ask, panel included.

        `prices` are those of a million prompt tokens and of a million answer tokens.
        """
        prompts = {*self._prompts(self._members()).values(), *self._prompts(latents).values()}
        missing = [prompt for prompt in prompts if self._scores(prompt) is None]
        read, written = (
            sum(-(-len(prompt.encode()) // BYTES_PER_TOKEN) for prompt in missing),
            ANSWER_TOKENS * len(missing),
        )
        cost = None if prices is None else (prices[0] * read + prices[1] * written) / 1e6
        return Estimate(len(missing), len(prompts) - len(missing), read, written, cost)

    def calibrate(self) -> Calibration:
        """Asks about the panel only, and says which of it was missed."""
        prompts = self._prompts(self._members())
        self._ask_all(prompts.values(), None)
        return Calibration({self.panel[i]: self._scores(prompt) for i, prompt in prompts.items()})

    def score(self, latents: Mapping[int, Sequence[TopToken]], *, progress: Progress | None = None) -> Judgements:
        """Both scores of every latent that has a top token.

        `progress(done, of)` is called after each answer that had to be asked for. Raises CalibrationError where the
        panel is not separated, before any latent is asked about. Raises EndpointError where the endpoint gives no more
        answers; what it gave is kept.
        """
        calibration = self.calibrate()
        if self.panel and not calibration.separated:
            raise CalibrationError(
                f"{self._model} was not asked about latents: {calibration.verdict}; take another model, "
                "or look at its scores without counts: Judge(..., panel=())",
                calibration,
            )
        prompts = self._prompts(latents)
        self._ask_all(prompts.values(), progress)
        scores = {latent: self._scores(prompt) for latent, prompt in prompts.items()}
        return Judgements(
            self._model,
            {latent: found for latent, found in scores.items() if found is not None},
            tuple(latent for latent, found in scores.items() if found is None),
            tuple(latent for latent, top_tokens in latents.items() if not top_tokens),
            calibration,
        )

    @property
    def _model(self) -> str:
        return str(self.endpoint.settings["model"])

    def _members(self) -> Mapping[int, Sequence[TopToken]]:
        return {i: member.top_tokens for i, member in enumerate(self.panel)}

    def _prompts(self, latents: Mapping[int, Sequence[TopToken]]) -> dict[int, str]:
        return {latent: self.prompt.text(top_tokens) for latent, top_tokens in latents.items() if top_tokens}

    def _scores(self, prompt: str) -> Scores | None:
        return read_scores(self.cache.get(digest(prompt, self.endpoint.settings)) or "")

    def _ask_all(self, prompts: Iterable[str], progress: Progress | None) -> None:
        """Fills the cache, from as many threads as the endpoint bears; what is under way when one fails is waited for
        and kept.

        What is under way at Ctrl-C is not waited for: the threads are daemons, and one that still gets its answer keeps
        it.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if self._scores(prompt) is None]
        if not missing:
            return
        before, down, failures = len(self.cache), Event(), list[EndpointError]()
        try:
            with ThreadPool(min(self.endpoint.in_flight, len(missing))) as pool:
                for done, failure in enumerate(pool.imap_unordered(partial(self._ask, down=down), missing), 1):
                    failures += [failure] if failure else []
                    if progress is not None and not failures:
                        progress(done, len(missing))
        except KeyboardInterrupt as stop:
            stop.add_note(self._told(len(self.cache) - before, len(missing)))
            raise
        finally:
            down.set()
        if failures:
            raise EndpointError(f"{failures[0]}; {self._told(len(self.cache) - before, len(missing))}") from failures[0]

    def _told(self, came: int, of: int) -> str:
        where = "in memory" if self.cache.path is None else f"in {self.cache.path}"
        return f"{came} of {of} answers came and are kept {where}: run the same again to ask for the other {of - came}"

    def _ask(self, prompt: str, down: Event) -> EndpointError | None:
        """One prompt's answers into the cache, if the last can be read; nothing once the endpoint is found down, or
        nobody waits.
        """
        answers = list[str]()
        try:
            while not down.is_set() and len(answers) <= RETRIES:
                answers.append(self.endpoint.answer(prompt + REMINDER if answers else prompt))
                if read_scores(answers[-1]) is not None:
                    self.cache.add(digest(prompt, self.endpoint.settings), self._model, answers)
                    break
        except EndpointError as error:
            down.set()
            return error
        return None
