import hashlib
import json
import re
from types import SimpleNamespace

import foreign_crosscoders
import httpx2
import hub_server
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

import fmxnn as fx
from fmxnn.core.files.integrity import IntegrityError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning"
)  # how huggingface_hub 2.4 uploads a large file


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)  # the client's pauses between tries, and ours
    monkeypatch.setattr("fmxnn.saving.fetching.FIRST_WAIT", 0.0)
    with hub_server.running() as (server, endpoint):
        yield server, endpoint


def made(seed):
    torch.manual_seed(seed)
    weight = fx.TensorRingWeight(2, 3, 5, ranks=(2, 2, 2))
    return fx.Crosscoder(fx.CrossLayerEncoder(weight, fx.TopK(2)), fx.CrossLayerDecoder(weight))


def assert_same(one, other):
    assert fx.describe(one) == fx.describe(other)
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in one.state_dict().items())


def test_what_is_pushed_is_pulled_and_a_revision_stays_what_it_was(hub, tmp_path):
    _, endpoint = hub
    first, second = made(0), made(1)
    address = fx.push_to_hub(
        first, "me/ring", endpoint=endpoint, token="hf_x", about={"base_model": "openai-community/gpt2"}
    )
    fx.push_to_hub(second, "me/ring", endpoint=endpoint, token="hf_x")
    commit = address.rpartition("/")[2]
    options = {"endpoint": endpoint, "cache_dir": tmp_path}
    newest = fx.from_pretrained("me/ring", **options)
    assert_same(newest, second)
    pinned = fx.from_pretrained("me/ring", revision=commit, **options)
    assert_same(pinned, first)
    assert pinned.pretrained_from == f"me/ring@{commit}"
    assert newest.pretrained_from != pinned.pretrained_from
    assert_same(fx.from_pretrained("me/ring", local_files_only=True, **options), second)


def test_a_branch_and_a_pull_request_leave_main_alone(hub, tmp_path):
    server, endpoint = hub
    first, second, third = made(0), made(1), made(2)
    fx.push_to_hub(first, "me/ring", endpoint=endpoint, token="hf_x")
    fx.push_to_hub(second, "me/ring", endpoint=endpoint, token="hf_x", revision="try")
    assert (
        fx.push_to_hub(third, "me/ring", endpoint=endpoint, token="hf_x", create_pr=True)
        == f"{endpoint}/me/ring/discussions/1"
    )
    options = {"endpoint": endpoint, "cache_dir": tmp_path}
    assert_same(fx.from_pretrained("me/ring", **options), first)
    assert_same(fx.from_pretrained("me/ring", revision="try", **options), second)
    assert_same(fx.from_pretrained("me/ring", revision=server.refs["me/ring", "refs/pr/1"], **options), third)


def test_a_tag_stays_on_its_commit(hub, tmp_path):
    _, endpoint, first = pushed(hub)
    huggingface_hub.HfApi(endpoint=endpoint, token="hf_x").create_tag("me/ring", tag="v1")
    fx.push_to_hub(made(1), "me/ring", endpoint=endpoint, token="hf_x")
    assert_same(fx.from_pretrained("me/ring", revision="v1", endpoint=endpoint, cache_dir=tmp_path), first)
    assert_same(fx.from_pretrained("me/ring", endpoint=endpoint, cache_dir=tmp_path), made(1))


def test_a_body_that_was_changed_on_the_way_is_refused(hub, tmp_path):
    server, endpoint = hub
    fx.push_to_hub(made(0), "me/ring", endpoint=endpoint, token="hf_x")
    body = bytearray(server.commits[server.refs["me/ring", "main"]]["model.safetensors"])
    body[-1] ^= 1
    server.faults["model.safetensors"] = bytes(body)
    with pytest.raises(IntegrityError, match="is not the file that was saved: its sha256 differs from manifest.json"):
        fx.from_pretrained("me/ring", endpoint=endpoint, cache_dir=tmp_path)


def test_what_the_hub_refuses_comes_through_as_it_says(hub, tmp_path):
    server, endpoint = hub
    with pytest.raises(RepositoryNotFoundError):
        fx.from_pretrained("me/none", endpoint=endpoint, cache_dir=tmp_path)
    fx.push_to_hub(made(0), "me/ring", endpoint=endpoint, token="hf_x")
    server.token = "hf_secret"
    with pytest.raises((HfHubHTTPError, LocalEntryNotFoundError)):
        fx.from_pretrained("me/ring", endpoint=endpoint, cache_dir=tmp_path, token="hf_wrong")
    with pytest.raises(HfHubHTTPError):
        fx.push_to_hub(made(0), "me/ring", endpoint=endpoint, token="hf_wrong")
    assert_same(fx.from_pretrained("me/ring", endpoint=endpoint, cache_dir=tmp_path, token="hf_secret"), made(0))


def test_one_folder_of_a_foreign_repository_is_fetched(hub, tmp_path):
    server, endpoint = hub
    files = {}
    for name in ("14", "14/inner", "1"):
        (tmp_path / name).mkdir()
        formula = foreign_crosscoders.crosscode(tmp_path / name, 2, 3, 4, torch.float64)
        files |= {f"{name}/{path.name}": path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
    server.commit("them/all", "main", {**files, "model.safetensors": b"of the top", "README.md": b""})
    options = {"endpoint": endpoint, "cache_dir": tmp_path / "cache", "subfolder": "1"}
    module = fx.from_pretrained("them/all", **options)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(module(x), formula(x)[1])
    assert module.pretrained_from == f"them/all@{server.refs['them/all', 'main']}/1"
    fetched = {
        path.rpartition("/resolve/")[2].partition("/")[2]
        for verb, path, _ in server.requests
        if "/resolve/" in path and verb == "GET"
    }
    assert fetched == {"1/model.pt", "1/model_cfg.yaml"}
    assert torch.equal(fx.from_pretrained("them/all", local_files_only=True, **options)(x), module(x))
    sha = server.refs["them/all", "main"]
    with pytest.raises(
        IntegrityError,
        match=f"^them/all@{sha} has no folder '2' with weights; subfolder= can be '14/inner', '14', '1'$",
    ):
        fx.from_pretrained("them/all", **{**options, "subfolder": "2"})  # the others were not fetched
    with pytest.raises(IntegrityError, match="has no folder '2' with weights; subfolder= can be '1'$"):
        fx.from_pretrained("them/all", local_files_only=True, **{**options, "subfolder": "2"})
    server.commit("them/sets", "main", {f"{name}/model.pt": b"" for name in "abcdefghij"})
    with pytest.raises(
        IntegrityError, match="holds no weights; subfolder= can be 'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h' and 2 more$"
    ):
        fx.from_pretrained("them/sets", endpoint=endpoint, cache_dir=tmp_path / "cache")
    server.commit("them/none", "main", {"notes.txt": b""})
    with pytest.raises(IntegrityError, match="^them/none@[0-9a-f]+ holds no weights; no folder of it holds any$"):
        fx.from_pretrained("them/none", endpoint=endpoint, cache_dir=tmp_path / "cache")


def pushed(hub, seed=0, **more):
    server, endpoint = hub
    module = made(seed)
    fx.push_to_hub(module, "me/ring", endpoint=endpoint, token="hf_x", **more)
    return server, endpoint, module


def test_large_files_go_up_as_blobs_and_the_card_has_its_tags(hub):
    server, _, _ = pushed(hub, about={"base_model": "openai-community/gpt2"})
    files = server.commits[server.refs["me/ring", "main"]]
    assert files["model.safetensors"] in server.blobs.values()
    front = re.match(r"---\n(.*?)\n---\n", files["README.md"].decode(), re.DOTALL)[1]
    assert front.splitlines() == [
        *("library_name: fmxnn", "tags:", "- crosscoder", "- sparse-dictionary", "- interpretability"),
        'base_model: "openai-community/gpt2"',
    ]


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 64
    )  # what is kept of a cut body are whole chunks, by default of 10 MB
    server, endpoint, module = pushed(hub)
    server.broken[f"GET /me/ring/resolve/{server.refs['me/ring', 'main']}/model.safetensors"] = ["cut"] * 2
    assert_same(fx.from_pretrained("me/ring", endpoint=endpoint, cache_dir=tmp_path), module)
    resumed = [byte_range for command, _, byte_range in server.requests if command == "GET" and byte_range]
    first, second = (int(re.fullmatch(r"bytes=(\d+)-", byte_range)[1]) for byte_range in resumed)
    assert 0 < first < second


def test_a_body_that_was_changed_stays_in_the_cache_until_it_is_fetched_again(hub, tmp_path):
    server, endpoint, module = pushed(hub)
    server.faults["model.safetensors"] = bytes(len(server.commits[server.refs["me/ring", "main"]]["model.safetensors"]))
    options = {"endpoint": endpoint, "cache_dir": tmp_path}
    for _ in range(2):
        with pytest.raises(
            IntegrityError, match=r"; from_pretrained\('me/ring', \.\.\., force_download=True\) fetches it again$"
        ):
            fx.from_pretrained("me/ring", **options)
        server.faults.clear()
    assert_same(fx.from_pretrained("me/ring", force_download=True, **options), module)
    assert_same(fx.from_pretrained("me/ring", **options), module)


def test_a_hub_that_is_away_for_a_moment_is_asked_again_and_one_that_stays_away_says_503(hub, tmp_path):
    server, endpoint, module = pushed(hub)
    server.broken["GET /me/ring/resolve/"] = [503] * 1000
    with pytest.raises(HfHubHTTPError, match="503"):
        fx.from_pretrained("me/ring", endpoint=endpoint, cache_dir=tmp_path)
    server.broken.clear()
    assert_same(fx.from_pretrained("me/ring", endpoint=endpoint, cache_dir=tmp_path), module)
    server.broken["GET /api/models/me/ring"] = [503] * 1000
    assert_same(
        fx.from_pretrained("me/ring", endpoint=endpoint, cache_dir=tmp_path), module
    )  # what was fetched before is still there
    server.broken = {"PUT /lfs/": [503, 503]}
    fx.push_to_hub(made(1), "me/ring", endpoint=endpoint, token="hf_x")
    assert_same(fx.from_pretrained("me/ring", endpoint=endpoint, cache_dir=tmp_path), made(1))


@pytest.mark.parametrize(
    "where", ["HEAD ", "GET /me/ring/resolve/", "/api/models/me/ring/revision/main", "/api/models/me/ring/tree/"]
)
@pytest.mark.parametrize(
    "fault", [429, 500, 502, 503, 504, (429, {"Retry_After": "0"}), (503, {"Retry_After": "0"})], ids=str
)
def test_a_hub_that_is_busy_is_asked_again(hub, tmp_path, where, fault):
    server, endpoint, module = pushed(hub)
    server.broken[where] = [fault] * 3
    assert_same(fx.from_pretrained("me/ring", endpoint=endpoint, cache_dir=tmp_path), module)
    assert server.broken[where] == []


def test_a_hub_that_asks_to_wait_is_given_what_it_asks_and_not_hours(hub, tmp_path, monkeypatch):
    server, endpoint, module = pushed(hub)
    waited = []
    monkeypatch.setattr("fmxnn.saving.fetching.FIRST_WAIT", 1.0)
    monkeypatch.setattr("fmxnn.saving.fetching.Event", lambda: SimpleNamespace(wait=waited.append))
    options = {"endpoint": endpoint, "cache_dir": tmp_path}
    server.broken = {"GET /api/models/me/ring": [503, (429, {"Retry_After": "7"}), 500]}
    assert_same(fx.from_pretrained("me/ring", **options), module)
    assert waited == [1.0, 7.0, 4.0]
    server.broken = {"GET /me/ring/resolve/": [(503, {"Retry_After": "7200"})] * 9}
    with pytest.raises(HfHubHTTPError, match="503"):
        fx.from_pretrained("me/ring", force_download=True, **options)
    assert len(waited) == 3


def test_a_hub_that_refuses_is_not_asked_again(hub, tmp_path):
    server, endpoint, _ = pushed(hub)
    server.broken["GET /api/models/me/ring"] = [403] * 9
    with pytest.raises((HfHubHTTPError, LocalEntryNotFoundError)):
        fx.from_pretrained("me/ring", endpoint=endpoint, cache_dir=tmp_path)
    assert len(server.broken["GET /api/models/me/ring"]) == 8


@pytest.mark.parametrize("where", ["model.safetensors", "config.json", "GET /api/models/me/ring/revision/", "/tree/"])
def test_a_body_of_a_byte_at_a_time_ends_at_the_timeout(hub, tmp_path, where):
    server, endpoint, module = pushed(hub)
    options = {"endpoint": endpoint, "cache_dir": tmp_path}
    server.broken[where] = ["drip"] * 99
    with pytest.raises(TimeoutError, match=r"^me/ring was not fetched within timeout=0.3 seconds; "):
        fx.from_pretrained("me/ring", timeout=0.3, **options)
    assert not list(tmp_path.rglob("*.incomplete"))
    server.broken.clear()
    assert_same(fx.from_pretrained("me/ring", timeout=600, **options), module)  # no lock is left behind
    with pytest.raises(ValueError, match="timeout=0$"):
        fx.from_pretrained("me/ring", timeout=0, **options)


def test_what_fails_within_the_timeout_comes_through_as_it_says(hub, tmp_path):
    _, endpoint = hub
    with pytest.raises(RepositoryNotFoundError):
        fx.from_pretrained("me/none", endpoint=endpoint, cache_dir=tmp_path, timeout=600)


def test_only_what_was_fetched_is_said_to_be_fetched_again(hub, tmp_path):
    _, endpoint, module = pushed(hub)
    options = {"endpoint": endpoint, "cache_dir": tmp_path / "cache"}
    fx.from_pretrained("me/ring", **options)
    for blob in (tmp_path / "cache").rglob("*/blobs/*"):
        blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises((IntegrityError, fx.RecipeError), match="force_download=True"):
        fx.from_pretrained("me/ring", **options)
    assert_same(fx.from_pretrained("me/ring", force_download=True, **options), module)
    fx.save_pretrained(module, tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(IntegrityError) as caught:
        fx.from_pretrained(tmp_path / "folder")
    assert "force_download" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "error"),
    [("PUT /lfs/", RuntimeError), ("POST /api/models/me/ring/commit/", httpx2.TransportError)],
    ids=["blob", "commit"],
)
def test_a_push_that_is_torn_leaves_main_as_it_was_and_the_next_one_goes_through(hub, tmp_path, where, error):
    server, endpoint, module = pushed(hub)
    before = server.refs["me/ring", "main"]
    server.broken[where] = ["cut"] * 100
    with pytest.raises(error) as caught:
        fx.push_to_hub(made(1), "me/ring", endpoint=endpoint, token="hf_x")
    assert caught.value.__notes__ == [
        "me/ring is as it was, or has all of the push where only the answer was lost: one commit is whole or absent; "
        "push again"
    ]
    assert server.commits[server.refs["me/ring", "main"]] == server.commits[before]
    assert_same(fx.from_pretrained("me/ring", endpoint=endpoint, cache_dir=tmp_path), module)
    server.broken.clear()
    fx.push_to_hub(made(1), "me/ring", endpoint=endpoint, token="hf_x")
    assert_same(fx.from_pretrained("me/ring", endpoint=endpoint, cache_dir=tmp_path), made(1))


class Own(fx.Weight):
    """A weight that only its author has."""

    def __init__(self, layers, d_model, latents):
        super().__init__()
        self.layers, self.d_model, self.latents = layers, d_model, latents
        self.dense = fx.DenseWeight(layers, d_model, latents)

    def to_latents(self, x):
        return self.dense.to_latents(x)

    def to_layers(self, z):
        return self.dense.to_layers(z)


def test_a_class_that_is_not_ours_and_a_newer_fmxnn_are_named_after_pulling(hub, tmp_path):
    server, endpoint = hub
    fx.push_to_hub(Own(2, 3, 5), "me/own", endpoint=endpoint, token="hf_x")
    options = {"endpoint": endpoint, "cache_dir": tmp_path}
    with pytest.raises(fx.RecipeError) as caught:
        fx.from_pretrained("me/own", **options)
    assert str(caught.value) == "unknown class 'Own' at the top; if it is yours, pass it: classes=[Own]"
    assert isinstance(fx.from_pretrained("me/own", classes=[Own], **options), Own)
    files = server.commits[server.refs["me/own", "main"]]
    config = json.dumps({**json.loads(files["config.json"]), "fmxnn": "99.0.0"}).encode()
    manifest = json.loads(files["manifest.json"])
    manifest["sha256"]["config.json"] = hashlib.sha256(config).hexdigest()
    server.commit("me/own", "main", {"config.json": config, "manifest.json": json.dumps(manifest).encode()})
    with pytest.raises(
        fx.RecipeError,
        match=rf"was written by fmxnn 99.0.0, and this is {fx.__version__}; upgrade: pip install -U fmxnn",
    ):
        fx.from_pretrained("me/own", classes=[Own], **options)
