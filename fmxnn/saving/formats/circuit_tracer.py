"""Cross-layer transcoders that circuit-tracer reads: two files a layer."""

from pathlib import Path

import torch

from fmxnn.core.errors import FormatError
from fmxnn.saving.formats.causal import Reader, causal, fitting_dtype, no_others, places, settled
from fmxnn.saving.formats.format import Format, Options, Reading, allocate, no_scale, settings
from fmxnn.saving.formats.tensors import Tensors

CONFIG, ENCODER, DECODER = "config.yaml", "W_enc_{}.safetensors", "W_dec_{}.safetensors"


def _recognises(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / ENCODER.format(0)).is_file()


def _read(folder: Path, options: Options) -> Reading:
    said = settings(folder / CONFIG)
    settled(said, "model_kind", ("cross_layer_transcoder",), folder / CONFIG)
    no_scale(options, str(folder))
    files, sizes, jump = _files(folder)
    blocks = [Reader(each["latents"], i) for i, each in enumerate(sizes)]
    d_model = sizes[0]["d_model"]
    module = allocate(
        lambda: causal(blocks, d_model, jump=jump),
        fitting_dtype(folder, blocks, d_model, files, options),
        options.device,
    )
    with torch.no_grad():
        for i, (place, tensors) in enumerate(zip(places(module), files, strict=True)):
            tensors.fill(place.reads, f"W_enc_{i}")
            tensors.fill(place.bias, f"b_enc_{i}")
            tensors.fill(place.writes, f"W_dec_{i}")
            tensors.fill(place.written_bias, f"b_dec_{i}")
            if place.threshold is not None:
                tensors.fill(place.threshold, f"threshold_{i}")
    kept = {key: said[key] for key in ("feature_input_hook", "feature_output_hook") if key in said}
    return Reading(module, {"base_model": said.get("model_name"), **kept, "folded": "nothing"})


def _files(folder: Path) -> tuple[list[Tensors], list[dict[str, int]], bool]:
    """Both files of every layer, checked, their sizes, and whether there are thresholds; the first layer's says how
    many layers it writes.
    """
    first = Tensors(folder / ENCODER.format(0), folder / DECODER.format(0))
    held = [key for path in folder.glob(ENCODER.format("*")) for key in Tensors(path).keys]
    jump = any(key.startswith("threshold") for key in held)
    sizes = [first.check(_layout(0, "layers", jump=jump))]
    layers, d_model = sizes[0]["layers"], sizes[0]["d_model"]
    pairs = [(folder / ENCODER.format(i), folder / DECODER.format(i)) for i in range(layers)]
    for pattern, known in zip((ENCODER, DECODER), zip(*pairs, strict=True), strict=True):
        no_others(folder, pattern.format("*"), known)
    files = [first, *(Tensors(*pair) for pair in pairs[1:])]
    sizes += [
        tensors.check(_layout(i, str(layers - i), jump=jump), sizes={"d_model": d_model})
        for i, tensors in enumerate(files[1:], 1)
    ]
    for i, tensors in enumerate(files if jump else []):
        if tensors.read(f"threshold_{i}").amin() < 0:
            raise FormatError(
                f"{tensors.paths[0]} has thresholds below zero, above which circuit-tracer keeps negative codes; "
                "there is no gate for it here"
            )
    return files, sizes, jump


def _layout(i: int, written: str, *, jump: bool) -> dict[str, str]:
    encoder = {f"W_enc_{i}": "latents d_model", f"b_enc_{i}": "latents", f"b_dec_{i}": "d_model"}
    return encoder | {f"W_dec_{i}": f"latents {written} d_model"} | ({f"threshold_{i}": "latents"} if jump else {})


CIRCUIT_TRACER = Format(
    "circuit_tracer", f"{CONFIG} with {ENCODER.format('0')}, {DECODER.format('0')} and so on", _recognises, _read
)
