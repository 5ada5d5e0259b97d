"""Encoder, decoder and crosscoder, and what is made of them."""

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

__all__ = [
    "CrossLayerDecoder",
    "CrossLayerEncoder",
    "Crosscoder",
    "DecoupledDecoder",
    "LayerMask",
    "MultilinearDecoder",
    "Normalisation",
    "Normalised",
    "PolynomialDecoder",
    "PowerTerm",
    "ProductTerm",
    "SkipCrosscoder",
    "factorize",
    "fit_normalisation",
    "fold",
    "from_saes",
    "polysae_decoder",
    "stack_layers",
    "unfold",
]
