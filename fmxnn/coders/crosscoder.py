"""Encoder, decoder and crosscoder."""

from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.coders import planning
from fmxnn.coders.decoder import CrossLayerDecoder, Decoder, written
from fmxnn.coders.encoder import CrossLayerEncoder
from fmxnn.coders.obstacles import why_not_chosen, why_not_written
from fmxnn.core.contraction import PLANNED_BATCH
from fmxnn.core.errors import ShapeError
from fmxnn.core.shortcuts import why_replaced
from fmxnn.sparse.codes import to_csr
from fmxnn.sparse.operators import is_without_data
from fmxnn.weights.factorized import DenseWeight
from fmxnn.weights.weight import Tabled, Weight

Backend = Literal["auto", "dense", "sparse"]


class Crosscoder(nn.Module):
    """`... layers d_model -> ... layers d_model`: one sparse dictionary for many layers.

    `layers` is whatever is stacked: layers of a model, base and chat, checkpoints. Encoder and decoder may
    have different layers and d_model (a cross-layer transcoder), never different latents. (Lindsey et al. 2024)

    `backend` is how `forward` and training run: `"dense"` products, `"sparse"` codes at the two tables, or `"auto"`,
    which takes what `explain()` predicts to be cheaper. The numbers are the same up to rounding. `folded_scale` is the scale
    of training that `fold_scale` has put into the weights, 1 for none. Both are saved with it.
    Raises ShapeError for different latents.
    """

    added_later: ClassVar[tuple[str, ...]] = ("backend", "folded_scale")

    def __init__(
        self, encoder: CrossLayerEncoder, decoder: Decoder, *, backend: Backend = "auto", folded_scale: float = 1.0
    ):
        super().__init__()
        if encoder.weight.latents != decoder.weight.latents:
            raise ShapeError(
                f"the encoder has latents={encoder.weight.latents} and the decoder latents={decoder.weight.latents}; make them equal"
            )
        self.encoder = encoder
        self.decoder = decoder
        self.backend: Backend = backend
        self.folded_scale = folded_scale
        self._planned: tuple[object, planning.Plan] | None = None

    @override
    def extra_repr(self) -> str:
        """The backend, and why it is dense where it cannot be sparse."""
        obstacle = self.obstacle
        return f"backend={self.backend!r}" + (f", dense: {obstacle}" if obstacle else "")

    def encode(self, x: Tensor, *, layout: torch.layout = torch.strided) -> Tensor:
        """`... layers d_model -> ... latents`: dense codes; with `layout=torch.sparse_csr` sparse ones of `tokens layers d_model`,
        for which nothing of the size of tokens x latents is held where weight and sparsifier allow it (the repr says where not).
        """
        if layout == torch.strided:
            return self.encoder(x)
        if layout != torch.sparse_csr:
            raise ValueError(f"encode gives torch.strided or torch.sparse_csr codes, got layout={layout}")
        if x.ndim != 3:
            raise ShapeError(
                f"CSR codes are of (tokens, layers, d_model), got {tuple(x.shape)}; flatten the batch axes first: x.flatten(0, -3)"
            )
        if why_not_chosen(self.encoder):
            return to_csr(self.encoder(x))
        return self.encoder.choose(self.encoder.read(x), propose=self._propose()).to_csr()

    def decode(self, z: Tensor) -> Tensor:
        """`... latents -> ... layers d_model`; codes dense or torch.sparse_csr"""
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        """`... layers d_model -> ... layers d_model`"""
        compiling = torch.compiler.is_compiling()
        tokens = PLANNED_BATCH if compiling else x.shape[:-2].numel()
        by_sizes = (
            None if compiling else self._kept_plan(tokens, "")
        )  # where these make it dense, no obstacle is looked for
        if (by_sizes and by_sizes.taken.backend == "dense") or (plan := self.plan(tokens)).taken.backend == "dense":
            return self.decode(self.encode(x))
        z = self.encoder.choose(self.encoder.read(x), propose=plan.taken.propose)
        x_hat = written(self.decoder, z)
        return x_hat.reshape(*x.shape[:-2], *x_hat.shape[1:])

    def plan(self, tokens: int = PLANNED_BATCH) -> planning.Plan:
        """The backend for a batch of so many tokens, in the present mode, dtype and device; a compiled graph plans for 1,024."""
        obstacle = self.obstacle
        plan = self._plan(tokens, obstacle) if torch.compiler.is_compiling() else self._kept_plan(tokens, obstacle)
        if self.backend == "auto" and plan.taken.backend == "sparse" and (why := self._unknown_count()):
            return plan.forced("dense", why)
        return plan

    def _kept_plan(self, tokens: int, obstacle: str) -> planning.Plan:
        """The last plan, unless something that it was made from changed: making one takes as long as a small batch."""
        encoder, sparsifier = self.encoder, self.encoder.sparsifier
        modes = self.backend, self.training, sparsifier.training, getattr(sparsifier, "k", None)
        asked = (
            tokens,
            obstacle,
            *modes,
            encoder.bias.dtype,
            encoder.bias.device,
            encoder.weight,
            self.decoder.weight,
            sparsifier,
        )
        if self._planned is None or self._planned[0] != asked:
            self._planned = asked, self._plan(tokens, obstacle)
        return self._planned[1]

    def _plan(self, tokens: int, obstacle: str) -> planning.Plan:
        if self.backend not in ("auto", "dense", "sparse"):
            raise ValueError(f"backend is 'auto', 'dense' or 'sparse', got {self.backend!r}")
        if obstacle and self.backend == "sparse":
            raise TypeError(f"the sparse backend cannot run: {obstacle}; set backend to 'auto' or 'dense'")
        encoder, decoder = self.encoder.weight, self.decoder.weight
        k, small = (
            getattr(self.encoder.sparsifier, "k", encoder.latents),
            sum(getattr(w, "small_flops", 0.0) for w in (encoder, decoder)),
        )
        sizes = planning.Sizes(tokens, encoder.latents, _bonds(encoder), _bonds(decoder), k, small)
        plan = planning.plan(sizes, self.encoder.bias.dtype, self.encoder.bias.device, training=self.training)
        if obstacle:
            return plan.forced("dense", obstacle)
        return plan if self.backend == "auto" else plan.forced(self.backend, "set by hand")

    def explain(self, tokens: int = PLANNED_BATCH) -> str:
        """What `plan` chose from: FLOP, bytes and predicted time of every choice, as a table to print."""
        plan, why = self.plan(tokens), self._unknown_count() if self.backend == "auto" else ""
        return str(plan.forced("dense", why) if why and not plan.forced_by else plan)

    def materialize(self) -> "Crosscoder":
        """The same crosscoder with dense weights, for inference where bonds exceed layers x d_model; all other parts are shared."""
        for part, known in ((self, Crosscoder), (self.encoder, CrossLayerEncoder), (self.decoder, CrossLayerDecoder)):
            if type(part) is not known:  # a subclass may do what its weight does not say
                raise TypeError(
                    f"materialize knows {known.__name__}, got {type(part).__name__}; give that a DenseWeight"
                )
        encoder = CrossLayerEncoder(_dense(self.encoder.weight), self.encoder.sparsifier, mask=self.encoder.mask)
        encoder.bias = self.encoder.bias
        decoder = CrossLayerDecoder(_dense(self.decoder.weight))
        decoder.bias = self.decoder.bias
        return Crosscoder(encoder, decoder, backend=self.backend, folded_scale=self.folded_scale).train(self.training)

    @property
    def obstacle(self) -> str:
        """Why codes cannot be sparse, if they cannot: a part without a table or `choose`, or code of your own, a hook or a parametrization that
        sparse codes would pass by. The text also stands in the repr and in `explain()`.
        """
        return (
            why_not_chosen(self.encoder)
            or why_not_written(self.decoder)
            or why_replaced(self, Crosscoder, ("encode", "decode"))
        )

    def _unknown_count(self) -> str:
        """Why the number of codes a token is not known beforehand, if it is not."""
        sparsifier = self.encoder.sparsifier
        if not hasattr(sparsifier, "k"):
            return f"{type(sparsifier).__name__} keeps a number of codes that is not known beforehand"
        if self.training or not hasattr(sparsifier, "threshold"):
            return ""
        threshold = cast("Tensor", sparsifier.threshold)
        if torch.compiler.is_compiling() or is_without_data(threshold):
            return "a compiled graph holds no codes whose number varies"
        return "" if float(threshold) > 0 else "the threshold is not set"

    def _propose(self) -> bool:
        return any(choice.propose for choice in self.plan().choices)


def _bonds(weight: Weight) -> int:
    table = weight.table if isinstance(weight, Tabled) else None
    return weight.layers * weight.d_model if table is None else -(-table.numel() // weight.latents)


@torch.no_grad()
def _dense(weight: Weight) -> DenseWeight:
    dense = weight.to_dense()
    made = DenseWeight(weight.layers, weight.d_model, weight.latents).to(dense.device, dense.dtype)
    made.factors[0].copy_(dense.movedim(-1, 0))
    return made


def crosscoder_in(module: nn.Module) -> Crosscoder:
    """The crosscoder itself, or the one inside a Normalised or a SkipCrosscoder. Raises TypeError for anything else."""
    inner = module
    while not isinstance(inner, Crosscoder):
        inner = getattr(inner, "crosscoder", None)
        if inner is None:
            raise TypeError(
                f"expected a Crosscoder, or a Normalised or SkipCrosscoder of one, got {type(module).__name__}; pass what it holds"
            )
    return inner
