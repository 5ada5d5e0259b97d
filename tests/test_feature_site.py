"""Feature pages as a folder: its files, its index, its search; and examples from intervals of activations."""

import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language import make_tokenizer
from test_dashboard import SILENT, TEXTS, Page, feature, page_of
from test_firing import MODEL, WIDTH, activations, make_crosscoder, streams

import fmxnn as fx
from fmxnn.activations import Contexts
from fmxnn.core.errors import IntegrityError
from fmxnn.core.files import verify_folder
from fmxnn.metrics import logit_weights
from fmxnn.metrics.excerpts import Excerpts, Piece
from fmxnn.reports import pages
from fmxnn.reports.pages import feature_page
from fmxnn.reports.pages import intervals as file
from fmxnn.reports.pages.intervals import INTERVALS, IntervalExamples
from fmxnn.reports.pages.site import BUNCH, cards_file, script

ROOM = Path(pages.__file__).parent
NODE = shutil.which("node")


def called(path):
    """What a file passes to the function that it calls."""
    name, _, rest = path.read_text(encoding="utf-8").partition("(")
    assert rest.endswith(");\n")
    return name, json.loads(f"[{rest[:-3]}]")


def read_site(folder):
    """The index as HTML, the table, and the card of each latent."""
    verify_folder(folder)
    name, (table,) = called(folder / "table.js")
    assert name == "table"
    cards = []
    for number in range(-(-len(table["latents"]) // table["bunch"])):
        name, (bunch, some) = called(folder / cards_file(number))
        assert (name, bunch) == ("cards", number)
        cards += some
    assert len(cards) == len(table["latents"])
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["index.html", "manifest.json", "site.js", "table.js", *map(cards_file, range(number + 1))]
    )
    return (folder / "index.html").read_text(encoding="utf-8"), table, dict(zip(table["latents"], cards, strict=True))


def many(count):
    return [feature(i, TEXTS[: i % 4], nearest=(((i + 1) % count, 0.5), (10**6, 0.25))) for i in range(count)]


def test_a_folder_has_an_index_a_table_and_a_card_for_each_latent(tmp_path):
    count = 2 * BUNCH + 3
    page_of(*many(count), title="</title><script>", model="</script>").save(f"{tmp_path}/features/")
    html, table, cards = read_site(tmp_path / "features")
    index = Page(html)
    assert {link for link in index.links} == {"site.js"}
    assert index.text.startswith("\n")
    assert "</title><script>" in index.text
    assert index.tags.count("script") == 1
    assert index.tags.count("style") == 1
    assert not any(name.startswith("on") for name in index.attributes)
    assert "script-src 'self' file:" in html  # no script but those of files
    assert table["latents"] == list(range(count))
    assert all(len(table[name]) == count for name in ("fired", "largest", "norm", "functional", "top", "promoted"))
    assert table["fired"][0] == 250
    assert [table["words"][number] for number in table["promoted"][7]] == ["␣whale", "<b>"]
    for latent, card in cards.items():
        shown = Page(card)
        assert f"Latent {latent}" in shown.text
        assert all(int(link.removeprefix("#latent-")) in cards for link in shown.links)
        assert f"#latent-{(latent + 1) % count}" in shown.links
        assert "1000000" in shown.text


def test_the_index_has_as_many_nodes_for_any_number_of_latents(tmp_path):
    found = []
    for count in (3, 300):
        page_of(*many(count)).save(tmp_path / f"site{count}")
        found.append(Page(read_site(tmp_path / f"site{count}")[0]))
    assert found[0].tags == found[1].tags
    assert len(found[0].tags) < 100


def test_cards_are_those_of_the_one_file_page(tmp_path):
    page = page_of(feature(), SILENT)
    page.save(tmp_path / "site")
    html, cards = page.html(), read_site(tmp_path / "site")[2]
    assert re.sub(r' data-place="[^"]*"', "", cards[1]) in re.sub(r' data-place="[^"]*"', "", html)
    assert "It never fires on this text." in cards[1]


def test_numbers_that_do_not_exist_are_null_and_dead_latents_have_no_tokens(tmp_path):
    page_of(SILENT, feature(0, norms=(0.0, 0.0), norm_coherence=float("nan"))).save(tmp_path / "site")
    table = read_site(tmp_path / "site")[1]
    assert (table["latents"], table["fired"], table["functional"]) == ([1, 0], [0, 250], [None, 1.5])
    assert table["norm"] == [1.5, None]
    assert (table["top"][0], table["promoted"][0]) == ([], [])


@given(st.lists(st.text(max_size=8), max_size=3))
def test_no_text_breaks_a_script(texts):
    for value in ([*texts, *TEXTS, "\u2028</script><!--", "]]>"], {"a": "</SCRIPT\u2029"}):
        text = script("cards", 3, value)
        assert not re.search(r"</|<!|[\u2028\u2029]", text)
        assert text.count("\n") == 1
        assert json.loads(f"[{text.removeprefix('cards(').removesuffix(');' + chr(10))}]") == [3, value]


def test_a_page_is_replaced_whole_and_what_others_put_into_its_folder_stays(tmp_path):
    folder = tmp_path / "features"
    page_of(*many(BUNCH + 1)).save(folder)
    (folder / "notes.txt").write_text("mine")

    lazy = pages.feature.LazyFeatures(range(BUNCH + 1), make=lambda i: 1 / 0 if i == BUNCH else feature(i))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ZeroDivisionError):
        pages.FeaturePage("new", "m", (0, 2), 1000, lazy).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    page_of(feature(5)).save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    assert read_site(folder)[1]["latents"] == [5]  # and no cards of the page before


def test_a_folder_that_holds_anything_else_is_left_as_it_is(tmp_path):
    crosscoder = make_crosscoder()
    fx.save_pretrained(crosscoder, tmp_path / "coder")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    for name, held in (("coder", "model.safetensors"), ("mine", "thesis.tex")):
        before = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        with pytest.raises(IntegrityError, match=rf"{name} holds .*which no feature page wrote.*give a new folder"):
            page_of(feature()).save(tmp_path / name)
        assert held in before
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="is a file"):
        page_of(feature()).save(tmp_path / "file")


def test_a_path_says_whether_it_is_a_file_or_a_folder(tmp_path):
    page = page_of(feature())
    (tmp_path / "there.v1").mkdir()
    for name, made in (("a/", "a/index.html"), ("b", "b/index.html"), ("there.v1", "there.v1/index.html")):
        page.save(f"{tmp_path}/{name}")
        assert (tmp_path / made).is_file()
    page.save(tmp_path / "c.html")
    page.save(f"{tmp_path}/d.v2/")
    assert (tmp_path / "c.html").read_text() == page.html()
    assert (tmp_path / "d.v2" / "index.html").is_file()


def test_features_are_made_a_bunch_at_a_time(tmp_path):
    held, most = [], []

    class Seen:
        """Counts those that are alive."""

        def __init__(self, made):
            held.append(1)
            self.made = made
            most.append(len(held))

        def __getattr__(self, name):
            return getattr(self.made, name)

        def __del__(self):
            held.pop()

    lazy = pages.feature.LazyFeatures(range(4 * BUNCH), make=lambda i: Seen(feature(i, [])))
    pages.FeaturePage("t", "m", (0, 2), 1000, lazy).save(tmp_path / "site")
    assert max(most) <= 2 * BUNCH


def test_a_folder_of_a_crosscoder_that_was_seen_on_text(tmp_path):
    made, crosscoder = activations(), make_crosscoder()
    page = feature_page(
        crosscoder, made, make_tokenizer(), promoted=logit_weights(crosscoder, MODEL), tokens=4, contexts=1
    )
    page.save(tmp_path / "site")
    _, table, cards = read_site(tmp_path / "site")
    assert table["latents"] == list(range(12))
    for one in page.features:
        shown = Page(cards[one.latent])
        assert {f"#latent-{other}" for other, _ in one.nearest} <= set(shown.links)
        assert table["fired"][one.latent] == round(one.density * page.tokens)
        assert all(token.token.replace(" ", "␣") in shown.text for token in one.top)


# Search, as the page runs it.


def expected_scores(latents, words, lists, query):
    asked = query.replace("␣", " ").lower().split()
    found = []
    for row, latent in enumerate(latents):
        if len(asked) == 1 and asked[0].isdigit() and int(asked[0]) == latent:
            found.append(1e6)
            continue
        numbers = [number for column in lists for number in column[row]]
        best = [
            max(
                [64 * fit - place for place, number in enumerate(numbers) if (fit := fitted(words[number], term))],
                default=0,
            )
            for term in asked
        ]
        found.append(sum(best) if all(best) else 0)
    return found


def fitted(word, term):
    return 3 if word == term else 2 if word.startswith(term) else 1 if term in word else 0


@pytest.mark.skipif(NODE is None, reason="needs node, which runs the page's script")
def test_search_ranks_whole_tokens_first_and_early_ones_before_late_ones():
    generator = torch.Generator().manual_seed(0)
    words = ["whale", "whales", "a whale", "the", "12", "sea", "<b>", "ü"]
    rows = 40
    lists = [
        [torch.randint(len(words), (count,), generator=generator).tolist() for _ in range(rows)] for count in (3, 2, 2)
    ]
    queries = ["whale", "WHALE ", "whale sea", "12", "the ␣sea", "nothing", "<", "ü", "a"]
    code = (ROOM / "search.js").read_text(encoding="utf-8")
    given_ = json.dumps([list(range(rows)), words, lists])
    code += f"const given = {given_};\nconst asked = {json.dumps(queries)};\n"
    code += "console.log(JSON.stringify([asked.map((query) => [...scores(...given, query)]), folded(' A␣')]));"
    done = subprocess.run([NODE, "-"], input=code, capture_output=True, text=True, check=True)
    found, bare = json.loads(done.stdout)
    assert bare == "a"
    assert found == [expected_scores(range(rows), words, lists, query) for query in queries]
    assert found[0] == found[1]
    assert max(found[3]) == 1e6
    assert not any(found[5])


@pytest.mark.skipif(NODE is None, reason="needs node, which reads the page's script")
def test_the_script_of_a_folder_is_javascript(tmp_path):
    page_of(feature()).save(tmp_path / "site")
    scripts = sorted((tmp_path / "site").glob("*.js"))
    assert scripts
    for path in scripts:
        done = subprocess.run([NODE, "--check", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# Examples from intervals.


class Numbered:
    """Pieces whose text is their number in the text."""

    texts = ()

    def split(self, ids):
        return [Piece(str(number), 0, position, 1) for position, number in enumerate(ids)]


def examples_of(kept, rows, latents):
    text = Contexts(torch.arange(rows * WIDTH).view(rows, WIDTH), torch.ones(rows, WIDTH, dtype=torch.bool))
    found = kept.found(Excerpts(Numbered(), text, characters=10**6))
    return [found.of(i, torch.zeros(INTERVALS, dtype=torch.long)) for i in range(latents)]


@given(streams(), st.integers(1, 3), st.booleans(), st.integers(0, 10**6))
def test_examples_are_a_sample_of_every_interval_however_the_text_is_cut_or_ordered(stream, count, sparse, seed):
    z, _, places, cuts, rows = stream
    latents = list(range(z.shape[1]))
    bounds = [bound - bound % WIDTH for bound in (0, *cuts, len(z))]
    if not torch.equal(places // WIDTH, torch.arange(len(z)) // WIDTH):
        bounds = [0, len(z)]  # a context comes in one batch
    batches = [slice(*bound) for bound in pairwise(bounds)]
    made = []
    for order in (batches, batches[::-1]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(file, "_WAITING", 0)
            kept = IntervalExamples(latents, WIDTH, examples=count, seed=seed)
            for rows_ in order:
                kept.update(fx.to_csr(z[rows_]) if sparse else z[rows_], places[rows_])
            made.append(examples_of(kept, rows, len(latents)))
    assert made[0] == made[1]
    for latent in latents:
        strength = {}
        for place, value in zip(places.tolist(), z[:, latent].tolist(), strict=True):
            strength[place] = max(value, strength.get(place, 0.0))
        fired = {place: value for place, value in strength.items() if value > 0}
        bound = 1.0
        while fired and bound <= max(fired.values()):
            bound *= 2
        width = max(1.0, bound) / INTERVALS
        expected = {}
        for value in fired.values():
            expected.setdefault(int(value / width), []).append(value)
        assert [one.low / width for one in made[0][latent]] == sorted(expected, reverse=True)
        for interval in made[0][latent]:
            inside = expected[round(interval.low / width)]
            assert len(interval.excerpts) == min(count, len(inside))
            shown = [int(one.pieces[one.at]) for one in interval.excerpts]
            assert len(set(shown)) == len(shown)
            for one in interval.excerpts:
                assert interval.low <= one.activations[one.at] < interval.high == interval.low + width
                assert [fired.get(int(piece), 0.0) for piece in one.pieces] == list(one.activations)


def test_the_sample_is_uniform_and_the_seed_chooses_it():
    z, places, drawn = torch.ones(40, 2), torch.arange(40), torch.zeros(2, 40)
    for seed in range(300):
        kept = IntervalExamples([3, 8], WIDTH, examples=4, seed=seed)
        wide = torch.zeros(40, 9)
        wide[:, [3, 8]] = z
        kept.update(wide, places)
        for latent, (interval,) in enumerate(examples_of(kept, 5, 2)):
            drawn[latent, [int(one.pieces[one.at]) for one in interval.excerpts]] += 1
    expected, deviation = 30, (300 * 0.1 * 0.9) ** 0.5
    assert drawn.sum(1).tolist() == [1200, 1200]
    assert float((drawn - expected).abs().max()) < 4.5 * deviation
    assert abs(float(torch.corrcoef(drawn)[0, 1])) < 0.5  # each latent has its own


def test_what_is_held_of_examples_is_bounded_by_latents_and_intervals():
    kept = IntervalExamples(list(range(5)), WIDTH, examples=2)
    for batch in range(30):
        kept.update(torch.rand(99, 5), torch.arange(99) + 99 * batch)
        kept._settle()
        assert len(kept._kept.latent) <= 5 * INTERVALS * 2 * WIDTH
        assert int(kept._kept.example.sum()) <= 5 * INTERVALS * 2


def test_no_examples_may_be_asked_for_and_fewer_than_none_may_not():
    kept = IntervalExamples([0], WIDTH, examples=0)
    kept.update(torch.ones(3, 1), torch.arange(3))
    assert examples_of(kept, 1, 1) == [()]
    with pytest.raises(ValueError, match="0 or more, got examples=-1"):
        IntervalExamples([0], WIDTH, examples=-1)
