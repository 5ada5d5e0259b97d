"""Crosscoders between two models by Kissane et al., and neelnanda's of all layers of one, whose code they come from."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from fmxnn.coders import Crosscoder, CrossLayerDecoder, CrossLayerEncoder
from fmxnn.folding import Normalised
from fmxnn.formats.format import Format, FormatError, Options, Reading, allocate, settings
from fmxnn.formats.tensors import Tensors
from fmxnn.normalisation import Normalisation
from fmxnn.weights import DenseWeight

LAYOUT = {
    "W_enc": "layers d_model latents",
    "W_dec": "latents layers d_model",
    "b_enc": "latents",
    "b_dec": "layers d_model",
}


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Weights and their settings: `cc_weights.pt` with `cfg.json`, or `{v}.pt` with `{v}_cfg.json`."""
    named = [(folder / "cc_weights.pt", folder / "cfg.json")]
    numbered = [(path, path.with_name(f"{path.stem}_cfg.json")) for path in sorted(folder.glob("*.pt"))]
    return [pair for pair in named + numbered if all(path.is_file() for path in pair)]


def _recognises(folder: Path) -> bool:
    return bool(_pairs(folder))


def _read(folder: Path, options: Options) -> Reading:
    pairs = _pairs(folder)
    if len(pairs) != 1:
        found = ", ".join(path.name for path, _ in pairs) or "none"
        raise FormatError(
            f"{folder} needs one file of weights with its settings beside it, got {found}; put one pair into a folder of its own"
        )
    (weights, config), *_ = pairs
    said = settings(config)
    tensors = Tensors(weights)
    known = {"d_model": said.get("d_in"), "latents": said.get("dict_size")}
    sizes = tensors.check(LAYOUT, sizes={word: size for word, size in known.items() if isinstance(size, int)})
    axes = {word: sizes[word] for word in ("layers", "d_model", "latents")}
    module = allocate(
        lambda: Crosscoder(CrossLayerEncoder(DenseWeight(**axes), nn.ReLU()), CrossLayerDecoder(DenseWeight(**axes))),
        tensors.room(options),
        options.device,
    )
    tensors.fill(module.encoder.weight.get_parameter("factors.0").permute(1, 2, 0), "W_enc")
    tensors.fill(module.decoder.weight.get_parameter("factors.0"), "W_dec")
    tensors.fill(module.encoder.bias, "b_enc")
    tensors.fill(module.decoder.bias, "b_dec")
    about = {"base_model": said.get("model_name"), "hook_point": said.get("hook_point"), "folded": "nothing"}
    if options.input_scale is None:
        warnings.warn(
            f"{weights} does not say by what each layer was multiplied in training, so this reads and writes x * input_scale; "
            "give it, sqrt(d_model) / mean norm of each layer: input_scale=torch.tensor([...])",
            stacklevel=2,
        )
        return Reading(module, about)
    return Reading(_scaled(module, options.input_scale, sizes), about)


def _scaled(module: Crosscoder, scale: Tensor, sizes: dict[str, int]) -> Normalised:
    device = module.encoder.bias.device
    normalisation = Normalisation.of(scale, torch.zeros(sizes["layers"], sizes["d_model"], dtype=scale.dtype)).to(device)
    return Normalised(module, normalisation).eval()


CKKISSANE = Format("ckkissane", "cfg.json with cc_weights.pt, or {v}_cfg.json with {v}.pt", _recognises, _read)
