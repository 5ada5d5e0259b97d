"""Weights of the axes `layers d_model latents`, each written as a pattern or made of others."""

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

__all__ = [
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
]
