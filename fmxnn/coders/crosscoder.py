"""The crosscoder: encoder, decoder and forward."""

from functools import singledispatch
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.coders.decoder import CrossLayerDecoder, Decoder, why_not_written, written
from fmxnn.coders.encoder import CrossLayerEncoder, Encoder, why_not_chosen
from fmxnn.coders.planner import Planner
from fmxnn.coders.planning import Plan, proposes
from fmxnn.core.contraction import PLANNED_BATCH
from fmxnn.core.errors import ShapeError
from fmxnn.core.outputs import checked
from fmxnn.core.shortcuts import why_replaced, why_watched
from fmxnn.sparse.codes import to_csr
from fmxnn.weights.factorized import DenseWeight
from fmxnn.weights.weight import Weight

Backend = Literal["auto", "dense", "sparse"]


class Crosscoder(nn.Module):
    """`... layers d_model -> ... layers d_model`: one sparse dictionary for many layers.

    `layers` is whatever is stacked: layers of a model, a base and a chat model, checkpoints. Encoder and decoder may
    have different layers and d_model (a cross-layer transcoder), never different latents. Both may be of your own:
    Encoder and Decoder say what they must give. (Lindsey et al. 2024)

    - `backend` says how it runs: `"dense"` products, `"sparse"` codes at the tables of the weights, or `"auto"`, which
      takes what `explain()` predicts to be faster. The numbers are the same up to rounding.
    - `folded_scale` is the scale of training that `fold_scale` has put into the weights, 1 for none.

    Both can be set later and are saved with it. Raises ShapeError for different latents.

    ```python
    coder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(8, 64, 512), fx.BatchTopK(16)),
        fx.CrossLayerDecoder(fx.DenseWeight(8, 64, 512)),
    )
    x_hat = coder(torch.randn(5, 8, 64))
    ```
    """

    added_later: ClassVar[tuple[str, ...]] = ("backend", "folded_scale")

    def __init__(self, encoder: Encoder, decoder: Decoder, *, backend: Backend = "auto", folded_scale: float = 1.0):
        super().__init__()
        if encoder.weight.latents != decoder.weight.latents:
            raise ShapeError(
                f"the encoder has latents={encoder.weight.latents} and the decoder latents={decoder.weight.latents}; "
                "make them equal"
            )
        # What goes beyond the contract of an Encoder is asked only where nothing stands in the way of sparse codes.
        self.encoder = cast("CrossLayerEncoder", encoder)
        self.decoder = decoder
        self.backend = backend
        self.folded_scale = folded_scale
        self._planner = Planner()

    @property
    def backend(self) -> Backend:
        """How `forward` and training run."""
        return self._backend

    @backend.setter
    def backend(self, backend: Backend) -> None:
        """Checks it at once, so that a mistake is found where it is made."""
        if backend not in ("auto", "dense", "sparse"):
            raise ValueError(f"backend is 'auto', 'dense' or 'sparse', got {backend!r:.200}")
        self._backend: Backend = backend

    @override
    def extra_repr(self) -> str:
        """The backend, and why it is dense where it cannot be sparse."""
        obstacle = self.obstacle
        return f"backend={self.backend!r}" + (f", dense: {obstacle}" if obstacle else "")

    def encode(self, x: Tensor, *, layout: torch.layout = torch.strided) -> Tensor:
        """`... layers d_model -> ... latents`: the codes, dense, or with `layout=torch.sparse_csr` sparse.

        They have the dtype of the encoder's parameters either way, under autocast too. Sparse codes are of
        `tokens layers d_model`. Nothing of the size of tokens x latents is held for them, unless the repr says why
        they must be dense inside.
        """
        if layout == torch.strided:
            return self._codes(x)
        if layout != torch.sparse_csr:
            raise ValueError(f"encode gives torch.strided or torch.sparse_csr codes, got layout={layout}")
        if x.ndim != 3:
            raise ShapeError(
                f"CSR codes are of (tokens, layers, d_model), got {tuple(x.shape)}; "
                "flatten the batch axes first: x.flatten(0, -3)"
            )
        encoder = self.encoder
        if why_not_chosen(encoder):
            return to_csr(self._codes(x))
        return encoder.choose(encoder.read(x), propose=proposes(encoder.bias.dtype, encoder.bias.device)).to_csr()

    def decode(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`; codes dense or torch.sparse_csr"""
        decoder = self.decoder
        weight = decoder.weight
        return checked(decoder(z), (*z.shape[:-1], weight.layers, weight.d_model), decoder)

    def forward(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... layers d_model`"""
        plan = self._planner.sparse_plan(self, x.shape[:-2].numel())
        if plan is None:
            return self.decode(self.encode(x))
        z = self.encoder.choose(self.encoder.read(x), propose=plan.taken.propose)
        x_hat = written(self.decoder, z)
        return x_hat.reshape(*x.shape[:-2], *x_hat.shape[1:])

    def plan(self, tokens: int = PLANNED_BATCH) -> Plan:
        """The backend for a batch of so many tokens, in the present mode, dtype and device.

        A compiled graph plans for 1,024 tokens, whatever it is given.
        """
        return self._planner.plan(self, tokens)

    def explain(self, tokens: int = PLANNED_BATCH) -> str:
        """What `plan` chose from: FLOP, bytes and predicted time of every choice, as a table to print."""
        return self._planner.explain(self, tokens)

    @property
    def obstacle(self) -> str:
        """Why codes cannot be sparse, if they cannot; also in the repr and in `explain()`.

        A part has no table or no `choose`, or sparse codes would pass by code of your own, a hook or a parametrization.
        """
        return (
            why_not_chosen(self.encoder)
            or why_not_written(self.decoder)
            or why_replaced(self, Crosscoder, ("encode", "decode"))
        )

    def materialize(self) -> "Crosscoder":
        """The same crosscoder with dense weights, for inference where bonds exceed layers x d_model.

        All other parts are shared. Raises TypeError for parts of a class of your own.
        """
        check_plain("materialize", self)
        encoder = CrossLayerEncoder(_dense(self.encoder.weight), self.encoder.sparsifier, mask=self.encoder.mask)
        encoder.bias = self.encoder.bias
        decoder = CrossLayerDecoder(_dense(self.decoder.weight))
        decoder.bias = cast("CrossLayerDecoder", self.decoder).bias
        return Crosscoder(encoder, decoder, backend=self.backend, folded_scale=self.folded_scale).train(self.training)

    def _codes(self, x: Tensor) -> Tensor:
        encoder = self.encoder
        return checked(encoder(x), (*x.shape[:-2], encoder.weight.latents), encoder)


def check_plain(who: str, crosscoder: Crosscoder) -> None:
    """Raises TypeError where a part is of a class of the user's own, which may do what its weight does not say."""
    encoder, decoder = crosscoder.encoder, crosscoder.decoder
    for part, known in ((crosscoder, Crosscoder), (encoder, CrossLayerEncoder), (decoder, CrossLayerDecoder)):
        if type(part) is not known:
            raise TypeError(
                f"{who} takes a Crosscoder of a CrossLayerEncoder and a CrossLayerDecoder, "
                f"got {type(part).__name__} for the {known.__name__}; make one of its weights"
            )


def own_code(crosscoder: Crosscoder) -> str:
    """Why weights, biases and gate alone do not say what it does, if they do not: an override or a hook."""
    return (
        why_replaced(crosscoder, Crosscoder, ("forward", "encode", "decode", "__call__"))
        or why_replaced(crosscoder.encoder, CrossLayerEncoder, ("forward", "pre_activations", "__call__"))
        or why_watched(crosscoder.modules())
    )


@torch.no_grad()
def _dense(weight: Weight) -> DenseWeight:
    dense = weight.to_dense()
    made = DenseWeight(weight.layers, weight.d_model, weight.latents).to(dense.device, dense.dtype)
    made.factors[0].copy_(dense.movedim(-1, 0))
    return made


@singledispatch
def crosscoder_in(module: nn.Module) -> Crosscoder:
    """The crosscoder itself, or the one that a module holds as `crosscoder`, such as Normalised and SkipCrosscoder.

    Raises TypeError for a module that holds none.
    """
    inner = getattr(module, "crosscoder", None)
    if inner is None:
        raise TypeError(
            f"expected a Crosscoder, or a module that holds one as `crosscoder` such as Normalised or SkipCrosscoder, "
            f"got {type(module).__name__}; pass what it holds"
        )
    return crosscoder_in(inner)


@crosscoder_in.register
def _(module: Crosscoder) -> Crosscoder:
    return module
