"""A crosscoder and the terms of its loss, as one module."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.inputs import check_batch
from fmxnn.core.excerpt import cut
from fmxnn.core.sharding import has_processes, is_sharded
from fmxnn.gates.steps import one_step
from fmxnn.sparse.codes import Codes
from fmxnn.training.losses import reconstruction_loss
from fmxnn.training.passes import Coder, Pass, coder_in, inner_coder, run_pass
from fmxnn.training.terms import Term

RESERVED = ("loss", "error", "l0", "dead", "gradient_norm")
"""Names that an objective or a trainer gives beside those of the terms."""


class Objective(nn.Module):
    """`... layers d_model -> `: a crosscoder and what it is trained on; the module that every training loop runs.

    Its `forward` gives the loss: the reconstruction error plus the `terms`, by name. So `Trainer`, `torch.compile`,
    DistributedDataParallel, FSDP2, accelerate, Lightning and the HF Trainer all take it as it is.

    * `crosscoder`: a Crosscoder, a Normalised or SkipCrosscoder of one, or a module of your own that holds an encoder
      and a decoder and calls both. A Normalised is trained in normalised units, in which all layers count alike.
    * `terms`: each is called with the `Pass` and gives one number, its weight included; a term may be a module.

    The buffer `silent` (`latents`) counts the tokens since each latent fired. It is saved, and moves in training only.
    Raises TypeError for a module without a crosscoder, and ValueError for a name that cannot be one of a term.

    ```python
    decoder = fx.CrossLayerDecoder(fx.DenseWeight(2, 4, 16))
    crosscoder = fx.Crosscoder(fx.CrossLayerEncoder(fx.DenseWeight(2, 4, 16), fx.TopK(2)), decoder)
    l1 = lambda run: 0.04 * fx.l1_penalty(run.codes, decoder.weight.norms())
    numbers = fx.Objective(crosscoder, {"l1": l1})(torch.randn(32, 2, 4))
    numbers["loss"].backward()     # numbers also has error, l0, dead and l1
    ```
    """

    silent: Tensor

    def __init__(self, crosscoder: nn.Module, terms: Mapping[str, Term] | None = None):
        super().__init__()
        if isinstance(crosscoder, Objective):
            raise TypeError(
                "an objective holds a crosscoder, got an Objective; take that one, and add to its terms: "
                "objective.terms |= {'l1': l1}"
            )
        bias = coder_in(crosscoder).encoder.bias
        self.crosscoder = crosscoder
        self.terms = terms or {}
        self.register_buffer("silent", torch.zeros(bias.shape[0], dtype=torch.int64, device=bias.device))

    @property
    def coder(self) -> Coder:
        """The crosscoder itself: what holds encoder and decoder, inside of whatever is trained."""
        return inner_coder(self.crosscoder)

    @property
    def terms(self) -> dict[str, Term]:
        """A copy of the terms by name; set all of them to change one: `objective.terms |= {"l1": l1}`."""
        return {name: term.function if isinstance(term, _Called) else term for name, term in self.added.items()}

    @terms.setter
    def terms(self, terms: Mapping[str, Term]) -> None:
        """Replaces all terms. Raises ValueError for a name that cannot be one and TypeError for what is not called."""
        if not isinstance(terms, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"an objective's terms have names, got {cut(repr(terms))}; give them as {{'l1': l1}}")
        taken = {*RESERVED, *dir(nn.ModuleDict())}
        for name, term in terms.items():
            if name in taken or not str(name).isidentifier():
                raise ValueError(
                    f"a term's name is a word of its own beside {', '.join(RESERVED)}, got {cut(repr(name))}; "
                    "take another, such as 'l1'"
                )
            if not callable(term):
                raise TypeError(
                    f"the term {name!r} of an objective is called with the pass, got {cut(repr(term))}; "
                    "give a function or a module, such as lambda run: 0.04 * l1_penalty(run.codes, weight.norms())"
                )
        self.added = nn.ModuleDict(
            {name: term if isinstance(term, nn.Module) else _Called(term) for name, term in terms.items()}
        )

    def placed(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`... layers d_model, ... layers d_model -> `: a batch and what is rebuilt, as the crosscoder takes them.

        They are brought to its device and its dtype. Raises ShapeError and TypeError for other axes, for no tokens, and
        for numbers not in floating point.
        """
        check_batch(cast("Crosscoder", self.coder), x, y)
        like = self.coder.encoder.bias
        x = x.to(like.device, like.dtype, non_blocking=True)  # bf16 activations must not make a bf16 loss
        return x, x if y is None else y.to(like.device, like.dtype, non_blocking=True)

    @override
    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """`... layers d_model, ... layers d_model -> `: `loss`, to be differentiated, and numbers to be reported.

        `y` is what a transcoder rebuilds from x, of the same tokens at the decoder's layers; None: x itself.
        `error` is the reconstruction loss, `l0` the latents that fired a token, `dead` the share of latents silent for
        100 batches; then each term by its name. Nothing is synchronised. Raises ShapeError and TypeError as `placed`.
        """
        x, y = self.placed(x, y)
        with one_step():  # all micro-batches of an optimiser step move a threshold once
            run = run_pass(self.crosscoder, x, y, self.silent)
        if self.added and not torch.compiler.is_compiling() and has_processes():
            _check_whole(self.crosscoder)
        loss = error = reconstruction_loss(run.y, run.x_hat)
        values: dict[str, Tensor] = {}
        for name, term in self.added.items():
            value = _number(name, term(run))
            values[name], loss = value.detach(), loss + value
        tokens, fired = x.shape[:-2].numel(), _firings(run)
        if self.training:
            self.silent.copy_(torch.where(fired > 0, 0, self.silent + tokens))
        dead = (self.silent >= 100 * tokens).double().mean()
        return {"loss": loss, "error": error.detach(), "l0": fired.sum() / tokens, "dead": dead, **values}


class _Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Term):
        super().__init__()
        self.function = function

    def forward(self, run: Pass) -> Tensor:
        return self.function(run)


def _number(name: str, value: object) -> Tensor:
    made = torch.as_tensor(value) if isinstance(value, (Tensor, int, float)) else None
    if made is None or made.numel() != 1:
        got = type(value).__name__ if made is None else f"a tensor of {tuple(made.shape)}"
        raise TypeError(f"the term {name!r} of an objective gives one number, got {got}; add up or average its values")
    return made.reshape(())


def _check_whole(module: nn.Module) -> None:
    """Raises TypeError for a part that FSDP2 has sharded by itself: after its forward nobody else can read it."""
    sharded = [name for name, parameter in module.named_parameters() if is_sharded(parameter)]
    if sharded:
        raise TypeError(
            f"the terms of an objective read weights after they ran, and {sharded[0][:200]} is sharded then; "
            "shard the objective as a whole and no part of it: fully_shard(objective)"
        )


def _firings(run: Pass) -> Tensor:
    """`-> latents`: on how many tokens each latent fired."""
    z = run.codes
    return z.firsts.diff() if isinstance(z, Codes) else (z != 0).flatten(0, -2).sum(0)
