"""Sparse autoencoders of one layer that dictionary_learning wrote."""

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from fmxnn.core.errors import FormatError
from fmxnn.core.excerpt import excerpt
from fmxnn.gates.top_k import BatchTopK, TopK
from fmxnn.saving.formats.dense import dense, rows
from fmxnn.saving.formats.format import Format, Options, Reading, no_scale, setting, settings
from fmxnn.saving.formats.one_layer import centred, what_became
from fmxnn.saving.formats.tensors import Tensors

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
    weights, threshold = folder / WEIGHTS, float(tensors.read("threshold"))
    gate = _gate(name, int(tensors.read("k")), threshold, sizes["latents"], weights)
    module = dense(tensors, sizes | {"layers": 1}, lambda _: gate, options)
    tensors.fill(rows(module.encoder.weight)[:, 0], "encoder.weight")
    tensors.fill(module.encoder.bias, "encoder.bias")
    tensors.fill(rows(module.decoder.weight)[:, 0].T, "decoder.weight")
    about = {
        "base_model": said.get("lm_name"),
        "hook_point": said.get("submodule_name"),
        "folded": what_became([], ["b_dec"]),
    }
    if isinstance(gate, BatchTopK):
        tensors.fill(gate.threshold, "threshold")
    elif threshold >= 0:
        about["threshold"] = threshold
    return Reading(centred(module, tensors), about)


def _gate(name: str, k: int, threshold: float, latents: int, weights: Path) -> nn.Module:
    """What the class itself does where it is not told otherwise: each token's k largest, or the codes above the
    threshold.
    """
    if not 1 <= k <= latents:  # the buffer's, since the setting may be where annealing started
        raise FormatError(
            f"{weights} holds k={k}, and the weights have {latents} latents; ask who wrote it, or take another file"
        )
    if name == "AutoEncoderTopK":
        return TopK(k)
    if not threshold >= 0:
        warnings.warn(
            f"{weights} has a threshold that was never set, so every positive code is kept; calibrate it: "
            "encoder.sparsifier.calibrate(pre)",
            stacklevel=2,
        )
    return BatchTopK(k)


DICTIONARY_LEARNING = Format("dictionary_learning", f"{CONFIG} with {WEIGHTS}", _recognises, _read)
