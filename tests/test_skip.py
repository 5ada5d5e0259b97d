import tempfile
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import crosscoders, randn, seeds
from torch.testing import assert_close

import fmxnn as fx


@given(crosscoders())
def test_a_skip_is_a_linear_map_beside_the_crosscoder(coder):
    read, written = coder.encoder.weight, coder.decoder.weight
    if read.layers != written.layers:
        with pytest.raises(
            fx.ShapeError, match=f"reads layers={read.layers} and writes layers={written.layers}; make them equal"
        ):
            fx.SkipCrosscoder(coder)
        return
    whole = fx.SkipCrosscoder(coder.eval()).double()
    x = randn(4, read.layers, read.d_model)
    assert_close(whole(x), coder(x))
    torch.nn.init.normal_(whole.skip)
    assert_close(whole(x), reference.skipped(x, coder(x).detach(), whole.skip.detach()))
    assert torch.equal(whole.encode(x), coder.encode(x))
    assert_close(whole(x) - whole.decode(whole.encode(x)), torch.einsum("tld, lde -> tle", x, whole.skip))
    assert whole(x[0]).shape == (written.layers, written.d_model)


@given(crosscoders())
def test_beside_a_normalised_crosscoder_it_reads_the_units_of_the_data(coder):
    read, written = coder.encoder.weight, coder.decoder.weight
    assume(read.layers == written.layers)
    scaled = (
        fx.Normalisation.of(torch.rand(each.layers) + 0.5, torch.randn(each.layers, each.d_model))
        for each in (read, written)
    )
    inner = fx.Normalised(coder.eval(), next(scaled), output=next(scaled)).double()
    whole = fx.SkipCrosscoder(inner).double()
    torch.nn.init.normal_(whole.skip)
    x = randn(4, read.layers, read.d_model)
    assert_close(whole(x), reference.skipped(x, inner(x).detach(), whole.skip.detach()))
    assert torch.equal(whole.encode(x), inner.encode(x))


def test_it_is_saved_and_comes_back(tmp_path):
    axes = {"d_model": 3, "latents": 4}
    reader, writer = fx.DenseWeight(2, **axes), fx.DenseWeight(2, d_model=5, latents=4)
    whole = fx.SkipCrosscoder(fx.Crosscoder(fx.CrossLayerEncoder(reader, fx.TopK(2)), fx.CrossLayerDecoder(writer)))
    torch.nn.init.normal_(whole.skip)
    fx.save_pretrained(whole, tmp_path / "saved")
    x = torch.randn(6, 2, 3)
    assert torch.equal(fx.from_pretrained(tmp_path / "saved")(x), whole(x))


@given(seeds, st.booleans())
def test_a_skip_crosscoder_is_normalised_as_its_formula_says(seed, own_output):
    torch.manual_seed(seed)
    coder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(2, 3, 8), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 3, 8))
    )
    whole = fx.SkipCrosscoder(coder).double().eval()
    torch.nn.init.normal_(whole.skip)
    read, written = (fx.Normalisation.of(torch.rand(2, dtype=torch.float64) + 0.5, randn(2, 3)) for _ in range(2))
    written = written if own_output else read
    normalised, x = fx.Normalised(whole, read, output=written if own_output else None).eval(), randn(5, 2, 3)
    inside = (x - read.mean) * read.scale.unsqueeze(-1)
    z = normalised.encode(x)
    assert torch.equal(z, coder.encode(inside))
    assert_close(normalised.decode(z), coder.decode(z) / written.scale.unsqueeze(-1) + written.mean)
    rebuilt = coder(inside) + torch.einsum("tlr, lrw -> tlw", inside, whole.skip)
    assert_close(normalised(x), rebuilt / written.scale.unsqueeze(-1) + written.mean)
    with tempfile.TemporaryDirectory() as name:
        fx.save_pretrained(normalised, Path(name) / "saved")
        assert torch.equal(fx.from_pretrained(Path(name) / "saved")(x), normalised(x))


def test_what_cannot_be_normalised_or_folded_is_one_sentence():
    coder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(2, 3, 8), fx.TopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 3, 8))
    )
    normalised = fx.Normalised(fx.SkipCrosscoder(coder), fx.Normalisation(2, 3))
    with pytest.raises(
        TypeError, match="fold makes a plain crosscoder, and a SkipCrosscoder adds .*; keep the Normalised"
    ):
        fx.fold(normalised)
    with pytest.raises(
        TypeError, match="takes a Crosscoder or a SkipCrosscoder, got Normalised; normalise what it holds"
    ):
        fx.Normalised(normalised, fx.Normalisation(2, 3))
    with pytest.raises(
        fx.ShapeError, match="the crosscoder reads layers=2, d_model=3, and the normalisation is made for layers=1"
    ):
        fx.Normalised(fx.SkipCrosscoder(coder), fx.Normalisation(1, 3))
