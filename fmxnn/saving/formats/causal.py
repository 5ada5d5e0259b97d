"""What cross-layer transcoders and weakly causal crosscoders share: latents read one layer and write later ones."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.decoder import CrossLayerDecoder
from fmxnn.coders.encoder import CrossLayerEncoder
from fmxnn.core.errors import FormatError
from fmxnn.core.excerpt import excerpt
from fmxnn.gates.jump_relu import JumpReLU
from fmxnn.saving.formats.dense import rows
from fmxnn.saving.formats.format import Options
from fmxnn.saving.formats.memory import check_room
from fmxnn.saving.formats.tensors import Tensors
from fmxnn.weights.combined import ConcatWeight
from fmxnn.weights.connectivity import PlacedWeight
from fmxnn.weights.factorized import DenseWeight
from fmxnn.weights.parted import parts_of


class Reader(NamedTuple):
    """The latents that read one layer: how many, and the first layer they write.

    They write that layer and all after it.
    """

    latents: int
    first: int


class Places(NamedTuple):
    """Where one block's tensors go: views of the module's, to be filled."""

    reads: Tensor
    writes: Tensor
    bias: Tensor
    threshold: Tensor | None
    written_bias: Tensor


def causal(blocks: Sequence[Reader], d_model: int, *, jump: bool) -> Crosscoder:
    """A crosscoder of as many layers as blocks; for layers that a block does not read or write nothing is stored."""
    layers = len(blocks)
    readers = [
        PlacedWeight(DenseWeight(1, d_model, block.latents), layers=layers, at=i) for i, block in enumerate(blocks)
    ]
    writers = [
        PlacedWeight(DenseWeight(layers - block.first, d_model, block.latents), layers=layers, at=block.first)
        for block in blocks
    ]
    gate = JumpReLU(sum(block.latents for block in blocks)) if jump else nn.ReLU()
    return Crosscoder(CrossLayerEncoder(ConcatWeight(*readers), gate), CrossLayerDecoder(ConcatWeight(*writers)))


def places(crosscoder: Crosscoder) -> Iterator[Places]:
    """The views of each block of what `causal` made."""
    readers, writers = parts_of(crosscoder.encoder.weight), parts_of(crosscoder.decoder.weight)
    gate, first = crosscoder.encoder.sparsifier, 0
    for i, (reader, writer) in enumerate(zip(readers, writers, strict=True)):
        run = slice(first, first + reader.weight.latents)
        threshold = gate.threshold[run] if isinstance(gate, JumpReLU) else None
        yield Places(
            rows(reader.weight)[:, 0],
            writer.weight.get_parameter("factors.0"),
            crosscoder.encoder.bias[run],
            threshold,
            crosscoder.decoder.bias[i],
        )
        first = run.stop


def fitting_dtype(
    folder: Path, blocks: Sequence[Reader], d_model: int, tensors: Sequence[Tensors], options: Options
) -> torch.dtype:
    """The dtype to load as, once it is known that what is kept fits. Raises MemoryError where it does not."""
    dtype = options.dtype or max((each.dtype for each in tensors), key=lambda each: each.itemsize)
    latents, layers = sum(block.latents for block in blocks), len(blocks)
    kept = (
        sum(block.latents * d_model * (layers - block.first + 1) for block in blocks) + 2 * latents + layers * d_model
    )
    check_room(str(folder), kept, dtype, options.device)
    return dtype


def no_others(folder: Path, pattern: str, known: Sequence[Path]) -> None:
    """Raises FormatError where a folder has more files of a pattern than its tensors have layers."""
    others = sorted(set(folder.glob(pattern)) - set(known))
    if others:
        names = ", ".join(path.name for path in others)
        raise FormatError(
            f"{folder} has {names}, and its tensors are of {len(known)} layers; put these elsewhere, or fetch the "
            "folder again"
        )


def settled(said: dict[str, Any], key: str, known: tuple[str, ...], path: Path) -> None:
    """Raises FormatError where a setting is there and is none of these."""
    if key in said and said[key] not in known:
        raise FormatError(f"{path} says {key}={excerpt(said[key])}, and known here is {', '.join(known)}")
