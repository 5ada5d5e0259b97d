"""What fx.save_pretrained wrote, read back: its recipe, its headers, its tensors."""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fmxnn.core.errors import IntegrityError, RecipeError
from fmxnn.core.excerpt import cut, excerpt, listed
from fmxnn.core.files.manifest import AGAIN, MANIFEST, NEW, Listed, in_force, list_files, steadily, verify
from fmxnn.core.files.strict_json import ABOUT_LIMITS, INDEX_LIMITS, entry, strict_json
from fmxnn.core.kinds import is_object
from fmxnn.core.recipe import build, check_tree
from fmxnn.core.sharding import is_sharded
from fmxnn.core.version import __version__
from fmxnn.saving.formats.headers import read_headers
from fmxnn.saving.formats.memory import check_bytes

CONFIG, ABOUT, CARD = "config.json", "about.json", "README.md"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SUFFIX = ".safetensors"
MAX_SMALL = 16_000_000
_FLOATING = ("F64", "F32", "F16", "BF16")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def is_saved(folder: Path) -> bool:
    """Whether a folder is ours: it has a manifest, or its config names fmxnn."""
    if in_force(folder) is not None:
        return True
    try:
        config = strict_json(folder / CONFIG)
    except (RecipeError, OSError):
        return False
    return is_object(config) and "fmxnn" in config


def read_saved(
    folder: Path, classes: Iterable[type[nn.Module]], device: torch.device
) -> tuple[nn.Module, Mapping[str, Any]]:
    """The module of a folder, and what was said of it.

    On the meta device headers are compared and no tensor is read. Raises RecipeError for a recipe or keys that do not
    fit, IntegrityError for missing or changed files, and MemoryError for more than fits.
    """
    known = tuple(classes)
    module, about = steadily(folder, lambda: _read(folder, known, device))
    if faults := _not_sound(own_tensors(module)):
        warnings.warn(
            f"{folder} holds {faults}, and what is computed from it is wrong; train it again, or ask who made it",
            stacklevel=3,
        )
    return module, about


def _read(
    folder: Path, classes: tuple[type[nn.Module], ...], device: torch.device
) -> tuple[nn.Module, Mapping[str, Any]]:
    files = _listed(folder)
    verify(
        file for name, file in files.items() if not name.endswith(SUFFIX)
    )  # what a changed byte says is not looked into
    recipe = _read_config(files[CONFIG].path)
    with torch.device("meta"):
        module = build(recipe, classes)
    weights = _weight_files(folder, files)
    for path in [path for path, _ in weights if path.is_file()]:
        path.open("rb").close()  # a file that may not be read is called that, and not broken
    headers = (read_headers(path, way_out=AGAIN) for path, _ in weights)
    try:
        _compare(own_tensors(module), {key: header for each in headers for key, header in each.items()}, folder)
    except RecipeError:
        verify(weights)  # so that a header with a changed byte is called that
        raise
    if device.type != "meta":
        check_bytes(str(folder), sum(path.stat().st_size for path, _ in weights), device)
        verify(weights)
        tensors = {key: tensor for path, _ in weights for key, tensor in load_file(path, device=str(device)).items()}
        module.load_state_dict(
            tensors, strict=False, assign=True
        )  # every key was accounted for by _compare; aliases follow their module
        unsaved = [key for key, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
        if unsaved:
            raise RecipeError(
                f"{', '.join(unsaved)} of {type(module).__name__} are made in a constructor and not saved; register "
                "them as persistent buffers"
            )
    return module.eval(), _read_about(files[ABOUT].path) if ABOUT in files else {}


def _read_about(path: Path) -> Mapping[str, Any]:
    about = strict_json(path, ABOUT_LIMITS)
    if not is_object(about):
        raise RecipeError(f"{path} needs names and values, got {excerpt(about)}; fetch or save it again")
    return about


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Each parameter and saved buffer once, under its first name."""
    first: dict[int, str] = {}
    kept, aliases = module.state_dict(keep_vars=True), {id(part): name for name, part in module.named_modules()}
    own: dict[str, Tensor] = {}
    for key, tensor in kept.items():
        if is_sharded(tensor):
            raise RecipeError(
                f"{key} is sharded, and a folder holds whole tensors; gather them first, by get_model_state_dict with "
                "full_state_dict=True, and save a crosscoder that has loaded them"
            )
        if id(tensor) not in first:
            first[id(tensor)], own[key] = key, tensor
            continue
        holder, other = (module.get_submodule(name.rpartition(".")[0]) for name in (key, first[id(tensor)]))
        if holder is not other:
            raise RecipeError(
                f"{key} and {first[id(tensor)]} are one tensor in two modules, which no recipe can say; share the "
                f"module itself ({aliases[id(other)]!r})"
            )
    return own


def check_sound(who: str, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Warns of NaN, infinity and thresholds below zero that are about to be saved.

    Raises IntegrityError where they would replace an earlier save.
    """
    if faults := _not_sound(tensors):
        if in_force(folder) is not None:
            raise IntegrityError(
                f"{who} holds {faults}, and {folder} an earlier save, which stays; save into another folder"
            )
        warnings.warn(f"{who} holds {faults}, and is saved as it is", stacklevel=3)


def _not_sound(tensors: Mapping[str, Tensor]) -> str:
    """What is wrong with numbers, in words, and nothing where nothing is: NaN, infinity, and thresholds below zero but
    for the -1 of one never set.

    Of a threshold for each latent some may be infinite: those never fire, as `Scored.frozen()` writes them.
    """
    wrong, negative = list[str](), list[str]()
    for key, tensor in tensors.items():
        if tensor.is_meta or not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or not tensor.numel():
            continue
        least, most = tensor.detach().aminmax()  # NaN is both; no copy is made
        is_threshold = key.rpartition(".")[2] == "threshold"
        if not all(bound.isfinite() or (is_threshold and tensor.ndim and bool(bound > 0)) for bound in (least, most)):
            wrong.append(key)
        elif is_threshold and bool(((tensor < 0) & (tensor != -1)).any()):
            negative.append(key)
    faults = [f"NaN or infinity in {', '.join(wrong)}"] if wrong else []
    return "; ".join(faults + ([f"a threshold below zero in {', '.join(negative)}"] if negative else []))


def _listed(folder: Path) -> dict[str, Listed]:
    """What the manifest lists. Raises IntegrityError where it leaves out what is read, and for a file that would be
    read were it listed.
    """
    if in_force(folder) is None and not (folder / CONFIG).is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise IntegrityError(f"{folder} has no {CONFIG}, it holds {found}; give a folder that fx.save_pretrained wrote")
    files = list_files(folder)
    if CONFIG not in files:
        raise IntegrityError(f"{folder / MANIFEST} lists no {CONFIG}, so nothing says that it is whole; {AGAIN}")
    if not (folder / NEW).is_dir():  # else what the save before wrote may still be there
        for path in sorted(folder.iterdir()):
            if path.name not in files and (path.name in (ABOUT, WEIGHTS, INDEX) or _SHARD.fullmatch(path.name)):
                raise IntegrityError(
                    f"{path} is not in {MANIFEST}, so nothing says whose it is; take it away, or {AGAIN}"
                )
    for name, (path, _) in files.items():
        if not name.endswith(SUFFIX) and path.is_file() and path.stat().st_size > MAX_SMALL:
            raise IntegrityError(
                f"{path} has {path.stat().st_size:,} bytes, and what is no weight has at most {MAX_SMALL:,}; {AGAIN}"
            )
    return files


def _read_config(path: Path) -> Mapping[str, Any]:
    config = strict_json(path)
    if not is_object(config) or set(config) != {"fmxnn", "module"}:
        got = ", ".join(sorted(config)) if is_object(config) else type(config).__name__
        raise RecipeError(f"{path} needs the keys fmxnn and module and no other, got {cut(got) or 'none'}")
    check_tree(config["module"])
    _check_version(config["fmxnn"], path)
    return config["module"]


def _check_version(wrote: object, path: Path) -> None:
    if not isinstance(wrote, str) or not (match := re.match(r"(\d{1,6})\.(\d{1,6})\b", wrote)):
        raise RecipeError(f"{path} names no version of fmxnn, got {excerpt(wrote)}")
    theirs = tuple(map(int, match.groups()))
    if theirs > tuple(map(int, __version__.split(".")[:2])):
        raise RecipeError(
            f"{path} was written by fmxnn {cut(wrote)}, and this is {__version__}; upgrade: pip install -U fmxnn"
        )


def _weight_files(folder: Path, files: Mapping[str, Listed]) -> list[Listed]:
    if WEIGHTS in files:
        return [files[WEIGHTS]]
    if INDEX not in files:
        raise IntegrityError(f"{folder / MANIFEST} lists neither {WEIGHTS} nor {INDEX}; {AGAIN}")
    names = entry(strict_json(files[INDEX].path, INDEX_LIMITS), "weight_map")
    if not is_object(names) or not all(isinstance(file, str) and _SHARD.fullmatch(file) for file in names.values()):
        raise IntegrityError(f"{files[INDEX].path} names files that are no shards of this folder; {AGAIN}")
    shards = sorted(set(names.values()))
    if missing := [name for name in shards if name not in files]:
        raise IntegrityError(f"{files[INDEX].path} names {missing[0]}, which {MANIFEST} does not list; {AGAIN}")
    return [files[name] for name in shards]


def _compare(wanted: Mapping[str, Tensor], found: Mapping[str, tuple[tuple[int, ...], str]], folder: Path) -> None:
    faults = [f"{key} is missing" for key in wanted if key not in found]
    faults += [f"{key} is not of this recipe" for key in found if key not in wanted]
    for key in wanted.keys() & found.keys():
        shape, dtype = found[key]
        if shape != tuple(wanted[key].shape):
            faults.append(f"{key} has the shape {shape} and the recipe {tuple(wanted[key].shape)}")
        if not dtype.startswith(
            _FLOATING if wanted[key].is_floating_point() else ("C",) if wanted[key].is_complex() else ("I", "U", "BOOL")
        ):
            faults.append(f"{key} has the type {dtype} and the recipe {wanted[key].dtype}")
    if faults:
        raise RecipeError(
            f"the weights in {folder} do not fit its config.json: {listed(faults)}; save them together again"
        )
