import importlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from language import make_model, make_tokenizer, words

import fmxnn as fx
from fmxnn.training import Trainer

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def paper(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("reproduce_paper")


@pytest.fixture
def presets(paper):
    return importlib.import_module("paper_presets")


@pytest.fixture
def data(paper):
    return importlib.import_module("paper_data")


@pytest.fixture
def reports(paper):
    return importlib.import_module("paper_report")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    for family in ("gpt2", "gpt_neox", "gemma2"):
        make_tokenizer().save_pretrained(folder / family)
        make_model(family).save_pretrained(folder / family)
    (folder / "text.txt").write_text(words(3000))
    (folder / "heldout.txt").write_text(words(600, seed=1))
    for split, seed in (("train", 2), ("test", 3)):
        lines = [{"text": words(12, seed=seed * 100 + i), "label": i % 2} for i in range(20)]
        (folder / "probe").mkdir(exist_ok=True)
        (folder / "probe" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def small(presets, name, variants, seeds=(0,), steps=6):
    """A preset with the sizes of the random models."""
    sizes = dict(layers=(0, 1, 3), tokens=steps * 64, latents=32, k=3, batch=64, context=16, heldout=256, dead_after=64)
    return replace(presets.PRESETS[name], variants=variants, seeds=seeds, **sizes)


def arguments(folder, out, *more, family="gpt2"):
    text = (
        "--text",
        str(folder / "text.txt"),
        "--heldout",
        str(folder / "heldout.txt"),
        "--model",
        str(folder / family),
        "--device",
        "cpu",
    )
    return ["mine", "--out", str(out), *text, *more]


def results(out):
    return {path.stem: json.loads(path.read_text()) for path in (out / "results").glob("*.json")}


@pytest.mark.parametrize(
    ("name", "d_model", "layers", "tokens", "ring", "cp"),
    [
        ("gpt2-small", 768, range(2, 10), 300_000_000, [(5, 244, 25)], [5866]),
        (
            "pythia-410m",
            1024,
            range(8, 16),
            500_000_000,
            [(7, 302, 27), (5, 214, 19), (3, 151, 13), (2, 107, 9)],
            [7707, 3853, 1926, 963],
        ),
        ("pythia-1.4b", 2048, range(8, 16), 500_000_000, [(11, 501, 31)], [14557]),
        ("gemma2-2b", 2304, range(9, 17), 500_000_000, [(12, 545, 32)], [16153]),
    ],
)
def test_the_presets_are_the_papers_rows(presets, name, d_model, layers, tokens, ring, cp):
    preset = presets.PRESETS[name]
    assert preset.layers == tuple(layers)
    assert preset.tokens == tokens
    assert (preset.latents, preset.k, preset.batch, preset.context, preset.learning_rate) == (
        16_384,
        64,
        4096,
        128,
        3e-4,
    )

    def found(kind, attribute):
        with torch.device("meta"):
            weights = [
                presets.make_weight(each, len(preset.layers), d_model, preset.latents)
                for each in preset.variants
                if each.weight == kind
            ]
        return list(dict.fromkeys(getattr(weight, attribute) for weight in weights))

    assert found("tr", "ranks") == ring
    assert found("cp", "rank") == cp
    assert {(each.start, each.p) for each in preset.variants if each.weight == "dense" and each.share == 1} >= {
        ("paper", 0),
        ("tied", 0),
    }


def test_the_papers_probabilities_and_shares_are_there(presets):
    for name in ("pythia-410m", "tiny"):
        variants = presets.PRESETS[name].variants
        for kind in ("tr-wide" if name == "tiny" else "tr", "cp"):
            mine = [each for each in variants if each.weight == kind]
            assert {each.p for each in mine if each.share == 1} == {0, 0.02, 0.05, 0.1}
            assert {each.share for each in mine if each.p == 0} == {1, 1 / 2, 1 / 4, 1 / 8}
            assert {each.share for each in mine if each.p == 0.05} >= {1, 1 / 8}


@pytest.mark.parametrize("name", ["gpt2-small", "pythia-410m", "pythia-1.4b", "gemma2-2b", "tiny", "tiny-search"])
def test_every_job_comes_once_and_first_seeds_before_all_others(presets, name):
    preset = presets.PRESETS[name]
    found = presets.jobs(preset)
    assert len({job.slug for job in found}) == len(found) == len(preset.variants) * len(preset.seeds)
    assert {job.seed for job in found[: len(preset.variants)]} == {preset.seeds[0]}
    assert not set(presets.PRESETS["tiny"].seeds) & set(presets.PRESETS["tiny-search"].seeds)


def test_a_run_measures_every_job_and_goes_on_where_it_stopped(paper, presets, folder, tmp_path, monkeypatch, capsys):
    variants = (
        *(
            presets.Variant("dense", "tied", full=True),
            presets.Variant("sae", "tied", full=True),
            presets.Variant("dense", "paper"),
        ),
        *(presets.Variant("tr-wide", "isometric", p=0.1, auxiliary=True), presets.Variant("cp", "tied", share=0.5)),
        *(presets.Variant("tr-wide", "data"), presets.Variant("sae", "data")),
    )
    monkeypatch.setitem(presets.PRESETS, "mine", small(presets, "tiny", variants, seeds=(0, 1)))
    out, more = tmp_path / "out", ("--probes", str(folder / "probe"))
    assert paper.main(arguments(folder, out, *more)) == 0
    first = results(out)
    assert len(first) == 14
    for slug, record in first.items():
        assert record["numbers"]["mse"] > 0
        assert ("c_f" in record) == (record["variant"]["weight"] != "sae")
        assert ({"probes", "splice"} <= record.keys()) == record["variant"]["full"]
        parts = sorted((out / "dictionaries" / slug).iterdir())
        assert len(parts) == (3 if record["variant"]["weight"] == "sae" else 1)
        assert fx.from_pretrained(parts[0]).encoder.weight.latents == 32
    assert "| dense, tied start" in (out / "report.md").read_text()

    gone = "tr-wide-isometric-p0.1-share1-aux1-lr1-seed1"
    (out / "results" / f"{gone}.json").unlink()
    for path in (out / "dictionaries" / gone / "0").iterdir():
        path.unlink()
    times = {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    assert paper.main(arguments(folder, out, *more)) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    again = results(out)[gone]
    assert {name: again[name] for name in ("numbers", "c_n", "c_f")} == {
        name: first[gone][name] for name in ("numbers", "c_n", "c_f")
    }
    assert "14 of 14 jobs are done, in 0 minutes of one thread." in capsys.readouterr().out


def test_what_earlier_runs_did_not_measure_is_measured_without_training_again(
    paper, presets, folder, tmp_path, monkeypatch
):
    variants = (presets.Variant("dense", "tied", full=True), presets.Variant("sae", "tied", full=True))
    monkeypatch.setitem(presets.PRESETS, "mine", small(presets, "tiny", variants, seeds=(0, 1)))
    out, more = tmp_path / "out", ("--probes", str(folder / "probe"))
    assert paper.main(arguments(folder, out)) == 0
    without = results(out)
    assert all("splice" in record and "probes" not in record for record in without.values())
    monkeypatch.setattr(paper, "train", None)
    assert paper.main(arguments(folder, out, *more)) == 0
    whole = results(out)
    for slug, lost in (
        ("dense-tied-p0-share1-aux0-lr1-seed1", "splice"),
        ("sae-tied-p0-share1-aux0-lr1-seed0", "probes"),
    ):
        record = {name: part for name, part in whole[slug].items() if name != lost}
        (out / "results" / f"{slug}.json").write_text(json.dumps(record))
    times = {path: path.stat().st_mtime_ns for path in (out / "dictionaries").rglob("*")}
    assert paper.main(arguments(folder, out, *more)) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "dictionaries").rglob("*")} == times
    for slug, record in results(out).items():
        assert record["seconds"] >= whole[slug]["seconds"] > without[slug]["seconds"]
        assert {**record, "seconds": 0} == {**whole[slug], "seconds": 0}
        assert {name: whole[slug][name] for name in without[slug] if name != "seconds"} | {"seconds": 0} == {
            **without[slug],
            "seconds": 0,
        }


@pytest.mark.slow
def test_two_workers_leave_what_one_does(paper, presets, folder, tmp_path, monkeypatch):
    variants = (presets.Variant("dense", "tied"), presets.Variant("tr", "paper", p=0.1), presets.Variant("sae", "tied"))
    monkeypatch.setitem(presets.PRESETS, "mine", small(presets, "tiny", variants))
    for workers in ("1", "2"):
        assert paper.main(arguments(folder, tmp_path / workers, "--workers", workers)) == 0
    one, two = results(tmp_path / "1"), results(tmp_path / "2")
    assert {slug: record["numbers"] for slug, record in two.items()} == {
        slug: record["numbers"] for slug, record in one.items()
    }


@pytest.mark.parametrize(
    ("name", "family"), [("gpt2-small", "gpt2"), ("pythia-410m", "gpt_neox"), ("gemma2-2b", "gemma2")]
)
def test_a_streamed_preset_runs_on_its_family_and_resumes_inside_a_job(
    paper, presets, folder, tmp_path, monkeypatch, name, family
):
    variants = (presets.Variant("tr", "paper", p=0.05), presets.Variant("sae", "tied"))
    monkeypatch.setitem(presets.PRESETS, "mine", small(presets, name, variants))
    monkeypatch.setattr(paper, "CHECKPOINT_EVERY", 2)
    assert paper.main(arguments(folder, tmp_path / "whole", family=family)) == 0

    class Killed(BaseException):
        pass

    taken, step = [], Trainer.step

    def until_killed(self, x):
        taken.append(self.steps)
        if len(taken) == 6 + 3 * 3 + 2:  # in the SAEs' fourth step, after two of the three
            raise Killed
        return step(self, x)

    monkeypatch.setattr(Trainer, "step", until_killed)
    with pytest.raises(Killed):
        paper.main(arguments(folder, tmp_path / "killed", family=family))
    assert len(results(tmp_path / "killed")) == 1
    taken.clear()
    monkeypatch.setattr(paper, "CHECKPOINT_EVERY", 100)
    monkeypatch.setattr(Trainer, "step", lambda self, x: taken.append(self.steps) or step(self, x))
    assert paper.main(arguments(folder, tmp_path / "killed", family=family)) == 0
    assert min(taken) == 2
    whole, killed = results(tmp_path / "whole"), results(tmp_path / "killed")
    assert {slug: record["numbers"] for slug, record in killed.items()} == {
        slug: record["numbers"] for slug, record in whole.items()
    }


def test_stored_batches_are_the_harvested_ones_in_an_order_of_each_seed(
    paper, data, presets, folder, tmp_path, monkeypatch
):
    monkeypatch.setitem(presets.PRESETS, "mine", small(presets, "tiny", ()))
    texts = {name: (str(folder / f"{name}.txt"),) for name in ("text", "heldout")}
    plan = paper.make_plan(paper.Arguments("mine", tmp_path / "out", model=str(folder / "gpt2"), device="cpu", **texts))
    data.store(plan)
    stream, heldout, scale = data.open_streams(plan, 0)
    harvested = torch.stack([x * scale for x in stream][:6])
    assert harvested.norm(dim=-1).mean().item() == pytest.approx(4, rel=0.05)  # sqrt(d_model), of the first 8 batches
    assert data.open_streams(replace(plan, preset=replace(plan.preset, scaled=False)), 0)[2] == 1
    orders = []
    for seed in (0, 1):
        opened = data.open_data(plan, seed)
        found = list(opened.train(0))
        orders.append([int((harvested - x).abs().amax((1, 2, 3)).argmin()) for x in found])
        assert sorted(orders[-1]) == list(range(6))
        torch.testing.assert_close(
            torch.stack(found), harvested[orders[-1]], rtol=1e-3, atol=1e-3
        )  # they are kept in float16
        assert all(torch.equal(x, y) for x, y in zip(opened.train(2), found[2:]))
        kept, wanted = torch.stack(list(opened.heldout())), torch.stack([x * scale for x in heldout])
        torch.testing.assert_close(kept, wanted, rtol=1e-3, atol=1e-3)
    assert orders[0] != orders[1]


def test_no_job_starts_when_the_time_is_up_and_the_report_says_so(
    paper, presets, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(presets.PRESETS, "mine", small(presets, "tiny", (presets.Variant("dense", "tied"),)))
    assert paper.main(arguments(folder, tmp_path / "out", "--minutes", "0")) == 0
    printed = capsys.readouterr().out
    assert "not started, for lack of time: dense-tied-p0-share1-aux0-lr1-seed0" in printed
    assert "0 of 1 jobs are done, in 0 minutes of one thread. Not measured at all: dense, tied start." in printed


def hand_made(presets, out, values):
    """Results with these errors, by variant and seed."""
    (out / "results").mkdir(parents=True)
    (out / "preset.json").write_text(json.dumps({"preset": "mine"}))
    for (variant, seed), mse in values.items():
        numbers = {"mse": mse, "ev": 1 - mse, "cos": 0.5, "l0": 16.04, "dead": 0.25, "off_to_on_per_token": 1.5}
        coherence = {"variant": "of hand", "mean": 2 * mse, "median": 2.0, "alive": 3, "values": [1.0, 2.0, 3.0, None]}
        record = {
            "seed": seed,
            "seconds": 60,
            "ranks": [2, 3, 4],
            "numbers": numbers,
            "c_n": coherence,
            "c_f": coherence,
        }
        if variant.full:
            record |= {"probes": {"f1": mse, "auroc": 0.5}, "splice": {"ce_score_zero": 1 - mse, "kl": mse}}
        (out / "results" / f"{presets.Job(variant, seed).slug}.json").write_text(json.dumps(record))


@pytest.fixture
def three(presets, monkeypatch, tmp_path):
    dense, tied, ring = (
        presets.Variant("dense", "paper", full=True),
        presets.Variant("dense", "tied", full=True),
        presets.Variant("tr", "tied", share=0.5),
    )
    whole = replace(ring, share=1.0)
    preset = replace(presets.PRESETS["tiny"], variants=(dense, tied, whole, ring), seeds=(0, 1))
    monkeypatch.setitem(presets.PRESETS, "mine", preset)
    values = {(dense, 0): 0.2, (dense, 1): 0.4, (tied, 0): 0.2, (whole, 0): 0.1, (ring, 0): 0.15}
    hand_made(presets, tmp_path / "out", values)
    return tmp_path / "out"


def rows(text, name):
    return [
        [cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines() if line.startswith(f"| {name} ")
    ]


def test_tables_hold_means_spreads_and_changes_against_both_baselines(reports, three):
    made = reports.tables(reports.Results.read(three))
    assert rows(made["best"], "dense, tied start") == []  # it has the first seed alone, by which the best was chosen
    table = made["reconstruction"]
    assert rows(table, "dense, paper start") == [
        ["0.3000 ± 0.1414", "+0.0%", "+50.0%", "0.7000 ± 0.1414", "0.5000 ± 0.0000", "16.0 ± 0.0", "25.0 ± 0.0", "2"]
    ]
    assert rows(table, "TR, tied start") == [["0.1000", "-66.7%", "-50.0%", "0.9000", "0.5000", "16.0", "25.0", "1"]]
    assert rows(made["compression"], "TR, tied start, 1/2 of the parameters") == [
        ["2, 3, 4", "0.1500", "+50.0%", "0.8500", "25.0", "0.30", "+50.0%", "1"],
    ]
    assert rows(made["probing"], "dense, paper start") == [
        ["30.0 ± 14.1", "0.500 ± 0.000", "", "", "0.7000 ± 0.1414", "0.3000 ± 0.1414", "2"],
    ]
    assert rows(made["probing"], "dense, tied start") == [["20.0", "0.500", "", "", "0.8000", "0.2000", "1"]]
    assert rows(made["probing"], "TR, tied start") == []  # not measured
    assert made["missing"] == "5 of 8 jobs are done, in 5 minutes of one thread."


def test_the_best_is_shown_on_other_seeds_than_the_first_and_against_its_baseline_seed_by_seed(
    presets, reports, tmp_path, monkeypatch
):
    dense, ring = (presets.named(f"{name}-aux") for name in ("dense-tied", "tr-wide-isometric"))
    data = tuple(replace(presets.named(name), full=True) for name in ("dense-data", "tr-wide-data"))
    variants = (*(replace(variant, full=True) for variant in (dense, ring)), *data)
    monkeypatch.setitem(presets.PRESETS, "mine", replace(presets.PRESETS["tiny"], variants=variants, seeds=(0, 1, 2)))
    errors = {
        variants[0]: (9.0, 0.3, 0.5, 0.1),
        variants[1]: (9.0, 0.25, 0.35),
        data[0]: (9.0, 0.2, 0.1),
        data[1]: (9.0, 0.1, 0.1),
    }
    hand_made(
        presets,
        tmp_path / "out",
        {(variant, seed): mse for variant, found in errors.items() for seed, mse in enumerate(found)},
    )
    best = reports.tables(reports.Results.read(tmp_path / "out"))["best"]
    assert [row[:2] for row in rows(best, "dense, tied start, auxiliary loss")] == [["0.4000 ± 0.1414", ""]]
    assert [row[:2] for row in rows(best, "TR wide, isometric start, auxiliary loss")] == [
        ["0.3000 ± 0.0707", "-0.1000 ± 0.0707"]
    ]
    assert [row[:2] for row in rows(best, "TR wide, data start")] == [["0.1000 ± 0.0000", "-0.0500 ± 0.0707"]]


def test_planted_tables_hold_every_variant_and_the_oracle(presets, reports, tmp_path):
    (tmp_path / "minutes" / "results").mkdir(parents=True)
    names = ("mcc", "recovered", "detection_f1", "iou", "c_n_error", "c_f_error", "silent", "training_seconds")
    for variant, found in (("dense-tied", {3: 0.5, 4: 0.7}), ("tr-wide-isometric", {4: 0.9, 5: 0.7})):
        for seed, mcc in found.items():
            record = {
                "variant": asdict(presets.named(variant)),
                "seed": seed,
                "recovery": dict.fromkeys(names, mcc),
                "oracle": {"mcc": seed / 4},
            }
            (tmp_path / "minutes" / "results" / f"{variant}-{seed}.json").write_text(json.dumps(record))
    page = tmp_path / "page.md"
    page.write_text("<!-- planted: minutes -->\n<!-- /planted: minutes -->\n")
    assert reports.main(tmp_path, page) == 0
    text = page.read_text()
    assert rows(text, "dense, tied start")[0][:3] == ["0.600 ± 0.141", "", "0.600 ± 0.141"]
    assert rows(text, "TR wide, isometric start")[0][:3] == ["0.800 ± 0.141", "+0.200", "0.800 ± 0.141"]
    assert rows(text, "the oracle") == [["1.000 ± 0.250", *[""] * 8, "3"]]


def test_a_variant_is_called_by_name(presets):
    for name in ("tiny", "tiny-search", "pythia-410m"):
        for variant in presets.PRESETS[name].variants:
            assert presets.named(variant.slug) == variant
    assert presets.named("tr-wide-isometric-aux") == presets.Variant("tr-wide", "isometric", auxiliary=True)
    assert presets.named("cp-tied-p0.05-share0.5-lr2") == presets.Variant("cp", "tied", p=0.05, share=0.5, faster=2.0)


def test_a_page_is_filled_where_it_has_places_and_keeps_the_rest(reports, three, tmp_path, capsys):
    page, names = tmp_path / "page.md", ("reconstruction", "coherence", "missing")
    (tmp_path / "images").mkdir()
    places = "".join(
        f"<!-- mine: {name} -->\n{old}<!-- /mine: {name} -->\nafter {name}\n"
        for name, old in zip(names, ("old\n", "", "old\n"))
    )
    page.write_text(
        f"Said by hand.\n\n{places}<!-- other: missing -->\nkept\n<!-- /other: missing "
        "-->\n![masking](images/mine-masking.png)\n"
    )
    assert reports.main(three, page) == 0
    first = page.read_text()
    assert "old" not in first
    assert "<!-- other: missing -->\nkept\n<!-- /other: missing -->\n" in first
    assert first.startswith("Said by hand.\n\n<!-- mine: reconstruction -->\n\n| dictionary")
    assert all(f"<!-- /mine: {name} -->\nafter {name}\n" in first for name in names)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["mine-masking.png"]
    assert reports.main(three, page) == 0
    assert page.read_text() == first
    page.write_text("no place")
    capsys.readouterr()
    assert reports.main(three, page) == 1
    lines = ", ".join(
        f"<!-- mine: {name} -->"
        for name in ("reconstruction", "probing", "coherence", "compression", "best", "missing")
    )
    sentence = (
        f"error: {page} has no place for a table; give it one of the lines {lines}, and the same with a / "
        "where the table ends\n"
    )
    assert capsys.readouterr().err == sentence


def test_a_folder_without_results_is_one_sentence(reports, tmp_path, capsys):
    assert reports.main(tmp_path) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path} holds no results; make them: python examples/reproduce_paper.py tiny --out {tmp_path}\n"
    )


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ("--text", "missing.txt"),
            "there is no text file 'missing.txt'; give the path of a file, or texts as a list of strings",
        ),
        (("--workers", "0"), "reproduce_paper needs workers >= 1, got workers=0"),
        (
            ("--probes", "nowhere"),
            "there is no folder '{here}/nowhere' of train.jsonl and test.jsonl, and no data set of that name; the "
            "data sets are ",
        ),
        (
            ("--heldout", "short.txt"),
            "the text gives 5 tokens, and one context needs 15; give more text or a shorter context",
        ),
    ],
)
def test_a_mistake_is_one_sentence(paper, presets, folder, tmp_path, monkeypatch, capsys, more, sentence):
    monkeypatch.setitem(presets.PRESETS, "mine", small(presets, "tiny", (presets.Variant("dense", "tied"),)))
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("w3 w4 w5 w6")
    assert paper.main(arguments(folder, tmp_path / "out", *more)) == 1
    assert f"error: {sentence.format(here=tmp_path)}" in capsys.readouterr().err


def test_too_little_text_another_preset_or_folder_is_one_sentence(
    paper, presets, folder, tmp_path, monkeypatch, capsys
):
    assert paper.main(["huge", "--out", str(tmp_path / "out")]) == 1
    known = "gpt2-small, pythia-410m, pythia-1.4b, gemma2-2b, tiny, tiny-search"
    assert capsys.readouterr().err == f"error: reproduce_paper knows the presets {known}, got 'huge'\n"
    monkeypatch.setitem(presets.PRESETS, "mine", small(presets, "tiny", (), steps=100))
    assert paper.main(arguments(folder, tmp_path / "out")) == 1
    assert "error: the text gives 3,000 tokens, and 100 batches need 6,400; give more text\n" in capsys.readouterr().err
    monkeypatch.setitem(presets.PRESETS, "mine", small(presets, "tiny", (), steps=5))
    assert paper.main(arguments(folder, tmp_path / "out")) == 0  # nothing came of the mistake before
    monkeypatch.setitem(presets.PRESETS, "mine", small(presets, "tiny", (), steps=6))
    capsys.readouterr()
    assert paper.main(arguments(folder, tmp_path / "out")) == 1
    sentence = f"error: {tmp_path / 'out'} holds results of another preset, text or model; choose another --out\n"
    assert capsys.readouterr().err == sentence
    monkeypatch.setitem(presets.PRESETS, "mine", small(presets, "tiny", (), steps=5))
    assert paper.main([*arguments(folder, tmp_path / "out"), "--heldout", str(folder / "text.txt")]) == 1
    assert capsys.readouterr().err == sentence
