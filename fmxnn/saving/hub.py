"""Saving, loading and the Hugging Face Hub."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Unpack

import torch
from huggingface_hub import HfApi, split_torch_state_dict_into_shards
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  # of httpx or httpx2
from safetensors.torch import save_file
from torch import Tensor, nn

from fmxnn.core.errors import RecipeError
from fmxnn.core.excerpt import excerpt
from fmxnn.core.files.integrity import IntegrityError, write_folder
from fmxnn.core.files.manifest import permitted
from fmxnn.core.recipe import check_rebuilds, describe
from fmxnn.core.version import __version__
from fmxnn.saving import formats
from fmxnn.saving.card import about_json, card
from fmxnn.saving.fetching import HubOptions, fetch, fetched_again
from fmxnn.saving.formats.own import ABOUT, CARD, CONFIG, INDEX, WEIGHTS, check_sound, is_saved, own_tensors, read_saved
from fmxnn.saving.known import KNOWN
from fmxnn.training.objective import Objective

SUFFIXES, DEPTHS, NAMED = (".safetensors", ".pt"), ("*/", "*/*/", "*/*/*/"), 8


def save_pretrained(
    module: nn.Module, folder: str | Path, *, about: Mapping[str, Any] | None = None, max_shard_size: str = "5GB"
) -> None:
    """Writes `config.json`, safetensors, a model card and a sha256 manifest into `folder`, all of it or nothing.

    Files of an earlier save there are replaced, and no others. NaN or infinity never replaces an earlier save;
    elsewhere it is saved with a warning. `about` goes into the card and into `about.json`: base_model, layers, text,
    metrics. What is not JSON is written as its `str`. Shared modules are written once and stay shared.

    Raises RecipeError, before anything is written, for a module that cannot be described or built again, and for an
    `about` that could not be read back (deeper than 16 levels, larger than 1 MB). Raises IntegrityError where the
    folder cannot be written or holds other files of those names. Raises LockedError where another process is writing
    there.

    ```python
    fx.save_pretrained(fx.TopK(2), "gate", about={"text": "TinyStories"})
    fx.from_pretrained("gate")  # TopK(k=2), in eval mode
    ```
    """
    _check_module(module)
    said = about_json(about or {})
    config = {"fmxnn": __version__, "module": describe(module)}
    tensors = own_tensors(module)
    check_sound(type(module).__name__, tensors, Path(folder))

    def fill(target: Path) -> None:
        (target / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (target / CARD).write_text(card(module, about or {}), encoding="utf-8")
        (target / ABOUT).write_text(said, encoding="utf-8")
        shards = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
        for name, keys in (
            shards.filename_to_tensors or {WEIGHTS: []}
        ).items():  # ReLU has no tensors and is a file all the same
            save_file(
                {key: tensors[key].detach().contiguous() for key in keys}, target / name, metadata={"format": "pt"}
            )
        if shards.is_sharded:
            (target / INDEX).write_text(
                json.dumps({"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}, indent=1)
            )

    write_folder(Path(folder), fill)


def _check_module(module: nn.Module) -> None:
    """Raises RecipeError for a module that no folder can hold."""
    if isinstance(module, Objective):
        raise RecipeError(
            "a folder holds a module and its recipe, and an objective's terms are functions; save what it trains: "
            "save_pretrained(objective.crosscoder, folder)"
        )
    check_rebuilds(module)


@permitted()
def from_pretrained(
    name: str | Path,
    *,
    subfolder: str = "",
    format: str | None = None,
    input_scale: Tensor | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    classes: Iterable[type[nn.Module]] = (),
    **hub: Unpack[HubOptions],
) -> nn.Module:
    """The module in a folder or Hub repository, in eval mode.

    `pretrained_from` then says where it came from, and `about` what was said of it. Another library's folder is
    recognised by its files, or read as `format`. `input_scale` (`layers`) is for formats that do not save it. `device`
    "meta" reads headers alone. Thresholds stay float32 under a narrower `dtype`.

    A class of your own is passed in `classes`; a name in a file never leads to an import. Headers are compared before a
    tensor is allocated, and checksums, where there are any, before it is used.

    `revision`, `token`, `cache_dir`, `local_files_only`, `endpoint` and `force_download` (for a damaged cache) go to
    huggingface_hub. One commit of the one folder is fetched whole, within `timeout` seconds where they are given.

    Raises RecipeError or FormatError for recipes, keys and folders that do not fit, IntegrityError for missing or
    changed files, TimeoutError, and MemoryError.
    """
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for and torch sees no GPU; load with device='cpu'")
    options = formats.options(dtype, where, input_scale)
    root, source = fetch(name, subfolder, hub)
    folder = _inside(root, subfolder)
    _check_folder(folder, source, subfolder, lambda: _folders(root, str(name), hub))
    source = f"{source}/{subfolder}" if subfolder else source
    with fetched_again(name, folder):
        foreign = formats.format_of(folder, format, own=is_saved(folder))
        if foreign is None:
            formats.no_scale(options, str(folder))
            module, about = read_saved(folder, (*KNOWN, *classes), where)
            module = module if dtype is None else module.to(dtype)
        else:
            module, about = foreign.read(folder, options)
            about = {"format": foreign.name, **about}
    vars(module).update(pretrained_from=source, about=about)  # plain values beside the module's own
    return module


def _inside(root: Path, subfolder: str) -> Path:
    """The folder in `root`. Raises IntegrityError for one that is elsewhere, by its name or through a link."""
    folder = root / subfolder
    if "\0" in subfolder or not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(root)):
        raise IntegrityError(f"subfolder={excerpt(subfolder)} leads out of {root}; give the name of a folder inside it")
    return folder


def _check_folder(folder: Path, source: str, subfolder: str, others: Callable[[], list[str]]) -> None:
    """Raises IntegrityError for a folder that is not there, and for one without weights that has folders with weights,
    naming those most like it.
    """
    there = folder.is_dir()
    if there and (is_saved(folder) or any(path.suffix in SUFFIXES for path in folder.iterdir())):
        return
    held = others()
    near = get_close_matches(subfolder, held, n=NAMED, cutoff=0) if subfolder else held[:NAMED]
    listed = ", ".join(map(repr, near)) + (f" and {len(held) - len(near)} more" if len(held) > len(near) else "")
    way_out = f"subfolder= can be {listed}" if held else "no folder of it holds any"
    if subfolder and not there:
        raise IntegrityError(f"{source} has no folder {subfolder!r} with weights; {way_out}")
    if held or not there:  # one that holds other things than weights is told what it holds
        raise IntegrityError(f"{source} holds no weights{f' in {subfolder!r}' if subfolder else ''}; {way_out}")


def _folders(root: Path, name: str, hub: HubOptions) -> list[str]:
    """The folders below with weights in them; of a Hub repository those it has, or where it cannot be asked those that
    were fetched.
    """
    files: list[str] = []
    if not Path(name).is_dir() and not hub.get("local_files_only"):
        with suppress(OSError, HTTPError):
            files = HfApi(endpoint=hub.get("endpoint"), token=hub.get("token")).list_repo_files(
                name, revision=hub.get("revision")
            )
    paths = (
        map(PurePosixPath, files)
        if files
        else (path.relative_to(root) for depth in DEPTHS for path in root.glob(f"{depth}*"))
    )
    return sorted({path.parent.as_posix() for path in paths if path.suffix in SUFFIXES} - {"."})


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
    """Saves and uploads in one commit, and gives the address of the commit or pull request.

    It goes to the branch `revision`, or with `create_pr` into a pull request.
    """
    api = HfApi(endpoint=endpoint, token=token)
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "module"
        save_pretrained(module, folder, about=about)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        try:
            done = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                delete_patterns="*.safetensors",
            )
        except (OSError, RuntimeError, HTTPError) as error:
            error.add_note(
                f"{repo} is as it was, or has all of the push where only the answer was lost: one commit is whole or "
                "absent; push again"
            )
            raise
    return done.pr_url or done.commit_url
