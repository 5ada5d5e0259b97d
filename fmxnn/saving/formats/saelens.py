"""Sparse autoencoders of one layer that SAELens wrote, from version 3 on."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.normalisation import Normalisation
from fmxnn.core.errors import FormatError
from fmxnn.core.excerpt import excerpt
from fmxnn.core.kinds import is_object
from fmxnn.gates.jump_relu import JumpReLU
from fmxnn.gates.top_k import TopK
from fmxnn.saving.formats.dense import dense, normalised, rows
from fmxnn.saving.formats.format import Format, Options, Reading, no_scale, peek, setting, settings
from fmxnn.saving.formats.one_layer import centred, latents_kept, what_became
from fmxnn.saving.formats.tensors import Tensors
from fmxnn.weights.factorized import DenseWeight

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LAYOUT = {"W_enc": "d_model latents", "b_enc": "latents", "W_dec": "latents d_model", "b_dec": "d_model"}
ARCHITECTURES = ("standard", "topk", "jumprelu")
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_GONE = "SAELens 6 no longer computes; use it in the version that wrote it"


def is_poly(said: Mapping[str, Any]) -> bool:
    """Whether these are the settings of a PolySAE, which has the same files."""
    return "poly_order" in said or str(said.get("architecture")).startswith("poly")


def _recognises(folder: Path) -> bool:
    said = peek(folder / CONFIG)
    return (folder / WEIGHTS).is_file() and not is_poly(said) and not {"architecture", "d_sae"}.isdisjoint(said)


def _read(folder: Path, options: Options) -> Reading:
    config = folder / CONFIG
    said = converted(settings(config), config)
    architecture = architecture_of(said, config, ARCHITECTURES)
    tensors = Tensors(folder / WEIGHTS)
    sizes = tensors.check(layout(architecture), optional={"scaling_factor": "latents"}, sizes=stated(said))
    if "scaling_factor" in tensors and bool((tensors.read("scaling_factor") != 1).any()):
        raise FormatError(f"{folder / WEIGHTS} holds a scaling_factor other than one, of a fine-tuning that {_GONE}")
    scale = input_scale(said, config, options)
    module = dense(
        tensors, sizes | {"layers": 1}, lambda _: gate_of(architecture, said, config, sizes["latents"]), options
    )
    tensors.fill(rows(module.decoder.weight)[:, 0], "W_dec")
    fill_encoder(module, tensors)
    rescaled = is_rescaled(said, architecture)
    if rescaled:
        _take_in_norms(module)
    return in_units_of_the_data(module, tensors, said, scale, ["decoder norms"] if rescaled else [])


def converted(said: Mapping[str, Any], config: Path) -> dict[str, Any]:
    """The settings of SAELens 3 to 5 under the names of version 6, as its own conversion reads them.

    Settings of version 6 stay as they are.
    """
    found = {_RENAMED.get(key, key): value for key, value in said.items()}
    found.setdefault("architecture", "standard")
    if isinstance(found.get("normalize_activations"), bool):
        found["normalize_activations"] = "expected_average_only_in" if found["normalize_activations"] else "none"
    if found.get("activation_fn") == "topk":
        found["architecture"] = "topk"
    elif found["architecture"] == "topk" and found.get("activation_fn") == "relu":
        found["activation_fn"] = "topk"  # the architecture decides
    if found["architecture"] == "topk" and found.get("activation_fn_kwargs"):
        k: int = setting(setting(found, "activation_fn_kwargs", dict, config), "k", int, config)
        found["k"] = k
    return found


def architecture_of(said: Mapping[str, Any], config: Path, known: tuple[str, ...]) -> str:
    """The architecture, if it is known here and no setting changes what it computes.

    Raises FormatError, naming the setting.
    """
    architecture: str = setting(said, "architecture", str, config)
    if architecture not in known:
        raise FormatError(f"{config} says architecture={excerpt(architecture)}, and known here are {', '.join(known)}")
    older = {
        "finetuning_scaling_factor": (False, None),
        "activation_fn": ("topk" if architecture.endswith("topk") else "relu", None),
    }
    for key, plain in older.items():
        if said.get(key) not in plain:
            raise FormatError(f"{config} says {key}={excerpt(said[key])}, which {_GONE}")
    return architecture


def is_rescaled(said: Mapping[str, Any], architecture: str) -> bool:
    """Whether latents are chosen in units of the decoder's norms.

    The library reads that setting for TopK alone.
    """
    return bool(said.get("rescale_acts_by_decoder_norm")) and architecture.endswith("topk")


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
    """What activations were multiplied by in training, None for nothing.

    On the meta device it is None, with a warning, where nobody says. Raises FormatError where the settings ask for more
    than one number can do.
    """
    how = said.get("normalize_activations") or "none"
    if how == "none":
        no_scale(options, str(config))
        return None
    if how != "expected_average_only_in":
        raise FormatError(
            f"{config} says normalize_activations={excerpt(how)}, which no weights can take in without numbers that "
            "the files do not hold; "
            "normalise the activations yourself and write 'none' there"
        )
    if options.input_scale is None:
        lacking = (
            f"{config} says normalize_activations='expected_average_only_in', and not what activations were "
            "multiplied by; "
            "give it, sqrt(d_in) / their mean norm: input_scale=torch.tensor([...])"
        )
        if options.device.type != "meta":
            raise FormatError(lacking)
        warnings.warn(lacking, stacklevel=2)  # it can be looked at without
        return None
    checked = Normalisation.of(options.input_scale.reshape(-1), torch.zeros(options.input_scale.numel(), 1))
    if checked.layers != 1:
        raise FormatError(
            f"{config.parent} reads one layer, and the input_scale is of {checked.layers}; give one number"
        )
    return float(checked.scale)


def fill_encoder(module: Crosscoder, tensors: Tensors) -> None:
    """The encoder, thresholds included."""
    tensors.fill(rows(module.encoder.weight)[:, 0].T, "W_enc")
    tensors.fill(module.encoder.bias, "b_enc")
    if "threshold" in tensors:
        tensors.fill(module.encoder.sparsifier.get_buffer("threshold"), "threshold")


def in_units_of_the_data(
    module: Crosscoder, tensors: Tensors, said: Mapping[str, Any], scale: float | None, folded: list[str]
) -> Reading:
    """The dictionary on the model's own activations: its scale and b_dec are kept beside the weights.

    b_dec is also added to the output.
    """
    subtracted = bool(said.get("apply_b_dec_to_input", True))
    kept = [name for name, there in (("b_dec", subtracted), ("input_scale", scale is not None)) if there]
    known = about(said, what_became(folded, kept))
    if subtracted:
        return Reading(centred(module, tensors, scale=scale or 1.0), known)
    tensors.fill(module.decoder.bias[0], "b_dec")
    return Reading(module if scale is None else normalised(module, "input_scale", torch.tensor([scale])), known)


@torch.no_grad()
def _take_in_norms(module: Crosscoder) -> None:
    """Codes are chosen and shown in units of the decoder's norms: these go from the decoder into the encoder. Zero
    atoms, which write nothing, stay.
    """
    norms = module.decoder.weight.norms()[0]
    scale_latents(module, norms)
    lengths = norms.where(norms > 0, 1.0).double()  # so that a product with 1 / length rounds as the quotient does
    cast("DenseWeight", module.decoder.weight).scale_along_("latents", 1 / lengths)


@torch.no_grad()
def scale_latents(module: Crosscoder, by: Tensor) -> None:
    """`latents -> `: multiplies the pre-activation of each latent."""
    cast("DenseWeight", module.encoder.weight).scale_along_("latents", by)
    module.encoder.bias.mul_(by)


def about(said: Mapping[str, Any], folded: str) -> dict[str, Any]:
    """What the settings say of the language model, and what was folded."""
    metadata = said.get("metadata")
    known: Mapping[str, Any] = metadata if is_object(metadata) else said
    return {
        "base_model": known.get("model_name"),
        "hook_point": known.get("hook_name"),
        "folded": folded,
    }


SAELENS = Format("saelens", f"{CONFIG} with architecture or d_sae, with {WEIGHTS}", _recognises, _read)
