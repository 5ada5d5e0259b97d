"""Crosscoders that llamascopium (language-model-saes) wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmxnn.formats.dense import dense, normalised, rows
from fmxnn.formats.format import Format, FormatError, Options, Reading, no_scale, peek, setting, settings
from fmxnn.formats.tensors import Tensors

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
NORM, THRESHOLD = "dataset_average_activation_norm.", "activation_function.log_jumprelu_threshold"
SCALED, FOLDED, UNSCALED = "dataset-wise", "inference", "none"
LAYOUT = {"W_E": "layers d_model latents", "b_E": "layers latents", "W_D": "layers latents d_model", "b_D": "layers d_model"}


def _recognises(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() and peek(folder / CONFIG).get("sae_type") == "crosscoder"


def _read(folder: Path, options: Options) -> Reading:
    config, weights = folder / CONFIG, folder / WEIGHTS
    said = settings(config)
    no_scale(options, str(weights))
    hooks: list[str] = setting(said, "hook_points", list, config)
    tensors = Tensors(weights)
    _check_gate(said, config)
    norms = {f"{NORM}{hook}": "" for hook in hooks}
    scaled = _is_scaled(said, config)
    stated = {"layers": len(hooks), "d_model": setting(said, "d_model", int, config)}
    sizes = tensors.check({**LAYOUT, **(norms if scaled else {})}, optional=norms, sizes=stated)
    module = dense(tensors, sizes, lambda _: nn.ReLU(), options)
    tensors.fill(rows(module.encoder.weight).permute(1, 2, 0), "W_E")
    tensors.fill(rows(module.decoder.weight).transpose(0, 1), "W_D")
    tensors.fill(module.decoder.bias, "b_D")
    with torch.no_grad():
        module.encoder.bias.copy_(tensors.read("b_E").double().sum(0))
    about = {"hook_points": hooks, "folded": "the encoder's biases, one a layer, into their sum"}
    if not scaled:
        return Reading(module, about)
    scale = torch.stack([sizes["d_model"] ** 0.5 / tensors.read(norm).double() for norm in norms])
    return Reading(normalised(module, scale), {**about, "folded": f"{about['folded']}; scales are kept beside it, and fx.fold folds them"})


def _check_gate(said: Mapping[str, Any], path: Path) -> None:
    act = str(said.get("act_fn", "relu")).lower()
    if act != "relu":  # each layer then has codes of its own
        raise FormatError(f"{path} says act_fn={act!r}, and known is 'relu'")


def _is_scaled(said: Mapping[str, Any], path: Path) -> bool:
    """Whether each layer is brought to a mean norm of sqrt(d_model) first. What the library folded itself scaled the biases alone and is refused."""
    kind = said.get("norm_activation", SCALED)
    if kind == FOLDED:
        raise FormatError(
            f"{path} says norm_activation={FOLDED!r}: llamascopium folds its scales into biases alone, which is wrong for layers of unequal norms; fetch "
            f"the checkpoint from before, which says {SCALED!r}, or write {UNSCALED!r} where there never were scales"
        )
    if kind not in (SCALED, UNSCALED):
        raise FormatError(
            f"{path} says norm_activation={kind!r}, which scales each token on its own; known are {SCALED!r} and {UNSCALED!r}"
        )
    return kind == SCALED


LLAMASCOPIUM = Format("llamascopium", f"{WEIGHTS} with {CONFIG} that says sae_type crosscoder", _recognises, _read)
