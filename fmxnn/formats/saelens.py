"""Sparse autoencoders of one layer that SAELens 6 and later wrote."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmxnn.coders import Crosscoder
from fmxnn.excerpt import excerpt
from fmxnn.formats.dense import dense, rows
from fmxnn.formats.dictionary import centre, latents_kept
from fmxnn.formats.format import Format, FormatError, Options, Reading, no_scale, peek, setting, settings
from fmxnn.formats.tensors import Tensors
from fmxnn.normalisation import Normalisation
from fmxnn.sparsifiers import JumpReLU, TopK

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LAYOUT = {"W_enc": "d_model latents", "b_enc": "latents", "W_dec": "latents d_model", "b_dec": "d_model"}
ARCHITECTURES = ("standard", "topk", "jumprelu")


def is_poly(said: Mapping[str, Any]) -> bool:
    """Whether these are the settings of a PolySAE, which has the same files."""
    return "poly_order" in said or str(said.get("architecture")).startswith("poly")


def _recognises(folder: Path) -> bool:
    said = peek(folder / CONFIG)
    return (folder / WEIGHTS).is_file() and not is_poly(said) and not {"architecture", "d_sae"}.isdisjoint(said)


def _read(folder: Path, options: Options) -> Reading:
    config = folder / CONFIG
    said = settings(config)
    architecture = architecture_of(said, config, ARCHITECTURES)
    tensors = Tensors(folder / WEIGHTS)
    sizes = tensors.check(layout(architecture), sizes=stated(said))
    scale = input_scale(said, config, options)
    module = dense(tensors, sizes | {"layers": 1}, lambda _: gate_of(architecture, said, config, sizes["latents"]), options)
    tensors.fill(rows(module.decoder.weight)[:, 0], "W_dec")
    folded = fill_encoder(module, tensors, said)
    if said.get("rescale_acts_by_decoder_norm"):
        _take_in_norms(module)
        folded.append("decoder norms")
    if scale is not None:
        _take_in_scale(module, scale)
        folded.append("input_scale")
    return Reading(module, about(said, folded))


def architecture_of(said: Mapping[str, Any], config: Path, known: tuple[str, ...]) -> str:
    """The architecture, if it is one of these and nothing in the settings changes what it computes. Raises FormatError, naming the setting."""
    architecture: str = setting(said, "architecture", str, config)
    if architecture not in known:
        raise FormatError(f"{config} says architecture={excerpt(architecture)}, and known here are {', '.join(known)}")
    older = {"finetuning_scaling_factor": (False, None), "activation_fn": ("topk" if architecture.endswith("topk") else "relu", None)}
    for key, plain in older.items():
        if said.get(key) not in plain:
            raise FormatError(f"{config} says {key}={excerpt(said[key])}, which SAELens 6 no longer has; save it again with SAELens 6")
    return architecture


def layout(architecture: str) -> dict[str, str]:
    """Which tensors an architecture has."""
    return LAYOUT | ({"threshold": "latents"} if architecture.endswith("jumprelu") else {})


def stated(said: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that the settings name, against which the tensors are checked."""
    known = {"d_model": said.get("d_in"), "latents": said.get("d_sae")}
    return {word: size for word, size in known.items() if isinstance(size, int)}


def gate_of(architecture: str, said: Mapping[str, Any], config: Path, latents: int) -> nn.Module:
    """The gate of an architecture, its thresholds not yet filled."""
    if architecture.endswith("topk"):
        return TopK(latents_kept(said, config, latents))
    return JumpReLU(latents) if architecture.endswith("jumprelu") else nn.ReLU()


def input_scale(said: Mapping[str, Any], config: Path, options: Options) -> float | None:
    """What activations were multiplied by in training, None for nothing; or, with a warning, on the meta device where nobody says.

    Raises FormatError where the settings ask for more than one number can do.
    """
    how = said.get("normalize_activations") or "none"
    if how == "none":
        no_scale(options, str(config))
        return None
    if how != "expected_average_only_in":
        raise FormatError(
            f"{config} says normalize_activations={excerpt(how)}, which no weights can take in without numbers that the files do not hold; "
            "normalise the activations yourself and write 'none' there"
        )
    if options.input_scale is None:
        lacking = (
            f"{config} says normalize_activations='expected_average_only_in', and not what activations were multiplied by; "
            "give it, sqrt(d_in) / their mean norm: input_scale=torch.tensor([...])"
        )
        if options.device.type != "meta":
            raise FormatError(lacking)
        warnings.warn(lacking, stacklevel=2)  # it can be looked at without
        return None
    checked = Normalisation.of(options.input_scale.reshape(-1), torch.zeros(options.input_scale.numel(), 1))
    if checked.layers != 1:
        raise FormatError(f"{config.parent} reads one layer, and the input_scale is of {checked.layers}; give one number")
    return float(checked.scale)


@torch.no_grad()
def fill_encoder(module: Crosscoder, tensors: Tensors, said: Mapping[str, Any]) -> list[str]:
    """Everything but the decoder's weight, with b_dec folded into the encoder's bias where it is subtracted from the input; what was folded."""
    tensors.fill(rows(module.encoder.weight)[:, 0].T, "W_enc")
    tensors.fill(module.encoder.bias, "b_enc")
    tensors.fill(module.decoder.bias[0], "b_dec")
    if "threshold" in tensors:
        tensors.fill(module.encoder.sparsifier.get_buffer("threshold"), "threshold")
    if not said.get("apply_b_dec_to_input", True):
        return []
    b_dec = module.decoder.bias[0]
    centre(module, b_dec if b_dec.is_meta else tensors.read("b_dec").to(b_dec.device))
    return ["b_dec"]


@torch.no_grad()
def _take_in_norms(module: Crosscoder) -> None:
    """Codes are chosen and shown in units of the decoder's norms: these go from the decoder into the encoder. Zero atoms, which write nothing, stay."""
    norms = module.decoder.weight.norms()[0]
    rows(module.encoder.weight)[:, 0].mul_(norms.unsqueeze(-1))
    module.encoder.bias.mul_(norms)
    rows(module.decoder.weight)[:, 0].div_(norms.where(norms > 0, 1.0).unsqueeze(-1))


@torch.no_grad()
def _take_in_scale(module: Crosscoder, scale: float) -> None:
    """What was trained on scale * x reads and writes x. Pre-activations stay, and thresholds with them."""
    rows(module.encoder.weight)[:, 0].mul_(scale)
    for tensor in (rows(module.decoder.weight)[:, 0], module.decoder.bias):
        tensor.div_(scale)


def about(said: Mapping[str, Any], folded: list[str]) -> dict[str, Any]:
    """What the settings say of the language model, and what was folded."""
    metadata = said.get("metadata")
    known: Mapping[str, Any] = metadata if isinstance(metadata, dict) else said
    return {
        "base_model": known.get("model_name"),
        "hook_point": known.get("hook_name"),
        "folded": ", ".join(folded) or "nothing",
    }


SAELENS = Format("saelens", f"{CONFIG} with architecture, with {WEIGHTS}", _recognises, _read)
