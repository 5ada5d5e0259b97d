"""A judge behind an OpenAI-compatible chat-completions endpoint; needs `pip install 'fmxnn[judge]'`."""

import json
import logging
import os
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from threading import Lock
from time import monotonic, sleep
from typing import Any

import httpx2
from tenacity import (
    RetryCallState,
    Retrying,
    before_sleep_log,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from fmxnn.core.waiting import LONGEST_WAIT, seconds_asked
from fmxnn.metrics.judge.endpoint import EndpointError

LONGEST_BODY, PATIENCE = 1_000_000, 10
_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
_BUSY = {408, 409, 425, 429}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pace:
    """How hard an endpoint is pressed.

    - `in_flight`: requests at the same time
    - `per_minute`: requests a minute at most, spread evenly, retries among them; None: as they come
    - `timeout`: seconds to connect, and seconds without a byte of the answer; the whole answer may take ten times that
    - `tries`: how often one request is sent before the endpoint counts as down
    - `backoff`: seconds before the second try, doubled before each further one up to 120, with a random part of
      `backoff` more; a Retry-After holds up all requests instead, and one of more than 120 seconds ends the run

    ```python
    from fmxnn.metrics.judge.remote import Pace

    Pace(in_flight=4, per_minute=60)
    ```
    """

    in_flight: int = 8
    per_minute: float | None = None
    timeout: float = 60.0
    tries: int = 6
    backoff: float = 1.0

    def __post_init__(self) -> None:
        lowest = {"in_flight": 1, "tries": 1, "backoff": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"Pace needs {name} >= {least}, got {name}={getattr(self, name)}")
        for name in ("per_minute", "timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Pace needs {name} > 0, got {name}={value}")


class RateLimit:
    """Lets callers through at most `per_minute` times a minute, evenly, from whatever threads they come.

    None lets them through at once.

    ```python
    from fmxnn.metrics.judge.remote import RateLimit

    RateLimit(per_minute=None).wait()
    ```
    """

    def __init__(self, per_minute: float | None):
        self.per_minute = per_minute
        self._next = 0.0
        self._lock = Lock()

    def wait(self) -> None:
        """Sleeps until it is the caller's turn."""
        with self._lock:
            now = monotonic()
            turn = max(now, self._next)
            self._next = turn + (0.0 if self.per_minute is None else 60 / self.per_minute)
        if turn > now:
            sleep(turn - now)

    def hold(self, seconds: float) -> None:
        """Lets nobody through for so long."""
        with self._lock:
            self._next = max(self._next, monotonic() + seconds)


class _NotNow(EndpointError):
    """A failure that another try may mend; `held`: after the wait that the endpoint asked for."""

    def __init__(self, message: str, *, held: bool = False):
        super().__init__(message)
        self.held = held


class OpenAIEndpoint:
    """A model at `url`, such as `http://127.0.0.1:8000/v1`, asked at temperature 0.

    - `key`: the name of the environment variable that holds the key; None: no key is sent
    - `options`: further fields of the request; a newer model may want `{"max_completion_tokens": 256, "temperature":
      1}`
    - `pace`: how hard it is pressed

    The key is read for each request and kept nowhere: no attribute, message, log line or cache has it. Raises
    ValueError for a URL or key that cannot be used, and EndpointError where no answer comes.

    ```python
    from fmxnn.metrics.judge.remote import OpenAIEndpoint, Pace

    OpenAIEndpoint("http://127.0.0.1:8000/v1", "my-model", pace=Pace(in_flight=2))
    ```
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        pace: Pace | None = None,
    ):
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL:
            raise ValueError(
                "OpenAIEndpoint needs a URL such as 'http://127.0.0.1:8000/v1', and what was given is none"
            ) from None
        if parsed.userinfo or parsed.query:
            raise ValueError(
                "OpenAIEndpoint takes a URL without credentials or a query; put the key into an environment variable, "
                "key='NAME'"
            )
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"OpenAIEndpoint needs a URL such as 'http://127.0.0.1:8000/v1', got {url!r}")
        self.url, self.model, self.key = url.rstrip("/"), model, key
        self.options, self.pace = {"max_tokens": 256} if options is None else dict(options), pace or Pace()
        if key is not None:
            self._secret()
        self._rate = RateLimit(self.pace.per_minute)
        self._client = httpx2.Client(
            timeout=self.pace.timeout,
            limits=httpx2.Limits(max_connections=self.pace.in_flight),
            headers={"Accept-Encoding": "identity"},  # what unpacks to gigabytes is small on the way
        )
        weakref.finalize(self, self._client.close)

    def __repr__(self) -> str:
        return f"OpenAIEndpoint({self.url!r}, {self.model!r}, key={self.key!r})"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The model's name, the temperature and the options; not the URL, so that a model may move."""
        return {"model": self.model, "temperature": 0, **self.options}

    @property
    def in_flight(self) -> int:
        """How many requests may be under way at the same time."""
        return self.pace.in_flight

    def answer(self, prompt: str) -> str:
        """The answer to a prompt, asked again as `pace` says while the endpoint is busy, broken or not there."""
        retrying = Retrying(
            retry=retry_if_exception_type(_NotNow),
            stop=stop_after_attempt(self.pace.tries),
            wait=self._wait,
            before_sleep=before_sleep_log(_log, logging.INFO),
            reraise=True,
        )
        try:
            return retrying(self._ask, prompt)
        except _NotNow as error:
            raise EndpointError(f"{error}; tried {self.pace.tries} times") from error

    def _ask(self, prompt: str) -> str:
        self._rate.wait()
        body = {**self.settings, "messages": [{"role": "user", "content": prompt}]}
        auth = httpx2.FunctionAuth(self._authorize)
        try:
            with self._client.stream("POST", f"{self.url}/chat/completions", json=body, auth=auth) as response:
                came = self._body(response)
        except httpx2.RequestError as error:
            raise _NotNow(
                f"{self.url} does not answer ({type(error).__name__}: {self._without_key(str(error))})"
            ) from error
        if response.is_success:
            return self._content(came, response.status_code)
        said = f"{self.url} answers {response.status_code} ({came[:200]})"
        after = seconds_asked(response.headers.get("Retry-After"))
        if response.status_code not in _BUSY and response.status_code < 500:
            raise EndpointError(
                f"{said}; this is not mended by waiting: look at the URL, the model's name, the key and the options"
            )
        if after is None:
            raise _NotNow(said)
        if after > LONGEST_WAIT:
            raise EndpointError(f"{said} and asks to wait {after:,.0f} seconds; run again after that")
        self._rate.hold(after)
        raise _NotNow(f"{said} and asks to wait {after:,.1f} seconds", held=True)

    def _body(self, response: httpx2.Response) -> str:
        """The body without the key; one that is packed, or without end, is not read on. It is held where no traceback
        shows it.
        """
        packed = self._without_key(response.headers.get("Content-Encoding", "identity"))
        said = f"{self.url} answers {response.status_code}"
        if packed != "identity":
            raise _NotNow(f"{said} packed as {packed[:40]}, which was not asked for")
        patience, held, chunks = PATIENCE * self.pace.timeout, BytesIO(), response.iter_raw()
        end = monotonic() + patience
        while held.write(next(chunks, b"")):
            if held.tell() > LONGEST_BODY:
                raise _NotNow(f"{said} with more than {LONGEST_BODY:,} bytes; limit it: options={{'max_tokens': 256}}")
            if monotonic() > end:
                raise _NotNow(f"{said} and has not ended after {patience:,.0f} seconds")
        return self._without_key(held.getvalue().decode("utf-8-sig", errors="replace"))

    def _content(self, came: str, status: int) -> str:
        try:
            content = json.loads(came)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise _NotNow(f"{self.url} answers {status} with no chat completion ({came[:200]})") from error
        return (
            self._without_key(content) if isinstance(content, str) else ""
        )  # null: the model refuses, which is a malformed answer

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, _NotNow) and error.held:
            return 0.0  # the next try waits its turn, as those of all threads do
        return (wait_exponential(self.pace.backoff, LONGEST_WAIT) + wait_random(0, self.pace.backoff))(state)

    def _secret(self) -> str:
        """The key, if it can be sent; never in a local variable, which a traceback may show."""
        if not _NAME.fullmatch(self.key or ""):
            raise ValueError(
                "OpenAIEndpoint's key is the name, in capitals, of the environment variable that holds the key, such "
                "as 'OPENAI_API_KEY'; "
                "what was given is no such name, and is not shown because it may be the key"
            )
        flaw = _flaw(os.environ.get(str(self.key), "").strip())
        if flaw is not None:
            raise ValueError(
                f"the environment variable {self.key}, which should hold the key of {self.url}, {flaw}; export it, or "
                "pass key=None"
            )
        return os.environ[str(self.key)].strip()

    def _authorize(self, request: httpx2.Request) -> httpx2.Request:
        if self.key is not None:
            request.headers["Authorization"] = f"Bearer {self._secret()}"
        return request

    def _without_key(self, text: str) -> str:
        return text if self.key is None else text.replace(self._secret(), f"<{self.key}>")


def _flaw(secret: str) -> str | None:
    if not secret:
        return "is not set"
    return None if secret.isascii() and secret.isprintable() else "holds characters that no header may have"
