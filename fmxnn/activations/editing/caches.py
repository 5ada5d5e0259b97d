"""The clean model's keys and values, beside those of the edited one."""

from copy import deepcopy
from functools import cache
from typing import Any
from weakref import WeakSet

FOLLOWED = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")
"""What generation does to a cache, and must do to its companion."""
_COMPANION = "clean_companion"


class CleanCaches:
    """For each cache that an edited model fills, one that the clean model fills with the same tokens.

    The companion is kept on the cache itself, so that a copy of the one has a copy of the other. What is done to the
    cache, such as reordering its beams, is done to the companion. A cache that was filled before any edit is the clean
    model's own.

    ```python
    from transformers import DynamicCache
    from fmxnn.activations.editing.caches import CleanCaches

    caches, given = CleanCaches(), DynamicCache()
    assert caches.of(given) is not given
    assert caches.of(given) is caches.of(given)
    caches.release()
    ```
    """

    def __init__(self) -> None:
        self._paired = WeakSet[Any]()

    def __contains__(self, given: Any) -> bool:
        return vars(given).get(_COMPANION) is not None

    def of(self, given: Any) -> Any:
        """The companion of a cache, made where it has none.

        Raises ValueError for a cache that an edited model filled while its codes were not asked for.
        """
        if _COMPANION not in vars(given):
            self.pair(given, deepcopy(given))
        clean = vars(given)[_COMPANION]
        if clean is None or clean.get_seq_length() != given.get_seq_length():
            raise ValueError(
                "codes need the clean model's cache of the same tokens, and this one was filled by an edited model "
                "without it; start with a new cache, after all edits are set"
            )
        return clean

    def pair(self, given: Any, clean: Any) -> None:
        """Makes `clean` the companion of a cache."""
        given.__class__ = _followed(type(given))
        setattr(given, _COMPANION, clean)
        self._paired.add(given)

    def spoil(self, given: Any) -> None:
        """Remembers that an edited model filled this cache without a companion."""
        if given not in self:
            setattr(given, _COMPANION, None)

    def release(self) -> None:
        """Takes every companion away; what remains known is that the caches are not clean."""
        for given in self._paired:
            given.__class__ = type(given).__bases__[0]
            setattr(given, _COMPANION, None)
        self._paired.clear()


@cache
def _followed(kind: type) -> type:
    """The same class of cache, whose companion follows it."""

    def both(name: str) -> Any:
        def method(self: Any, *args: Any, **named: Any) -> Any:
            getattr(getattr(self, _COMPANION), name)(*args, **named)
            return getattr(kind, name)(self, *args, **named)

        return method

    return type(kind.__name__, (kind,), {name: both(name) for name in FOLLOWED if hasattr(kind, name)})


def cache_in(output: Any) -> Any:
    """The cache among what a model gave, or None."""
    parts = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)
