"""Files of torch.save, read as tensors and nothing else."""

import struct
from pathlib import Path
from pickle import UnpicklingError
from typing import cast
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor

from fmxnn.core.errors import FormatError
from fmxnn.core.excerpt import cut, excerpt
from fmxnn.core.files.integrity import IntegrityError
from fmxnn.saving.formats.headers import FOREIGN
from fmxnn.saving.formats.memory import too_large

ANEW = "torch.save(torch.load(path, weights_only=True), path)"
_UNTRUE = (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, ImportError, struct.error)
"""What torch.load raises of a pickle that is not what torch.save wrote."""


def unmapped(path: Path, error: Exception) -> Exception:
    """What torch says of a file that it maps: larger than the memory of the machine, or broken."""
    reason = cut(str(error).split("\n")[0])
    return (
        too_large(path)
        if "unable to mmap" in reason
        else IntegrityError(f"{path} cannot be read: {reason}; fetch it again")
    )


def check_archive(path: Path) -> None:
    """Raises FormatError for a pickle without an archive, and for an archive that is no plain one of torch.save."""
    with path.open("rb") as file:
        bare = file.read(1) == b"\x80"
    if bare:
        raise FormatError(
            f"{path} is a bare pickle, not an archive of torch.save, and is refused: loading it may run code; ask for "
            "safetensors, "
            f"or save its tensors anew where you trust it: {ANEW}"
        )
    try:
        with ZipFile(path) as archive:
            members = archive.infolist()
    except (BadZipFile, OSError, ValueError, OverflowError, NotImplementedError, struct.error) as error:
        raise IntegrityError(f"{path} cannot be read: {cut(str(error))}; fetch it again") from error
    if any(
        member.compress_type != ZIP_STORED for member in members
    ):  # what is mapped would be read as it lies there, compressed
        raise FormatError(
            f"{path} is a compressed archive, and torch.save writes plain ones; save its tensors anew: {ANEW}"
        )
    if any(member.filename.endswith("data.pkl") and member.file_size > FOREIGN for member in members):
        raise FormatError(f"{path} describes its tensors in more than {FOREIGN:,} bytes; save its tensors alone")


def torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, mapped and not read."""
    try:
        found: object = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise FormatError(
            f"{path} is a pickle that names code or classes and is refused: loading it would run them; ask for "
            "safetensors, "
            "or save its tensors alone where you trust it: torch.save(model.state_dict(), path)"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, *_UNTRUE) as error:
        raise unmapped(path, error) from error
    return _by_name(found, path)


def _by_name(found: object, path: Path) -> dict[str, Tensor]:
    """What a file holds, if it is tensors by name and nothing else."""
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds a {type(found).__name__}, expected tensors by name; save a state dict")
    held = cast("dict[object, object]", found)
    for key in held:
        kind = type(held[key])
        if type(key) is not str or not issubclass(kind, Tensor):
            raise FormatError(
                f"{path} holds {excerpt(key)}, a {kind.__name__}, expected tensors by name; save a state dict"
            )
    return cast("dict[str, Tensor]", held)
