"""A Hub that fails, drips, lies or is asked by two at once: what is loaded is what was pushed, or an error says how to
go on.
"""

import os
import random
import subprocess
import sys

import hub_server
import huggingface_hub
import pytest
import torch
from attempts import attempt, tries
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

import fmxnn as fx
from fmxnn.core.files.integrity import IntegrityError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning"
)  # how huggingface_hub 2.4 uploads a large file
FAULTS = [408, 429, 500, 502, 503, 504, (429, {"Retry_After": "0"}), (503, {"Retry_After": "0"}), "cut"]
PLACES = ["/resolve/", "model.safetensors", "config.json", "manifest.json", "HEAD ", "/revision/", "/tree/"]


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)  # the client's pauses between tries
    monkeypatch.setattr("fmxnn.saving.fetching.FIRST_WAIT", 0.0)
    with hub_server.running() as (server, endpoint):
        torch.manual_seed(0)
        weight = fx.DenseWeight(2, 3, 5)
        fx.push_to_hub(weight, "me/dense", endpoint=endpoint, token="hf_x", about={"base_model": "gpt2"})
        yield server, endpoint, weight


def assert_loaded(module, weight):
    assert fx.describe(module) == fx.describe(weight)
    assert all(torch.equal(tensor, module.state_dict()[key]) for key, tensor in weight.state_dict().items())


def test_a_hub_that_fails_anywhere_gives_what_was_pushed_or_says_so_and_then_gives_it(hub, tmp_path):
    server, endpoint, weight = hub
    for seed in range(tries(ci=20, thorough=1_000)):
        draw = random.Random(seed)
        server.broken = {
            place: [draw.choice(FAULTS) for _ in range(draw.randint(1, 8))]
            for place in draw.sample(PLACES, draw.randint(1, 3))
        }
        options = {"endpoint": endpoint, "cache_dir": tmp_path / str(seed)}
        with attempt("statuses and cuts of a Hub", case=server.broken):
            try:
                assert_loaded(fx.from_pretrained("me/dense", **options), weight)
            except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError) as error:
                assert str(error)
            server.broken.clear()
            assert_loaded(fx.from_pretrained("me/dense", **options), weight)


def test_a_file_that_changed_in_the_cache_is_refused_until_it_is_fetched_again(hub, tmp_path):
    server, endpoint, weight = hub
    names = sorted(server.commits[server.refs["me/dense", "main"]].keys() - {".gitattributes"})
    options = {"endpoint": endpoint, "cache_dir": tmp_path}
    fx.from_pretrained("me/dense", **options)
    for seed in range(tries(ci=20, thorough=1_000)):
        draw = random.Random(seed)
        name = draw.choice(names)
        (file,) = tmp_path.rglob(f"snapshots/*/{name}")
        body = bytearray(file.read_bytes())
        at = draw.randrange(len(body))
        body[at:] = draw.choice([b"", bytes([body[at] ^ 1 << draw.randrange(8)]) + body[at + 1 :]])
        file.resolve().write_bytes(body)
        with attempt("a cached file flipped or cut", case=(name, at)):
            with pytest.raises(
                (fx.RecipeError, IntegrityError),
                match=r"from_pretrained\('me/dense', \.\.\., force_download=True\) fetches it again$",
            ):
                fx.from_pretrained("me/dense", **options)
            assert_loaded(fx.from_pretrained("me/dense", force_download=True, **options), weight)


@pytest.mark.parametrize("place", ["model.safetensors", "README.md", "/tree/"])
def test_a_hub_that_drips_ends_at_the_timeout(hub, tmp_path, place):
    server, endpoint, weight = hub
    for seed in range(tries(ci=1, thorough=20)):
        options = {"endpoint": endpoint, "cache_dir": tmp_path / str(seed)}  # a cache keeps what lies in a commit
        server.broken[place] = ["drip"] * 99
        with attempt("a Hub of one byte at a time", case=seed):
            with pytest.raises(TimeoutError, match="me/dense was not fetched within timeout=0.2 seconds"):
                fx.from_pretrained("me/dense", timeout=0.2, force_download=True, **options)
            server.broken.clear()
            assert_loaded(fx.from_pretrained("me/dense", timeout=600, **options), weight)


CHILD = """
import hashlib, sys
import fmxnn as fx
print("ready", flush=True)
for cache in sys.stdin:
    module = fx.from_pretrained("me/dense", endpoint=sys.argv[1], cache_dir=cache.strip())
    print(hashlib.sha256(module.state_dict()["factors.0"].numpy().tobytes()).hexdigest(), flush=True)
"""


def test_two_processes_pull_at_once_and_load_the_same(hub, tmp_path):
    _, endpoint, _ = hub
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    pair = [subprocess.Popen([sys.executable, "-c", CHILD, endpoint], env=environment, **pipes) for _ in range(2)]
    try:
        assert [child.stdout.readline() for child in pair] == ["ready\n"] * 2
        for seed in range(tries(ci=10, thorough=300)):
            with attempt("two processes that pull at once", case=seed):
                for child in pair:
                    child.stdin.write(f"{tmp_path / str(seed)}\n")
                one, other = (child.stdout.readline() for child in pair)
                assert one == other
                assert len(one) == 65
    finally:
        for child in pair:
            child.kill()
            child.communicate()
