"""What fx.save_pretrained wrote, read back: its recipe, its headers, its tensors."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fmxnn.excerpt import cut, excerpt, listed
from fmxnn.formats.room import check_bytes
from fmxnn.headers import read_headers
from fmxnn.integrity import MANIFEST, IntegrityError, verify_folder
from fmxnn.recipe import RecipeError, build, check_tree
from fmxnn.strict import ABOUT_LIMITS, INDEX_LIMITS, strict_json
from fmxnn.version import __version__

CONFIG, ABOUT, CARD = "config.json", "about.json", "README.md"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def is_saved(folder: Path) -> bool:
    """Whether a folder is ours: it has a manifest, or its config names fmxnn."""
    if (folder / MANIFEST).is_file():
        return True
    try:
        config = strict_json(folder / CONFIG)
    except (RecipeError, OSError):
        return False
    return isinstance(config, dict) and "fmxnn" in config


def read_saved(folder: Path, classes: Iterable[type[nn.Module]], device: torch.device) -> tuple[nn.Module, Mapping[str, Any]]:
    """The module of a folder and what was said of it; on the meta device its headers are compared and no tensor is read.

    Raises RecipeError for a recipe or keys that do not fit, IntegrityError for missing or changed files and MemoryError for more than fits.
    """
    recipe = _read_config(folder)
    with torch.device("meta"):
        module = build(recipe, classes)
    files = _weight_files(folder)
    headers = (read_headers(file, way_out="fetch or save the folder again") for file in files)
    _compare(own_tensors(module), {key: header for each in headers for key, header in each.items()}, folder)
    if device.type != "meta":
        check_bytes(str(folder), sum(file.stat().st_size for file in files), device)
        verify_folder(folder)
        tensors = {key: tensor for file in files for key, tensor in load_file(file, device=str(device)).items()}
        module.load_state_dict(tensors, strict=False, assign=True)  # every key was accounted for by _compare; aliases follow their module
        unsaved = [key for key, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
        if unsaved:
            raise RecipeError(
                f"{', '.join(unsaved)} of {type(module).__name__} are made in a constructor and not saved; register them as persistent buffers"
            )
    return module.eval(), _read_about(folder / ABOUT)


def _read_about(path: Path) -> Mapping[str, Any]:
    about = strict_json(path, ABOUT_LIMITS) if path.is_file() else {}
    if not isinstance(about, dict):
        raise RecipeError(f"{path} needs names and values, got {excerpt(about)}; fetch or save it again")
    return cast("Mapping[str, Any]", about)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Each parameter and saved buffer once, under its first name."""
    first: dict[int, str] = {}
    kept, aliases = module.state_dict(keep_vars=True), {id(part): name for name, part in module.named_modules()}
    own: dict[str, Tensor] = {}
    for key, tensor in kept.items():
        if id(tensor) not in first:
            first[id(tensor)], own[key] = key, tensor
            continue
        holder, other = (module.get_submodule(name.rpartition(".")[0]) for name in (key, first[id(tensor)]))
        if holder is not other:
            raise RecipeError(
                f"{key} and {first[id(tensor)]} are one tensor in two modules, which no recipe can say; share the module itself ({aliases[id(other)]!r})"
            )
    return own


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise IntegrityError(f"{folder} has no {CONFIG}, it holds {found}; give a folder that fx.save_pretrained wrote")
    config = strict_json(path)
    if not isinstance(config, dict) or set(cast("dict[str, Any]", config)) != {"fmxnn", "module"}:
        got = ", ".join(sorted(cast("dict[str, Any]", config))) if isinstance(config, dict) else type(config).__name__
        raise RecipeError(f"{path} needs the keys fmxnn and module and no other, got {cut(got) or 'none'}")
    tree = cast("dict[str, Any]", config)
    check_tree(tree["module"])
    _check_version(tree["fmxnn"], path)
    return cast("Mapping[str, Any]", tree["module"])


def _check_version(wrote: object, path: Path) -> None:
    if not isinstance(wrote, str) or not (match := re.match(r"(\d{1,6})\.(\d{1,6})\b", wrote)):
        raise RecipeError(f"{path} names no version of fmxnn, got {excerpt(wrote)}")
    theirs = tuple(map(int, match.groups()))
    if theirs > tuple(map(int, __version__.split(".")[:2])):
        raise RecipeError(f"{path} was written by fmxnn {cut(wrote)}, and this is {__version__}; upgrade: pip install -U fmxnn")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise IntegrityError(f"{folder} has neither {WEIGHTS} nor {INDEX}; fetch or save the folder again")
    index = strict_json(folder / INDEX, INDEX_LIMITS)
    names: object = cast("dict[str, Any]", index).get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(
        isinstance(file, str) and _SHARD.fullmatch(file) for file in cast("dict[str, Any]", names).values()
    ):
        raise IntegrityError(f"{folder / INDEX} names files that are no shards of this folder; fetch or save the folder again")
    return [folder / name for name in sorted(set(cast("dict[str, str]", names).values()))]


def _compare(wanted: Mapping[str, Tensor], found: Mapping[str, tuple[tuple[int, ...], str]], folder: Path) -> None:
    faults = [f"{key} is missing" for key in wanted if key not in found]
    faults += [f"{key} is not of this recipe" for key in found if key not in wanted]
    for key in wanted.keys() & found.keys():
        shape, dtype = found[key]
        if shape != tuple(wanted[key].shape):
            faults.append(f"{key} has the shape {shape} and the recipe {tuple(wanted[key].shape)}")
        if wanted[key].is_floating_point() != dtype.startswith(("F", "BF")):
            faults.append(f"{key} has the type {dtype} and the recipe {wanted[key].dtype}")
    if faults:
        raise RecipeError(f"the weights in {folder} do not fit its config.json: {listed(faults)}; save them together again")
