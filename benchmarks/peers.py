"""The training steps of the peers, each with its own loss, on layers side by side: `d_in = layers x d_model`."""

import importlib
import os
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[], Tensor]
Built = tuple[Loss, list[nn.Parameter]]


def sae_lens(x: Tensor, latents: int, k: int) -> Built:
    """SAELens's BatchTopK SAE: `training_forward_pass(...).loss`."""
    package, core = importlib.import_module("sae_lens"), importlib.import_module("sae_lens.saes.sae")
    flat = x.flatten(1)
    config = package.BatchTopKTrainingSAEConfig(d_in=flat.shape[1], d_sae=latents, k=k, dtype="float32", device="cpu")
    sae = package.BatchTopKTrainingSAE(config)
    given = core.TrainStepInput(
        sae_in=flat, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )
    return lambda: sae.training_forward_pass(given).loss, list(sae.parameters())


def dictionary_learning(x: Tensor, latents: int, k: int) -> Built:
    """dictionary_learning's BatchTopK trainer: its own `loss`, past the step from which it follows the threshold."""
    without_nnsight()
    package = importlib.import_module("dictionary_learning.trainers.batch_top_k")
    flat = x.flatten(1)
    trainer = package.BatchTopKTrainer(
        steps=10_000,
        activation_dim=flat.shape[1],
        dict_size=latents,
        k=k,
        layer=0,
        lm_name="none",
        device="cpu",
        seed=0,
    )
    return lambda: trainer.loss(flat, step=2000), list(trainer.ae.parameters())


def without_nnsight() -> None:
    """Lets dictionary_learning be imported: its __init__ imports the activation buffer, which names nnsight and is not
    used here.
    """
    if "nnsight" not in sys.modules:
        stub = types.ModuleType("nnsight")
        stub.LanguageModel = object
        sys.modules["nnsight"] = stub


def sparsify(x: Tensor, latents: int, k: int) -> Built:
    """eai-sparsify: TopK of each token, for it has no BatchTopK; on a CPU its eager decoder, for Triton needs a GPU."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    package = importlib.import_module("sparsify")
    flat = x.flatten(1)
    coder = package.SparseCoder(flat.shape[1], package.SparseCoderConfig(num_latents=latents, k=k), dtype=torch.float32)
    return lambda: coder(flat).fvu, list(coder.parameters())


PEERS = {
    "SAELens BatchTopK": sae_lens,
    "dictionary_learning BatchTopK": dictionary_learning,
    "eai-sparsify TopK": sparsify,
}
