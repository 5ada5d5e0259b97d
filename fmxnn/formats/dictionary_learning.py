"""Sparse autoencoders of one layer that dictionary_learning wrote."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmxnn.excerpt import excerpt
from fmxnn.formats.dense import dense, rows
from fmxnn.formats.dictionary import centre
from fmxnn.formats.format import Format, FormatError, Options, Reading, no_scale, setting, settings
from fmxnn.formats.tensors import Tensors
from fmxnn.sparsifiers import BatchTopK, TopK

CONFIG, WEIGHTS = "config.json", "ae.pt"
LAYOUT = {
    "encoder.weight": "latents d_model",
    "encoder.bias": "latents",
    "decoder.weight": "d_model latents",
    "b_dec": "d_model",
    "k": "",
    "threshold": "",
}
CLASSES = ("BatchTopKSAE", "AutoEncoderTopK")


def _recognises(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def _read(folder: Path, options: Options) -> Reading:
    config = folder / CONFIG
    said: dict[str, Any] = setting(settings(config), "trainer", dict, config)
    name = setting(said, "dict_class", str, config)
    if name not in CLASSES:
        raise FormatError(f"{config} says dict_class={excerpt(name)}, and known here are {', '.join(CLASSES)}")
    no_scale(options, str(folder))
    tensors = Tensors(folder / WEIGHTS)
    stated = {"d_model": said.get("activation_dim"), "latents": said.get("dict_size")}
    sizes = tensors.check(LAYOUT, sizes={word: size for word, size in stated.items() if isinstance(size, int)})
    gate = _gate(name, tensors, sizes["latents"], folder / WEIGHTS)
    module = dense(tensors, sizes | {"layers": 1}, lambda _: gate, options)
    with torch.no_grad():
        tensors.fill(rows(module.encoder.weight)[:, 0], "encoder.weight")
        tensors.fill(module.encoder.bias, "encoder.bias")
        tensors.fill(rows(module.decoder.weight)[:, 0].T, "decoder.weight")
        tensors.fill(module.decoder.bias[0], "b_dec")
        centre(module, tensors.read("b_dec").to(options.device))
        if isinstance(module.encoder.sparsifier, BatchTopK):
            tensors.fill(module.encoder.sparsifier.threshold, "threshold")
    return Reading(module, {"base_model": said.get("lm_name"), "hook_point": said.get("submodule_name"), "folded": "b_dec"})


def _gate(name: str, tensors: Tensors, latents: int, weights: Path) -> nn.Module:
    """Codes above the threshold; where it was never set, a TopK dictionary keeps each token's k largest and a BatchTopK one every positive."""
    k = int(tensors.read("k"))  # the setting may be where annealing started
    if not 1 <= k <= latents:
        raise FormatError(f"{weights} holds k={k}, and the weights have {latents} latents; fetch it again")
    if float(tensors.read("threshold")) >= 0:
        return BatchTopK(k)
    if name == "AutoEncoderTopK":
        return TopK(k)
    warnings.warn(
        f"{weights} has a threshold that was never set, so every positive code is kept; calibrate it: encoder.sparsifier.calibrate(pre)",
        stacklevel=2,
    )
    return BatchTopK(k)


DICTIONARY_LEARNING = Format("dictionary_learning", f"{CONFIG} with {WEIGHTS}", _recognises, _read)
