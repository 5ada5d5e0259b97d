"""The contexts of a long text, read while others of them are already used."""

import atexit
import os
import threading
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmxnn.activations.tokens import Contexts

_PATIENCE = 10.0  # seconds that the end of the interpreter waits for the part that is being read


class GrowingContexts(Contexts):
    """`contexts context`: the contexts of a text that a thread of its own goes on reading.

    It is used as any `Contexts`. A slice with an end waits for that part of the text only, and tokenises it itself if
    the thread has not. `ids`, `keep`, `tokens`, `digest` and `len` wait for the end of the text. An error in the text
    is raised where that part is needed. Pickling and copying give the `Contexts` of the whole text.

    ```python
    from fmxnn.activations.growing import GrowingContexts, Parts

    ids = torch.tensor([[0, 5, 6, 7]], dtype=torch.int32)
    text = GrowingContexts(Parts(Contexts(ids, keep=ids != 0) for _ in range(3)))
    text[:2].tokens  # 6
    ```
    """

    def __init__(self, parts: "Parts", start: int = 0):
        object.__setattr__(self, "_parts", parts)
        object.__setattr__(self, "_start", start)

    _parts: "Parts"
    _start: int

    def __getattr__(self, name: str) -> Any:
        """The fields that hold a tensor: they are there once the text has been read to its end."""
        if name not in ("ids", "keep"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found: Tensor = getattr(self._parts.whole(), name)[self._start :]
        object.__setattr__(self, name, found)
        return found

    def __getitem__(self, some: slice) -> Any:
        """Some of the contexts; without an end, a text that still grows."""
        first, step = some.start or 0, some.step or 1
        if step != 1 or first < 0 or (some.stop or 0) < 0:
            return Contexts(self.ids[some], self.keep[some])
        if some.stop is None:
            return GrowingContexts(self._parts, self._start + self.up_to(first))
        return self._parts.cut(self._start + first, self._start + some.stop)

    def __len__(self) -> int:
        return self._parts.whole().ids.shape[0] - self._start

    def __repr__(self) -> str:
        return f"{type(self).__name__}(of {self.context} tokens each, of a text that is read while it is used)"

    def __reduce__(self) -> tuple[type[Contexts], tuple[Tensor, Tensor]]:
        return Contexts, (self.ids, self.keep)

    @property
    def context(self) -> int:
        """Tokens of a context, the first one counted."""
        return self._parts.cut(0, 1).context

    @property
    def known(self) -> Contexts:
        """What was there when the text began to be read."""
        return self[: max(1, self._parts.first - self._start)]

    def up_to(self, most: int) -> int:
        """How many contexts there are, or `most` if that is less; it waits for no more of the text than that."""
        return min(most, max(0, self._parts.read(contexts=self._start + most)[0] - self._start))

    def holds(self, tokens: int) -> bool:
        """Whether at least `tokens` tokens are kept; it waits for no more of the text than that."""
        wanted = self._before() + tokens
        return self._parts.read(tokens=wanted)[1] >= wanted

    def _filled_by(self, tokens: int) -> int:
        return self._parts.filled_by(self._before() + tokens) - self._start

    def _before(self) -> int:
        return self._parts.kept_before(self._start)


class Parts:
    """`contexts context`: the parts of a text, each made once by whoever comes first.

    `behind`: a thread makes them too, until all are made, nobody holds this any more, or the interpreter ends.

    ```python
    from fmxnn.activations.growing import Parts

    ids = torch.tensor([[0, 5, 6, 7]], dtype=torch.int32)
    parts = Parts(iter([Contexts(ids, keep=ids != 0)]))
    parts.whole().tokens  # 3
    ```
    """

    def __init__(self, made: Iterator[Contexts], *, begun: tuple[Contexts, ...] = (), behind: bool = False):
        self._made = _Made(made)
        for part in begun:
            self._made.add(part)
        self.first = self._made.held.rows[-1]
        if behind:
            weakref.finalize(self, self._made.stop).atexit = False
            self._made.begin()

    def read(self, *, contexts: int = 0, tokens: int = 0) -> tuple[int, int]:
        """How many contexts and kept tokens are there: at least as many as asked for, or all."""
        there = len(self._made.held.rows)  # counted before, so that a part that comes between is not overlooked
        while self._made.held.rows[-1] < contexts or self._made.held.kept[-1] < tokens:
            if not self._made.advance(there):
                break
            there = len(self._made.held.rows)
        return self._made.held.rows[-1], self._made.held.kept[-1]

    def cut(self, start: int, stop: int) -> Contexts:
        """The contexts from `start` to before `stop`, or to the end."""
        stop = min(stop, self.read(contexts=stop)[0])
        parts, rows, _ = self._made.held
        last, start = len(rows) - 2, min(start, stop)  # the last part that is there, while others may come
        first = min(bisect_right(rows, start) - 1, last)
        found: list[Contexts] = []
        while not found or rows[first] < stop:
            found.append(parts[first][max(0, start - rows[first]) : stop - rows[first]])
            first += 1
        return found[0] if len(found) == 1 else _joined(found)

    def whole(self) -> Contexts:
        """The contexts of the whole text, which is read to its end."""
        while self._made.advance(len(self._made.held.rows)):
            pass
        return self._made.join()

    def kept_before(self, context: int) -> int:
        """The kept tokens of the contexts before this one, which are there."""
        parts, rows, kept = self._made.held
        part = bisect_right(rows, context) - 1
        return kept[part] + (parts[part][: context - rows[part]].tokens if part < len(parts) else 0)

    def filled_by(self, tokens: int) -> int:
        """How many contexts from the first on hold `tokens` kept tokens, which are there."""
        parts, rows, kept = self._made.held
        part = bisect_left(kept, tokens) - 1
        return rows[part] + int((parts[part].keep.sum(1).cumsum(0) < tokens - kept[part]).sum()) + 1


class _Held(NamedTuple):
    """Parts, and how many contexts and kept tokens are before each and after the last."""

    parts: list[Contexts]
    rows: list[int]
    kept: list[int]


class _Made:
    """The parts that are there and where the next come from; all that the thread holds."""

    def __init__(self, source: Iterator[Contexts]):
        self.held = _Held([], [0], [0])
        self.thread: threading.Thread | None = None
        self._source, self._lock, self._process = source, threading.Lock(), os.getpid()
        self._done = self._stopped = False
        self._kept = _KeptError()

    def add(self, part: Contexts) -> None:
        parts, rows, kept = self.held
        parts.append(part)  # first, for others read these without a lock and go by the counts
        kept.append(kept[-1] + part.tokens)
        rows.append(rows[-1] + len(part))

    def advance(self, there: int) -> bool:
        """Makes the next part, unless there are more than `there` already; false after the last.

        Raises what the text raises.
        """
        if not self._done and os.getpid() != self._process:
            raise RuntimeError(
                "this text was still being read when the process was forked, and only the first process can go on; "
                "read it to its end before that, with len(contexts)"
            )
        with self._lock:
            if not self._done and len(self.held.rows) == there:
                self._pull()
        grown = len(self.held.rows) > there
        if self._kept.error is not None and not grown:
            raise self._kept.error
        return grown

    def _pull(self) -> None:
        part = None
        with self._kept:
            part = next(self._source, None)
        if part is None:
            self._done = True
        else:
            self.add(part)

    def join(self) -> Contexts:
        """All parts as one, which takes their place."""
        with self._lock:
            if len(self.held.parts) > 1:
                whole = _joined(self.held.parts)
                self.held = _Held([whole], [0, len(whole)], [0, whole.tokens])
            return self.held.parts[0]

    def begin(self) -> None:
        """Lets a thread make the rest."""
        self.thread = threading.Thread(target=self._behind, name="fmxnn-contexts", daemon=True)
        _READING.add(self)
        self.thread.start()

    def stop(self) -> None:
        """Lets the thread end after the part that it makes."""
        self._stopped = True

    def _behind(self) -> None:
        while not (self._done or self._stopped):
            with self._lock:
                if not self._done:
                    self._pull()


class _KeptError:
    """Keeps what is raised in its `with`, for the thread that needs what could not be made."""

    def __init__(self):
        self.error: BaseException | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return error is not None


_READING: "weakref.WeakSet[_Made]" = weakref.WeakSet()


@atexit.register
def _end() -> None:
    """Ends the threads before the interpreter does: a tokenizer must not lose it while it works."""
    reading = list(_READING)
    for made in reading:
        made.stop()
    for made in reading:
        if made.thread is not None:
            made.thread.join(_PATIENCE)


def _joined(parts: list[Contexts]) -> Contexts:
    return Contexts(torch.cat([part.ids for part in parts]), torch.cat([part.keep for part in parts]))
