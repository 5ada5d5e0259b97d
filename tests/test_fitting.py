"""A dictionary of other layers than the model's is refused in the same words by everything that measures it."""

import re

import pytest
import torch
from language import make_model, make_tokenizer, words

import fmxnn as fx
from fmxnn.activations.harvesting import harvest
from fmxnn.activations.text import contexts
from fmxnn.metrics import functional_coherence, off_to_on, spliced_loss, top_tokens
from fmxnn.metrics.probing.pooling import pooled_codes
from fmxnn.reports.pages import feature_page

MODEL, TOKENIZER, LAYERS = make_model(), make_tokenizer(), (0, 3)
TEXT = contexts([words(20)], TOKENIZER, context=8)
MEASURES = {
    "evaluate": lambda crosscoder: fx.evaluate(crosscoder, TEXT, model=MODEL, layers=LAYERS),
    "spliced_loss": lambda crosscoder: spliced_loss(crosscoder, MODEL, TEXT, layers=LAYERS),
    "pooled_codes": lambda crosscoder: pooled_codes(crosscoder, MODEL, TOKENIZER, ["w3 w4"], layers=LAYERS, context=8),
    "top_tokens": lambda crosscoder: top_tokens(crosscoder, harvest(MODEL, TEXT, layers=LAYERS, batch=1), TOKENIZER),
    "feature_page": lambda crosscoder: feature_page(
        crosscoder, harvest(MODEL, TEXT, layers=LAYERS, batch=1), TOKENIZER, [1]
    ),
}


def make_crosscoder(reads=(2, 16), writes=(2, 16)):
    encoder = fx.CrossLayerEncoder(fx.DenseWeight(*reads, 6), fx.TopK(2))
    return fx.Crosscoder(encoder, fx.CrossLayerDecoder(fx.DenseWeight(*writes, 6))).double()


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("sizes", [(3, 16), (1, 16), (2, 5)])
def test_what_reads_other_layers_is_refused(name, sizes):
    sentence = (
        f"the crosscoder reads (..., layers={sizes[0]}, d_model={sizes[1]}), got (2, 16) from the layers 0, 3; "
        "give it the layers that it was trained on, in their order"
    )
    with pytest.raises(fx.ShapeError, match=f"^{re.escape(sentence)}$"):
        MEASURES[name](make_crosscoder(sizes, sizes))


@pytest.mark.parametrize("measure", [functional_coherence, off_to_on])
@pytest.mark.parametrize("shape", [(4, 3, 16), (4, 2, 5), (16,)])
def test_so_are_activations_of_other_layers(measure, shape):
    sentence = (
        f"the crosscoder reads (..., layers=2, d_model=16), got {shape}; "
        "give it the layers that it was trained on, in their order"
    )
    with pytest.raises(fx.ShapeError, match=f"^{re.escape(sentence)}$"):
        measure(make_crosscoder(), [torch.zeros(2, 2, 16), torch.zeros(shape)])


def test_what_writes_other_layers_is_refused_where_they_are_replaced():
    sentence = (
        "the crosscoder writes (..., layers=1, d_model=16), got (2, 16) from the layers 0, 3; "
        "give it the layers that it was trained on, in their order"
    )
    with pytest.raises(fx.ShapeError, match=f"^{re.escape(sentence)}$"):
        MEASURES["spliced_loss"](make_crosscoder(writes=(1, 16)))
