import json
import logging
import math
import random
import re
import socket
import threading
import time
import traceback
from dataclasses import replace
from email.utils import formatdate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from judge_server import chatting, completion
from language import make_model
from reference import kind_by_hand, wilson_by_bisection
from transformers import AutoTokenizer

from fmxnn.metrics.firing import TopToken
from fmxnn.metrics.judge import (
    PANEL,
    Calibration,
    CalibrationError,
    EndpointError,
    Judge,
    Judgements,
    Prompt,
    Scores,
    ScriptedEndpoint,
    Share,
    read_scores,
    summarise,
)
from fmxnn.metrics.judge.cache import digest
from fmxnn.metrics.judge.local import LocalEndpoint
from fmxnn.metrics.judge.prompt import REMINDER
from fmxnn.metrics.judge.remote import OpenAIEndpoint, Pace, RateLimit

TRUTH = {"semantic": (0.9, 0.1), "surface": (0.1, 0.9), "neither": (0.1, 0.1), "both": (0.9, 0.9)}
PANEL_PROMPTS = {Prompt().text(member.top_tokens): member for member in PANEL}
SECRET = "sk-do-not-show-me-0123456789"
QUICK = Pace(in_flight=4, timeout=5.0, tries=3, backoff=0.001)


def said(semantic, surface):
    return json.dumps({"semantic_score": semantic, "surface_score": surface})


def knowing(prompt):
    """A judge that is right about the panel, and draws the scores of anything else from the prompt."""
    prompt = prompt.removesuffix(REMINDER)
    if prompt in PANEL_PROMPTS:
        return said(*TRUTH[PANEL_PROMPTS[prompt].kind])
    drawn = random.Random(prompt)
    return said(drawn.random(), drawn.random())


def latents(count):
    return {
        10 * i: [TopToken(f"word{i}", 2.0, (f"left <<word{i}>> right",)), TopToken("a", 1.0, ())] for i in range(count)
    }


def panel_scores(scores_of):
    return Calibration({member: scores_of(member) for member in PANEL})


GOOD = panel_scores(lambda member: Scores(*TRUTH[member.kind]))


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    return "JUDGE_KEY"


# Answers


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.text(max_size=30),
)
def test_scores_are_read_out_of_prose_fences_and_strings_and_clipped(semantic, surface, as_strings, prose):
    prose = prose.replace("{", "(")
    answer = said(*(str(value) if as_strings else value for value in (semantic, surface)))
    expected = Scores(min(max(semantic, 0.0), 1.0), min(max(surface, 0.0), 1.0))
    for text in (
        answer,
        f"{prose}{answer}",
        f"{answer}\n{prose}",
        f"```json\n{answer}\n```",
        f'{{"rating": {answer}}}',
        f"{said(0, 0)} no: {answer}",
    ):
        assert read_scores(text) == expected
    assert read_scores(f'{{"semantic_score": "NaN", "surface_score": 1}} {answer}') == expected


@pytest.mark.parametrize(
    "score",
    ["null", "NaN", "-Infinity", '"NaN"', '"inf"', "true", '"high"', '"0.8/1"', "[0.8]", "{}", "1" + "0" * 400, '""'],
)
def test_a_score_that_is_no_number_makes_the_answer_malformed(score):
    assert read_scores(f'{{"semantic_score": {score}, "surface_score": 0.1}}') is None
    assert read_scores(f'{{"surface_score": {score}, "semantic_score": 0.1}}') is None
    assert read_scores(f'{said(0.5, 0.5)} or rather {{"semantic_score": {score}, "surface_score": 0.1}}') is None


@given(st.text(alphabet='{}[]":,.0 semantic_score', max_size=80))
def test_any_other_answer_is_malformed_and_never_an_error(text):
    found = read_scores(text)
    assert found is None or ("semantic_score" in text and "surface_score" in text)


def test_half_an_answer_is_malformed():
    for text in (
        "",
        '{"semantic_score": 0.5}',
        '{"semantic_score": 0.5, "surface_',
        "0.5, 0.5",
        '{"a":' * 3000,
        "{" * 30_000,
        '[["' * 5000,
    ):
        assert read_scores(text) is None


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_kind_of_a_latent_is_the_rule_as_written(semantic, surface):
    assert Scores(semantic, surface).kind == kind_by_hand(semantic, surface)


def test_the_limits_of_the_rule_are_outside_it():
    assert [
        Scores(*pair).kind
        for pair in ((0.7, 0.0), (0.71, 0.3), (0.71, 0.29), (0.29, 0.71), (0.3, 0.71), (0.9, 0.9), (0, 0))
    ] == [*("other", "other", "semantic", "surface", "other", "other", "other")]


# Prompts


@given(
    st.lists(st.tuples(st.text(max_size=8), st.floats(0, 9), st.lists(st.text(max_size=20), max_size=3)), max_size=25)
)
def test_a_prompt_shows_the_strongest_tokens_each_on_a_line_of_its_own(drawn):
    top_tokens = [TopToken(token, activation, tuple(contexts)) for token, activation, contexts in drawn]
    lines = Prompt("Judge.", tokens=5, contexts=2).text(top_tokens).split("\n")
    strongest = sorted(drawn, key=lambda top: -top[1])[:5]
    assert lines[:2] == ["Judge.", ""]
    shown = [(f"{i}. ", token, contexts[:2]) for i, (token, _, contexts) in enumerate(strongest, 1)]
    expected = [
        part
        for number, token, contexts in shown
        for part in [(number, token), *(("   in ", context) for context in contexts)]
    ]
    assert [
        (line[: len(opening)], json.loads(line[len(opening) :]))
        for line, (opening, _) in zip(lines[2:], expected, strict=True)
    ] == expected


def test_half_a_surrogate_pair_can_be_sent():
    assert Prompt("").text([TopToken("\ud83d", 1.0, ())]) == '\n\n1. "?"'


def test_a_prompt_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="tokens=0") as caught:
        Prompt(tokens=0)
    assert str(caught.value) == "a Prompt shows tokens >= 1 with contexts >= 0 each, got tokens=0, contexts=2"


# The panel


def test_the_panel_is_what_the_prompt_asks_about():
    assert [[member.kind for member in PANEL].count(kind) for kind in TRUTH] == [4, 4, 2, 2]
    assert len({member.name for member in PANEL}) == len(PANEL)
    contexts = [context for member in PANEL for context in member.contexts]
    assert len(set(contexts)) == len(contexts)
    for context in contexts:
        left, right = re.split("<<.+?>>", context)
        assert max(len(left), len(right)) <= 80
    for member in PANEL:
        tokens = [top.token.strip().lower() for top in member.top_tokens]
        assert len(tokens) == len(member.contexts) == 10
        assert len(set(tokens)) == 10 or "bracket" in member.name


def test_a_panel_is_separated_by_the_truth_and_by_one_miss_of_each_kind():
    assert GOOD.separated
    assert GOOD.missed == ()
    assert repr(GOOD) == "Calibration: the judge separates the calibration panel, 12 of 12 right"
    semantic, surface = ([member for member in PANEL if member.kind == kind] for kind in ("semantic", "surface"))
    once = Calibration({**GOOD.scores, semantic[0]: None, surface[2]: Scores(0.5, 0.9)})
    assert once.separated
    assert once.missed == (semantic[0], surface[2])
    assert once.verdict == (
        "the judge separates the calibration panel, 10 of 12 right; missed: 'illness and care' (semantic) got "
        "malformed answers; "
        "'a capital at the start of a sentence' (surface) got semantic 0.5, surface 0.9"
    )
    assert not Calibration({**once.scores, semantic[1]: None}).separated


@pytest.mark.parametrize("index", range(12))
def test_a_single_false_count_spoils_the_panel(index):
    for kind in {"semantic", "surface"} - {PANEL[index].kind}:
        assert not Calibration({**GOOD.scores, PANEL[index]: Scores(*TRUTH[kind])}).separated


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_judges_that_know_nothing_do_not_separate_the_panel(a, b, seed):
    drawn = random.Random(seed)
    assert not panel_scores(lambda _: Scores(a, b)).separated
    assert not panel_scores(lambda _: None).separated
    assert not panel_scores(
        lambda member: Scores(a := TRUTH[member.kind][0], 1 - a)
    ).separated  # as if one scale were the other reversed
    passed = sum(panel_scores(lambda _: Scores(drawn.random(), drawn.random())).separated for _ in range(20))
    assert passed == 0


def test_a_panel_of_nothing_separates_nothing():
    assert not Calibration({}).separated
    assert Calibration({}).verdict == "there was no calibration panel; give the Judge one"
    assert not Calibration(
        {member: scores for member, scores in GOOD.scores.items() if member.kind != "surface"}
    ).separated


# Asking


@given(st.integers(0, 8), st.integers(1, 5), st.sets(st.integers(0, 7)))
def test_scores_do_not_depend_on_threads_or_order_and_malformed_answers_are_invalid(count, in_flight, broken):
    bad = {Prompt().text(latents(8)[10 * i]) for i in broken}
    judge = Judge(
        ScriptedEndpoint(lambda p: "no idea" if p.removesuffix(REMINDER) in bad else knowing(p), in_flight=in_flight)
    )
    asked = latents(count)
    found = judge.score({**asked, 999: []})
    assert list(found.scores) == [latent for latent in asked if latent // 10 not in broken]
    assert found.scores == {latent: read_scores(knowing(Prompt().text(asked[latent]))) for latent in found.scores}
    assert found.invalid == tuple(latent for latent in asked if latent // 10 in broken)
    assert found.silent == (999,)
    counts = f"{len(found.scores)} latents scored, {len(found.invalid)} invalid, 1 silent"
    assert repr(found) == f"Judgements by scripted: {counts}; {GOOD.verdict}"
    assert found.calibration == GOOD


@pytest.mark.parametrize(
    "answers",
    [["x", "y", said(0.5, 0.25)], ["x", said(0.5, 0.25)], [said(0.5, 0.25)], ["x", "y", "z", said(0.5, 0.25)]],
)
def test_a_malformed_answer_is_asked_for_twice_more_with_a_reminder(answers):
    asked, left = [], list(answers)
    judge = Judge(ScriptedEndpoint(lambda prompt: asked.append(prompt) or left.pop(0)), panel=())
    found = judge.score(latents(1))
    plain = Prompt().text(latents(1)[0])
    assert asked == [plain, plain + REMINDER, plain + REMINDER][: len(answers)]
    assert found.scores == ({0: Scores(0.5, 0.25)} if len(answers) < 4 else {})
    assert found.invalid == (() if len(answers) < 4 else (0,))


def test_latents_with_the_same_top_tokens_are_asked_about_once():
    asked = []
    judge = Judge(ScriptedEndpoint(lambda prompt: asked.append(prompt) or said(1, 0)), panel=())
    found = judge.score(dict.fromkeys((3, 1, 2), latents(1)[0]))
    assert len(asked) == 1
    assert list(found.scores) == [3, 1, 2]


def test_a_judge_that_fails_its_panel_is_not_asked_about_latents():
    asked = []
    judge = Judge(ScriptedEndpoint(lambda prompt: asked.append(prompt) or said(0.9, 0.1), name="yes-man"))
    with pytest.raises(CalibrationError, match="yes-man") as caught:
        judge.score(latents(3))
    assert len(asked) == 12
    assert str(caught.value).startswith(
        "yes-man was not asked about latents: the judge does not separate the calibration panel, 4 of 12 right; "
        "missed: "
    )
    assert str(caught.value).endswith(
        "; take another model, or look at its scores without counts: Judge(..., panel=())"
    )
    assert len(caught.value.calibration.missed) == 8
    found = Judge(judge.endpoint, panel=()).score(latents(3))
    assert len(found.scores) == 3
    with pytest.raises(CalibrationError) as caught:
        summarise(found, alive=3)
    assert str(caught.value) == "no counts are reported for yes-man: there was no calibration panel; give the Judge one"


def test_an_estimate_is_what_is_then_asked(tmp_path):
    asked, progress = [], []
    judge = Judge(
        ScriptedEndpoint(lambda prompt: asked.append(prompt) or knowing(prompt)), cache=tmp_path / "judged.jsonl"
    )
    expected = judge.estimate(latents(5), prices=(3.0, 15.0))
    assert asked == []
    judge.calibrate()
    some = judge.estimate(latents(5))
    judge.score(latents(5), progress=lambda done, of: progress.append((done, of)))
    assert (expected.requests, expected.answered) == (len(asked), 0) == (17, 0)
    assert (some.requests, some.answered, some.cost) == (5, 12, None)
    assert expected.prompt_tokens == sum(math.ceil(len(prompt) / 3) for prompt in asked)
    assert expected.answer_tokens == 17 * 40
    assert expected.cost == pytest.approx((3 * expected.prompt_tokens + 15 * expected.answer_tokens) / 1e6)
    assert progress == [(i, 5) for i in range(1, 6)]
    nothing = judge.estimate(latents(5), prices=(3.0, 15.0))
    assert (
        str(nothing)
        == "0 requests (17 answered already), about 0 prompt and 0 answer tokens, cost about 0.00; at most 3 times that"
    )


# The cache


def test_a_second_run_asks_for_nothing_and_another_model_for_everything(tmp_path):
    path, asked = tmp_path / "new" / "judged.jsonl", []

    def judge(name="one", prompt=None):
        return Judge(
            ScriptedEndpoint(lambda prompt: asked.append(prompt) or knowing(prompt), name=name),
            cache=path,
            prompt=prompt,
        )

    first = judge().score(latents(4))
    assert len(asked) == 16
    assert judge().score(latents(4)) == first
    assert len(asked) == 16
    assert judge("two").score(latents(4)) == replace(first, model="two")
    assert len(asked) == 32
    assert judge().estimate(latents(5)).requests == 1
    assert judge(prompt=Prompt(contexts=0)).estimate(latents(4)).requests == 16


def test_invalid_answers_are_asked_for_again_in_the_next_run(tmp_path):
    asked, answers = [], ["?"]
    endpoint, path = ScriptedEndpoint(lambda prompt: asked.append(prompt) or answers[-1]), tmp_path / "judged.jsonl"
    assert Judge(endpoint, cache=path, panel=()).score(latents(2)).invalid == (0, 10)
    assert len(asked) == 6
    assert path.read_bytes() == b""
    answers.append(said(0.5, 0.25))
    judge = Judge(endpoint, cache=path, panel=())
    assert judge.estimate(latents(2)).requests == 2
    assert judge.score(latents(2)).scores == dict.fromkeys((0, 10), Scores(0.5, 0.25))
    assert len(asked) == 8


def test_an_invalid_answer_that_an_earlier_version_kept_is_asked_for_again(tmp_path):
    path, endpoint = tmp_path / "judged.jsonl", ScriptedEndpoint(lambda _: said(1, 0))
    name = digest(Prompt().text(latents(1)[0]), endpoint.settings)
    path.write_text(json.dumps({"digest": name, "model": "scripted", "answers": ["?"] * 3}) + "\n")
    for _ in range(2):
        assert Judge(endpoint, cache=path, panel=()).score(latents(1)).scores == {0: Scores(1.0, 0.0)}
    assert path.read_bytes().count(b"\n") == 2


@given(cut=st.integers(1, 400))
def test_a_torn_last_line_is_dropped_and_asked_again(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("torn") / "judged.jsonl"
    whole = Judge(ScriptedEndpoint(knowing), cache=path, panel=()).score(latents(4))
    data = path.read_bytes()
    cut = min(cut, len(data))
    path.write_bytes(data[:-cut])
    left = data[:-cut].count(b"\n")
    asked = []
    judge = Judge(ScriptedEndpoint(lambda prompt: asked.append(prompt) or knowing(prompt)), cache=path, panel=())
    assert judge.estimate(latents(4)).answered == left
    assert judge.score(latents(4)) == whole
    assert len(asked) == 4 - left
    assert path.read_bytes() == data


def test_a_file_that_is_no_cache_is_named_and_left_as_it_was(tmp_path):
    path = tmp_path / "notes.txt"
    good = b'{"digest": "a", "model": "m", "answers": ["x"]}\n'
    for data, line in (
        (b"my notes", 1), (good + b"\n" + good, 2), (b'{"text": "a"}\n', 1), (good + b'{"digest": "b", "answers": '
            b'[]}\n', 2), (good + b"\xff\n", 2),
        (good + b'{"text": "a"}', 2), (b"[" * 5000 + b"\n", 1), (good + b"[]\n", 2), (good + b"3\n", 2),
    ):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(ValueError, match="no answer of a judge") as caught:
            Judge(ScriptedEndpoint(knowing), cache=path)
        expected = (
            f"{path}, line {line}: no answer of a judge, which has a digest and answers; take the line out or "
            "name another cache"
        )
        assert str(caught.value) == expected
        assert path.read_bytes() == data
    path.write_bytes(good)
    assert len(Judge(ScriptedEndpoint(knowing), cache=path).cache) == 1


def test_when_the_endpoint_goes_down_everything_judged_is_kept(tmp_path):
    path, calls, lock = tmp_path / "judged.jsonl", [], threading.Lock()

    def failing(prompt):
        with lock:
            calls.append(prompt)
            number = len(calls)
        if number > 15:
            raise EndpointError("the endpoint is down")
        return knowing(prompt)

    with pytest.raises(EndpointError, match="down") as caught:
        Judge(ScriptedEndpoint(failing, in_flight=3), cache=path).score(latents(9))
    assert str(caught.value) == (
        f"the endpoint is down; 3 of 9 answers came and are kept in {path}: run the same again to ask for the other 6"
    )
    assert path.read_bytes().count(b"\n") == 15
    judge = Judge(ScriptedEndpoint(knowing), cache=path)
    assert judge.estimate(latents(9)).requests == 6
    assert judge.score(latents(9)) == Judge(ScriptedEndpoint(knowing)).score(latents(9))


def test_an_error_of_an_endpoints_own_comes_through():
    def script(prompt):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Judge(ScriptedEndpoint(script, in_flight=3), panel=()).score(latents(5))


def test_an_answer_under_way_when_another_fails_is_kept_and_counted():
    begun = threading.Event()

    def script(prompt):
        if "word0" in prompt:
            begun.wait(5)
            raise EndpointError("down")
        begun.set()
        time.sleep(0.2)
        return knowing(prompt)

    judge = Judge(ScriptedEndpoint(script, in_flight=2), panel=())
    with pytest.raises(EndpointError, match="down") as caught:
        judge.score(latents(2))
    assert (
        str(caught.value)
        == "down; 1 of 2 answers came and are kept in memory: run the same again to ask for the other 1"
    )
    assert judge.estimate(latents(2)).requests == 1


# Over HTTP


def test_a_judge_over_http_says_what_it_would_say_here(key, tmp_path):
    together = threading.Barrier(4, timeout=10)  # nobody is answered before four have asked
    with chatting(lambda prompt: (together.wait(), knowing(prompt))[1]) as (server, url):
        found = Judge(OpenAIEndpoint(url, "m", key, pace=QUICK), cache=tmp_path / "judged.jsonl").score(latents(20))
    assert found == replace(Judge(ScriptedEndpoint(knowing)).score(latents(20)), model="m")
    assert len(server.bodies) == 32
    assert server.busiest == 4
    assert all(
        body == {"model": "m", "temperature": 0, "max_tokens": 256, "messages": body["messages"]}
        for body in server.bodies
    )
    assert all(headers["Authorization"] == f"Bearer {SECRET}" for headers in server.headers)


@pytest.mark.parametrize(
    "fault",
    [
        (429, {"error": "slow down"}, {"Retry-After": "0"}),
        (429, b"", {}),
        (500, b"<html>", {}),
        (503, {}, {"Retry-After": "soon"}),
        (200, b"{not json", {}),
        (200, {"choices": []}, {}),
        (200, [], {}),
        (200, b"", {"Content-Encoding": "gzip"}),
        (200, b"zzz", {"Content-Encoding": "gzip"}),
        (200, b"[" * 5000, {}),
        (500, b"", {"Retry-After": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"}),
    ],
    ids=lambda fault: f"{fault[0]} {fault[1]}",
)
def test_faults_that_pass_are_waited_out(fault):
    with chatting(knowing) as (server, url):
        server.faults = [fault, fault]
        assert OpenAIEndpoint(url, "m", pace=QUICK).answer("p") == knowing("p")
        assert len(server.bodies) == 3
        server.faults = [fault] * 3
        with pytest.raises(EndpointError, match=re.escape(url)) as caught:
            OpenAIEndpoint(url, "m", pace=QUICK).answer("p")
        assert str(caught.value).endswith("; tried 3 times")
        assert len(server.bodies) == 6


@pytest.mark.parametrize("content", ["0.8", None, '{"semantic_score": NaN, "surface_score": 0.5}', ["parts"]])
def test_answers_without_scores_are_invalid_over_http(content):
    with chatting(lambda _: content) as (server, url):
        found = Judge(OpenAIEndpoint(url, "m", pace=QUICK), panel=()).score(latents(2))
    assert found.invalid == (0, 10)
    assert len(server.bodies) == 6


def test_scores_that_are_strings_are_read_over_http():
    with chatting(lambda _: 'Sure!\n```json\n{"semantic_score": "0.8", "surface_score": "-1"}\n```') as (_, url):
        found = Judge(OpenAIEndpoint(url, "m", pace=QUICK), panel=()).score(latents(1))
    assert found.scores == {0: Scores(0.8, 0.0)}


def test_retry_after_is_waited_for_as_a_number_and_as_a_date():
    with chatting(knowing) as (server, url):
        endpoint = OpenAIEndpoint(url, "m", pace=QUICK)
        start, server.faults = time.monotonic(), [(429, {}, {"Retry-After": "0.3"})]
        assert endpoint.answer("p") == knowing("p")
        assert time.monotonic() - start >= 0.3
        date = int(time.time()) + 2
        server.faults = [(429, {}, {"Retry-After": formatdate(date, usegmt=True)})]
        assert endpoint.answer("p") == knowing("p")
        assert date - 0.05 <= time.time()
        server.faults = [(429, {}, {"Retry-After": formatdate(date - 60)})]
        assert endpoint.answer("p") == knowing("p")
        server.faults, start = [(429, {}, {"Retry-After": "0"})], time.monotonic()
        OpenAIEndpoint(url, "m", pace=replace(QUICK, backoff=30.0)).answer("p")
        assert time.monotonic() - start < 20  # the wait that was asked for, not the one of our own
        server.faults, start = [(503, {"error": "full"}, {"Retry-After": "0.1"})] * 3, time.monotonic()
        with pytest.raises(EndpointError, match="full") as caught:
            endpoint.answer("p")
        assert time.monotonic() - start >= 0.2
        assert (
            str(caught.value) == f'{url} answers 503 ({{"error": "full"}}) and asks to wait 0.1 seconds; tried 3 times'
        )


def test_a_retry_after_of_hours_is_not_slept_through():
    with chatting(knowing) as (server, url):
        server.faults = [(429, {"error": "quota"}, {"Retry-After": "7200"})]
        with pytest.raises(EndpointError, match="7,200") as caught:
            OpenAIEndpoint(url, "m", pace=QUICK).answer("p")
        assert (
            str(caught.value)
            == f'{url} answers 429 ({{"error": "quota"}}) and asks to wait 7,200 seconds; run again after that'
        )
        assert len(server.bodies) == 1


def test_an_answer_that_does_not_end_is_not_waited_for():
    with chatting(knowing) as (server, url):
        server.faults = [(200, (b" " for _ in iter(lambda: server.stopping.wait(0.01), True)), {})]
        assert OpenAIEndpoint(url, "m", pace=replace(QUICK, timeout=0.02)).answer("p") == knowing("p")
        assert len(server.bodies) == 2


def test_a_byte_order_mark_before_an_answer_is_no_part_of_it():
    with chatting(knowing) as (server, url):
        server.faults = [(200, b"\xef\xbb\xbf" + json.dumps(completion("said")).encode(), {})]
        assert OpenAIEndpoint(url, "m", pace=QUICK).answer("p") == "said"


def test_a_slow_endpoint_times_out_and_is_tried_again():
    with chatting(knowing) as (server, url):
        server.faults = [5.0]
        start = time.monotonic()
        assert OpenAIEndpoint(url, "m", pace=replace(QUICK, timeout=0.5)).answer("p") == knowing("p")
        assert time.monotonic() - start < 3
        assert len(server.bodies) == 2


def test_an_endpoint_that_is_not_there_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match="ConnectError") as caught:
            Judge(OpenAIEndpoint(url, "m", pace=QUICK), cache=tmp_path / "judged.jsonl").score(latents(2))
    assert str(caught.value).startswith(f"{url} does not answer (ConnectError: ")
    assert str(caught.value).endswith(
        f"; tried 3 times; 0 of 12 answers came and are kept in {tmp_path / 'judged.jsonl'}: run the same again to "
        "ask for the other 12"
    )


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422])
def test_faults_that_do_not_pass_are_reported_at_once(status):
    with chatting(knowing) as (server, url):
        server.faults = [(status, {"error": "so"}, {"Location": url})]
        with pytest.raises(EndpointError, match=str(status)) as caught:
            OpenAIEndpoint(url, "m", pace=QUICK).answer("p")
        assert str(caught.value) == (
            f'{url} answers {status} ({{"error": "so"}}); this is not mended by waiting: look at the URL, the '
            "model's name, the key and the options"
        )
        assert len(server.bodies) == 1


def test_what_came_before_the_server_died_is_kept_and_another_server_goes_on(tmp_path):
    path = tmp_path / "judged.jsonl"
    with chatting(knowing) as (server, url):
        endpoint = OpenAIEndpoint(url, "m", pace=replace(QUICK, in_flight=1))
        Judge(endpoint, cache=path).calibrate()
        server.faults = [None] * 3 + [(500, b"", {})] * 3
        with pytest.raises(EndpointError, match="500"):
            Judge(endpoint, cache=path).score(latents(8))
    with chatting(knowing) as (server, url):
        found = Judge(OpenAIEndpoint(url, "m", pace=QUICK), cache=path).score(latents(8))
        assert len(server.bodies) == 5
    assert found == replace(Judge(ScriptedEndpoint(knowing)).score(latents(8)), model="m")


def test_requests_are_spread_over_the_minute(monkeypatch):
    now, slept = [100.0], []
    monkeypatch.setattr("fmxnn.metrics.judge.remote.monotonic", lambda: now[0])
    monkeypatch.setattr("fmxnn.metrics.judge.remote.sleep", slept.append)
    limit = RateLimit(per_minute=30)
    for _ in range(4):
        limit.wait()
    assert slept == [2.0, 4.0, 6.0]  # each in its own thread: they sleep side by side
    now[0] = 150.0
    limit.wait()
    assert len(slept) == 3
    limit = RateLimit(None)
    limit.wait()
    assert len(slept) == 3
    limit.hold(7.0)
    limit.hold(5.0)
    limit.wait()
    limit.wait()
    assert slept[3:] == [7.0, 7.0]


def test_retries_count_towards_the_rate():
    with chatting(knowing) as (server, url):
        server.faults = [(500, b"", {})]
        start = time.monotonic()
        OpenAIEndpoint(url, "m", pace=replace(QUICK, per_minute=300)).answer("p")
        assert time.monotonic() - start >= 0.19


@pytest.mark.parametrize("wrong", [{"in_flight": 0}, {"tries": 0}, {"backoff": -1}, {"per_minute": 0}, {"timeout": 0}])
def test_a_pace_that_goes_nowhere_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=name) as caught:
        Pace(**wrong)
    limit = {"in_flight": ">= 1", "tries": ">= 1", "backoff": ">= 0"}.get(name, "> 0")
    assert str(caught.value) == f"Pace needs {name} {limit}, got {name}={value}"


# The key


def everything_said(error):
    """The messages, notes and frames of an error and of those behind it, with the values of this package's local
    variables.
    """
    traced = traceback.TracebackException.from_exception(error, capture_locals=True)
    seen = []
    while traced is not None:
        seen += [
            traced._str,
            *(f"{frame.line} {frame.locals}" for frame in traced.stack if "/fmxnn/" in frame.filename),
        ]
        traced = traced.__cause__ or traced.__context__
    return "\n".join(map(str, seen))


@pytest.mark.parametrize(
    "faults",
    [
        [(401, {"error": f"Incorrect API key provided: {SECRET}"}, {})],
        [(429, f"{SECRET} is over its limit".encode(), {"Retry-After": "900"})],
        [(500, f"{SECRET} broke it".encode(), {"X-Key": SECRET})] * 3,
        [(200, f"<{SECRET}>".encode(), {})] * 3,
        [(200, SECRET.encode(), {"Content-Encoding": "gzip"})] * 3,
        [(301, b"", {"Location": f"/{SECRET}"})],
        [5.0] * 3,
    ],
    ids=["401", "429", "500", "no completion", "no gzip", "elsewhere", "timeout"],
)
def test_the_key_shows_up_nowhere(key, faults, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with chatting(lambda _: f"{SECRET} {said(1, 0)}") as (server, url):
        endpoint = OpenAIEndpoint(url, "m", key, pace=replace(QUICK, in_flight=1, timeout=0.4))
        judge = Judge(endpoint, cache=tmp_path / "judged.jsonl", panel=())
        assert judge.score(latents(1)).scores == {0: Scores(1.0, 0.0)}
        server.faults = list(faults)
        with pytest.raises(EndpointError) as caught:
            judge.score(latents(2))
    shown = [
        repr(endpoint),
        str(vars(endpoint)),
        str(endpoint.settings),
        str(caught.value),
        everything_said(caught.value),
    ]
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("fmxnn")]
    assert not any(SECRET in text for text in (*shown, *logged, (tmp_path / "judged.jsonl").read_text()))
    assert "<JUDGE_KEY>" in (tmp_path / "judged.jsonl").read_text()
    assert repr(endpoint) == f"OpenAIEndpoint({url!r}, 'm', key='JUDGE_KEY')"
    assert all(headers["Authorization"] == f"Bearer {SECRET}" for headers in server.headers)


def test_an_honest_server_has_no_log_line_with_the_key_in_it(key, caplog):
    caplog.set_level(logging.DEBUG)
    with chatting(knowing) as (server, url):
        server.faults = [(500, b"", {})]
        OpenAIEndpoint(url, "m", key, pace=QUICK).answer("p")
    assert any("Retrying" in record.getMessage() for record in caplog.records)
    assert SECRET not in caplog.text
    assert SECRET.removeprefix("sk-") not in caplog.text


@pytest.mark.parametrize("given_key", [SECRET, "hf_abcDEF", "gsk abc", ""])
def test_a_key_in_place_of_its_name_is_refused_and_not_shown(given_key):
    with pytest.raises(ValueError, match="capitals") as caught:
        OpenAIEndpoint("http://127.0.0.1:1/v1", "m", given_key)
    assert str(caught.value) == (
        "OpenAIEndpoint's key is the name, in capitals, of the environment variable that holds the key, such as "
        "'OPENAI_API_KEY'; "
        "what was given is no such name, and is not shown because it may be the key"
    )


@pytest.mark.parametrize(
    ("value", "state"),
    [
        (None, "is not set"),
        ("  ", "is not set"),
        ("sk-a\nb", "holds characters that no header may have"),
        ("sk-ä", "holds characters that no header may have"),
    ],
)
def test_a_key_that_cannot_be_sent_is_refused_before_a_request(monkeypatch, value, state):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ValueError, match="JUDGE_KEY") as caught:
        OpenAIEndpoint("http://127.0.0.1:1/v1", "m", "JUDGE_KEY")
    assert value is None or value.strip() == "" or repr(value)[1:-1] not in everything_said(caught.value)
    assert str(caught.value) == (
        f"the environment variable JUDGE_KEY, which should hold the key of http://127.0.0.1:1/v1, {state}; export it, "
        "or pass key=None"
    )


def test_a_line_break_after_the_key_is_taken_away(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f"{SECRET}\n")
    with chatting(knowing) as (server, url):
        OpenAIEndpoint(url, "m", "JUDGE_KEY").answer("p")
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"


def test_a_url_that_cannot_be_used_is_refused():
    for url, part in (
        ("127.0.0.1:8000/v1", "needs a URL such as"),
        ("ftp://a/v1", "got 'ftp://a/v1'"),
        ("http://a:x/v1", "what was given is none"),
    ):
        with pytest.raises(ValueError, match=part):
            OpenAIEndpoint(url, "m")
    for url in (f"http://me:{SECRET}@127.0.0.1/v1", f"http://127.0.0.1/v1?key={SECRET}"):
        with pytest.raises(ValueError, match="without credentials") as caught:
            OpenAIEndpoint(url, "m")
        assert SECRET not in str(caught.value)


# A model on this machine


def test_tiny_lm_answers_nonsense_and_is_found_out():
    endpoint = LocalEndpoint("examples/tiny-lm", new_tokens=8)
    judge = Judge(endpoint, prompt=Prompt("Rate these as JSON.", tokens=2, contexts=1))
    calibration = judge.calibrate()
    assert set(calibration.scores.values()) == {None}
    assert not calibration.separated
    assert endpoint.settings == {"model": "examples/tiny-lm", "temperature": 0, "new_tokens": 8}
    again = LocalEndpoint(endpoint.model, endpoint.tokenizer, new_tokens=8)
    assert again.answer("Once upon a time") == endpoint.answer("Once upon a time") != ""


def test_a_local_model_answers_with_its_likeliest_tokens_and_not_with_the_prompt():
    endpoint = LocalEndpoint("examples/tiny-lm", new_tokens=5)
    ids = endpoint.tokenizer("Once upon a time\n")["input_ids"]
    length = len(ids)
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(endpoint.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert endpoint.answer("Once upon a time") == endpoint.tokenizer.decode(ids[length:])


def test_a_prompt_beyond_the_models_context_is_refused():
    with pytest.raises(EndpointError, match="reads at most 128") as caught:
        Judge(LocalEndpoint("examples/tiny-lm")).calibrate()
    assert re.fullmatch(
        r"GPT2LMHeadModel reads at most 128 tokens, and this prompt has \d+ with 128 to answer; take a model of "
        r"longer context, or fewer tokens "
        r"and contexts: Judge\(\.\.\., prompt=Prompt\(tokens=10, contexts=1\)\); 0 of 12 answers came and are kept in "
        r"memory: "
        r"run the same again to ask for the other 12",
        str(caught.value),
    )
    with pytest.raises(EndpointError, match=r"this prompt has [2-9] with 127 to answer"):
        LocalEndpoint("examples/tiny-lm", new_tokens=127).answer("Once upon a time")


def test_a_local_model_reads_through_its_chat_template():
    tokenizer = AutoTokenizer.from_pretrained("examples/tiny-lm")
    plain = LocalEndpoint("examples/tiny-lm", tokenizer, new_tokens=4)
    expected = plain.answer("[user] Hello [assistant]")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if "
        "add_generation_prompt %} [assistant]\n{% endif %}"
    )
    assert plain.answer("Hello") == expected


def test_a_model_without_its_tokenizer_is_refused():
    with pytest.raises(ValueError, match="tokenizer") as caught:
        LocalEndpoint(make_model())
    assert (
        str(caught.value)
        == "LocalEndpoint needs the tokenizer of a model that is given as a module; pass tokenizer=..."
    )


# The report


def judged(pairs, invalid=0, calibration=GOOD):
    scores = {i: Scores(*pair) for i, pair in enumerate(pairs)}
    return Judgements("m", scores, tuple(range(1000, 1000 + invalid)), (), calibration)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=30), st.integers(0, 3), st.integers(0, 30))
def test_a_report_counts_as_a_loop_does(pairs, invalid, unjudged):
    report = summarise(judged(pairs, invalid), alive=len(pairs) + invalid + unjudged)
    for kind in ("semantic", "surface"):
        count = sum(kind_by_hand(*pair) == kind for pair in pairs)
        assert getattr(report, kind) == count
        assert report.of_judged(kind) == Share(count, len(pairs))
        assert report.of_alive(kind) == Share(count, len(pairs) + invalid + unjudged)
    assert (report.judged, report.invalid, report.complete) == (len(pairs), invalid, invalid + unjudged == 0)


def test_a_report_as_it_is_printed():
    pairs = [(0.9, 0.1)] * 8 + [(0.1, 0.9)] * 1 + [(0.9, 0.9)]
    assert str(summarise(judged(pairs), alive=10)) == (
        "10 of 10 alive latents judged by m, 0 answers invalid\n"
        "semantic: 8; 80.0% (49.0% to 94.3%) of the judged, 80.0% (49.0% to 94.3%) of the alive\n"
        " surface: 1; 10.0% (1.8% to 40.4%) of the judged, 10.0% (1.8% to 40.4%) of the alive"
    )
    report = summarise(judged(pairs, invalid=2), alive=40)
    assert (
        str(report).splitlines()[1] == "semantic: 8; 80.0% (49.0% to 94.3%) of the judged, at least 20.0% of the alive"
    )
    assert report.numbers() == {
        **{"semantic": 8.0, "surface": 1.0, "judged": 10.0, "invalid": 2.0, "alive": 40.0},
        **{"semantic_of_judged": 0.8, "surface_of_judged": 0.1, "semantic_of_alive": 0.2, "surface_of_alive": 0.025},
    }


def test_no_counts_without_a_separated_panel():
    bad = panel_scores(lambda _: None)
    with pytest.raises(CalibrationError, match="no counts") as caught:
        summarise(judged([(0.9, 0.1)], calibration=bad), alive=1)
    assert str(caught.value).startswith(
        "no counts are reported for m: the judge does not separate the calibration panel, 0 of 12 right; missed: "
    )
    assert caught.value.calibration is bad


def test_fewer_alive_than_judged_is_refused():
    with pytest.raises(ValueError, match="alive=2") as caught:
        summarise(judged([(0.9, 0.1)] * 2, invalid=1), alive=2)
    assert (
        str(caught.value)
        == "summarise got alive=2 and 3 latents that a judge was asked about; count the alive on the same text, all "
        "of them"
    )


@given(st.integers(1, 500), st.data())
def test_wilsons_interval_is_where_the_score_test_turns(total, data):
    count = data.draw(st.integers(0, total))
    low, high = Share(count, total).interval
    expected = wilson_by_bisection(count, total)
    assert (low, high) == pytest.approx(expected, abs=1e-9)
    assert 0 <= low <= count / total <= high <= 1


def test_a_share_of_nothing_has_no_value():
    empty = Share(0, 0)
    assert math.isnan(empty.value)
    assert all(map(math.isnan, empty.interval))
    assert math.isnan(summarise(judged([]), alive=0).numbers()["semantic_of_judged"])
