"""Folders as vLLM's hidden-state connector writes them: a safetensors file for each prompt."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language import FAMILIES, make_model, make_tokenizer
from safetensors.torch import save_file

from fmxnn.activations import Activations, LastLayer, Shuffle, VllmSource, compare_last_layer, store
from fmxnn.core.errors import FormatError, IntegrityError


def written(folder, lengths, layers=2, d_model=4, dtype=torch.bfloat16):
    """What vLLM would write, made here, and the states of each prompt."""
    folder.mkdir(exist_ok=True)
    prompts = [torch.randint(0, 9, (length,)) for length in lengths]
    states = [torch.randn(length, layers, d_model).to(dtype) for length in lengths]
    for number, (ids, x) in enumerate(zip(prompts, states, strict=True)):
        save_file({"hidden_states": x, "token_ids": ids}, folder / f"{number:03d}-abc.safetensors")
        (folder / f"{number:03d}-abc.safetensors.lock").touch()
    return prompts, states


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return lambda: tmp_path_factory.mktemp("vllm") / "states"


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6).filter(lambda lengths: max(lengths) > 1), st.booleans())
def test_prompts_of_any_length_are_contexts_whose_first_token_is_dropped(places, lengths, special):
    folder = places()
    prompts, states = written(folder, lengths)
    source = VllmSource(folder, [3, 1], tokenizer=make_tokenizer() if special else None, name="a model")
    rows = [x[1:][ids[1:] != 0] if special else x[1:] for ids, x in zip(prompts, states, strict=True)]
    assert (source.layers, source.d_model, source.name) == ((2, 0), 4, "a model")
    assert source.contexts.ids.shape == (len(lengths), max(lengths))
    assert torch.equal(source.read(0, len(lengths))[0], torch.cat(rows))
    for number, ids in enumerate(prompts):
        assert torch.equal(source.contexts.ids[number, : len(ids)], ids.int())
        assert torch.equal(source.read(number, number + 1)[0], rows[number])


def test_they_are_a_stream_like_any_other(tmp_path):
    written(tmp_path / "states", [5, 9, 3, 8])
    stream = Activations(VllmSource(tmp_path / "states", [1, 2]), Shuffle(batch=4, block=2))
    again = store(stream, tmp_path / "cache")
    assert again.stored.about["dtype"] == "bfloat16"
    assert all(map(torch.equal, stream, again))
    assert stream.identity() == again.identity()
    assert len(stream) == 21 // 4


def test_files_may_be_given_in_the_order_of_the_prompts(tmp_path):
    _, states = written(tmp_path / "states", [3, 4, 5])
    files = sorted((tmp_path / "states").glob("*.safetensors"))[::-1]
    assert torch.equal(VllmSource(files, [1, 2]).read(0, 1)[0], states[2][1:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["block_out", "final_norm", "neither"])
def test_the_last_layer_is_compared_with_the_models_own(tmp_path, family, place):
    model, ids = make_model(family), torch.randint(3, 60, (3, 7))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_f" in name:
                parameter.add_(torch.rand_like(parameter))  # so that the final norm is no identity
    hidden, last = model(input_ids=ids, output_hidden_states=True).hidden_states, []
    blocks = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(family, "model.layers")
    block = model.get_submodule(f"{blocks}.3")
    with block.register_forward_hook(lambda _m, _i, out: last.append(out if torch.is_tensor(out) else out[0])):
        model(input_ids=ids)
    top = {"block_out": last[0], "final_norm": hidden[-1], "neither": torch.randn_like(last[0])}[place]
    for number in range(3):
        states = torch.stack([hidden[2][number], top[number]], dim=1).bfloat16().detach()
        save_file({"hidden_states": states, "token_ids": ids[number]}, tmp_path / f"{number}.safetensors")
    source = VllmSource(tmp_path, [2, 4])
    assert source.layers == (1, 3)
    found = compare_last_layer(source, model.train())
    assert model.training
    assert isinstance(found, LastLayer)
    assert found.place == place
    near = {"block_out": found.block_out, "final_norm": found.final_norm, "neither": 0.0}[place]
    assert near < 0.01
    assert max(found.block_out, found.final_norm) > 0.1
    with pytest.raises(
        ValueError, match=r"last layer of \w+ is 3, vLLM's layer id 4, and the files hold the ids 2, 3; let"
    ):
        compare_last_layer(VllmSource(tmp_path, [2, 3]), model)


def test_what_vllm_did_not_write_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none'; give the shared_storage_path"):
        VllmSource(tmp_path / "none", [1])
    with pytest.raises(FormatError, match=r"holds no .safetensors file of vLLM; give"):
        VllmSource(tmp_path, [1])
    (tmp_path / "a.safetensors.zst").touch()
    with pytest.raises(FormatError, match="compressed: unpack them"):
        VllmSource(tmp_path, [1])
    for ids in ([], [1, 1], [-1], [1.5], 3):
        with pytest.raises(ValueError, match="layer_ids are different whole numbers"):
            VllmSource(tmp_path, ids)
    folder = tmp_path / "states"
    written(folder, [3, 4])
    with pytest.raises(
        FormatError, match=r"holds hidden_states \(3, 2, 4\) and token_ids \(3,\), expected \(tokens, layers=3"
    ):
        VllmSource(folder, [1, 2, 3])
    path = folder / "zzz.safetensors"
    for tensors, said in (
        ({"hidden_states": torch.zeros(2, 2, 4)}, "holds no token_ids"),
        ({"token_ids": torch.zeros(2)}, r"holds hidden_states \(\) and"),
        ({"hidden_states": torch.zeros(2, 2, 4), "token_ids": torch.zeros(3)}, r"holds hidden_states \(2, 2, 4\)"),
        ({"hidden_states": torch.zeros(2, 2, 5), "token_ids": torch.zeros(2)}, "has d_model=5, and .*000-abc.* has 4"),
    ):
        save_file(tensors, path)
        with pytest.raises(FormatError, match=f"zzz.safetensors {said}"):
            VllmSource(folder, [1, 2])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(IntegrityError, match="zzz.safetensors cannot be read: .*; wait until vLLM is done"):
        VllmSource(folder, [1, 2])
