"""Encoder, decoder and crosscoder, and what is made of them."""

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

__all__ = [
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
]
