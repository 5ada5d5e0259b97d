"""What a foreign format is, and what its reader may be told."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fmxnn.core.errors import FormatError
from fmxnn.core.excerpt import excerpt
from fmxnn.core.files.integrity import IntegrityError
from fmxnn.core.files.strict_json import Limits, parse_json, read_bytes
from fmxnn.core.kinds import is_object
from fmxnn.saving.formats.mistaken import check_kind
from fmxnn.saving.formats.plain_yaml import parse_yaml

_M = TypeVar("_M", bound=nn.Module)


class Options(NamedTuple):
    """How a foreign folder is to be read: as which dtype, on which device, and with which scale of its input.

    `dtype` None keeps what the files have. `input_scale` is one number for each layer, for files that did not save it.

    ```python
    from fmxnn.saving.formats import Options

    Options(dtype=torch.float32, device=torch.device("cpu"), input_scale=None)
    ```
    """

    dtype: torch.dtype | None = None
    device: torch.device = torch.device("cpu")
    input_scale: Tensor | None = None


def options(dtype: object, device: torch.device, input_scale: object) -> Options:
    """What a caller gives, once it is known to be of the types meant. Raises TypeError."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype needs a floating torch.dtype, got {excerpt(dtype)}; for example dtype=torch.bfloat16")
    if input_scale is not None and not isinstance(input_scale, Tensor):
        raise TypeError(
            f"input_scale needs a tensor, one number for each layer, got {excerpt(input_scale)}; wrap it: "
            "torch.tensor([...])"
        )
    return Options(dtype, device, input_scale)


class Reading(NamedTuple):
    """A module in eval mode, and what is said of it: its format, what was folded, the language model it reads.

    ```python
    from fmxnn.saving.formats import Reading

    Reading(nn.Identity(), {"base_model": "openai-community/gpt2", "folded": "nothing"})
    ```
    """

    module: nn.Module
    about: dict[str, Any]


class Format(NamedTuple):
    """One foreign format: how a folder of it is recognised, and how it is read.

    - `name`: what `from_pretrained(format=...)` calls it
    - `files`: in words, what `recognises` looks for
    - `recognises`: whether a folder has this format; it never fails
    - `read`: our module, made of the folder

    ```python
    from fmxnn.saving.formats import FORMATS

    saelens = next(each for each in FORMATS if each.name == "saelens")
    saelens.files  # 'cfg.json with architecture or d_sae, with sae_weights.safetensors'
    ```
    """

    name: str
    files: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, Options], Reading]


SETTINGS_LIMITS = Limits("a file of settings", values=10_000, error=FormatError, way_out="fetch it again")


def settings(path: Path) -> dict[str, Any]:
    """What a JSON or YAML file of settings holds, within limits.

    Raises IntegrityError where there is no such file and FormatError for a broken one, naming it.
    """
    if not path.is_file():
        raise IntegrityError(f"{path} is missing; fetch it again, or name another: format=")
    check_kind(path)
    parse = parse_json if path.suffix == ".json" else parse_yaml
    found = parse(read_bytes(path, SETTINGS_LIMITS), path, SETTINGS_LIMITS)
    if not is_object(found):
        raise FormatError(f"{path} holds a {type(found).__name__}, expected names and values; name another: format=")
    return dict(found)


def peek(path: Path) -> dict[str, Any]:
    """The settings, or nothing where they cannot be read: for `recognises`, which never fails."""
    try:
        return settings(path)
    except (FormatError, IntegrityError):
        return {}


def unreadable(folder: Path) -> list[str]:
    """What is wrong with each file of settings in a folder that cannot be read, for one that fits no format."""
    faults: list[str] = []
    for path in sorted(path for pattern in ("*config.json", "*cfg.json", "*.yaml") for path in folder.glob(pattern)):
        try:
            settings(path)
        except (FormatError, IntegrityError) as error:
            faults.append(str(error))
    return faults


def setting(found: Mapping[str, Any], key: str, kind: type[Any], path: Path) -> Any:
    """One value of the settings, of the type asked for.

    Raises FormatError, naming file and key, where it is missing or of another type.
    """
    value = found.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        got = f"{key}={excerpt(value)}" if key in found else "none"
        raise FormatError(
            f"{path} needs {key}, of type {kind.__name__}, got {got}; write it there, or name another: format="
        )
    return value


def allocate(make: Callable[[], _M], dtype: torch.dtype, device: torch.device) -> _M:
    """The module that `make` makes, in eval mode, with its tensors allocated and not filled.

    No initialisation is drawn and thrown away.
    """
    with torch.device("meta"):
        module = make()
    module = module.to(dtype)
    return (module if device.type == "meta" else module.to_empty(device=device)).eval()


def no_scale(options: Options, who: str) -> None:
    """Raises FormatError where the caller gives an input scale to files that need none."""
    if options.input_scale is not None:
        raise FormatError(f"{who} says itself how its input is scaled, got an input_scale; leave it out")
