"""Factorized masked crosscoders: PyTorch layers from which cross-layer sparse dictionaries are composed."""

from typing import TYPE_CHECKING, Any

from fmxnn.coders.conversion import factorize, from_saes
from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.decoder import CodesWriter, CrossLayerDecoder, Decoder, PrefixWriter
from fmxnn.coders.decoupled import DecoupledDecoder
from fmxnn.coders.encoder import CrossLayerEncoder, Encoder, TableReader
from fmxnn.coders.folding import fold, unfold
from fmxnn.coders.laws import check_decoder
from fmxnn.coders.layer_mask import LayerMask
from fmxnn.coders.multilinear import MultilinearDecoder, ProductTerm
from fmxnn.coders.normalisation import Normalisation, Normalised, fit_normalisation
from fmxnn.coders.polynomial import NonlinearDecoder, PolynomialDecoder, PowerTerm, polysae_decoder
from fmxnn.coders.skip import SkipCrosscoder
from fmxnn.coders.stacking import stack_layers
from fmxnn.core.contraction import Contraction
from fmxnn.core.errors import PatternError, RecipeError, ShapeError
from fmxnn.core.extras import lazy
from fmxnn.core.recipe import build, describe
from fmxnn.core.version import __version__
from fmxnn.gates.decoupled import Decoupled
from fmxnn.gates.freezing import frozen
from fmxnn.gates.gate import (
    Chooser,
    Counted,
    Freezable,
    Gate,
    HasK,
    HasLatents,
    HasThreshold,
    Ranking,
    Scoring,
    Selector,
    Thresholded,
)
from fmxnn.gates.group_max import GroupMax, SignedGroupMax
from fmxnn.gates.jump_relu import JumpReLU, TrainedJumpReLU
from fmxnn.gates.laws import check_gate
from fmxnn.gates.scored import ConcatNorm, MixedNorm, Score, Scored, SumNorm
from fmxnn.gates.signed import SignedBatchTopK, SignedTopK
from fmxnn.gates.split import SplitGate
from fmxnn.gates.steps import one_step
from fmxnn.gates.thresholds import Calibrated
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
from fmxnn.training.objective import Objective
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
from fmxnn.weights.parted import PartedWeight
from fmxnn.weights.projected import ProjectedWeight, Projection, retract_after
from fmxnn.weights.ragged import RaggedWeight, pad_layers, unpad_layers
from fmxnn.weights.ranks import cp_rank, tensor_ring_ranks, wide_tensor_ring_ranks
from fmxnn.weights.weight import LayerScalable, Part, Rowed, Scalable, Startable, Tabled, Weight

__all__ = [  # noqa: RUF022  # by room, in the order of the rooms
    # core: what knows nothing of crosscoders
    "Contraction",
    "PatternError",
    "RecipeError",
    "ShapeError",
    "__version__",
    "build",
    "describe",
    # sparse: codes in compressed rows
    "to_csr",
    # weights: each a pattern, or made of others
    "CPWeight",
    "ConcatWeight",
    "DenseWeight",
    "EinsumWeight",
    "FactorizedEmbedding",
    "FactorizedLinear",
    "FactorizedWeight",
    "LayerMap",
    "LayerScalable",
    "Part",
    "PartedWeight",
    "PlacedWeight",
    "ProjectedWeight",
    "Projection",
    "RaggedWeight",
    "RestrictedWeight",
    "Rowed",
    "Scalable",
    "Startable",
    "SumWeight",
    "Tabled",
    "TensorRingWeight",
    "Weight",
    "causal_weight",
    "check_weight",
    "cp_rank",
    "error_by_rank",
    "fit_weight",
    "matrix_optimizer",
    "pad_layers",
    "relative_error",
    "retract_after",
    "sae_stack_weight",
    "tensor_ring_ranks",
    "unpad_layers",
    "wide_tensor_ring_ranks",
    "windowed_weight",
    # gates: which codes are kept
    "BatchTopK",
    "Calibrated",
    "Chooser",
    "ConcatNorm",
    "Counted",
    "Decoupled",
    "Freezable",
    "Gate",
    "GroupMax",
    "HasK",
    "HasLatents",
    "HasThreshold",
    "JumpReLU",
    "MixedNorm",
    "Ranking",
    "Score",
    "Scored",
    "Scoring",
    "Selector",
    "SignedBatchTopK",
    "SignedGroupMax",
    "SignedTopK",
    "SplitGate",
    "SumNorm",
    "Thresholded",
    "TopK",
    "TrainedJumpReLU",
    "check_gate",
    "frozen",
    "one_step",
    # coders: encoder, decoder, crosscoder, and what is made of them
    "CodesWriter",
    "CrossLayerDecoder",
    "CrossLayerEncoder",
    "Crosscoder",
    "Decoder",
    "DecoupledDecoder",
    "Encoder",
    "LayerMask",
    "MultilinearDecoder",
    "NonlinearDecoder",
    "Normalisation",
    "Normalised",
    "PolynomialDecoder",
    "PowerTerm",
    "PrefixWriter",
    "ProductTerm",
    "SkipCrosscoder",
    "TableReader",
    "check_decoder",
    "factorize",
    "fit_normalisation",
    "fold",
    "from_saes",
    "polysae_decoder",
    "stack_layers",
    "unfold",
    # training: objective, initialisations and losses; the rest is in fmxnn.training
    "Objective",
    "data_start",
    "dead_latent_loss",
    "gaussian_start",
    "isometric_start",
    "l1_penalty",
    "matryoshka_loss",
    "preactivation_loss",
    "quadratic_l0_loss",
    "reconstruction_loss",
    "tanh_penalty",
    "tied_start",
    # saving: files, and the Hub
    "from_pretrained",
    "push_to_hub",
    "save_pretrained",
    # metrics: found when it is first asked for, since it needs the extra `harvest`
    "latents_of",
    # reports: found when it is first asked for, since it needs the extra `evaluate`
    "evaluate",
]

if TYPE_CHECKING:
    from fmxnn.metrics.latents_of import latents_of
    from fmxnn.reports.evaluating import evaluate
else:
    _LAZY = {
        "evaluate": ("fmxnn.reports.evaluating", "evaluate"),
        "latents_of": ("fmxnn.metrics.latents_of", "harvest"),
    }

    def __getattr__(name: str) -> Any:
        """`evaluate` and `latents_of`, found when first asked for: they need packages that the modules here do not."""
        if name in _LAZY:
            module, extra = _LAZY[name]
            return lazy(module, name, extra=extra)
        raise AttributeError(f"module 'fmxnn' has no attribute {name!r}")
