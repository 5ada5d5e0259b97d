"""How far a long piece of work is."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

_Item = TypeVar("_Item")


class Progress(Protocol):
    """What `tqdm.tqdm` is: it passes an iterable on and shows how far it is; `total` is None where it is not known."""

    def __call__(self, iterable: Iterable[_Item], /, *, desc: str, total: int | None) -> Iterable[_Item]:
        """The same items."""
        ...


def silently(iterable: Iterable[_Item], /, *, desc: str, total: int | None) -> Iterable[_Item]:
    """The same items, without a word."""
    return iterable
