"""Factorized masked crosscoders: PyTorch layers from which cross-layer sparse dictionaries are composed."""

from importlib import import_module
from typing import Any

from fmxnn.algebra import ConcatWeight, SumWeight
from fmxnn.coders import Crosscoder, CrossLayerDecoder, CrossLayerEncoder
from fmxnn.contraction import Contraction, PatternError, ShapeError
from fmxnn.conversion import factorize, from_saes
from fmxnn.fitting import error_by_rank, fit_weight, relative_error
from fmxnn.folding import Normalised, fold, unfold
from fmxnn.hub import from_pretrained, push_to_hub, save_pretrained
from fmxnn.losses import dead_latent_loss, l1_penalty, reconstruction_loss
from fmxnn.masking import LayerMask
from fmxnn.normalisation import Normalisation, fit_normalisation
from fmxnn.polynomial import PolynomialDecoder, PowerTerm, ProjectedWeight, Projection, polysae_decoder, retract_after
from fmxnn.ranks import cp_rank, tensor_ring_ranks, wide_tensor_ring_ranks
from fmxnn.recipe import RecipeError, build, describe
from fmxnn.sparse import to_csr
from fmxnn.sparsifiers import BatchTopK, JumpReLU, TopK
from fmxnn.starts import gaussian_start, isometric_start, tied_start
from fmxnn.testing import check_weight
from fmxnn.version import __version__
from fmxnn.weights import CPWeight, DenseWeight, EinsumWeight, FactorizedWeight, TensorRingWeight, Weight

__all__ = [
    "BatchTopK",
    "CPWeight",
    "ConcatWeight",
    "Contraction",
    "CrossLayerDecoder",
    "CrossLayerEncoder",
    "Crosscoder",
    "DenseWeight",
    "EinsumWeight",
    "FactorizedWeight",
    "JumpReLU",
    "LayerMask",
    "Normalisation",
    "Normalised",
    "PatternError",
    "PolynomialDecoder",
    "PowerTerm",
    "ProjectedWeight",
    "Projection",
    "RecipeError",
    "ShapeError",
    "SumWeight",
    "TensorRingWeight",
    "TopK",
    "Weight",
    "__version__",
    "build",
    "check_weight",
    "cp_rank",
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
    "polysae_decoder",
    "push_to_hub",
    "reconstruction_loss",
    "relative_error",
    "retract_after",
    "save_pretrained",
    "tensor_ring_ranks",
    "tied_start",
    "to_csr",
    "unfold",
    "wide_tensor_ring_ranks",
]


def __getattr__(name: str) -> Any:
    """`evaluate`, found when it is first asked for: it needs packages that the blocks do not."""
    if name == "evaluate":
        return import_module("fmxnn.evaluation").evaluate
    raise AttributeError(f"module 'fmxnn' has no attribute {name!r}")
