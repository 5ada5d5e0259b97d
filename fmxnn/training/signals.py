"""Stopping between two steps when asked to."""

import signal
from types import FrameType
from typing import Self


class StopSignals:
    """Turns SIGTERM and SIGINT into a wish that a training loop reads between two steps.

    `received` is None or the signal's number; after saving, exit with `exit_code` (143 or 130). A second
    signal acts as it would have without this.

    ```python
    with fx.training.StopSignals() as stop:
        for step in range(3):  # train, then look
            if stop.received:
                raise SystemExit(stop.exit_code)
    ```
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 0 where none came."""
        return 0 if self.received is None else 128 + self.received

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  # what signal.signal gave back
        self._before = {}
