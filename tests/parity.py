"""How far what is read is from the formula in loops: `python tests/parity.py` prints the largest error of each format,
relative to the largest value.
"""

import tempfile
import warnings
from functools import partial
from pathlib import Path

import foreign_crosscoders as crosscoders
import foreign_sae as sae
import torch

import fmxnn as fx

LAYERS, D_MODEL, LATENTS, K = 3, 16, 32, 4
RANKS = (8, 4, 2)
TOKENS, SEEDS = 16, 5

# Each case writes a folder and gives the formula: `tokens layers d_model -> tokens layers d_model`, in loops.


def crosscoder(write, folder, dtype, **options):
    formula = write(folder, LAYERS, D_MODEL, LATENTS, dtype, **options)
    scale = [torch.ones(LAYERS)] if write is crosscoders.ckkissane else []
    return LAYERS, lambda x: formula(x, *scale)[1]


def one_layer(formula):
    return 1, lambda x: formula(x[:, 0])[2].unsqueeze(1)


def saelens(folder, dtype, *, architecture, **cfg):
    kind = {"standard": sae.RELU, "topk": sae.TOPK, "jumprelu": sae.JUMP}[architecture]
    t = sae.saelens_tensors(D_MODEL, LATENTS, threshold=kind == sae.JUMP, dtype=dtype)
    sae.write_saelens(folder, t, architecture, **({"k": K} if kind == sae.TOPK else {}), **cfg)
    rescale = cfg.get("rescale_acts_by_decoder_norm", False)
    return one_layer(
        lambda x: sae.saelens(x, t, kind=kind, k=K, apply=cfg.get("apply_b_dec_to_input", True), rescale=rescale)
    )


def old_saelens(folder, dtype, *, version, k=None):
    t = sae.saelens_tensors(D_MODEL, LATENTS, threshold=False, dtype=dtype)
    sae.write_old_saelens(folder, t, version=version, k=k)
    return one_layer(lambda x: sae.saelens(x, t, kind=sae.TOPK if k else sae.RELU, k=k))


def sparsify(folder, dtype, *, activation, skip=False, transcode=False):
    t = sae.sparsify_tensors(D_MODEL, LATENTS, skip=skip, dtype=dtype)
    sae.write_sparsify(folder, t, k=K, activation=activation, transcode=transcode)
    return one_layer(lambda x: sae.sparsify(x, t, k=K, transcode=transcode, kind=activation))


def dictionary_learning(folder, dtype, *, dict_class, threshold=0.5):
    t = sae.dictionary_learning_tensors(D_MODEL, LATENTS, k=K, threshold=threshold, dtype=dtype)
    sae.write_dictionary_learning(folder, t, dict_class)
    gate = (sae.TOPK, K) if dict_class == "AutoEncoderTopK" else (sae.JUMP, [threshold] * LATENTS)
    return one_layer(lambda x: sae.dictionary_learning(x, t, gate))


def polysae(folder, dtype, *, architecture, shared, rescale=None):
    jump = architecture == "poly_jumprelu"
    t = sae.saelens_tensors(D_MODEL, LATENTS, threshold=jump, dtype=dtype) | sae.poly_tensors(
        D_MODEL, LATENTS, RANKS, shared=shared, dtype=dtype
    )
    sae.write_saelens(
        folder,
        t,
        architecture,
        k=K,
        poly_order=3,
        poly_ranks=RANKS,
        shared_u=shared,
        rescale_acts_by_decoder_norm=rescale is not None,
    )
    gate = (sae.JUMP, sae.lists(t["threshold"])) if jump else (sae.TOPK, K)
    return one_layer(lambda x: sae.poly(x, t, RANKS, gate=gate, shared=shared, rescale=rescale))


def gemma_scope(folder, dtype, **options):
    files = sae.gemma_scope_files(LAYERS, D_MODEL, LATENTS, dtype=dtype, **options)
    sae.write_gemma_scope(folder, files)
    return LAYERS, lambda x: sae.gemma_scope(x, files)[2]


def circuit_tracer(folder, dtype, **options):
    files = sae.circuit_tracer_files(LAYERS, D_MODEL, LATENTS, dtype=dtype, **options)
    sae.write_circuit_tracer(folder, files)
    return LAYERS, lambda x: sae.circuit_tracer(x, files)[2]


def each(write, key, values, **options):
    return [partial(write, **{key: value}, **options) for value in values]


theirs = partial(partial, crosscoder)  # a case that is lacking its options
CASES = {
    "ckkissane": [theirs(crosscoders.ckkissane)],
    "dictionary_learning_crosscoder, CrossCoder": each(
        theirs(crosscoders.dictionary_learning), "scaled", ("newer", "older", "nan"), batch=False
    ),
    "dictionary_learning_crosscoder, BatchTopKCrossCoder": [
        *each(theirs(crosscoders.dictionary_learning), "code", range(1, 6)),
        *each(theirs(crosscoders.dictionary_learning), "order", ([2, 0, 1], [1], [-1, 0])),
    ],
    "crosscode": each(theirs(crosscoders.crosscode), "activation", crosscoders.ACTIVATIONS, k=K),
    "llamascopium": each(theirs(crosscoders.llamascopium), "act", ("relu", "topk", "jumprelu"), k=K),
    "gemma_scope": [
        partial(gemma_scope, skip=skip, causal=causal) for skip in (False, True) for causal in (False, True)
    ],
    "circuit_tracer": each(circuit_tracer, "threshold", (False, True)),
    "saelens": [
        *each(saelens, "architecture", ("standard", "topk", "jumprelu")),
        *each(saelens, "architecture", ("standard", "topk", "jumprelu"), apply_b_dec_to_input=False),
        partial(saelens, architecture="topk", rescale_acts_by_decoder_norm=True),
        *each(old_saelens, "version", (3, 4, 5)),
        *each(old_saelens, "version", (3, 4, 5), k=K),
    ],
    "sparsify": [
        *each(sparsify, "activation", ("topk", "groupmax")),
        *each(sparsify, "activation", ("topk", "groupmax"), skip=True, transcode=True),
    ],
    "dictionary_learning": [
        *each(dictionary_learning, "dict_class", ("BatchTopKSAE", "AutoEncoderTopK")),
    ],
    "polysae": [
        *(
            partial(polysae, architecture=kind, shared=shared)
            for kind in ("poly_topk", "poly_jumprelu")
            for shared in (False, True)
        ),
        *each(polysae, "shared", (False, True), architecture="poly_topk", rescale="W_dec"),
    ],
}


def error(case, dtype, seed):
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        layers, formula = case(Path(folder), dtype)
        module = fx.from_pretrained(folder)
    x = torch.randn(TOKENS, layers, D_MODEL, dtype=dtype)
    x_hat = formula(x)
    return float((module(x) - x_hat).abs().max() / x_hat.abs().max())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name, cases in CASES.items():
        found = [
            max(error(case, dtype, seed) for case in cases for seed in range(SEEDS))
            for dtype in (torch.float32, torch.float64)
        ]
        print(f"{name:<52} float32 {found[0]:.1e}  float64 {found[1]:.1e}")
