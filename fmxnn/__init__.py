"""Factorized masked crosscoders: PyTorch layers from which cross-layer sparse dictionaries are composed."""

from typing import Any

from fmxnn.algebra import ConcatWeight, SumWeight
from fmxnn.coders import Crosscoder, CrossLayerDecoder, CrossLayerEncoder
from fmxnn.connectivity import PlacedWeight, RestrictedWeight, causal_weight, sae_stack_weight, windowed_weight
from fmxnn.contraction import Contraction, PatternError, ShapeError
from fmxnn.conversion import factorize, from_saes
from fmxnn.decoupled import Decoupled, DecoupledDecoder
from fmxnn.extras import from_extra
from fmxnn.fitting import error_by_rank, fit_weight, relative_error
from fmxnn.folding import Normalised, fold, unfold
from fmxnn.gates import GroupMax, SignedBatchTopK, SignedGroupMax, SignedTopK
from fmxnn.hub import from_pretrained, push_to_hub, save_pretrained
from fmxnn.losses import dead_latent_loss, l1_penalty, preactivation_loss, quadratic_l0_loss, reconstruction_loss, tanh_penalty
from fmxnn.masking import LayerMask
from fmxnn.matryoshka import matryoshka_loss
from fmxnn.multilinear import MultilinearDecoder, ProductTerm
from fmxnn.normalisation import Normalisation, fit_normalisation
from fmxnn.polynomial import PolynomialDecoder, PowerTerm, polysae_decoder
from fmxnn.projected import ProjectedWeight, Projection, retract_after
from fmxnn.ragged import RaggedWeight, pad_layers, unpad_layers
from fmxnn.ranks import cp_rank, tensor_ring_ranks, wide_tensor_ring_ranks
from fmxnn.recipe import RecipeError, build, describe
from fmxnn.scores import ConcatNorm, MixedNorm, Score, Scored, SumNorm
from fmxnn.skip import SkipCrosscoder
from fmxnn.sparse import to_csr
from fmxnn.sparsifiers import BatchTopK, JumpReLU, TopK, TrainedJumpReLU
from fmxnn.stacking import SplitGate, stack_layers
from fmxnn.starts import data_start, gaussian_start, isometric_start, tied_start
from fmxnn.testing import check_weight
from fmxnn.version import __version__
from fmxnn.weights import CPWeight, DenseWeight, EinsumWeight, FactorizedWeight, TensorRingWeight, Weight

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
    "FactorizedWeight",
    "GroupMax",
    "JumpReLU",
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
        return from_extra("fmxnn.evaluation", who="evaluate", extra="evaluate").evaluate
    raise AttributeError(f"module 'fmxnn' has no attribute {name!r}")
