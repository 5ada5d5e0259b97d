import foreign_crosscoders
import hub_server
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

import fmxnn as fx
from fmxnn.integrity import IntegrityError


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
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
    address = fx.push_to_hub(first, "me/ring", endpoint=endpoint, token="hf_x", about={"base_model": "openai-community/gpt2"})
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
    assert fx.push_to_hub(third, "me/ring", endpoint=endpoint, token="hf_x", create_pr=True) == f"{endpoint}/me/ring/discussions/1"
    options = {"endpoint": endpoint, "cache_dir": tmp_path}
    assert_same(fx.from_pretrained("me/ring", **options), first)
    assert_same(fx.from_pretrained("me/ring", revision="try", **options), second)
    assert_same(fx.from_pretrained("me/ring", revision=server.refs["me/ring", "refs/pr/1"], **options), third)


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
    fetched = {path.rpartition("/resolve/")[2].partition("/")[2] for verb, path in server.requests if "/resolve/" in path and verb == "GET"}
    assert fetched == {"1/model.pt", "1/model_cfg.yaml"}
    assert torch.equal(fx.from_pretrained("them/all", local_files_only=True, **options)(x), module(x))
    with pytest.raises(IntegrityError, match="has no folder '2'; give one that it has: subfolder=$"):
        fx.from_pretrained("them/all", **{**options, "subfolder": "2"})
