"""Saving, loading and the Hugging Face Hub."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict, Unpack, cast

import torch
from huggingface_hub import HfApi, snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fmxnn.algebra import ConcatWeight, SumWeight
from fmxnn.card import card
from fmxnn.coders import Crosscoder, CrossLayerDecoder, CrossLayerEncoder
from fmxnn.contraction import Contraction
from fmxnn.folding import Normalised
from fmxnn.integrity import MANIFEST, IntegrityError, verify_folder, write_folder
from fmxnn.masking import LayerMask
from fmxnn.normalisation import Normalisation
from fmxnn.polynomial import PolynomialDecoder, PowerTerm, ProjectedWeight, Projection
from fmxnn.recipe import RecipeError, build, check_tree, describe
from fmxnn.sparsifiers import BatchTopK, JumpReLU, TopK
from fmxnn.strict import strict_json, to_json
from fmxnn.version import __version__
from fmxnn.weights import CPWeight, DenseWeight, EinsumWeight, TensorRingWeight

CONFIG, ABOUT, CARD = "config.json", "about.json", "README.md"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
KNOWN: tuple[type[nn.Module], ...] = (
    *(BatchTopK, ConcatWeight, Contraction, CPWeight, Crosscoder, CrossLayerDecoder, CrossLayerEncoder, DenseWeight, EinsumWeight),
    *(PolynomialDecoder, PowerTerm, ProjectedWeight, Projection),
    *(JumpReLU, LayerMask, Normalisation, Normalised, SumWeight, TensorRingWeight, TopK, nn.ReLU, nn.Identity),
)
MAX_CONFIG = 1_000_000
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class HubOptions(TypedDict, total=False):
    """What `from_pretrained` hands on to huggingface_hub."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool
    endpoint: str | None


def save_pretrained(module: nn.Module, folder: str | Path, *, about: Mapping[str, Any] | None = None, max_shard_size: str = "5GB") -> None:
    """Writes `config.json`, safetensors, a model card and a sha256 manifest into `folder`, all of it or nothing.

    `about` goes into the card and into `about.json`: base_model, layers, text, metrics; what is no JSON as its `str`.
    Shared modules are written once and stay shared.
    Raises RecipeError for a module that cannot be described and IntegrityError where the folder cannot be written.
    """
    config = {"fmxnn": __version__, "module": describe(module)}
    tensors = _own_tensors(module)

    def fill(target: Path) -> None:
        (target / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (target / CARD).write_text(card(module, about or {}), encoding="utf-8")
        (target / ABOUT).write_text(to_json(about or {}), encoding="utf-8")
        shards = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
        for name, keys in shards.filename_to_tensors.items():
            save_file({key: tensors[key].detach().contiguous() for key in keys}, target / name, metadata={"format": "pt"})
        if shards.is_sharded:
            (target / INDEX).write_text(json.dumps({"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}, indent=1))

    write_folder(Path(folder), fill)


def from_pretrained(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    classes: Iterable[type[nn.Module]] = (),
    **hub: Unpack[HubOptions],
) -> nn.Module:
    """The module saved in a folder or Hub repository, in eval mode; `pretrained_from` tells where it came from, `about` what was said of it.

    The options revision, token, cache_dir, local_files_only, endpoint and force_download (for what was cached damaged) go to
    huggingface_hub, and one commit is fetched whole.
    A class of your own is passed in `classes`; a name in a file never leads to an import. The recipe is read and built on the meta
    device and compared with the files' headers before a tensor is allocated; then checksums are verified. Thresholds stay float32 under a narrower
    `dtype`. Raises RecipeError for a recipe or keys that do not fit, IntegrityError for missing or changed files.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for and torch sees no GPU; load with device='cpu'")
    folder, source = Path(name), str(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name), allow_patterns=[CONFIG, ABOUT, CARD, MANIFEST, INDEX, "*.safetensors"], **hub))
        except HFValidationError as error:
            raise IntegrityError(
                f"there is no folder {str(name)!r}, and no Hub repository can have that name; give a folder or 'owner/name'"
            ) from error
        source = f"{name}@{folder.name}"
    recipe = _read_config(folder)
    with torch.device("meta"):
        module = build(recipe, (*KNOWN, *classes))
    files = _weight_files(folder)
    _compare(_own_tensors(module), _headers(files), folder)
    verify_folder(folder)
    tensors = {key: tensor for file in files for key, tensor in load_file(file, device=str(device)).items()}
    module.load_state_dict(tensors, strict=False, assign=True)  # every key was accounted for by _compare; aliases follow their module
    unsaved = [key for key, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if unsaved:
        raise RecipeError(
            f"{', '.join(unsaved)} of {type(module).__name__} are made in a constructor and not saved; register them as persistent buffers"
        )
    about = strict_json(folder / ABOUT) if (folder / ABOUT).is_file() else {}
    module.pretrained_from, module.about = source, about  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]  # plain values beside the module's own
    module.eval()
    return module if dtype is None else module.to(dtype)


def push_to_hub(
    module: nn.Module,
    repo_id: str,
    *,
    about: Mapping[str, Any] | None = None,
    commit_message: str = "Upload with fmxnn",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> str:
    """Saves and uploads in one commit, to a branch or as a pull request where asked; gives the commit's or pull request's address."""
    api = HfApi(endpoint=endpoint, token=token)
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "module"
        save_pretrained(module, folder, about=about)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            delete_patterns="*.safetensors",
        )
    return done.pr_url or done.commit_url


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
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
    if path.stat().st_size > MAX_CONFIG:
        raise RecipeError(f"{path} has {path.stat().st_size:,} bytes, and a config has at most {MAX_CONFIG:,}")
    config = strict_json(path)
    if not isinstance(config, dict) or set(cast("dict[str, Any]", config)) != {"fmxnn", "module"}:
        got = ", ".join(sorted(cast("dict[str, Any]", config))) if isinstance(config, dict) else type(config).__name__
        raise RecipeError(f"{path} needs the keys fmxnn and module and no other, got {got or 'none'}")
    tree = cast("dict[str, Any]", config)
    check_tree(tree["module"])
    _check_version(tree["fmxnn"], path)
    return cast("Mapping[str, Any]", tree["module"])


def _check_version(wrote: object, path: Path) -> None:
    if not isinstance(wrote, str) or not (match := re.match(r"(\d+)\.(\d+)\b", wrote)):
        raise RecipeError(f"{path} names no version of fmxnn, got {wrote!r}")
    theirs = tuple(map(int, match.groups()))
    if theirs > tuple(map(int, __version__.split(".")[:2])):
        raise RecipeError(f"{path} was written by fmxnn {wrote}, and this is {__version__}; upgrade: pip install -U fmxnn")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise IntegrityError(f"{folder} has neither {WEIGHTS} nor {INDEX}; fetch or save the folder again")
    index = strict_json(folder / INDEX)
    names: object = cast("dict[str, Any]", index).get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(
        isinstance(file, str) and _SHARD.fullmatch(file) for file in cast("dict[str, Any]", names).values()
    ):
        raise IntegrityError(f"{folder / INDEX} names files that are no shards of this folder; fetch or save the folder again")
    return [folder / name for name in sorted(set(cast("dict[str, str]", names).values()))]


def _headers(files: list[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in cast("Iterable[str]", file.keys()):
                    part = file.get_slice(key)
                    found[key] = (tuple(part.get_shape()), str(part.get_dtype()))
        except (OSError, SafetensorError) as error:
            raise IntegrityError(f"{path} cannot be read: {error}; fetch or save the folder again") from error
    return found


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
        raise RecipeError(f"the weights in {folder} do not fit its config.json: {'; '.join(sorted(faults))}; save them together again")
