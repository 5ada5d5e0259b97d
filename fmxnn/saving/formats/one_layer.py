"""What the formats of one layer share: a dictionary with any decoder, and what is subtracted from its input."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.decoder import CrossLayerDecoder, Decoder
from fmxnn.coders.encoder import CrossLayerEncoder
from fmxnn.coders.normalisation import Normalised
from fmxnn.core.errors import FormatError
from fmxnn.saving.formats.dense import normalised
from fmxnn.saving.formats.format import setting
from fmxnn.saving.formats.tensors import Tensors
from fmxnn.weights.factorized import DenseWeight


def dictionary(gate: nn.Module, sizes: Mapping[str, int], decoder: Decoder | None = None) -> Crosscoder:
    """A crosscoder of one layer, dense where no decoder is given; `sizes` has d_model and latents."""
    reader, writer = (DenseWeight(1, sizes["d_model"], sizes["latents"]) for _ in range(2))
    return Crosscoder(CrossLayerEncoder(reader, gate), CrossLayerDecoder(writer) if decoder is None else decoder)


@torch.no_grad()
def centred(crosscoder: Crosscoder, tensors: Tensors, *, scale: float = 1.0) -> Normalised:
    """The dictionary of `x * scale - b_dec`; b_dec is added to its output before that is divided by `scale`.

    Both are kept beside the weights. Folded into a bias of 16 bits, one large coordinate of b_dec would drown what
    latents read. On the meta device it is not read. Raises FormatError where b_dec holds NaN or infinity.
    """
    bias = crosscoder.decoder.bias.zero_()
    b_dec = torch.zeros(bias.shape[1:]) if bias.is_meta else tensors.read("b_dec")
    read = torch.tensor([scale], dtype=torch.float64)
    return normalised(crosscoder, f"{tensors.paths[0]}, b_dec", read, b_dec.double().unsqueeze(0) / read)


def what_became(folded: Sequence[str], kept: Sequence[str]) -> str:
    """In words: what was folded into the weights, and what is kept beside them."""
    beside = f"; {' and '.join(kept)} kept beside, and fx.fold folds what is" if kept else ""
    return f"{', '.join(folded) or 'nothing'}{beside}"


def latents_kept(said: Mapping[str, Any], path: Path, latents: int) -> int:
    """The setting k. Raises FormatError for one that is missing or no number of these latents."""
    k: int = setting(said, "k", int, path)
    if not 1 <= k <= latents:
        raise FormatError(f"{path} says k={k}, and the weights have {latents} latents; fetch both again")
    return k
