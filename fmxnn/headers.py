"""What the header of a safetensors file says, without reading its numbers."""

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open

from fmxnn.integrity import IntegrityError


def read_headers(path: Path, *, way_out: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape of each tensor and its type as the file writes it (`BF16`). Raises IntegrityError for a file that is missing or cut."""
    try:
        with safe_open(path, framework="np") as file:  # torch would map the file, and the system refuse one larger than its memory
            parts = {key: file.get_slice(key) for key in cast("Iterable[str]", file.keys())}
            return {key: (tuple(part.get_shape()), str(part.get_dtype())) for key, part in parts.items()}
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}; {way_out}") from error
