"""Endpoints that answer anything, and judges that are stopped: no answer is lost, none is taken for scores, no body
fills the memory.
"""

import gzip
import json
import random
import signal
import subprocess
import sys
import threading
from functools import cache

import pytest
from attempts import attempt, tries
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_server import chatting, completion

from fmxnn.metrics.firing import TopToken
from fmxnn.metrics.judge import EndpointError, Judge, ScriptedEndpoint, read_scores
from fmxnn.metrics.judge.remote import OpenAIEndpoint, Pace

SCORES = '{"semantic_score": 0.9, "surface_score": 0.1}'
PACE = Pace(in_flight=4, timeout=5.0, tries=1, backoff=0.0)
UNPACKED = tries(ci=1 << 26, thorough=1 << 30)


def latents(count):
    return {i: [TopToken(f"word{i}", 1.0, ())] for i in range(count)}


@cache
def bomb():
    return gzip.compress(bytes(UNPACKED), compresslevel=1)


def endless(piece):
    return (piece for _ in range((32 << 20) // len(piece)))


BODIES = {
    "unpacks to gigabytes": lambda _: (bomb(), {"Content-Encoding": "gzip"}),
    "never ends": lambda _: (endless(b"x" * 65_536), {}),
    "is nested": lambda draw: (draw.choice((b"[", b'{"choices":', b'{"a":[')) * draw.randint(1, 100_000), {}),
    "is other JSON": lambda draw: (
        json.dumps(draw.choice((None, 1, [], {}, {"choices": [{"message": 1}]}, {"choices": {}}))).encode(),
        {},
    ),
    "is noise": lambda draw: (draw.randbytes(draw.randint(0, 5000)), {}),
    "is cut": lambda draw: (json.dumps(completion(SCORES)).encode()[: draw.randint(0, 60)], {}),
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_that_is_no_completion_is_one_sentence_and_little_memory(kind):
    with chatting(lambda _: SCORES) as (server, url):
        endpoint = OpenAIEndpoint(url, "m", pace=PACE)
        for seed in range(tries(ci=5, thorough=200)):
            body, headers = BODIES[kind](random.Random(seed))
            server.faults = [(200, body, headers)]
            with attempt(f"a judge's body that {kind}", case=seed, memory=True) as row:
                with pytest.raises(EndpointError, match="answers 200 |does not answer") as caught:
                    endpoint.answer("p")
                assert len(str(caught.value)) < 500
                assert row.mib < 10
            assert row.mib < 10
            server.faults.clear()
        assert endpoint.answer("p") == SCORES


NESTED = st.sampled_from(["[", "{", '{"a":', '{"semantic_score":', '{"semantic_score": 1, "surface_score": ['])


@given(
    st.one_of(st.text(max_size=200), st.tuples(NESTED, st.integers(1, 50_000)).map(lambda drawn: drawn[0] * drawn[1]))
)
@settings(max_examples=tries(ci=30, thorough=1_000))
def test_an_answer_that_holds_no_scores_is_invalid_now_and_asked_for_again(answer):
    with attempt("an answer without scores", case=answer[:40]):
        assert read_scores(answer) is None
        answers = [answer] * 3 + [SCORES]
        judge = Judge(ScriptedEndpoint(lambda _: answers.pop(0)), panel=())
        assert judge.score(latents(1)).invalid == (0,)
        assert len(judge.cache) == 0
        assert judge.score(latents(1)).scores == {0: read_scores(SCORES)}


@given(st.integers(0, 2**32))
@settings(max_examples=tries(ci=20, thorough=500))
def test_ctrl_c_does_not_wait_for_what_is_under_way_and_keeps_what_came(tmp_path_factory, seed):
    draw, path = random.Random(seed), tmp_path_factory.mktemp("stopped") / "judged.jsonl"
    count, in_flight = draw.randint(2, 12), draw.randint(1, 5)
    wanted = draw.randint(1, count - 1)
    first, never, ended = set(draw.sample(range(count), wanted)), threading.Event(), threading.Event()

    def script(prompt):
        if not any(f'"word{i}"' in prompt for i in first):
            never.wait()
        return SCORES

    def stop(done, of):
        raise KeyboardInterrupt

    def run():
        judge = Judge(ScriptedEndpoint(script, in_flight=in_flight), cache=path, panel=())
        try:
            judge.score({i: latents(count)[i] for i in [*first, *(set(range(count)) - first)]}, progress=stop)
        except KeyboardInterrupt as stopped:
            ended.notes = stopped.__notes__
            ended.set()

    with attempt("Ctrl-C while answers are under way", case=seed):
        threading.Thread(target=run, daemon=True).start()
        try:
            assert ended.wait(60), "it waits for answers that never come"
            kept = len(path.read_bytes().splitlines())
            assert 1 <= kept <= wanted
            assert f"of {count} answers came and are kept in {path}: run the same again" in ended.notes[0]
            first.update(range(count))
            again = Judge(ScriptedEndpoint(script, in_flight=in_flight), cache=path, panel=())
            assert again.estimate(latents(count)).requests <= count - kept
            assert len(again.score(latents(count)).scores) == count
        finally:
            never.set()


CHILD = """
import sys, threading
from fmxnn.metrics.firing import TopToken
from fmxnn.metrics.judge import Judge
from fmxnn.metrics.judge.remote import OpenAIEndpoint, Pace
endpoint = OpenAIEndpoint(sys.argv[1], "m", pace=Pace(in_flight=4, timeout=600.0))
judge = Judge(endpoint, cache=sys.argv[2], panel=())
judge.score({i: [TopToken(f"word{i}", 1.0, ())] for i in range(9)}, progress=lambda done, of: print(done, flush=True))
"""


def test_ctrl_c_ends_a_process_whose_endpoint_never_answers(tmp_path):
    quick, never, lock = [3], threading.Event(), threading.Lock()

    def answer(_):
        with lock:
            quick[0] -= 1
            held = quick[0] < 0
        if held:
            never.wait()
        return SCORES

    with chatting(answer) as (_, url), attempt("SIGINT to a judge whose endpoint is silent"):
        path = tmp_path / "judged.jsonl"
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, url, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert [child.stdout.readline() for _ in range(3)] == ["1\n", "2\n", "3\n"]
            child.send_signal(signal.SIGINT)
            _, said = child.communicate(timeout=120)  # one that waited for its endpoint would wait for ever
        finally:
            never.set()
            child.kill()
        assert child.returncode == -signal.SIGINT
        assert "KeyboardInterrupt" in said
        assert f"3 of 9 answers came and are kept in {path}" in said
        assert path.read_bytes().count(b"\n") == 3
