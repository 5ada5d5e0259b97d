"""Crosscoders between two models by Kissane et al., and Nanda's of all layers of one, which the code comes from."""

from pathlib import Path

from torch import nn

from fmxnn.core.errors import FormatError
from fmxnn.saving.formats.dense import dense, rows, scaled_by_caller
from fmxnn.saving.formats.format import Format, Options, Reading, settings
from fmxnn.saving.formats.tensors import Tensors

LAYOUT = {
    "W_enc": "layers d_model latents",
    "W_dec": "latents layers d_model",
    "b_enc": "latents",
    "b_dec": "layers d_model",
}
NAMED, SUFFIX = ("cc_weights.pt", "cfg.json"), "_cfg.json"


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Each file of weights with its settings."""
    named = [(folder / NAMED[0], folder / NAMED[1])]
    numbered = [(path, path.with_name(path.stem + SUFFIX)) for path in sorted(folder.glob("*.pt"))]
    return [pair for pair in named + numbered if all(path.is_file() for path in pair)]


def _recognises(folder: Path) -> bool:
    return bool(_pairs(folder))


def _read(folder: Path, options: Options) -> Reading:
    pairs = _pairs(folder)
    if len(pairs) != 1:
        found = ", ".join(path.name for path, _ in pairs) or "none"
        raise FormatError(
            f"{folder} needs one file of weights with its settings, got {found}; put one pair into a folder of its own"
        )
    (weights, config), *_ = pairs
    said = settings(config)
    tensors = Tensors(weights)
    stated = {"d_model": said.get("d_in"), "latents": said.get("dict_size")}
    sizes = tensors.check(LAYOUT, sizes={word: size for word, size in stated.items() if isinstance(size, int)})
    module = dense(tensors, sizes, lambda _: nn.ReLU(), options)
    tensors.fill(rows(module.encoder.weight).permute(1, 2, 0), "W_enc")
    tensors.fill(rows(module.decoder.weight), "W_dec")
    tensors.fill(module.encoder.bias, "b_enc")
    tensors.fill(module.decoder.bias, "b_dec")
    about = {"base_model": said.get("model_name"), "hook_point": said.get("hook_point")}
    whole = scaled_by_caller(module, options, weights)
    return Reading(
        whole,
        {
            **about,
            "folded": "nothing" if whole is module else "nothing; input_scale is kept beside it, and fx.fold folds it",
        },
    )


CKKISSANE = Format("ckkissane", f"{NAMED[0]} with {NAMED[1]}, or {{v}}.pt with {{v}}{SUFFIX}", _recognises, _read)
