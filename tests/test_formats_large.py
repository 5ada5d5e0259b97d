"""Files larger than the machine: looked at by their headers, and refused before anything is read."""

import hashlib
import json
import struct

import pytest
import torch

import fmxnn as fx
from fmxnn.saving.formats import memory

LATENTS, D_MODEL = 1 << 26, 1 << 11  # 550 GB of float32


def sparse(path, **shapes):
    """A safetensors file whose tensors are one hole in the disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[key.replace("__", ".")] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    said = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(said)) + said)
        file.truncate(8 + len(said) + end)


def saelens(folder):
    (folder / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": D_MODEL, "d_sae": LATENTS}))
    shapes = {"W_enc": [D_MODEL, LATENTS], "b_enc": [LATENTS], "W_dec": [LATENTS, D_MODEL], "b_dec": [D_MODEL]}
    sparse(folder / "sae_weights.safetensors", **shapes)


def gemma_scope(folder):
    (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu"}))
    shapes = {
        "w_enc": [D_MODEL, LATENTS],
        "b_enc": [LATENTS],
        "threshold": [LATENTS],
        "w_dec": [LATENTS, 1, D_MODEL],
        "b_dec": [D_MODEL],
    }
    sparse(folder / "params_layer_0.safetensors", **shapes)


def circuit_tracer(folder):
    (folder / "config.yaml").write_text("model_kind: cross_layer_transcoder\n")
    sparse(folder / "W_enc_0.safetensors", W_enc_0=[LATENTS, D_MODEL], b_enc_0=[LATENTS], b_dec_0=[D_MODEL])
    sparse(folder / "W_dec_0.safetensors", W_dec_0=[LATENTS, 1, D_MODEL])


def ours(folder):
    config = {"fmxnn": fx.__version__, "module": {"DenseWeight": {"layers": 1, "d_model": D_MODEL, "latents": LATENTS}}}
    (folder / "config.json").write_text(json.dumps(config))
    digests = {
        "config.json": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "model.safetensors": "0" * 64,
    }
    (folder / "manifest.json").write_text(json.dumps({"sha256": digests}))
    sparse(folder / "model.safetensors", factors__0=[LATENTS, 1, D_MODEL])


@pytest.mark.skipif(not memory.MEMORY.is_file(), reason="the system does not say what is free")
@pytest.mark.parametrize("write", [saelens, gemma_scope, circuit_tracer, ours])
def test_a_file_larger_than_the_machine_is_looked_at_and_refused_by_its_headers(write, tmp_path):
    write(tmp_path)
    headers = fx.from_pretrained(tmp_path, device="meta")
    assert sum(parameter.nbytes for parameter in headers.parameters()) > 5e11
    with pytest.raises(
        MemoryError, match=r"^.* needs [\d,.]+ GB.*, and cpu has [\d.]+ GB free; look at it without its weights: "
    ):
        fx.from_pretrained(tmp_path)


def test_a_file_that_the_system_will_not_map_is_too_large_and_not_broken(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "model.pt")

    def load(*_args, **_options):
        raise RuntimeError("unable to mmap 99 bytes from file <model.pt>: Cannot allocate memory (12)\nat some line")

    monkeypatch.setattr(torch, "load", load)
    (tmp_path / "model_cfg.yaml").write_text("activation_fn: {classname: ReLUActivation}")
    with pytest.raises(MemoryError) as caught:
        fx.from_pretrained(tmp_path)
    said = "which is more than this machine can map; look at it without its weights: python -m fmxnn inspect"
    assert str(caught.value) == f"{tmp_path / 'model.pt'} has 0.0 GB, {said}"
