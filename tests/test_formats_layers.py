"""dictionary_learning's crosscoders: which layers are read and written, in which order, and what one that chooses for
each layer normalises.
"""

import json

import foreign_crosscoders as foreign
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategies import seeds
from test_formats_crosscoders import FILES, any_layers, assert_parity, axes, dtypes

import fmxnn as fx
from fmxnn.saving.formats import FormatError


@given(axes(), seeds, dtypes, st.sampled_from(["newer", "older"]), st.floats(0, 3))
def test_a_decoupled_crosscoder_normalises_twice_what_it_reads_as_its_class_does(sizes, seed, dtype, scaled, threshold):
    assert_parity(
        foreign.dictionary_learning,
        sizes,
        seed,
        dtype,
        codes=any_layers,
        scaled=scaled,
        code=5,
        threshold=threshold,
        k=1,
    )


@given(
    axes(), seeds, dtypes, st.sampled_from(["newer", "older", "nan"]), st.sampled_from(FILES), st.booleans(), st.data()
)
def test_the_layers_that_an_encoder_reads_are_those_of_the_settings_in_their_order(
    sizes, seed, dtype, scaled, file, batch, data
):
    order = data.draw(st.permutations(range(sizes[0])))[: data.draw(st.integers(1, sizes[0]))]
    order = [at - sizes[0] if data.draw(st.booleans()) else at for at in order]  # the class counts from the end too
    code = data.draw(st.integers(1, 5)) if batch else 1
    codes = any_layers if code == 5 else None
    module = assert_parity(
        foreign.dictionary_learning,
        sizes,
        seed,
        dtype,
        codes=codes,
        scaled=scaled,
        file=file,
        batch=batch,
        code=code,
        order=order,
        k=1,
    )
    encoder = getattr(module, "crosscoder", module).encoder
    assert sum(p.numel() for p in encoder.weight.parameters()) == len(order) * sizes[1] * sizes[2]


@given(axes(), seeds, dtypes, st.integers(1, 4), st.data())
def test_other_layers_may_be_written_than_read(sizes, seed, dtype, writes, data):
    order = data.draw(st.none() | st.just([0]))
    assert_parity(
        foreign.dictionary_learning, sizes, seed, dtype, scaled="nan", code=2, k=1, order=order, writes=writes
    )


@pytest.mark.parametrize("order", [[0, 0], [2], [-3], [], [0.5], "0", [True]])
def test_layers_that_an_encoder_cannot_read_are_refused(order, tmp_path):
    foreign.dictionary_learning(tmp_path, 2, 3, 4, torch.float32)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | {"encoder_layers": order}))
    held = load_file(tmp_path / "model.safetensors")
    held["encoder.weight"] = torch.randn(max(len(order), 1), 3, 4)
    foreign.save(held, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"says encoder_layers=.*, expected .*layers"):
        fx.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{"scaled": "newer"}, {"scaled": "nan", "code": 5}])
def test_layers_written_that_its_class_cannot_normalise_or_decouple_are_refused(options, tmp_path):
    foreign.dictionary_learning(tmp_path, 2, 3, 4, torch.float32, writes=3, **options)
    with pytest.raises(FormatError, match="says num_decoder_layers=3 of layers=2, .*use the library that wrote it"):
        fx.from_pretrained(tmp_path)
