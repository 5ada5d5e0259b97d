"""Crosscoders that llamascopium (language-model-saes) wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fmxnn.core.errors import FormatError
from fmxnn.core.excerpt import excerpt
from fmxnn.gates.decoupled import Decoupled
from fmxnn.gates.jump_relu import JumpReLU
from fmxnn.gates.top_k import TopK
from fmxnn.saving.formats.dense import Gate, dense, normalised, rows
from fmxnn.saving.formats.format import Format, Options, Reading, no_scale, peek, setting, settings
from fmxnn.saving.formats.tensors import Tensors

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
CHECKPOINTS, ENDS = ("pruned", "final"), ("safetensors", "pt", "dcp")
NORM, THRESHOLD = "dataset_average_activation_norm.", "activation_function.log_jumprelu_threshold"
SCALED, FOLDED, UNSCALED = "dataset-wise", "inference", "none"
LAYOUT = {
    "W_E": "layers d_model latents",
    "b_E": "layers latents",
    "W_D": "layers latents d_model",
    "b_D": "layers d_model",
}


def _recognises(folder: Path) -> bool:
    return _weights(folder).exists() and peek(_config(folder)).get("sae_type") == "crosscoder"


def _config(folder: Path) -> Path:
    """The settings; those of a folder of checkpoints lie in the folder above."""
    return (folder.parent if _is_checkpoints(folder) else folder) / CONFIG


def _weights(folder: Path) -> Path:
    """The file that the library would take."""
    names = [f"{stem}.{end}" for stem in CHECKPOINTS for end in ENDS] if _is_checkpoints(folder) else [WEIGHTS]
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])


def _is_checkpoints(folder: Path) -> bool:
    return folder.name == "checkpoints" and not (folder / CONFIG).is_file()


def _read(folder: Path, options: Options) -> Reading:
    config, weights = _config(folder), _weights(folder)
    said = settings(config)
    if weights.suffix != ".safetensors":
        raise FormatError(
            f"{weights} is a checkpoint for training; save it as {WEIGHTS} with the library that wrote it: "
            "SparseDictionary.from_pretrained(...)"
            ".save_pretrained(...)"
        )
    no_scale(options, str(weights))
    hooks: list[str] = setting(said, "hook_points", list, config)
    tensors = Tensors(weights)
    gate = _gate(said, config)
    norms = {f"{NORM}{hook}": "" for hook in hooks}
    scaled = _is_scaled(said, config)
    stated = {"layers": len(hooks), "d_model": setting(said, "d_model", int, config)}
    thresholds = {THRESHOLD: "latents"} if str(said.get("act_fn")).lower() == "jumprelu" else {}
    sizes = tensors.check({**LAYOUT, **thresholds, **(norms if scaled else {})}, optional=norms, sizes=stated)
    module = dense(tensors, sizes, gate, options)
    tensors.fill(rows(module.encoder.weight).permute(1, 2, 0), "W_E")
    tensors.fill(rows(module.decoder.weight).transpose(0, 1), "W_D")
    tensors.fill(module.decoder.bias, "b_D")
    with torch.no_grad():
        module.encoder.bias.copy_(tensors.read("b_E").double().sum(0))
        if thresholds:  # one module in all places
            cast("Tensor", module.get_submodule("encoder.sparsifier.sparsifiers.0").threshold).copy_(
                tensors.read(THRESHOLD).exp()
            )
    about = {"hook_points": hooks, "folded": "the encoder's biases, one a layer, into their sum"}
    if not scaled:
        return Reading(module, about)
    scale = torch.stack([sizes["d_model"] ** 0.5 / tensors.read(norm).double() for norm in norms])
    return Reading(
        normalised(module, str(weights), scale),
        {**about, "folded": f"{about['folded']}; scales are kept beside it, and fx.fold folds them"},
    )


def _gate(said: Mapping[str, Any], path: Path) -> Gate:
    """Each layer chooses by `u ||W_D||` of its own. A ReLU chooses alike for all of them."""
    act = str(said.get("act_fn", "relu")).lower()
    if said.get("sparsity_include_decoder_norm", True) is not True:
        raise FormatError(
            f"{path} says sparsity_include_decoder_norm={excerpt(said['sparsity_include_decoder_norm'])}; crosscoders "
            "of llamascopium have true"
        )
    if act == "relu":
        return lambda _: nn.ReLU()
    if act == "jumprelu":
        return lambda decoder: Decoupled(*[JumpReLU(decoder.latents)] * decoder.layers, weight=decoder)
    if act == "topk":
        k: int = setting(said, "top_k", int, path)
        return lambda decoder: Decoupled(*[TopK(k)] * decoder.layers, weight=decoder)
    raise FormatError(
        f"{path} says act_fn={excerpt(act)}, and known are 'relu', 'topk' and 'jumprelu'; a batchtopk is saved as "
        "jumprelu for inference"
    )


def _is_scaled(said: Mapping[str, Any], path: Path) -> bool:
    """Whether each layer is brought to a mean norm of sqrt(d_model) first. What the library folded itself scaled the
    biases alone and is refused.
    """
    kind = said.get("norm_activation", SCALED)
    if kind == FOLDED:
        raise FormatError(
            f"{path} says norm_activation={FOLDED!r}: llamascopium folds its scales into biases alone, which is wrong "
            "for layers of unequal norms; fetch "
            f"the checkpoint from before, which says {SCALED!r}, or write {UNSCALED!r} where there never were scales"
        )
    if kind not in (SCALED, UNSCALED):
        each = {
            "token-wise": "by the norm of each token",
            "batch-wise": "by the mean norm of the batch that a token comes in",
        }
        how = f", which scales {each[kind]}, as no weights can" if isinstance(kind, str) and kind in each else ""
        raise FormatError(
            f"{path} says norm_activation={excerpt(kind)}{how}; known are {SCALED!r} and {UNSCALED!r}: normalise the "
            "activations yourself and write "
            f"{UNSCALED!r} there"
        )
    return kind == SCALED


LLAMASCOPIUM = Format(
    "llamascopium",
    f"{WEIGHTS} with {CONFIG} that says sae_type crosscoder, or its folder checkpoints",
    _recognises,
    _read,
)
