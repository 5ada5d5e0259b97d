"""Which latents fire on which token of a text: as the crosscoder's own codes say, as text and as a page."""

import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language import make_model, make_tokenizer
from torch.testing import assert_close
from transformers import AutoTokenizer

import fmxnn as fx
from fmxnn.activations.layer_reader import LayerReader
from fmxnn.metrics.latents_of import LatentsOf

FOLDER = Path(__file__).parents[1] / "examples" / "tiny-lm"
TINY = AutoTokenizer.from_pretrained(FOLDER)
MODEL, TOKENIZER, LAYERS = make_model(), make_tokenizer(eos_token="<eos>", bos_token="<bos>"), (0, 2)


def make_crosscoder(layers=2, gate=None, d_model=16):
    torch.manual_seed(3)
    weights = [fx.DenseWeight(layers, d_model, 12) for _ in range(2)]
    encoder = fx.CrossLayerEncoder(weights[0], gate or fx.TopK(3), mask=fx.LayerMask(0.5))
    return fx.Crosscoder(encoder, fx.CrossLayerDecoder(weights[1])).double()


@given(
    st.lists(st.integers(3, 40), min_size=1, max_size=12),
    st.sampled_from(["block_out", "mlp_in"]),
    st.sampled_from([fx.TopK(3), fx.SignedTopK(2), torch.nn.ReLU(), torch.nn.Tanh()]),
)
def test_each_token_has_the_codes_of_the_crosscoder(ids, at, gate):
    crosscoder, text = make_crosscoder(gate=gate), " ".join(f"w{i}" for i in ids)
    found = fx.latents_of(crosscoder, MODEL, TOKENIZER, text, layers=LAYERS, at=at, top=2)
    assert crosscoder.training
    z = crosscoder.eval().encode(LayerReader(MODEL, LAYERS, at=at)(torch.tensor([[2, *ids]]))[0, 1:]).detach()
    assert found.tokens == tuple(f" w{i}" for i in ids)
    assert found.codes.layout == torch.sparse_csr
    assert_close(found.codes.to_dense(), z)
    for token, row in enumerate(z):
        fired = found.of_token(token)
        assert sorted(latent for latent, _ in fired) == row.nonzero().flatten().tolist()
        assert [abs(value) for _, value in fired] == sorted((abs(value) for _, value in fired), reverse=True)
        assert_close(torch.tensor([value for _, value in fired]).double(), row[[latent for latent, _ in fired]])
    for latent in range(12):
        there = found.top(latent)
        assert sorted(token for token, _, _ in there) == z[:, latent].nonzero().flatten().tolist()
        assert [abs(value) for *_, value in there] == sorted((abs(value) for *_, value in there), reverse=True)
        assert all(text == found.tokens[token] and value == dict(found.of_token(token))[latent]
                   for token, text, value in there)  # fmt: skip


@given(st.text(min_size=1, max_size=30).filter(lambda text: "\ufffd" not in text))
def test_the_tokens_add_up_to_the_text_and_each_has_a_line(text):
    found = fx.latents_of(CODER, SMALL, TINY, text, layers=LAYERS)
    assert "".join(found.tokens) == text
    assert len(found.tokens) == len(TINY(text, add_special_tokens=False)["input_ids"])
    written = io.StringIO()
    found.show(written)
    assert written.getvalue() == f"{found}\n"
    assert len(written.getvalue().splitlines()) == len(found.tokens)


def small():
    from_config = make_model()
    from_config.resize_token_embeddings(len(TINY))
    from_config.config.max_position_embeddings = None  # any length is read by what stands in the place of positions
    from_config.transformer.wpe = torch.nn.Embedding(512, 16).double()
    return from_config


SMALL, CODER = small(), make_crosscoder()


class Spans(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.titles, self.texts, self.tags = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.titles += [dict(attrs)["title"]] if "title" in dict(attrs) else []

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_shows_each_token_with_its_latents_and_no_markup_of_the_text():
    codes = torch.tensor([[0.0, 2.0, -3.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]])
    found = LatentsOf(("<b>&", '"\n', "x"), fx.to_csr(codes), shown=2)
    page = Spans(found._repr_html_())
    assert page.tags == ["div", "span", "span", "span", "div", "span", "span"]
    assert page.texts == ["<b>&", '"↵', "\n", "x", "strongest latents: ", "2", " ", "0"]
    assert page.titles == ["2: -3, 1: 2", "no latent fires", "0: 0.5"]
    assert "0.70" in found._repr_html_().split("</span>")[0]  # the strongest of the text
    assert str(found).splitlines() == ["<b>&   2 -3    1 2", '"↵  ', "x     0 0.5"]
    assert found.of_token(-1) == [(0, 0.5)]
    assert repr(found) == "<4 codes of 4 latents on 3 tokens; show() writes them>"


def test_shown_without_a_stream_it_goes_to_the_standard_output(capsys):
    LatentsOf(("a",), fx.to_csr(torch.tensor([[0.0, 2.0]]))).show()
    assert capsys.readouterr().out == "a  1 2\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@given(st.integers(1, 90), st.integers(1, 8))
def test_lines_fit_a_terminal_and_columns_stand_below_each_other(columns, shown):
    codes = fx.to_csr(torch.tensor([[1.0] * 9, [0.5] * 9, [0.0] * 9]))
    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        LatentsOf(("ab", "日本", ""), codes, shown).show(terminal)
    first, wide, goes_on = terminal.getvalue().splitlines()
    fits = [n for n in range(1, shown + 1) if 4 + 7 * n <= columns]
    assert first == "ab    " + "  ".join(f"{latent} 1".rjust(5) for latent in range(max(fits, default=1)))
    assert wide == "日本  " + "  ".join(f"{latent} 0.5" for latent in range(max(fits, default=1)))
    assert goes_on.strip() == "⋯"


def test_a_crosscoder_of_several_models_and_too_few_latents_are_said():
    with pytest.raises(
        ValueError, match="latents_of reads one model, and the crosscoder reads several: .* base:2, chat:2"
    ):
        fx.latents_of(make_crosscoder(), MODEL, TOKENIZER, "w5", layers=["base:2", "chat:2"])
    with pytest.raises(ValueError, match="top >= 1 latents a token, got top=0"):
        fx.latents_of(make_crosscoder(), MODEL, TOKENIZER, "w5", layers=LAYERS, top=0)


def test_a_model_of_ones_own_is_called_in_its_own_way():
    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = MODEL.transformer.h
            self.table = MODEL.transformer.wte

        def run(self, ids):
            hidden = self.table(ids)
            for block in self.stack:
                output = block(hidden)
                hidden = output if isinstance(output, torch.Tensor) else output[0]

    model, seen = Mine(), []
    hooks = [model.stack[layer].register_forward_hook(lambda *given: seen.append(given[2])) for layer in LAYERS]
    with torch.no_grad():
        model.run(torch.tensor([[2, 5, 6]]))
    for hook in hooks:
        hook.remove()
    x = torch.stack([each if isinstance(each, torch.Tensor) else each[0] for each in seen], dim=-2)[0, 1:]
    found = fx.latents_of(
        make_crosscoder(),
        model,
        TOKENIZER,
        "w5 w6",
        layers=LAYERS,
        path="stack",
        call=lambda model, ids: model.run(ids),
    )
    assert_close(found.codes.to_dense(), make_crosscoder().eval().encode(x).detach())


def test_a_saved_crosscoder_knows_its_layers_and_place_and_a_model_may_be_a_name():
    crosscoder = make_crosscoder(d_model=128).float()
    crosscoder.about = {"layers": [1, 3], "at": "mlp_out"}
    found = fx.latents_of(crosscoder, FOLDER, None, "The whale")
    assert "".join(found.tokens) == "The whale"
    given_ = fx.latents_of(crosscoder, FOLDER, TINY, "The whale", layers=[1, 3], at="mlp_out")
    assert_close(found.codes.to_dense(), given_.codes.to_dense())


def test_modules_around_a_crosscoder_are_looked_at_in_the_units_of_the_model():
    crosscoder = make_crosscoder()
    normalised = fx.Normalised(crosscoder, fx.fit_normalisation([torch.randn(99, 2, 16).double()])).double()
    expected = fx.latents_of(fx.fold(normalised), MODEL, TOKENIZER, "w5 w6 w7", layers=LAYERS)
    for module in (normalised, fx.SkipCrosscoder(normalised)):
        found = fx.latents_of(module, MODEL, TOKENIZER, "w5 w6 w7", layers=LAYERS)
        assert_close(found.codes.to_dense(), expected.codes.to_dense())


@pytest.mark.parametrize(
    ("change", "error", "words_said"),
    [
        ({"layers": None}, ValueError, ["latents_of needs the layers", "pass layers="]),
        ({"tokenizer": None}, ValueError, ["latents_of needs the tokenizer", "pass tokenizer"]),
        ({"text": ["w5"]}, TypeError, ["latents_of looks at one text, got list", "give a string"]),
        ({"text": ""}, ValueError, ["latents_of looks at the tokens of a text", "'' has none but BOS"]),
        ({"text": "<bos><eos>"}, ValueError, ["'<bos><eos>' has none but BOS, EOS"]),
        ({"text": "w5 " * 16}, ValueError, ["GPT2LMHeadModel reads at most 16 tokens", "17", "give a part of it"]),
        ({"layers": (0, 1, 2)}, fx.ShapeError, ["layers=2", "(3, 16) from the layers 0, 1, 2"]),
        ({"layers": (0, 9)}, ValueError, ["layers 0 to 3", "9"]),
    ],
)
def test_what_cannot_be_shown_is_said(change, error, words_said):
    given_ = {"tokenizer": TOKENIZER, "text": "w5 w6", "layers": LAYERS} | change
    with pytest.raises(error) as caught:
        fx.latents_of(make_crosscoder(), MODEL, given_["tokenizer"], given_["text"], layers=given_["layers"])
    for word in words_said:
        assert word in str(caught.value)


def test_a_latent_or_token_that_is_not_there_is_said():
    found = fx.latents_of(make_crosscoder(), MODEL, TOKENIZER, "w5 w6", layers=LAYERS)
    with pytest.raises(ValueError, match="the latents 0 to 11, got 12"):
        found.top(12)
    for token in (2, -3):
        with pytest.raises(IndexError, match=f"the tokens 0 to 1, got {token}"):
            found.of_token(token)
