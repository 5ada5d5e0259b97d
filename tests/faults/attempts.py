"""Counts what the attacks tried and what survived: `make attack` prints it as one table.

@given(st.integers(0, 2**32)) @settings(max_examples=tries(ci=50, thorough=2_000)) def
test_a_flipped_byte_is_named(seed): with attempt("a flipped byte in a weight file", memory=True): ...
# asserts, as in any test

An attempt survives where its block ends without an exception. Its time is that of the block; with `memory=True` the
peak of what Python allocated in it is kept too (tensors are not counted).
"""

import os
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Attempts:
    tried: int = 0
    survived: int = 0
    seconds: float = 0.0
    mib: float = 0.0
    failed: str = ""


TALLY: dict[str, Attempts] = {}


def tries(ci: int, thorough: int) -> int:
    """How many cases: `thorough` under HYPOTHESIS_PROFILE=thorough, else `ci`."""
    return thorough if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else ci


@contextmanager
def attempt(fault: str, *, case: object = None, memory: bool = False) -> Iterator[Attempts]:
    """One attempt at `fault`; `case` is what the table shows of one that failed. Gives the row, for what the test
    measures itself.
    """
    row = TALLY.setdefault(fault, Attempts())
    row.tried += 1
    if memory:
        tracemalloc.start()
    began = time.perf_counter()
    try:
        yield row
        row.survived += 1
    except BaseException:
        row.failed = str(case)[:80]
        raise
    finally:
        row.seconds = max(row.seconds, time.perf_counter() - began)
        if memory:
            row.mib = max(row.mib, tracemalloc.get_traced_memory()[1] / 2**20)
            tracemalloc.stop()


def table() -> str:
    """Fault, tried, survived, worst case, as Markdown."""
    lines = ["| fault | tried | survived | worst case |", "|---|---|---|---|"]
    for fault, row in sorted(TALLY.items()):
        worst = (
            f"{row.seconds * 1e3:,.0f} ms"
            + (f", {row.mib:.1f} MiB" if row.mib else "")
            + (f"; failed: {row.failed}" if row.failed else "")
        )
        lines.append(f"| {fault} | {row.tried:,} | {row.survived:,} | {worst} |")
    return "\n".join(lines)
