"""What the formats of one layer share: a dictionary with whatever decoder, and what is folded into it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmxnn.coders import Crosscoder, CrossLayerDecoder, CrossLayerEncoder
from fmxnn.decoder import Decoder
from fmxnn.formats.dense import rows
from fmxnn.formats.format import FormatError, setting
from fmxnn.weights import DenseWeight

_BLOCK = 1024


def dictionary(gate: nn.Module, sizes: Mapping[str, int], decoder: Decoder | None = None) -> Crosscoder:
    """A crosscoder of one layer, dense where no decoder is given; `sizes` has d_model and latents."""
    reader, writer = (DenseWeight(1, sizes["d_model"], sizes["latents"]) for _ in range(2))
    return Crosscoder(CrossLayerEncoder(reader, gate), CrossLayerDecoder(writer) if decoder is None else decoder)


@torch.no_grad()
def centre(crosscoder: Crosscoder, at: Tensor) -> None:
    """`d_model -> `: the encoder of x becomes one of x - at: its bias loses what the weight reads there. Summed in float64, a block of latents at a time."""
    bias, read = crosscoder.encoder.bias, rows(crosscoder.encoder.weight)[:, 0]
    for start in range(0, len(bias), _BLOCK):
        block = slice(start, start + _BLOCK)
        bias[block] = (bias[block].double() - read[block].double() @ at.double()).to(bias.dtype)


def latents_kept(said: Mapping[str, Any], path: Path, latents: int) -> int:
    """The setting k. Raises FormatError for one that is missing or no number of these latents."""
    k: int = setting(said, "k", int, path)
    if not 1 <= k <= latents:
        raise FormatError(f"{path} says k={k}, and the weights have {latents} latents; fetch both again")
    return k
