"""The order in which the products of an Einstein sum are taken: the best, where it is found in bounded work."""

import random
from typing import Any, cast

from opt_einsum.path_random import RandomGreedy
from opt_einsum.paths import DynamicProgramming, PathOptimizer, auto_hq
from opt_einsum.paths import _dp_compare_flops as compare_flops  # pyright: ignore[reportPrivateUsage]

SMALL, LARGE = 6, 16
"""So many terms are always searched through, and so many as long as the work allows."""
WORK = 300_000
"""Axes that such a search looks at before it is given up, after some 20 ms."""
TRIES = 32
"""Terms times greedy tries, of which the best is taken then; there is one at the least."""


class _TooMuch(Exception):
    pass


class BoundedOrder(PathOptimizer):
    """The order that opt_einsum searches for, in bounded work; beyond that the best of some greedy tries.

    The bound is met by sums of many terms that share many axes. The same sum has the same order in every process.

    ```python
    import opt_einsum

    from fmxnn.core.ordering import BoundedOrder

    opt_einsum.contract_path("ab,bc,cd->ad", (2, 3), (3, 4), (4, 5), shapes=True, optimize=BoundedOrder())
    ```
    """

    def __call__(self, inputs: list[Any], output: Any, size_dict: Any, memory_limit: int | None = None) -> Any:
        """The pairs of places, as opt_einsum writes them."""
        if len(inputs) <= SMALL:
            return auto_hq(inputs, output, size_dict, memory_limit)
        if len(inputs) > LARGE:
            return _greedy(inputs, output, size_dict)
        left = WORK

        def compare(*pair: Any) -> None:
            nonlocal left
            left -= 8 + len(pair[2])
            if left < 0:
                raise _TooMuch
            compare_flops(*pair)

        try:
            return DynamicProgramming(minimize=cast("Any", compare))(inputs, output, size_dict, memory_limit)
        except _TooMuch:
            return _greedy(inputs, output, size_dict)


def _greedy(inputs: list[Any], output: Any, size_dict: Any) -> Any:
    number = {axis: i for i, axis in enumerate(sorted(size_dict))}  # a set of letters has another order in each process
    terms = [frozenset(number[axis] for axis in term) for term in inputs]
    sizes: Any = {number[axis]: size for axis, size in size_dict.items()}
    state = random.getstate()  # each try seeds the generator of the process
    try:
        return RandomGreedy(max_repeats=max(1, TRIES // len(inputs)))(
            cast("Any", terms), cast("Any", frozenset(map(number.__getitem__, output))), sizes
        )
    finally:
        random.setstate(state)
