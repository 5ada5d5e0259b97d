"""One call gives what the single measures give; what is saved is what was measured."""

import json
import re
from dataclasses import replace
from math import isnan

import pytest
import torch
from language import make_model, make_tokenizer, words
from test_dashboard import Page
from test_judge import knowing
from torch.testing import assert_close

import fmxnn as fx
from fmxnn import reports as evaluation
from fmxnn.activations.harvesting import harvest
from fmxnn.activations.text import Contexts, contexts
from fmxnn.metrics import (
    functional_coherence,
    measure_reconstruction,
    norm_coherence,
    off_to_on,
    spliced_loss,
    top_tokens,
)
from fmxnn.metrics.judge import Judge, ScriptedEndpoint, summarise
from fmxnn.metrics.probing.pooling import pooled_codes
from fmxnn.metrics.probing.probing import probe
from fmxnn.metrics.probing.tasks import LabelledTexts, ProbeTask
from fmxnn.reports import compare
from fmxnn.reports.command_line import main
from fmxnn.reports.pages import feature_page

MODEL, TOKENIZER, LAYERS = make_model(), make_tokenizer(), (0, 2, 3)
TEXT = contexts([words(40, i) for i in range(6)], TOKENIZER, context=12)
ALL = "reconstruction, splice, coherence, probing, features, judge"
ALIEN = Contexts(torch.full((2, 5), 99), torch.ones(2, 5, dtype=torch.bool))
FAMILIAR = ProbeTask(
    "first <task>", *(LabelledTexts([words(5, i) for i in range(40)], ["a", "b"] * 20) for _ in range(2))
)


def make_crosscoder(layers=3, d_model=16):
    torch.manual_seed(0)
    weights = [fx.DenseWeight(layers, d_model, 24) for _ in range(2)]
    crosscoder = fx.Crosscoder(
        fx.CrossLayerEncoder(weights[0], fx.TopK(5), mask=fx.LayerMask(0.5)), fx.CrossLayerDecoder(weights[1])
    )
    return crosscoder.double()


CROSSCODER = make_crosscoder()
REPORT = fx.evaluate(
    CROSSCODER, TEXT, model=MODEL, layers=LAYERS, tokenizer=TOKENIZER, probes=[FAMILIAR], latents=(3, 1), batch=2
)


def test_every_part_is_what_its_own_function_gives_whatever_the_batches():
    reader = harvest(MODEL, TEXT, layers=LAYERS, batch=1).reader
    batches = [reader(TEXT.ids.long())[TEXT.keep]]
    assert_close(REPORT.reconstruction.numbers(), measure_reconstruction(CROSSCODER.eval(), batches).numbers())
    assert REPORT.reconstruction.tokens == TEXT.tokens
    assert_close(REPORT.splice.numbers(), spliced_loss(CROSSCODER, MODEL, TEXT, layers=LAYERS).numbers())
    assert_close(REPORT.norm.values, norm_coherence(CROSSCODER.decoder.weight).values)
    assert_close(REPORT.functional.values, functional_coherence(CROSSCODER, batches).values, equal_nan=True)
    assert torch.equal(REPORT.switching.switched, off_to_on(CROSSCODER, batches).switched)
    splits = [
        pooled_codes(CROSSCODER, MODEL, TOKENIZER, split.texts, layers=LAYERS, context=12)
        for split in (FAMILIAR.train, FAMILIAR.test)
    ]
    alone = probe(splits[0].codes, FAMILIAR.train.labels, splits[1].codes, FAMILIAR.test.labels)
    assert REPORT.probes["first <task>"].numbers() == alone.numbers()
    assert [feature.latent for feature in REPORT.page.features] == [3, 1]


def test_numbers_of_layers_are_those_of_the_parts():
    found = REPORT.per_layer()
    assert_close(found["ev"], REPORT.reconstruction.ev)
    assert_close(found["ce - clean"], REPORT.splice.ce - REPORT.splice.clean)
    alive = ~REPORT.functional.values.isnan()
    expected = [sum(row[alive].tolist()) / int(alive.sum()) for row in REPORT.functional.per_layer]
    assert_close(found["dependence"], torch.tensor(expected, dtype=torch.float64))
    assert {len(values) for values in found.values()} == {3}


def test_means_over_tasks_leave_intervals_out():
    twice = fx.evaluate(
        CROSSCODER,
        TEXT,
        model=MODEL,
        layers=LAYERS,
        tokenizer=TOKENIZER,
        parts=["probing"],
        probes=[
            FAMILIAR,
            ProbeTask("other", FAMILIAR.test, LabelledTexts([words(4, i) for i in range(9, 19)], ["b", "a"] * 5)),
        ],
    ).numbers()
    assert list(twice) == ["probing", "probing first <task>", "probing other"]
    assert "f1_low" not in twice["probing"]
    assert twice["probing"]["auroc"] == pytest.approx(
        (twice["probing first <task>"]["auroc"] + twice["probing other"]["auroc"]) / 2
    )


def test_the_saved_files_hold_the_numbers_and_need_no_other_file(tmp_path):
    REPORT.save(tmp_path / "new" / "report")
    folder = tmp_path / "new" / "report"
    pictures = {"coherence.png", "layers.png", "per-layer.png"}
    assert {path.name for path in folder.iterdir()} == pictures | {
        "report.json",
        "report.md",
        "report.html",
        "features.html",
        "features.json",
    }
    record = json.loads((folder / "report.json").read_text())
    numbers = {part: {k: None if isnan(v) else v for k, v in row.items()} for part, row in REPORT.numbers().items()}
    assert record["numbers"] == numbers
    assert record["layers"] == [0, 2, 3]
    assert record["probes"]["first <task>"][0]["label"] == "a"
    page = Page((folder / "report.html").read_text())
    assert [link for link in page.links if not link.startswith("data:image/png;base64,")] == ["features.html"]
    assert "script" not in page.tags
    assert "first <task>" in page.text
    for name, value in REPORT.reconstruction.numbers().items():
        assert f"{value:.4g}" in page.text, name
    assert REPORT.table() in (folder / "report.md").read_text()


def test_markup_in_names_is_text_and_half_a_character_its_escape(tmp_path):
    name = "<img src=x>|`$\\x$\r# two\ud83d"
    probes = {"<script>|1e5\x85\udfff": REPORT.probes["first <task>"], "1e5": REPORT.probes["first <task>"]}
    report = replace(REPORT, name=name, model="m\u2028<b>", probes=probes)
    report.save(tmp_path)
    text = (tmp_path / "report.md").read_text()
    shown = "&lt;img src=x&gt;\\|\\`$\\\\x$↵# two\\\\ud83d"
    assert text.startswith(f"# {shown} on m↵&lt;b&gt;, layers 0, 2, 3\n")
    assert "| &lt;script&gt;\\|1e5↵\\\\udfff " in text
    assert "\n| 1e5 " in text
    assert "<" not in text
    assert len(text.splitlines()) == len(
        (replace(REPORT, probes=probes | {"a": probes["1e5"]}).table() + "\n\n").splitlines()
    )
    page = Page((tmp_path / "report.html").read_text())
    assert not {"b", "script"} & set(page.tags)
    assert page.tags.count("img") == 3
    assert json.loads((tmp_path / "report.json").read_text())["name"] == name.replace("\ud83d", "\\ud83d")
    assert f"| {shown} " in compare([report])
    assert f"\n{name.replace(chr(13), '↵').encode(errors='backslashreplace').decode()} " in compare(
        [report], form="plain"
    )


@pytest.mark.parametrize("part", ["reconstruction", "splice", "coherence", "probing", "features"])
def test_any_part_alone_is_saved_too(part, tmp_path):
    given = dict(probes=[FAMILIAR], latents=[2], tokenizer=TOKENIZER)
    report = fx.evaluate(CROSSCODER, TEXT, model=MODEL, layers=LAYERS, parts=[part], **given)
    report.save(tmp_path)
    assert (part == "features") == (not report.numbers())
    assert (tmp_path / "features.html").exists() == (part == "features")
    Page((tmp_path / "report.html").read_text())


def test_what_has_nothing_to_work_on_is_left_out_and_modes_are_put_back():
    shown = []

    def bar(iterable, *, desc, total):
        shown.append((desc, total))
        return iterable

    CROSSCODER.train()
    report = fx.evaluate(CROSSCODER, TEXT, model=MODEL, layers=LAYERS, progress=bar)
    assert CROSSCODER.training
    CROSSCODER.eval()
    assert (report.probes, report.page) == ({}, None)
    batches = -(-len(TEXT) // 8)
    assert shown == [("activations", batches), ("spliced loss", batches)]


def test_the_model_reads_the_text_once_for_all_that_needs_activations_alone():
    judge, read = Judge(ScriptedEndpoint(knowing)), []
    given = dict(model=MODEL, layers=LAYERS, tokenizer=TOKENIZER, latents=(3, 1), judge=judge, batch=2)
    parts = ["reconstruction", "coherence", "features", "judge"]
    hook = MODEL.register_forward_pre_hook(lambda _m, _a, given: read.append(len(given["input_ids"])), with_kwargs=True)
    together = fx.evaluate(CROSSCODER, TEXT, parts=parts, **given)
    hook.remove()
    assert read == [1] + [2] * (len(TEXT) // 2) + [1] * (len(TEXT) % 2)  # one to learn d_model
    alone = [fx.evaluate(CROSSCODER, TEXT, parts=[part], **given) for part in parts]
    assert together.numbers() == {name: numbers for each in alone for name, numbers in each.numbers().items()}
    assert together.page == alone[2].page
    assert_close(
        together.page.features[0].density,
        feature_page(CROSSCODER, harvest(MODEL, TEXT, layers=LAYERS, batch=1), TOKENIZER, [3]).features[0].density,
    )


def test_a_judge_is_asked_about_every_latent_that_fires():
    judge = Judge(ScriptedEndpoint(knowing))
    report = fx.evaluate(
        CROSSCODER, TEXT, model=MODEL, layers=LAYERS, tokenizer=TOKENIZER, judge=judge, parts=["judge"]
    )
    found = top_tokens(CROSSCODER, harvest(MODEL, TEXT, layers=LAYERS, batch=1), TOKENIZER)
    assert report.judged == summarise(
        Judge(ScriptedEndpoint(knowing)).score(found), alive=sum(map(bool, found.values()))
    )
    assert report.numbers()["judge"]["judged"] > 0


def test_evaluate_is_found_when_it_is_asked_for():
    assert fx.evaluate is evaluation.evaluate
    with pytest.raises(AttributeError, match=r"^module 'fmxnn' has no attribute 'evaluation_of'$"):
        fx.evaluation_of  # noqa: B018


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ["coherense"]}, f"evaluate knows the parts {ALL}, got coherense; leave parts out for all"),
        ({"parts": []}, f"evaluate knows the parts {ALL}, got none; leave parts out for all"),
        ({"layers": None}, "evaluate needs the layers that the crosscoder was trained on, and it was not saved with "
            "it; pass layers=range(2, 10)"),
        ({"model": None}, "evaluate needs the model that the crosscoder was trained on, and it was not saved with it; "
            "pass model='openai-community/gpt2'"),
        ({"probes": [FAMILIAR]}, "evaluate needs the tokenizer of a model that is given as a module; pass "
            "tokenizer=..."),
        ({"latents": (24,), "tokenizer": TOKENIZER, "parts": ["features"]}, "the crosscoder has the latents 0 to 23, "
            "got 24"),
        ({"text": ALIEN}, "GPT2LMHeadModel knows the token ids 0 to 63, got 99; use the model's own tokenizer"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(change, message):
    given = {"text": TEXT, "model": MODEL, "layers": LAYERS} | change
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fx.evaluate(CROSSCODER, given.pop("text"), **given)


def test_a_report_that_cannot_be_written_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "report"
    message = f"the report cannot be written into {target}: Not a directory; give a folder that you may write to"
    with pytest.raises(OSError, match=f"^{re.escape(message)}$"):
        REPORT.save(target)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    TOKENIZER.save_pretrained(folder / "model")
    MODEL.float().save_pretrained(folder / "model")
    MODEL.double()
    (folder / "text.txt").write_text(words(300))
    fx.save_pretrained(
        make_crosscoder().float(), folder / "crosscoder", about={"base_model": str(folder / "model"), "layers": LAYERS}
    )
    fx.save_pretrained(fx.DenseWeight(1, 2, 3), folder / "weight")
    return folder


def test_the_command_line_knows_the_model_and_layers_of_a_saved_crosscoder(saved, tmp_path, capsys):
    words_given = [
        "evaluate",
        str(saved / "crosscoder"),
        "--text",
        str(saved / "text.txt"),
        "--context",
        "12",
        "--out",
        str(tmp_path / "r"),
    ]
    assert main([*words_given, "--parts", "reconstruction", "coherence", "--tokens", "200"]) == 0
    assert json.loads((tmp_path / "r" / "report.json").read_text())["layers"] == list(LAYERS)
    assert "reconstruction" in capsys.readouterr().out
    assert main([*words_given, "--layers", "0", "1"]) == 1
    assert "error: the crosscoder reads (..., layers=3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["{f}/weight", "--text", "{f}/text.txt"], "evaluate measures a Crosscoder, and {f}/weight holds a "
            "DenseWeight; save the whole crosscoder"),
        (["{f}/crosscoder", "--text", "{f}/none.txt"], "there is no text file '{f}/none.txt'; give the path of a "
            "file, or texts as a list of strings"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_sentence(saved, given, message, capsys):
    assert main(["evaluate", *(word.format(f=saved) for word in given)]) == 1
    assert capsys.readouterr().err == f"error: {message.format(f=saved)}\n"


def test_a_folder_of_folders_on_the_command_line_says_which_hold_weights(saved, capsys):
    assert main(["evaluate", str(saved), "--text", "x"]) == 1
    assert (
        capsys.readouterr().err
        == f"error: {saved} holds no weights; subfolder= can be 'crosscoder', 'model', 'weight'\n"
    )


def test_a_comparison_has_a_row_for_each_and_the_measures_that_any_has():
    other = fx.evaluate(make_crosscoder(), TEXT, model=MODEL, layers=LAYERS, parts=["reconstruction"], name="untold")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in compare([REPORT, other]).splitlines()]
    assert lines[0] == ["dictionary", "mse", "ev", "cos", "l0", "dead", "c_n", "c_f", "kl", "f1", "auroc", "ce - clean"]
    numbers = REPORT.numbers()
    assert float(lines[2][7]) == pytest.approx(numbers["functional coherence"]["mean"], rel=1e-3)
    assert float(lines[2][11]) == pytest.approx(
        numbers["spliced loss"]["ce"] - numbers["spliced loss"]["ce_clean"], abs=1e-3
    )
    assert lines[3][0] == "untold"
    assert lines[3][6:] == [""] * 6
    assert "auroc" not in compare([other])


def test_what_is_not_of_one_text_is_not_compared():
    other = fx.evaluate(
        CROSSCODER, Contexts(TEXT.ids[:2], TEXT.keep[:2]), model=MODEL, layers=LAYERS, parts=["reconstruction"]
    )
    message = (
        "compare takes evaluations of one model, the same layers and the same text, got GPT2LMHeadModel, "
        f"layers (0, 2, 3), {other.tokens} tokens"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}; GPT2LMHeadModel, layers"):
        compare([REPORT, other])
    with pytest.raises(ValueError, match=r"same text, got none$"):
        compare([])


def test_latents_whose_codes_are_negative_fire_in_every_part():
    crosscoder = make_crosscoder()
    crosscoder.encoder.sparsifier = fx.SignedTopK(24)
    with torch.no_grad():
        crosscoder.encoder.bias -= 100
    judge = Judge(ScriptedEndpoint(knowing))
    parts = ["reconstruction", "coherence", "features", "judge"]
    report = fx.evaluate(
        crosscoder, TEXT, model=MODEL, layers=LAYERS, tokenizer=TOKENIZER, latents=(3,), judge=judge, parts=parts
    )
    assert (report.reconstruction.l0, report.reconstruction.dead) == (24, 0)
    assert (report.functional.alive, report.judged.alive) == (24, 24)
    assert [feature.density for feature in report.page.features] == [1.0]
    assert "negative codes alone" in report.page.html()
    assert "never fires" not in report.page.html()
