"""Every variant that the documentation composes, by name, and how one is trained; variants.py checks them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor, nn

import fmxnn as fx
from fmxnn.training import AuxiliaryLoss, Pass, Trainer, anneal_k, resample

LAYERS, D_MODEL, LATENTS, K, BATCH = 8, 128, 504, 8, 256
AXES = {"layers": LAYERS, "d_model": D_MODEL, "latents": LATENTS}
dense, ring = partial(fx.DenseWeight, **AXES), partial(fx.TensorRingWeight, **AXES)
stack = partial(fx.sae_stack_weight, fx.DenseWeight)
causal, causal_rings = (partial(fx.causal_weight, weight) for weight in (fx.DenseWeight, fx.TensorRingWeight))
WIDTHS = tuple(D_MODEL - 8 * layer for layer in range(LAYERS))


@dataclass
class Variant:
    """A crosscoder, and what its training needs beside it."""

    crosscoder: fx.Crosscoder
    penalty: Callable[[Pass], Tensor] | None = None
    auxiliary: AuxiliaryLoss | None = None
    prepare: Callable[[Trainer], object] = lambda trainer: None
    after_step: Callable[[Trainer, Tensor], object] = lambda trainer, x: None
    reads: Callable[[Tensor], Tensor] = lambda x: x
    """What it reads of the activations of all layers."""
    writes: Callable[[Tensor], Tensor] | None = None
    """What it rebuilds; None: what it reads."""
    normalisation: fx.Normalisation | None = None


def pair(variant: Variant, x: Tensor) -> tuple[Tensor, Tensor]:
    """`tokens layers d_model -> `: what is read of all layers, and what is rebuilt."""
    read = variant.reads(x)
    return read, read if variant.writes is None else variant.writes(x)


def train(variant: Variant, batches: list[Tensor], *, steps: int | None, seconds: float = 60.0) -> int:
    """So many steps, or as many as the seconds allow where that is None; gives how many."""
    named = dict(variant.crosscoder.named_parameters())
    thresholds = [
        named.pop(name) for name in list(named) if name.endswith("log_threshold")
    ]  # a step moves each by its share
    adam = torch.optim.Adam([{"params": list(named.values())}, {"params": thresholds, "lr": 1e-2}], lr=1e-3, fused=True)
    trainer = Trainer(variant.crosscoder, adam, auxiliary=variant.auxiliary)
    trainer.penalty = variant.penalty
    variant.prepare(trainer)
    end = time.perf_counter() + seconds
    for x in islice(cycle(batches), steps):
        read, rebuilt = pair(variant, x)
        trainer.step(read, rebuilt)
        variant.after_step(trainer, read)
        if steps is None and time.perf_counter() > end:
            break
    return trainer.steps


def between(
    encoder: fx.Weight, decoder: fx.Weight, gate: nn.Module | None = None, start=fx.tied_start
) -> fx.Crosscoder:
    """Two weights around a gate."""
    return start(fx.Crosscoder(fx.CrossLayerEncoder(encoder, gate or fx.BatchTopK(K)), fx.CrossLayerDecoder(decoder)))


def coder(weight: Callable[[], fx.Weight] = dense, gate: nn.Module | None = None) -> fx.Crosscoder:
    """Two weights of a kind."""
    return between(weight(), weight(), gate)


def masked() -> Variant:
    """The fmxcoder: a ring that reads with layers hidden at random."""
    encoder = fx.CrossLayerEncoder(ring(), fx.BatchTopK(K), mask=fx.LayerMask(0.05))
    return Variant(fx.isometric_start(fx.Crosscoder(encoder, fx.CrossLayerDecoder(ring()))))


def relu() -> Variant:
    """ReLU with L1 times the decoder norms summed over layers."""
    crosscoder = coder(gate=nn.ReLU())
    return Variant(crosscoder, penalty=lambda run: 0.25 * fx.l1_penalty(run.codes, crosscoder.decoder.weight.norms()))


def scored(gate: nn.Module, score: Callable[[fx.Weight], fx.Score]) -> Variant:
    """A gate that chooses by pre-activation times a norm of the decoder's atom."""
    weight = dense()
    encoder = fx.CrossLayerEncoder(dense(), fx.Scored(gate, score(weight)))
    return Variant(fx.tied_start(fx.Crosscoder(encoder, fx.CrossLayerDecoder(weight))))


def decoupled() -> Variant:
    """A choice for each layer."""
    weight = dense()
    gate = fx.Decoupled(*(fx.BatchTopK(K) for _ in range(LAYERS)), weight=weight)
    return Variant(fx.tied_start(fx.Crosscoder(fx.CrossLayerEncoder(dense(), gate), fx.DecoupledDecoder(weight, gate))))


def jumprelu(batches: list[Tensor], penalty: Callable[[Pass, fx.TrainedJumpReLU, Tensor], Tensor]) -> Variant:
    """Trained thresholds that start where K codes a token are kept, and a penalty in shares of the error, warmed up."""
    probe = fx.BatchTopK(K)
    crosscoder = coder(gate=probe)
    probe.calibrate(crosscoder.encoder.pre_activations(batches[0]))
    crosscoder.encoder.sparsifier = gate = fx.TrainedJumpReLU(LATENTS, start=probe.threshold.item())
    norms, error = crosscoder.decoder.weight.norms, fx.reconstruction_loss

    def prepare(trainer: Trainer) -> None:
        trainer.penalty = lambda run: (
            min(1, trainer.steps / 300) * error(run.y, run.x_hat).detach() * penalty(run, gate, norms())
        )

    return Variant(crosscoder, prepare=prepare)


def tanh(run: Pass, gate: fx.TrainedJumpReLU, norms: Tensor) -> Tensor:
    """Anthropic's recipe, but for the gradient of the thresholds."""
    count = fx.tanh_penalty(run.pre, norms, active=gate.active(run.pre))
    return count / (3 * K) + 3e-6 * fx.preactivation_loss(run.pre, gate.threshold, norms)


def matryoshka() -> Variant:
    """The first latents alone rebuild as well as they can."""
    crosscoder = coder()
    return Variant(
        crosscoder, penalty=lambda run: fx.matryoshka_loss(run.y, run.codes, crosscoder.decoder, prefixes=(16, 64, 256))
    )


def resampled() -> Variant:
    """Latents silent for 20 batches are drawn anew, early in the run."""

    def revive(trainer: Trainer, x: Tensor) -> None:
        if trainer.steps % 100 == 0 and trainer.steps <= 1000:
            resample(trainer, x, trainer.silent >= 20 * BATCH)

    return Variant(coder(), after_step=revive)


def transcoder(encoder: Callable[..., fx.Weight], decoder: Callable[..., fx.Weight]) -> Variant:
    """From each layer to all after it."""
    axes = AXES | {"layers": LAYERS - 1}
    return Variant(between(encoder(**axes), decoder(**axes)), reads=lambda x: x[:, :-1], writes=lambda x: x[:, 1:])


def one_to_all() -> Variant:
    """From the first layer to all."""
    start = partial(fx.gaussian_start, decoder_std=0.02)
    return Variant(
        between(fx.DenseWeight(1, D_MODEL, LATENTS), dense(), start=start), reads=lambda x: x[:, :1], writes=lambda x: x
    )


def reading(**axes: int) -> fx.Weight:
    """One ring over all latents, each of which reads a layer."""
    return fx.RestrictedWeight(fx.TensorRingWeight(**axes), at=[[i] for i in range(axes["layers"])])


def writing(**axes: int) -> fx.Weight:
    """One ring over all latents, each of which writes a layer and those after it."""
    return fx.RestrictedWeight(
        fx.TensorRingWeight(**axes), at=[range(i, axes["layers"]) for i in range(axes["layers"])]
    )


def ragged() -> Variant:
    """Layers of unequal d_model, the later ones narrower."""

    def read(x: Tensor) -> Tensor:
        return fx.pad_layers(fx.unpad_layers(x, WIDTHS))

    return Variant(coder(lambda: fx.RaggedWeight(ring(), widths=WIDTHS)), reads=read)


def ragged_causal() -> Variant:
    """The same, each latent reading one layer and writing those after it."""
    encoder, decoder = (fx.RaggedWeight(weight, widths=WIDTHS) for weight in (stack(**AXES), causal(**AXES)))
    return Variant(between(encoder, decoder), reads=ragged().reads)


def stacked() -> Variant:
    """SAEs side by side, each with a choice of its own."""
    return Variant(
        fx.stack_layers(
            *(coder(lambda: fx.DenseWeight(1, D_MODEL, LATENTS // LAYERS), fx.BatchTopK(1)) for _ in range(LAYERS))
        )
    )


def normalised(batches: list[Tensor]) -> Variant:
    """Activations of mean zero and one size at every layer."""
    normalisation = fx.fit_normalisation(batches[:8])
    return Variant(coder(), reads=normalisation, normalisation=normalisation)


def retracted(
    encoder: fx.Weight, gate: nn.Module, decoder: nn.Module, reads: Callable[[Tensor], Tensor] = lambda x: x
) -> Variant:
    """A decoder in which latents act together, whose projections stay orthonormal."""
    crosscoder = fx.Crosscoder(fx.CrossLayerEncoder(encoder, gate), decoder)
    return Variant(crosscoder, prepare=lambda trainer: fx.retract_after(trainer.optimizer, crosscoder), reads=reads)


def polysae() -> Variant:
    """As published, on one layer."""
    decoder = fx.polysae_decoder(D_MODEL, LATENTS, ranks=(D_MODEL, 16, 16))
    return retracted(fx.DenseWeight(1, D_MODEL, LATENTS), fx.TopK(K), decoder, lambda x: x[:, :1])


def polynomial() -> Variant:
    """Quadratic and cubic terms beside a ring."""
    square = fx.PowerTerm(fx.DenseWeight(LAYERS, D_MODEL, 32), degree=2, start=-0.5)
    cube = fx.PowerTerm(fx.CPWeight(LAYERS, D_MODEL, 32, rank=24), degree=3, start=0.5)
    return retracted(
        ring(),
        fx.BatchTopK(K),
        fx.PolynomialDecoder(square, cube, weight=ring(), projection=fx.Projection(LATENTS, rank=32)),
    )


def unshared() -> Variant:
    """Products of projections of their own."""
    projections = [fx.Projection(LATENTS, 16) for _ in range(5)]
    square = fx.ProductTerm(*projections[:2], weight=fx.DenseWeight(LAYERS, D_MODEL, 16), start=-0.5)
    cube = fx.ProductTerm(*projections[2:], weight=fx.DenseWeight(LAYERS, D_MODEL, 16), start=0.5)
    return retracted(ring(), fx.BatchTopK(K), fx.MultilinearDecoder(square, cube, weight=ring()))


def factorised(batches: list[Tensor]) -> Variant:
    """Of a dense crosscoder that was trained a little."""
    crosscoder, rank = coder(), fx.cp_rank(**AXES, share=1 / 4)
    train(Variant(crosscoder), batches, steps=20)
    return Variant(fx.factorize(crosscoder, partial(fx.CPWeight, rank=rank), sweeps=5))


def from_saes(batches: list[Tensor]) -> Variant:
    """Of SAEs on each layer that were trained a little."""
    saes = [coder(lambda: fx.DenseWeight(1, D_MODEL, LATENTS)) for _ in range(LAYERS)]
    for layer, sae in enumerate(saes):
        train(Variant(sae, reads=lambda x, layer=layer: x[:, layer : layer + 1]), batches, steps=10)
    return Variant(fx.from_saes(saes, fx.BatchTopK(K)))


VARIANTS: dict[str, Callable[[list[Tensor]], Variant]] = {
    "dense": lambda _: Variant(coder()),
    "TR": lambda _: Variant(coder(ring)),
    "CP": lambda _: Variant(coder(lambda: fx.CPWeight(**AXES))),
    "Einsum: Tucker": lambda _: Variant(
        coder(lambda: fx.EinsumWeight("latents r, p q r, d_model q, layers p", **AXES, p=8, q=64, r=96))
    ),
    "Sum: ring + dense": lambda _: Variant(coder(lambda: fx.SumWeight(ring(), dense()))),
    "Concat: ring, dense": lambda _: Variant(
        coder(lambda: fx.ConcatWeight(fx.TensorRingWeight(LAYERS, D_MODEL, 404), fx.DenseWeight(LAYERS, D_MODEL, 100)))
    ),
    "ReLU + L1": lambda _: relu(),
    "TopK": lambda _: Variant(coder(gate=fx.TopK(K))),
    "BatchTopK, masked ring": lambda _: masked(),
    "Scored TopK, sum": lambda _: scored(fx.TopK(K), fx.SumNorm),
    "Scored BatchTopK, sum": lambda _: scored(fx.BatchTopK(K), fx.SumNorm),
    "Scored BatchTopK, concat": lambda _: scored(fx.BatchTopK(K), fx.ConcatNorm),
    "Scored BatchTopK, mixed": lambda _: scored(fx.BatchTopK(K), fx.MixedNorm),
    "Decoupled": lambda _: decoupled(),
    "JumpReLU, quadratic L0": partial(
        jumprelu, penalty=lambda run, gate, _: fx.quadratic_l0_loss(gate.active(run.pre).sum(-1), K)
    ),
    "JumpReLU, tanh": partial(jumprelu, penalty=tanh),
    "GroupMax": lambda _: Variant(coder(gate=fx.GroupMax(K, LATENTS))),
    "Matryoshka": lambda _: matryoshka(),
    "k annealing": lambda _: Variant(coder(), prepare=lambda trainer: anneal_k(trainer, start=8 * K, k=K, steps=100)),
    "auxiliary loss": lambda _: Variant(coder(), auxiliary=AuxiliaryLoss(k=64, after=10 * BATCH)),
    "resampling": lambda _: resampled(),
    "windowed": lambda _: Variant(coder(lambda: fx.windowed_weight(fx.DenseWeight, window=3, **AXES))),
    "SAE stack": lambda _: Variant(coder(partial(stack, **AXES))),
    "SAE stack, a gate each": lambda _: stacked(),
    "weakly causal, dense": lambda _: Variant(between(stack(**AXES), causal(**AXES))),
    "weakly causal, ring per source": lambda _: Variant(between(stack(**AXES), causal_rings(**AXES))),
    "weakly causal, one ring": lambda _: Variant(between(reading(**AXES), writing(**AXES))),
    "CLT": lambda _: transcoder(stack, causal),
    "ring CLT": lambda _: transcoder(reading, writing),
    "CLT, one layer to all": lambda _: one_to_all(),
    "ragged d_model": lambda _: ragged(),
    "ragged, weakly causal": lambda _: ragged_causal(),
    "PolySAE": lambda _: polysae(),
    "PolySAE across layers": lambda _: polynomial(),
    "PolySAE, unshared": lambda _: unshared(),
    "Normalised": normalised,
    "factorised from dense": factorised,
    "from SAEs": from_saes,
}
