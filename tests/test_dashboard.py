import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from math import isnan, nan

import pytest
import reference
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from language import make_tokenizer
from strategies import weights
from test_firing import LAYERS, MODEL, activations, make_crosscoder
from torch.testing import assert_close

import fmxnn as fx
from fmxnn.core.cells import visible
from fmxnn.metrics import functional_coherence, logit_weights, norm_coherence
from fmxnn.metrics.excerpts import Excerpt, FiredToken
from fmxnn.metrics.firing import top_tokens
from fmxnn.metrics.logits import TokenWeight
from fmxnn.reports.pages import Feature, FeaturePage, Interval, feature_page, feature_table, nearest_latents
from fmxnn.reports.pages.histogram import Histograms

VOID = {"meta", "input", "rect", "line", "path", "br", "hr", "img", "link"}
TEXTS = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "&lt;",
    "مرحبا",
    "\u202eevil",
    "a\r\nb",
    "\x00",
    "{{ page }}",
    "",
]


class Page(HTMLParser):
    """Reads a page, and minds what is opened and closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.ids, self.links, self.text = [], [], set(), [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert len(given) == len(attrs)
        self.tags.append(tag)
        self.attributes |= set(given)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in ("href", "src", "action", "srcset", "data") if name in given]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not set(self.open) & {"script", "style"}:
            self.text += data


INTERVAL = Interval(8.0, 9.0, 3, (Excerpt(("an ", "<i>", "example"), (0.0, 8.5, 0.0), 1),))


def feature(latent=0, texts=TEXTS, **changed):
    top = tuple(
        FiredToken(text, 9.0 - i, (Excerpt(("before ", text, text), (0.0, 9.0 - i, 0.5), 1),))
        for i, text in enumerate(texts)
    )
    given = dict(
        density=0.25, largest=9.0, bin_width=0.5, bins=(3, 0, 1), norms=(1.0, 2.0), dependence=(0.5, 0.25), top=top
    )
    given |= dict(norm_coherence=1.5, functional_coherence=1.5, nearest=((1, 0.5), (77, -0.25)))
    given |= dict(promoted=(TokenWeight(" whale", 0.75), TokenWeight("<b>", 0.5)))
    given |= dict(demoted=(TokenWeight("\u2028", -0.25),), intervals=(INTERVAL,)) | changed
    return Feature(latent, **given)


SILENT = feature(
    1, [], density=0.0, largest=0.0, bin_width=0.0, bins=(), dependence=(nan, nan), functional_coherence=nan,
    intervals=(), promoted=(), demoted=(),
)  # fmt: skip


def page_of(*features, title="Latents", model="a/model"):
    return FeaturePage(title, model, (0, 2), 1000, features)


def assert_is_whole(text):
    """The page: well-formed, whole in itself, its ids unique."""
    page = Page(text)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert not any(name.startswith("on") for name in page.attributes)
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert not {"img", "link", "iframe", "object", "form", "base"} & set(page.tags)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"<main.*</main>", "", text, flags=re.DOTALL))
    return page


def test_a_page_is_well_formed_and_everything_in_it_is_escaped():
    page = assert_is_whole(page_of(feature(), SILENT, title="<b>&", model="</script><script>x").html())
    for text in TEXTS:
        assert text == "" or visible(text) in page.text
    assert "<b>&" in page.text
    assert "Layers 0, 2 of </script><script>x" in page.text
    assert "a↵b" in page.text
    assert "␀" in page.text
    assert "(no text)" in page.text
    assert "\r" not in page.text


@given(st.lists(st.text(max_size=8), max_size=3), st.text(max_size=8))
def test_no_text_breaks_a_page(texts, title):
    assert_is_whole(page_of(feature(texts=texts), title=title).html())


def test_promoted_and_demoted_tokens_and_examples_of_every_strength_are_shown():
    page = assert_is_whole(page_of(feature(), SILENT).html())
    for text in ("promotes", "␣whale", "demotes", "Examples of every strength", "8 to 9", "3 tokens", "an <i>example"):
        assert text in page.text
    assert_is_whole(page_of(feature(intervals=())).html())
    assert "Examples of every strength" not in page_of(feature(intervals=())).html()


def test_contexts_are_isolated_from_the_direction_of_their_text():
    html = page_of(feature()).html()
    assert html.count('<bdi dir="auto">') == html.count('class="context"') == len(TEXTS) + 1


def test_numbers_of_a_latent_that_never_fires_are_none():
    text = page_of(SILENT).html()
    assert "<dt>density</dt><dd>0 %</dd>" in text
    assert "<dt>largest</dt><dd>–</dd>" in text
    assert "<dt>largest</dt><dd>–</dd>" not in page_of(feature()).html()


def test_a_latent_that_never_fires_is_shown_as_such():
    page = assert_is_whole(page_of(feature(), SILENT).html())
    assert page.text.count("It never fires on this text.") == 1
    assert "latent-1" in page.ids
    assert "nan" not in page.text


def test_nearest_latents_are_links_where_they_are_on_the_page():
    page = assert_is_whole(page_of(feature(), SILENT).html())
    assert page.links.count("#latent-1") == 3  # its own and one from each
    assert "#latent-77" not in page.links
    assert "77" in page.text


@pytest.mark.parametrize("layers", [1, 2, 26])
def test_a_profile_has_a_bar_for_each_layer_whatever_the_decoder_writes(layers):
    html = page_of(feature(norms=(1.0,) * layers, dependence=(0.0,) * layers)).html()
    assert_is_whole(html)
    assert html.count("<rect") == 2 * layers
    assert ("layer 2: 1.000" in html) == (layers != 1)


def test_a_page_is_saved_and_exported_and_what_cannot_be_written_is_named(tmp_path):
    page = page_of(feature(), SILENT)
    page.save(tmp_path / "features.html")
    page.export(str(tmp_path / "features.json"))
    assert (tmp_path / "features.html").read_text(encoding="utf-8") == page.html().replace("\r\n", "\n")
    page.save(tmp_path / "features.html")  # again, in its place
    for write, path, why in (
        (page.export, tmp_path, "Is a directory"),
        (page.export, tmp_path / "none" / "features.json", "No such file or directory"),
        (page.save, tmp_path / "features.html" / "features.html", "Not a directory"),
    ):
        with pytest.raises(OSError, match="cannot be written") as caught:
            write(path)
        assert str(caught.value) == f"{path} cannot be written: {why}; give the path of a file in a folder that exists"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.html", "features.json"]


def test_the_export_reads_back(tmp_path):
    page_of(feature(7), SILENT).export(tmp_path / "features.json")
    fired, silent = json.loads((tmp_path / "features.json").read_text(encoding="utf-8"))
    assert (fired["modelId"], fired["layer"], fired["index"]) == ("a/model", "0-2-crosscoder", "7")
    assert (fired["frac_nonzero"], fired["maxActApprox"]) == (0.25, 9.0)
    assert fired["freq_hist_data_bar_heights"] == [3, 0, 1]
    assert fired["freq_hist_data_bar_values"] == [0.25, 0.75, 1.25]
    assert (fired["topkCosSimIndices"], fired["topkCosSimValues"]) == ([1, 77], [0.5, -0.25])
    assert [one["maxValue"] for one in fired["activations"]] == [9.0 - i for i in range(len(TEXTS))]
    first = {
        "tokens": ["before ", TEXTS[0], TEXTS[0]],
        "values": [0.0, 9.0, 0.5],
        "minValue": 0.0,
        "maxValue": 9.0,
        "maxValueTokenIndex": 1,
    }
    assert fired["activations"][0] == first
    assert fired["fmxnn"]["topTokens"][1] == {"token": TEXTS[1], "activation": 8.0}
    assert (fired["fmxnn"]["layers"], fired["fmxnn"]["tokens"], fired["fmxnn"]["norms"]) == ([0, 2], 1000, [1.0, 2.0])
    assert (silent["activations"], silent["freq_hist_data_bar_heights"], silent["frac_nonzero"]) == ([], [], 0)
    assert (fired["pos_str"], fired["pos_values"]) == ([" whale", "<b>"], [0.75, 0.5])
    assert (fired["neg_str"], fired["neg_values"]) == (["\u2028"], [-0.25])
    (interval,) = fired["fmxnn"]["intervals"]
    assert (interval["low"], interval["high"], interval["tokens"]) == (8.0, 9.0, 3)
    assert interval["activations"][0]["tokens"] == ["an ", "<i>", "example"]
    assert (silent["pos_str"], silent["neg_values"], silent["fmxnn"]["intervals"]) == ([], [], [])
    assert (silent["fmxnn"]["dependence"], silent["fmxnn"]["functionalCoherence"]) == ([None, None], None)
    assert fired.keys() == silent.keys()


def test_a_table_has_a_row_for_each_latent_of_each_dictionary():
    tokens = (FiredToken(" the|", 2.0, ()), FiredToken("\n", 1.0, ()), FiredToken("*", 0.5, ()))
    table = feature_table({"dense": page_of(feature(3, top=tokens)), "ring": page_of(SILENT)}, tokens=2)
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
    assert rows[0] == ["dictionary", "latent", "c_n", "c_f", "density", "largest", "top tokens"]
    assert rows[2] == ["dense", "3", "1.50", "1.50", "25.000%", "9.00", "␣the\\|, ↵"]
    assert rows[3] == ["ring", "1", "1.50", "", "0.000%", "never fires", ""]
    assert "␣the|, ↵" in feature_table({"dense": page_of(feature(top=tokens))}, form="plain")


def test_markup_in_tokens_and_names_is_text_in_a_table():
    page = page_of(feature(top=(FiredToken("<script>`", 2.0, ()), FiredToken("\ud83d\x85&lt;", 1.0, ()))))
    table = feature_table({"<b>|\r": page})
    assert "| &lt;b&gt;\\|↵ " in table
    assert "&lt;script&gt;\\`, \\\\ud83d↵&amp;lt;" in table
    assert len(table.splitlines()) == 3
    assert "<script>`, \\ud83d↵&lt;" in feature_table({"<b>": page}, form="plain")


def test_half_a_surrogate_pair_is_written_as_its_escape(tmp_path):
    page = page_of(feature(top=(FiredToken("\ud83d", 2.0, ()),)), title="\udfff", model="m\ud800")
    page.save(tmp_path / "page.html")
    page.export(tmp_path / "page.json")
    assert all(half in (tmp_path / "page.html").read_text() for half in ("\\ud83d", "\\udfff", "\\ud800"))
    assert json.loads((tmp_path / "page.json").read_text())[0]["modelId"] == "m\ud800"


@given(st.lists(st.floats(1e-9, 1e9), max_size=30), st.lists(st.integers(0, 30), max_size=3), st.booleans())
@example([1.9, 1000.0], [1], True)
def test_a_histogram_equals_a_loop_however_the_batches_are_cut(values, cuts, sparse):
    z = torch.zeros(len(values) + 1, 3, dtype=torch.float64)
    z[: len(values), 1] = torch.tensor(values, dtype=torch.float64)
    z[:, 2] = -1
    counted = Histograms([2, 1])
    bounds = [0, *sorted(min(cut, len(z)) for cut in cuts), len(z)]
    for start, stop in pairwise(bounds):
        counted.update(fx.to_csr(z[start:stop]) if sparse else z[start:stop])
    assert counted.tokens == len(z)
    assert counted.counts[0].sum() == 0
    assert counted.densities.tolist() == [1.0, len(values) / len(z)]  # a negative code fires, and has no bin
    if values:
        expected, width = reference.histogram(values)
        assert counted.counts[1].tolist() == expected
        assert counted.widths[1] == width
        assert counted.largest[1] == max(values)


@given(weights(), st.integers(1, 4), st.data())
def test_the_nearest_latents_of_any_weight_are_those_of_all_cosines(weight, count, data):
    chosen = data.draw(st.lists(st.integers(0, weight.latents - 1), min_size=1, unique=True))
    expected = reference.latent_cosines(weight.to_dense().detach())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fmxnn.reports.pages.nearest._BLOCK", data.draw(st.integers(1, 5)))
        cosines, others = nearest_latents(weight, chosen, count=count)
    assert cosines.shape == others.shape == (len(chosen), min(count, weight.latents - 1))
    for row, latent in enumerate(chosen):
        assert latent not in others[row]
        assert len(set(others[row].tolist())) == others.shape[1]
        rest = [float(expected[latent, j]) for j in range(weight.latents) if j != latent]
        assert_close(cosines[row].tolist(), sorted(rest, reverse=True)[:count])
        assert_close(cosines[row], expected[latent, others[row]])


def test_an_atom_of_zeros_has_cosine_zero():
    weight = fx.DenseWeight(2, 3, 3)
    with torch.no_grad():
        weight.factors[0][1] = 0
    assert nearest_latents(weight, [1], count=2)[0].tolist() == [[0.0, 0.0]]


def test_a_page_has_the_numbers_of_its_parts_from_one_pass_over_the_text():
    made, crosscoder = activations(), make_crosscoder(torch.nn.ReLU(), weight=fx.CPWeight)
    with torch.no_grad():
        crosscoder.encoder.bias[5] = -1e6
        z = crosscoder.encode(made.reader(made.contexts.ids.long())[made.contexts.keep])
    read = []
    hook = MODEL.register_forward_pre_hook(lambda _m, _a, given: read.append(len(given["input_ids"])), with_kwargs=True)
    page = feature_page(crosscoder, made, make_tokenizer(), latents=[5, 3], tokens=4, characters=12, neighbours=2)
    hook.remove()
    assert sum(read) == len(made.contexts) + 1  # one to learn d_model
    assert crosscoder.training
    x = made.reader(made.contexts.ids.long())[made.contexts.keep]
    dependence, norms = functional_coherence(crosscoder, [x]), norm_coherence(crosscoder.decoder.weight)
    silent, fired = page.features
    assert (page.layers, page.tokens, page.model) == (LAYERS, len(x), "GPT2LMHeadModel")
    assert (silent.latent, fired.latent) == (5, 3)
    assert (silent.density, silent.largest, silent.bin_width, silent.bins, silent.top) == (0.0, 0.0, 0.0, (), ())
    assert isnan(silent.functional_coherence)
    assert_close(fired.density, float((z[:, 3] > 0).double().mean()))
    assert_close(fired.largest, float(z[:, 3].max()))
    assert sum(fired.bins) == int((z[:, 3] > 0).sum())
    assert_close(fired.norms, tuple(norms.per_layer[:, 3].tolist()))
    assert_close(fired.dependence, tuple(dependence.per_layer[:, 3].tolist()))
    assert_close(fired.norm_coherence, float(norms.values[3]))
    assert_close(fired.functional_coherence, float(dependence.values[3]))
    assert [latent for latent, _ in fired.nearest] == nearest_latents(crosscoder.decoder.weight, [3], count=2)[1][
        0
    ].tolist()
    alone = top_tokens(crosscoder, made, make_tokenizer(), [3], tokens=4, characters=12)[3]
    assert [one.token for one in fired.top] == [one.token for one in alone]
    assert [tuple(map(str, one.excerpts)) for one in fired.top] == [one.contexts for one in alone]
    assert_is_whole(page.html())
    for shown in page.features:
        counts = {interval.low: interval.tokens for interval in shown.intervals}
        assert sum(counts.values()) == sum(shown.bins)  # every interval that holds a token has an example
        for interval in shown.intervals:
            assert len(interval.excerpts) == min(2, interval.tokens)
            strengths = [one.activations[one.at] for one in interval.excerpts]
            assert strengths == sorted(strengths, reverse=True)
            assert all(interval.low <= strength < interval.high for strength in strengths)
    assert (silent.promoted, silent.demoted) == ((), ())


def test_a_page_of_all_latents_shows_what_each_promotes(tmp_path):
    made, crosscoder, tokenizer = activations(), make_crosscoder(), make_tokenizer()
    promoted = logit_weights(crosscoder, MODEL, tokens=3)
    page = feature_page(crosscoder, made, tokenizer, promoted=promoted, examples=0)
    assert page.latents == tuple(range(12))
    assert [one.latent for one in page.features[3:5]] == [3, 4]
    assert page.features[-1] == page.features[11]
    assert [(one.promoted, one.demoted) for one in page.features] == [promoted.of(i, tokenizer) for i in range(12)]
    assert all(one.intervals == () for one in page.features)
    page.export(tmp_path / "features.json")
    records = json.loads((tmp_path / "features.json").read_text())
    assert [one["pos_values"] for one in records] == [
        [weight for weight in row if weight > 0] for row in promoted.promoted_weights.tolist()
    ]
    some = logit_weights(crosscoder, MODEL, [3, 5])
    with pytest.raises(ValueError, match=r"that each of 2 latents promotes, and `promoted` lacks latent 4; give"):
        feature_page(crosscoder, made, tokenizer, [3, 4], promoted=some)


def test_what_takes_long_shows_how_far_it_is(tmp_path):
    made, crosscoder, tokenizer, shown = activations(), make_crosscoder(), make_tokenizer(), []

    def bar(iterable, *, desc, total):
        items = list(iterable)
        shown.append((desc, total))
        assert total in (len(items), None)
        return items

    promoted = logit_weights(crosscoder, MODEL, progress=bar)
    page = feature_page(crosscoder, made, tokenizer, promoted=promoted, progress=bar)
    contexts = -(-len(made.contexts) // 32)
    assert shown == [("logit weights", 1), ("activations", contexts), ("nearest latents", 1)]
    shown.clear()
    x = made.reader(made.contexts.ids.long())
    feature_page(crosscoder, [(x, made.contexts.ids)], tokenizer, [3], progress=bar)
    assert shown == [("activations", None), ("nearest latents", 1)]
    shown.clear()
    page.save(tmp_path / "all", progress=bar)
    page.save(tmp_path / "page.html", progress=bar)
    page.export(tmp_path / "page.json", progress=bar)
    assert shown == [("cards", 1), ("cards", 12), ("latents", 12)]
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page.html()


def test_every_piece_of_an_excerpt_has_the_activation_of_its_token():
    made, crosscoder = activations(["w3 w4 w5 w6 w7 w8 w9 w10 " * 3]), make_crosscoder(torch.nn.ReLU())
    page = feature_page(crosscoder, made, make_tokenizer(), latents=range(12), tokens=50, characters=10**6)
    with torch.no_grad():
        z = crosscoder.encode(made.reader(made.contexts.ids.long()))
    for shown in page.features:
        for token in shown.top:
            for one in token.excerpts:
                rows = [z[row, 1:, shown.latent].clamp(min=0) for row in range(len(z))]
                assert any(
                    len(row) == len(one.activations)
                    and torch.allclose(row, torch.tensor(one.activations).double(), atol=1e-12)
                    for row in rows
                )
                assert one.activations[one.at] <= token.activation


def test_a_page_of_latents_that_are_not_there_is_refused():
    with pytest.raises(ValueError, match="^the crosscoder has the latents 0 to 11, got 12$"):
        feature_page(make_crosscoder(), activations(), make_tokenizer(), latents=[12])


def test_a_page_names_a_model_from_a_folder_without_the_way_to_it(tmp_path):
    made = activations()
    MODEL.config.name_or_path = str(tmp_path)
    try:
        page = feature_page(make_crosscoder(), made, make_tokenizer(), latents=[1], title="Mine")
    finally:
        MODEL.config.name_or_path = ""
    assert (page.title, page.model) == ("Mine", tmp_path.name)
