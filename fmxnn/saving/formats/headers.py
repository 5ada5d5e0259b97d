"""What the header of a safetensors file says, without reading its numbers."""

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open

from fmxnn.core.excerpt import cut
from fmxnn.core.files.integrity import IntegrityError

OURS, FOREIGN = 1_000_000, 16_000_000
"""Bytes that a header may have: some 10,000 tensors of our own, and ten times as many of others."""


def read_headers(path: Path, *, way_out: str, most: int = OURS) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape of each tensor and its type as the file writes it (`BF16`).

    Raises IntegrityError for a file that is missing, cut or contradicts itself, and for a header of more than `most`
    bytes before it is read.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > most:
            raise IntegrityError(
                f"{path} says that its header has {length:,} bytes, and one has at most {most:,}; {way_out}"
            )
        with safe_open(
            path, framework="np"
        ) as file:  # torch would map the file, and the system refuse one larger than its memory
            parts = {key: file.get_slice(key) for key in cast("Iterable[str]", file.keys())}
            return {key: (tuple(part.get_shape()), str(part.get_dtype())) for key, part in parts.items()}
    except (OSError, SafetensorError) as error:
        if isinstance(error, IntegrityError):
            raise
        raise IntegrityError(f"{path} cannot be read: {cut(str(error))}; {way_out}") from error
