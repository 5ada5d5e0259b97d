"""Factorized masked crosscoders: PyTorch layers from which cross-layer sparse dictionaries are composed."""

from typing import Any

from fmxnn.coders.conversion import factorize, from_saes
from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.decoder import CrossLayerDecoder
from fmxnn.coders.decoupled import DecoupledDecoder
from fmxnn.coders.encoder import CrossLayerEncoder
from fmxnn.coders.folding import fold, unfold
from fmxnn.coders.layer_mask import LayerMask
from fmxnn.coders.multilinear import MultilinearDecoder, ProductTerm
from fmxnn.coders.normalisation import Normalisation, Normalised, fit_normalisation
from fmxnn.coders.polynomial import PolynomialDecoder, PowerTerm, polysae_decoder
from fmxnn.coders.skip import SkipCrosscoder
from fmxnn.coders.stacking import stack_layers
from fmxnn.core.contraction import Contraction
from fmxnn.core.errors import PatternError, RecipeError, ShapeError
from fmxnn.core.extras import from_extra
from fmxnn.core.recipe import build, describe
from fmxnn.core.version import __version__
from fmxnn.gates.decoupled import Decoupled
from fmxnn.gates.group_max import GroupMax, SignedGroupMax
from fmxnn.gates.jump_relu import JumpReLU, TrainedJumpReLU
from fmxnn.gates.scored import ConcatNorm, MixedNorm, Score, Scored, SumNorm
from fmxnn.gates.signed import SignedBatchTopK, SignedTopK
from fmxnn.gates.split import SplitGate
from fmxnn.gates.top_k import BatchTopK, TopK
from fmxnn.saving.hub import from_pretrained, push_to_hub, save_pretrained
from fmxnn.sparse.codes import to_csr
from fmxnn.training.losses import (
    dead_latent_loss,
    l1_penalty,
    matryoshka_loss,
    preactivation_loss,
    quadratic_l0_loss,
    reconstruction_loss,
    tanh_penalty,
)
from fmxnn.training.starts import data_start, gaussian_start, isometric_start, tied_start
from fmxnn.weights.combined import ConcatWeight, SumWeight
from fmxnn.weights.connectivity import PlacedWeight, RestrictedWeight, causal_weight, sae_stack_weight, windowed_weight
from fmxnn.weights.embedding import FactorizedEmbedding
from fmxnn.weights.factorized import CPWeight, DenseWeight, EinsumWeight, FactorizedWeight, TensorRingWeight
from fmxnn.weights.fitting import error_by_rank, fit_weight, relative_error
from fmxnn.weights.laws import check_weight
from fmxnn.weights.layer_map import LayerMap
from fmxnn.weights.linear import FactorizedLinear
from fmxnn.weights.matrices import matrix_optimizer
from fmxnn.weights.projected import ProjectedWeight, Projection, retract_after
from fmxnn.weights.ragged import RaggedWeight, pad_layers, unpad_layers
from fmxnn.weights.ranks import cp_rank, tensor_ring_ranks, wide_tensor_ring_ranks
from fmxnn.weights.weight import Weight

__all__ = [
    "BatchTopK",
    "CPWeight",
    "ConcatNorm",
    "ConcatWeight",
    "Contraction",
    "CrossLayerDecoder",
    "CrossLayerEncoder",
    "Crosscoder",
    "Decoupled",
    "DecoupledDecoder",
    "DenseWeight",
    "EinsumWeight",
    "FactorizedEmbedding",
    "FactorizedLinear",
    "FactorizedWeight",
    "GroupMax",
    "JumpReLU",
    "LayerMap",
    "LayerMask",
    "MixedNorm",
    "MultilinearDecoder",
    "Normalisation",
    "Normalised",
    "PatternError",
    "PlacedWeight",
    "PolynomialDecoder",
    "PowerTerm",
    "ProductTerm",
    "ProjectedWeight",
    "Projection",
    "RaggedWeight",
    "RecipeError",
    "RestrictedWeight",
    "Score",
    "Scored",
    "ShapeError",
    "SignedBatchTopK",
    "SignedGroupMax",
    "SignedTopK",
    "SkipCrosscoder",
    "SplitGate",
    "SumNorm",
    "SumWeight",
    "TensorRingWeight",
    "TopK",
    "TrainedJumpReLU",
    "Weight",
    "__version__",
    "build",
    "causal_weight",
    "check_weight",
    "cp_rank",
    "data_start",
    "dead_latent_loss",
    "describe",
    "error_by_rank",
    "factorize",
    "fit_normalisation",
    "fit_weight",
    "fold",
    "from_pretrained",
    "from_saes",
    "gaussian_start",
    "isometric_start",
    "l1_penalty",
    "matrix_optimizer",
    "matryoshka_loss",
    "pad_layers",
    "polysae_decoder",
    "preactivation_loss",
    "push_to_hub",
    "quadratic_l0_loss",
    "reconstruction_loss",
    "relative_error",
    "retract_after",
    "sae_stack_weight",
    "save_pretrained",
    "stack_layers",
    "tanh_penalty",
    "tensor_ring_ranks",
    "tied_start",
    "to_csr",
    "unfold",
    "unpad_layers",
    "wide_tensor_ring_ranks",
    "windowed_weight",
]


def __getattr__(name: str) -> Any:
    """`evaluate`, found when it is first asked for: it needs packages that the blocks do not."""
    if name == "evaluate":
        return from_extra("fmxnn.reports", who="evaluate", extra="evaluate").evaluate
    raise AttributeError(f"module 'fmxnn' has no attribute {name!r}")
