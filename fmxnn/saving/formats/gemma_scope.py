"""Weakly causal crosscoders and cross-layer transcoders of Gemma Scope 2, a file a layer."""

from pathlib import Path
from typing import Any, cast

import torch

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.skip import SkipCrosscoder
from fmxnn.core.errors import FormatError
from fmxnn.core.kinds import is_list
from fmxnn.saving.formats.causal import Reader, causal, fitting_dtype, no_others, places, settled
from fmxnn.saving.formats.format import Format, Options, Reading, allocate, no_scale, settings
from fmxnn.saving.formats.tensors import BLOCK, Tensors

CONFIG, WEIGHTS = "config.json", "params_layer_{}.safetensors"
LAYOUT = {
    "w_enc": "d_model latents",
    "b_enc": "latents",
    "threshold": "latents",
    "w_dec": "latents layers d_model",
    "b_dec": "d_model",
}
SKIP = {"affine_skip_connection": "d_model d_model"}


def _recognises(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS.format(0)).is_file()


def _read(folder: Path, options: Options) -> Reading:
    said = settings(folder / CONFIG)
    settled(said, "architecture", ("jump_relu",), folder / CONFIG)
    no_scale(options, str(folder))
    files, sizes = _files(folder, said)
    blocks = [
        Reader(each["latents"], _first_written(tensors, i, each, options))
        for i, (tensors, each) in enumerate(zip(files, sizes, strict=True))
    ]
    d_model, skip = sizes[0]["d_model"], "affine_skip_connection" in files[0]

    def make() -> Crosscoder | SkipCrosscoder:
        plain = causal(blocks, d_model, jump=True)
        return SkipCrosscoder(plain) if skip else plain

    module = allocate(make, fitting_dtype(folder, blocks, d_model, files, options), options.device)
    with torch.no_grad():
        _fill(cast("Crosscoder", module.crosscoder) if isinstance(module, SkipCrosscoder) else module, files, blocks)
        if isinstance(module, SkipCrosscoder):
            for skipped, tensors in zip(module.skip, files, strict=True):
                tensors.fill(skipped, "affine_skip_connection")
    kept = {key: said[key] for key in ("hf_hook_point_in", "hf_hook_point_out", "type", "l0") if key in said}
    return Reading(module, {"base_model": said.get("model_name"), **kept, "folded": "nothing"})


def _files(folder: Path, said: dict[str, Any]) -> tuple[list[Tensors], list[dict[str, int]]]:
    """Every layer's file, checked, and its sizes; the first says how many there are."""
    first = Tensors(folder / WEIGHTS.format(0))
    layout = LAYOUT | (SKIP if said.get("affine_connection") or "affine_skip_connection" in first else {})
    sizes = [first.check(layout)]
    shared = {word: sizes[0][word] for word in ("layers", "d_model")}
    paths = [folder / WEIGHTS.format(i) for i in range(shared["layers"])]
    no_others(folder, WEIGHTS.format("*"), paths)
    hooks = said["hf_hook_point_out"] if is_list(said.get("hf_hook_point_out")) else paths
    if len(hooks) != len(paths):
        raise FormatError(
            f"{folder / CONFIG} names {len(hooks)} hook points, and the tensors are of {len(paths)} layers; fetch the "
            "folder again"
        )
    files = [first, *map(Tensors, paths[1:])]
    return files, sizes + [tensors.check(layout, sizes=shared) for tensors in files[1:]]


def _first_written(tensors: Tensors, layer: int, sizes: dict[str, int], options: Options) -> int:
    """The layer itself, as earlier ones are zeros in a weakly causal decoder; or 0 where they are not, so that nothing
    is lost.
    """
    if not layer or options.device.type == "meta":
        return layer
    step = max(BLOCK // (sizes["layers"] * sizes["d_model"] * tensors.dtype.itemsize), 1)
    for start in range(0, sizes["latents"], step):
        earlier = torch.empty(min(step, sizes["latents"] - start), layer, sizes["d_model"], dtype=tensors.dtype)
        tensors.fill(earlier, "w_dec", start=(start, 0, 0))
        if earlier.any():
            return 0
    return layer


def _fill(module: Crosscoder, files: list[Tensors], blocks: list[Reader]) -> None:
    for place, tensors, block in zip(places(module), files, blocks, strict=True):
        tensors.fill(place.reads.T, "w_enc")
        tensors.fill(place.bias, "b_enc")
        if place.threshold is not None:
            tensors.fill(place.threshold, "threshold")
        tensors.fill(place.writes, "w_dec", start=(0, block.first, 0))
        tensors.fill(place.written_bias, "b_dec")


GEMMA_SCOPE = Format("gemma_scope", f"{CONFIG} with {WEIGHTS.format('0')} and so on", _recognises, _read)
