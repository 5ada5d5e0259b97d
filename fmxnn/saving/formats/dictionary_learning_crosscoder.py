"""CrossCoder and BatchTopKCrossCoder of the dictionary_learning forks for model diffing."""

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fmxnn.core.errors import FormatError
from fmxnn.core.excerpt import excerpt
from fmxnn.core.kinds import is_list
from fmxnn.gates.decoupled import Decoupled
from fmxnn.gates.scored import ConcatNorm, MixedNorm, Score, Scored, SumNorm
from fmxnn.gates.top_k import BatchTopK
from fmxnn.saving.formats.dense import Gate, dense, normalised, rows
from fmxnn.saving.formats.format import Format, Options, Reading, no_scale, peek, settings
from fmxnn.saving.formats.tensors import Tensors
from fmxnn.weights.factorized import DenseWeight

CONFIG, TRAINER, FILES = "config.json", "trainer_config.json", ("model.safetensors", "model_final.pt")
CLASSES = ("CrossCoder", "BatchTopKCrossCoder")
SUM, CONCAT, MIXED, NONE, DECOUPLED = range(1, 6)  # code_normalization_id
CODES = {"CROSSCODER": SUM, "SAE": CONCAT, "MIXED": MIXED, "NONE": NONE, "DECOUPLED": DECOUPLED}
EPSILON = 1e-8
LAYOUT = {
    "encoder.weight": "layers d_model latents",
    "encoder.bias": "latents",
    "decoder.weight": "layers latents d_model",
    "decoder.bias": "layers d_model",
}
NORMALISED = {
    "activation_mean": "layers d_model",
    "activation_std": "layers d_model",
    "target_rms": "",
    "activation_global_scale": "layers",
}


def _recognises(folder: Path) -> bool:
    if not any((folder / file).is_file() for file in FILES):
        return False
    said = _said(peek(folder / CONFIG), peek(folder / TRAINER))
    return said.get("dict_class") in CLASSES or {"activation_dim", "dict_size", "num_layers"} <= said.keys()


def _said(config: Mapping[str, Any], trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings say of the dictionary, wherever they say it; its arguments are strings where a trainer wrote
    them.
    """
    parts = [part for part in (trainer.get("trainer"), config.get("trainer"), config) if isinstance(part, dict)]
    arguments = [part["dict_class_kwargs"] for part in parts if isinstance(part.get("dict_class_kwargs"), dict)]
    return {key: value for part in (*arguments, *parts) for key, value in part.items()}


def _read(folder: Path, options: Options) -> Reading:
    config, trainer = (settings(path) if path.is_file() else {} for path in (folder / CONFIG, folder / TRAINER))
    said = _said(config, trainer)
    found = [folder / file for file in FILES if (folder / file).is_file()]
    if len(found) != 1:
        raise FormatError(f"{folder} needs one of {' and '.join(FILES)}, got {len(found)}; take one of them away")
    no_scale(options, str(found[0]))
    tensors = Tensors(found[0], prefix="_orig_mod.")
    batch = said.get("dict_class") == CLASSES[1] or "threshold" in tensors
    order = _order(said, folder)
    sizes = _check(tensors, said, batch, order)
    reads = _reads(order, sizes["layers"], folder)
    normalisation = _code_normalisation(tensors, said, found[0])
    gate = _gate(tensors, said, normalisation, found[0]) if batch else _relu
    module = dense(tensors, sizes, gate, options, reads=None if reads is None else sorted(reads))
    _fill_encoder(rows(module.encoder.weight), tensors, reads)
    tensors.fill(rows(module.decoder.weight).transpose(0, 1), "decoder.weight")
    tensors.fill(module.encoder.bias, "encoder.bias")
    tensors.fill(module.decoder.bias, "decoder.bias")
    if batch:
        _set_thresholds(module.encoder.sparsifier, tensors.read("threshold"))
    about = {key: said[key] for key in ("model_name", "layer", "wandb_name") if key in said}
    scale = _scale(tensors, sizes["layers"])
    if scale is None:
        return Reading(module, {**about, "folded": "nothing"})
    mean, read = tensors.read("activation_mean"), scale
    if batch and normalisation == DECOUPLED:  # (x - m) s, and once more: ((x - m) s - m) s = (x - m - m / s) s^2
        read, mean = scale.square(), mean.double() * (1 + 1 / scale.unsqueeze(-1))
    kept = normalised(module, str(found[0]), read, mean, written=(scale + EPSILON, tensors.read("activation_mean")))
    return Reading(kept, {**about, "folded": "nothing; mean and scale are kept beside it, and fx.fold folds them"})


def _order(said: Mapping[str, Any], folder: Path) -> list[int] | None:
    """`encoder_layers`, which layer each row of the encoder reads; None for all of them in their order."""
    value = said.get("encoder_layers")
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value.replace("None", "null"))
    if value is None:
        return None
    if not is_list(value) or not value or not all(type(at) is int for at in value):
        raise FormatError(
            f"{folder} says encoder_layers={excerpt(value)}, expected a list of layers; write there which the encoder "
            "reads"
        )
    return value


def _reads(order: Sequence[int] | None, layers: int, folder: Path) -> list[int] | None:
    """The same, counted from the first layer. Raises FormatError for a layer that is not there or comes twice."""
    if order is None:
        return None
    found = [at + layers if at < 0 else at for at in order]
    if len(set(found)) < len(found) or not all(0 <= at < layers for at in found):
        raise FormatError(
            f"{folder} says encoder_layers={excerpt(order)}, expected different layers in range({layers}); write "
            "there which the encoder reads"
        )
    return found


@torch.no_grad()
def _fill_encoder(target: Tensor, tensors: Tensors, reads: Sequence[int] | None) -> None:
    """`latents layers d_model, layers d_model latents`: each row at the place of the layer that it reads."""
    if reads is None or list(reads) == sorted(reads):
        tensors.fill(target.permute(1, 2, 0), "encoder.weight")
        return
    for row, at in enumerate(reads):
        place = sorted(reads).index(at)
        tensors.fill(target[:, place : place + 1].permute(1, 2, 0), "encoder.weight", start=(row, 0, 0))


def _check(tensors: Tensors, said: Mapping[str, Any], batch: bool, order: Sequence[int] | None) -> dict[str, int]:
    """The sizes, `writes` among them where the settings say that other layers are written than read."""
    one_number = tensors.shape("activation_global_scale") == ()  # the older fork
    normalised = NORMALISED | ({"activation_global_scale": ""} if one_number else {})
    needed = normalised if any(key in tensors for key in NORMALISED) else {}
    each = "layers" if len(tensors.shape("threshold") or ()) else ""
    words = {
        "layers": "num_layers",
        "d_model": "activation_dim",
        "latents": "dict_size",
        "writes": "num_decoder_layers",
    }
    stated = {word: said[key] for word, key in words.items() if type(said.get(key)) is int}
    layout, folder = dict(LAYOUT), tensors.paths[0].parent
    if order is not None:
        layout["encoder.weight"] = f"{len(order)} d_model latents"
    known = tensors.shape("activation_mean") or tensors.shape("decoder.weight" if order else "encoder.weight") or (0,)
    layers = stated.setdefault("layers", known[0])
    others = stated.setdefault("writes", layers) != layers
    if others:
        layout |= {key: layout[key].replace("layers", "writes") for key in ("decoder.weight", "decoder.bias")}
    gate = {"k": "", "threshold": each} if batch else {}
    sizes = tensors.check({**layout, **needed, **gate}, optional={"code_normalization_id": ""}, sizes=stated)
    if others and (each or _scale(tensors, layers) is not None):
        raise FormatError(
            f"{folder} says num_decoder_layers={stated['writes']} of layers={layers}, and its class neither "
            "normalises nor decouples such; "
            "use the library that wrote it"
        )
    return sizes


def _code_normalisation(tensors: Tensors, said: Mapping[str, Any], path: Path) -> int:
    """Which norm a code is multiplied by before it is compared; files from before it was saved all took the sum."""
    if "code_normalization_id" in tensors:
        found = int(tensors.read("code_normalization_id"))
    else:
        found = CODES.get(str(said.get("code_normalization", "CROSSCODER")).upper(), 0)
    if found not in CODES.values():
        raise FormatError(
            f"{path} has the code normalisation {found}, and known are "
            f"{', '.join(f'{i} {name}' for name, i in CODES.items())}"
        )
    return found


def _relu(_: DenseWeight) -> nn.Module:
    return nn.ReLU()


def _gate(tensors: Tensors, said: Mapping[str, Any], normalisation: int, path: Path) -> Gate:
    k, threshold = int(tensors.read("k")), tensors.read("threshold")  # the setting of k may be where annealing started
    latents = (tensors.shape("encoder.bias") or (0,))[0]
    if not 1 <= k <= latents:
        raise FormatError(
            f"{path} holds k={k}, and its weights have latents={latents}; ask who wrote it, or take another file"
        )
    if (threshold.ndim == 1) != (normalisation == DECOUPLED):
        raise FormatError(
            f"{path} holds threshold of the shape {tuple(threshold.shape)} and code_normalization_id={normalisation}; "
            "one a layer goes with 5, one number with any other; ask who wrote it, or take another file"
        )
    if bool((threshold < 0).any()):
        then = "it gives no codes until they are set" if threshold.ndim else "every positive code is kept"
        warnings.warn(
            f"{path} holds a threshold that was never set, threshold={threshold.tolist()}, so {then}; "
            "find it in data: encoder.sparsifier.calibrate(pre)",
            stacklevel=2,
        )
    scores: dict[int, type[Score]] = {SUM: SumNorm, CONCAT: ConcatNorm}

    def gate(decoder: DenseWeight) -> nn.Module:
        if normalisation == DECOUPLED:
            return Decoupled(*(BatchTopK(k) for _ in threshold), weight=decoder)
        if normalisation == NONE:
            return BatchTopK(k)
        if normalisation == MIXED:
            concat, total = (
                _share(said, f"code_normalization_alpha_{of}", usual, path) for of, usual in (("sae", 1.0), ("cc", 0.1))
            )
            return Scored(BatchTopK(k), MixedNorm(decoder, concat=concat, sum=total))
        return Scored(BatchTopK(k), scores[normalisation](decoder))

    return gate


def _share(said: Mapping[str, Any], key: str, usual: float, path: Path) -> float:
    """How much one of two norms counts in the mixed one; zero leaves it out."""
    value = said.get(key)
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf")
    ):
        raise FormatError(f"{path.parent} says {key}={excerpt(value)}, expected a finite number >= 0; write one there")
    return usual if value is None else float(value)


@torch.no_grad()
def _set_thresholds(sparsifier: nn.Module, threshold: Tensor) -> None:
    held = list(sparsifier.sparsifiers) if isinstance(sparsifier, Decoupled) else [sparsifier]
    for part, value in zip(held, threshold.flatten(), strict=True):
        cast("Tensor", part.threshold).copy_(value)


def _scale(tensors: Tensors, layers: int) -> Tensor | None:
    """`-> layers`: what centred activations are multiplied by; None where mean or spread are NaN, which says that there
    was no normalisation.
    """
    if "activation_mean" not in tensors or any(
        bool(tensors.read(key).isnan().any()) for key in ("activation_mean", "activation_std")
    ):
        return None
    return tensors.read("activation_global_scale").to(torch.float64).expand(layers)


DICTIONARY_LEARNING_CROSSCODER = Format(
    "dictionary_learning_crosscoder",
    f"{' or '.join(FILES)} with {CONFIG} or {TRAINER} that names dict_class {' or '.join(CLASSES)}, or "
    "activation_dim, dict_size and num_layers",
    _recognises,
    _read,
)
