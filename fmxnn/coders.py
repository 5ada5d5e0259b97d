"""Encoder, decoder and crosscoder."""

import torch
from torch import Tensor, nn

from fmxnn.contraction import ShapeError
from fmxnn.masking import LayerMask
from fmxnn.weights import Weight


class CrossLayerEncoder(nn.Module):
    """`... layers d_model -> ... latents`: one sparse code from all layers.

    `mask` drops layers of the input while training (None: LayerMask(0)), `weight` reads them, a bias over
    latents that starts at zero is added, `sparsifier` chooses. (fmxcoders, equation 1)
    Raises ValueError where the sparsifier keeps more latents than there are.
    """

    def __init__(self, weight: Weight, sparsifier: nn.Module, *, mask: nn.Module | None = None):
        super().__init__()
        for part in (sparsifier, mask):
            if part is not None and not isinstance(part, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"the encoder's sparsifier and mask are modules, got {part!r}; pass BatchTopK(k=64) or LayerMask(p=0.05)")
        k, latents = getattr(sparsifier, "k", 1), getattr(sparsifier, "latents", weight.latents)
        if k > weight.latents:
            raise ValueError(
                f"the sparsifier keeps k={k} latents a token, and the weight has latents={weight.latents}; take k <= {weight.latents}"
            )
        if latents != weight.latents:
            raise ValueError(f"the sparsifier is made for latents={latents}, and the weight has latents={weight.latents}; make them equal")
        self.weight = weight
        self.sparsifier = sparsifier
        self.mask = LayerMask(0.0) if mask is None else mask
        self.bias = nn.Parameter(torch.zeros(weight.latents))

    def pre_activations(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`: what the sparsifier chooses from. Raises ShapeError for other layers or d_model."""
        weight = self.weight
        if x.shape[-2:] != (weight.layers, weight.d_model):
            raise ShapeError(
                f"the encoder reads (..., layers={weight.layers}, d_model={weight.d_model}), got {tuple(x.shape)}; "
                "stack one activation per layer: torch.stack(hidden, dim=-2)"
            )
        return weight.to_latents(self.mask(x)) + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`"""
        return self.sparsifier(self.pre_activations(x))


class CrossLayerDecoder(nn.Module):
    """`... latents -> ... layers d_model`: every layer back from one code, plus a bias per layer and coordinate that starts at zero.

    Codes dense or torch.sparse_csr. (fmxcoders, equation 1)
    """

    def __init__(self, weight: Weight):
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(weight.layers, weight.d_model))

    def forward(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`. Raises ShapeError for other latents."""
        if z.shape[-1:] != (self.weight.latents,):
            raise ShapeError(f"the decoder reads codes of (..., latents={self.weight.latents}), got {tuple(z.shape)}")
        return self.weight.to_layers(z) + self.bias


class Crosscoder(nn.Module):
    """`... layers d_model -> ... layers d_model`: one sparse dictionary for many layers.

    `layers` is whatever is stacked: layers of a model, base and chat, checkpoints. Encoder and decoder may
    have different layers and d_model (a cross-layer transcoder), never different latents. (Lindsey et al. 2024)
    Raises ShapeError for different latents.
    """

    def __init__(self, encoder: CrossLayerEncoder, decoder: CrossLayerDecoder):
        super().__init__()
        if encoder.weight.latents != decoder.weight.latents:
            raise ShapeError(
                f"the encoder has latents={encoder.weight.latents} and the decoder latents={decoder.weight.latents}; make them equal"
            )
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... latents`"""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`; codes dense or torch.sparse_csr"""
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... layers d_model`"""
        return self.decode(self.encode(x))
