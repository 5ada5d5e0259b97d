"""Whether what a file holds fits into memory, asked before anything is allocated."""

import re
from pathlib import Path

import torch

LOOK = "look at it without its weights: python -m fmxnn inspect"
MEMORY, LIMIT = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


def check_room(who: str, numbers: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises MemoryError where so many numbers of `dtype` do not fit.

    Where the system does not say how much is free, nothing is refused.
    """
    narrow = (
        "load it as dtype=torch.bfloat16, or "
        if dtype.itemsize > 2 and 2 * numbers <= (free_bytes(device) or 0)
        else ""
    )
    check_bytes(who, numbers * dtype.itemsize, device, kind=f" as {str(dtype).removeprefix('torch.')}", remedy=narrow)


def check_bytes(who: str, needed: int, device: torch.device, *, kind: str = "", remedy: str = "") -> None:
    """The same for bytes; `kind` says as what they are kept, and `remedy` what else could be done."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"{who} needs {needed / 1e9:,.1f} GB{kind}, and {device} has {free / 1e9:,.1f} GB free; {remedy}{LOOK}"
        )


def too_large(path: Path) -> MemoryError:
    """For a file that the system will not map, which it refuses beyond all memory there is, whatever is free."""
    return MemoryError(
        f"{path} has {path.stat().st_size / 1e9:,.1f} GB, which is more than this machine can map; {LOOK}"
    )


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated, as far as the system says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or not MEMORY.is_file():
        return None
    available = re.search(r"MemAvailable:\s+(\d+) kB", MEMORY.read_text())
    limit = LIMIT.read_text().strip() if LIMIT.is_file() else "max"
    known = [int(available[1]) * 1024] if available else []
    return min([*known, int(limit)] if limit.isdigit() else known, default=None)
