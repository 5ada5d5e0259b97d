"""Crosscoders and cross-layer transcoders that crosscode wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fmxnn.core.errors import FormatError
from fmxnn.core.excerpt import excerpt
from fmxnn.core.kinds import is_object
from fmxnn.gates.group_max import SignedGroupMax
from fmxnn.gates.jump_relu import JumpReLU
from fmxnn.gates.signed import SignedBatchTopK, SignedTopK
from fmxnn.saving.formats.dense import Gate, dense, rows, scaled_by_caller
from fmxnn.saving.formats.format import Format, Options, Reading, no_scale, peek, setting, settings
from fmxnn.saving.formats.tensors import Tensors

CONFIG, WEIGHTS = "model_cfg.yaml", "model.pt"
READ, WRITTEN, THRESHOLD = "_W_enc_XiDiL", "_W_dec_LXoDo", "_activation_fn.log_threshold_L"
JUMP = "AnthropicSTEJumpReLUActivation"


def _recognises(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() and "activation_fn" in peek(folder / CONFIG)


def _read(folder: Path, options: Options) -> Reading:
    config, weights = folder / CONFIG, folder / WEIGHTS
    said = settings(config)
    activation: dict[str, Any] = setting(said, "activation_fn", dict, config)
    tensors = Tensors(weights)
    biases = {"b_enc_L": said.get("use_encoder_bias", True), "_b_dec_XoDo": said.get("use_decoder_bias", True)}
    sizes = _check(tensors, said, activation, biases)
    module = dense(tensors, sizes, _gate(activation, config, sizes["latents"]), options)
    read, written = rows(module.encoder.weight), rows(module.decoder.weight)
    tensors.fill(read.permute(1, 2, 0).view(tensors.shape(READ) or ()), READ)
    tensors.fill(written.view(tensors.shape(WRITTEN) or ()), WRITTEN)
    with torch.no_grad():
        for key, bias in (("b_enc_L", module.encoder.bias), ("_b_dec_XoDo", module.decoder.bias)):
            tensors.fill(bias.view(tensors.shape(key) or ()), key) if biases[key] else bias.zero_()
        if THRESHOLD in tensors:
            cast("Tensor", module.encoder.sparsifier.threshold).copy_(tensors.read(THRESHOLD).exp())
    if bool(tensors.read("is_folded")):
        no_scale(options, str(weights))
        return Reading(module, {"folded": "scaling factors of every input and output, by crosscode as it saved them"})
    return Reading(scaled_by_caller(module, options, weights), {"folded": "nothing"})


def _check(
    tensors: Tensors, said: Mapping[str, Any], activation: Mapping[str, Any], biases: Mapping[str, bool]
) -> dict[str, int]:
    """Layers are whatever crosscode stacks, models and hook points, in one axis."""
    inner, outer = (len(tensors.shape(key) or (0, 0)) - 2 for key in (READ, WRITTEN))
    stacked = " ".join(f"axis{i}" for i in range(inner))
    written = " ".join(f"{'axis' if inner == outer else 'written'}{i}" for i in range(outer))
    layout = {
        READ: f"{stacked} d_model latents",
        WRITTEN: f"latents {written} d_model",
        "is_folded": "",
        "folded_scaling_factors_in_Xi": stacked,
        "folded_scaling_factors_out_Xo": written,
        **({"b_enc_L": "latents"} if biases["b_enc_L"] else {}),
        **({"_b_dec_XoDo": f"{written} d_model"} if biases["_b_dec_XoDo"] else {}),
        **({THRESHOLD: "latents"} if activation.get("classname") == JUMP else {}),
    }
    stated = {"d_model": said.get("d_model"), "latents": said.get("n_latents")}
    sizes = tensors.check(layout, sizes={word: size for word, size in stated.items() if isinstance(size, int)})
    sizes["layers"], sizes["writes"] = (
        torch.Size(sizes[word] for word in words.split()).numel() for words in (stacked, written)
    )
    return sizes


def _gate(activation: Mapping[str, Any], path: Path, latents: int) -> Gate:
    """The largest are kept whatever their sign: crosscode takes no ReLU before them."""
    name, given = activation.get("classname"), activation.get("cfg")
    options = given if is_object(given) else {}
    if name == "ReLUActivation":
        return lambda _: nn.ReLU()
    if name == JUMP:
        return lambda _: JumpReLU(latents)
    counted = {"TopkActivation": "k", "BatchTopkActivation": "k_per_example", "GroupMaxActivation": "k_groups"}
    if not isinstance(name, str) or name not in counted:
        raise FormatError(
            f"{path} says activation_fn={excerpt(name)}, and known are ReLUActivation, {JUMP}, {', '.join(counted)}"
        )
    k: int = setting(options, counted[name], int, path)
    if not 1 <= k <= latents:
        raise FormatError(f"{path} says {counted[name]}={k}, and the weights have latents={latents}; fetch both again")
    made = {"TopkActivation": SignedTopK, "BatchTopkActivation": SignedBatchTopK}
    return lambda _: SignedGroupMax(k, latents) if name == "GroupMaxActivation" else made[name](k)


CROSSCODE = Format("crosscode", f"{WEIGHTS} with {CONFIG} that has activation_fn", _recognises, _read)
