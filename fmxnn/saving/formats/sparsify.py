"""Sparse autoencoders and transcoders of one hookpoint that sparsify wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fmxnn.coders.skip import SkipCrosscoder
from fmxnn.core.errors import FormatError
from fmxnn.core.excerpt import excerpt
from fmxnn.gates.group_max import GroupMax
from fmxnn.gates.top_k import TopK
from fmxnn.saving.formats.dense import rows
from fmxnn.saving.formats.format import Format, Options, Reading, allocate, no_scale, setting, settings
from fmxnn.saving.formats.one_layer import centred, dictionary, latents_kept, what_became
from fmxnn.saving.formats.tensors import Tensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
LAYOUT = {
    "encoder.weight": "latents d_model",
    "encoder.bias": "latents",
    "W_dec": "latents d_model",
    "b_dec": "d_model",
}


def _recognises(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def _read(folder: Path, options: Options) -> Reading:
    config = folder / CONFIG
    said = settings(config)
    no_scale(options, str(folder))
    transcode, skip = bool(said.get("transcode", False)), bool(said.get("skip_connection", False))
    tensors = Tensors(folder / WEIGHTS)
    sizes = tensors.check(LAYOUT | ({"W_skip": "d_model d_model"} if skip else {}), sizes=_stated(said, config))
    gate = _gate(said, config, sizes["latents"])
    module = allocate(lambda: dictionary(gate, sizes), tensors.fitting_dtype(options), options.device)
    tensors.fill(rows(module.encoder.weight)[:, 0], "encoder.weight")
    tensors.fill(module.encoder.bias, "encoder.bias")
    tensors.fill(rows(module.decoder.weight)[:, 0], "W_dec")
    tensors.fill(module.decoder.bias[0], "b_dec")
    # a transcoder's b_dec is of what it writes, and is not subtracted from what it reads
    whole = module if transcode else centred(module, tensors)
    about = {"folded": what_became([], [] if transcode else ["b_dec"])}
    if not skip:
        return Reading(whole, about)
    with options.device:
        beside = SkipCrosscoder(whole).to(module.encoder.bias.dtype).eval()
    tensors.fill(beside.skip[0].T, "W_skip")
    return Reading(beside, about)


def _stated(said: Mapping[str, Any], config: Path) -> dict[str, int]:
    d_model: int = setting(said, "d_in", int, config)
    latents = said.get("num_latents") or d_model * setting(said, "expansion_factor", int, config)
    return {"d_model": d_model, "latents": latents} if isinstance(latents, int) else {"d_model": d_model}


def _gate(said: Mapping[str, Any], config: Path, latents: int) -> nn.Module:
    activation = said.get("activation", "topk")
    if said.get("signed"):
        raise FormatError(
            f"{config} says signed=True, which keeps the largest magnitudes, and SignedTopK keeps the largest values; "
            "build a Crosscoder of its tensors with a gate of your own"
        )
    k = latents_kept(said, config, latents)
    if activation == "groupmax" and latents % k == 0:
        return GroupMax(k, latents)
    if activation != "topk":
        raise FormatError(
            f"{config} says activation={excerpt(activation)} and k={k}, and known are topk, and groupmax where k "
            f"divides latents={latents}"
        )
    return TopK(k)


SPARSIFY = Format("sparsify", f"{CONFIG} with {WEIGHTS}", _recognises, _read)
