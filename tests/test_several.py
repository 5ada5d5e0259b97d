"""Several language models on one axis of layers."""

import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language import make_model, make_tokenizer, words
from several_tokenizers import TINY, byte_level, metaspace
from torch import nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

import fmxnn as fx
from fmxnn.activations import Contexts, activation_scale, contexts, harvest
from fmxnn.activations import models as opening
from fmxnn.activations.adapters import adapter_off, without_wrapper
from fmxnn.activations.layer_reader import LayerReader
from fmxnn.activations.members import distinct, short_name
from fmxnn.activations.models import at_revision
from fmxnn.activations.several import SeveralSource
from fmxnn.activations.source import ModelSource
from fmxnn.metrics import measure_reconstruction
from fmxnn.training import Trainer, calibrate, fold_scale

CHAT = TINY.parent / "tiny-lm-chat"
TEXT = [words(137, i) for i in range(5)]
HOW = {"tokenizer": make_tokenizer(), "context": 9, "batch": 32, "block": 5, "dtype": torch.float64}


def gpt2(width=16, *, vocabulary=64, positions=16, seed=1, layers=4):
    torch.manual_seed(seed)
    sizes = {"n_embd": width, "n_layer": layers, "n_head": 2, "n_positions": positions}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **sizes)).double().eval()


FIRST, OTHER, NARROW = make_model(), make_model("llama"), gpt2(8)


@given(st.integers(0, 99), st.integers(3, 40), st.integers(16, 60))
@settings(max_examples=8)
def test_each_models_layers_are_what_it_gives_alone(seed, block, batch):
    how = HOW | {"seed": seed, "block": block, "batch": batch, "layers": [0, 2]}
    models = [FIRST, OTHER, FIRST]
    together = harvest(models, TEXT[:2], **how)
    assert together.layers == tuple(f"{name}:{layer}" for name in together.source.sources for layer in (0, 2))
    alone = [harvest(model, TEXT[:2], **how) for model in models]
    for x, *each in zip(together, *alone, strict=True):
        assert x.shape == (batch, 6, 16)
        assert torch.equal(x, torch.cat(each, dim=1))


def test_pairs_of_inputs_and_targets_come_from_every_model():
    how = HOW | {"layers": [1, 3], "at": "mlp_in", "to": "mlp_out"}
    together = harvest([FIRST, OTHER], TEXT, **how)
    alone = [harvest(model, TEXT, **how) for model in (FIRST, OTHER)]
    for (x, y), *each in zip(together, *alone, strict=True):
        assert torch.equal(x, torch.cat([side for side, _ in each], dim=1))
        assert torch.equal(y, torch.cat([side for _, side in each], dim=1))
    assert together.identity()["to"] == "mlp_out"


def test_a_stream_of_several_goes_on_where_it_stopped_and_says_what_it_gives():
    made = harvest([FIRST, OTHER], TEXT, layers=[2], **HOW)
    for mine, theirs in zip(made.starting_at(3), islice(made, 3, None), strict=True):
        assert torch.equal(mine, theirs)
    assert "layers GPT2LMHeadModel:2, LlamaForCausalLM:2 of GPT2LMHeadModel, LlamaForCausalLM" in repr(made)
    assert made.identity()["layers"] == ["GPT2LMHeadModel:2", "LlamaForCausalLM:2"]
    assert made.identity()["text"] == made.contexts.digest
    assert {count.dropped for count in made.source.counts.values()} == {0}


def test_a_list_of_one_gives_the_numbers_of_its_model():
    made, alone = (harvest(model, TEXT, layers=[0, 2], **HOW) for model in ([FIRST], FIRST))
    assert made.layers == ("GPT2LMHeadModel:0", "GPT2LMHeadModel:2")
    assert all(torch.equal(x, y) for x, y in zip(made, alone, strict=True))


def test_narrower_models_end_in_the_zeros_that_a_ragged_weight_reads():
    made = harvest([NARROW, FIRST], TEXT, layers=[0, 2], **HOW)
    assert made.source.widths == (8, 8, 16, 16)
    assert made.d_model == 16
    x = next(iter(made))
    alone = [next(iter(harvest(model, TEXT, layers=[0, 2], **HOW))) for model in (NARROW, FIRST)]
    rows = [row for side in alone for row in side.unbind(-2)]
    assert torch.equal(x, fx.pad_layers(rows))
    assert all(torch.equal(a, b) for a, b in zip(fx.unpad_layers(x, made.source.widths), rows, strict=True))
    weight = fx.RaggedWeight(fx.DenseWeight(4, 16, 20), widths=made.source.widths).double()
    crosscoder = fx.Crosscoder(fx.CrossLayerEncoder(weight, fx.TopK(3)), fx.CrossLayerDecoder(weight)).double()
    assert torch.equal(crosscoder(x)[:, :2, 8:], torch.zeros(32, 2, 8, dtype=torch.float64))
    padding = x.clone()
    padding[:, :2, 8:] = torch.nan
    assert torch.equal(crosscoder(padding), crosscoder(x))


def test_models_of_two_dtypes_and_modes_are_read_together():
    half = gpt2().to(torch.bfloat16).train()
    x = next(iter(harvest([FIRST, half], TEXT, layers=[1], **HOW)))
    assert x.dtype == torch.float64
    assert not half.training
    assert_close(x[:, 1], next(iter(harvest(half, TEXT, layers=[1], **HOW)))[:, 0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_models_stay_where_they_are_and_x_is_where_the_first_is():
    here, there = gpt2(), gpt2(seed=2).to("cuda")
    for models in ([here, there], [there, here]):
        x = next(iter(harvest(models, TEXT, layers=[1], **HOW)))
        assert x.device == next(models[0].parameters()).device
    moved = harvest([here, there], TEXT, layers=[1], **HOW, device="cuda")
    assert {next(model.parameters()).device.type for model in (here, there)} == {"cuda"}
    assert next(iter(moved)).device.type == "cuda"


# ---- other tokens for each model


def direct(model, ids, layer):
    return LayerReader(model, [layer])(ids.long())[:, :, 0]


def test_models_of_different_tokenizers_are_read_at_the_ends_of_the_same_characters():
    one, other = gpt2(vocabulary=4096, positions=24), gpt2(8, vocabulary=len(metaspace()), positions=24)
    texts = ["The whale was seen off the coast again, café 🙂. " * 6, "Another one"]
    made = harvest([one, other], texts, layers=[2], **HOW | {"tokenizer": [byte_level(), metaspace()], "context": 20})
    source = made.source
    assert all(count.dropped > 0 for count in source.counts.values())
    assert made.contexts is source.sources["GPT2LMHeadModel-1"].contexts
    both = [each.contexts for each in source.sources.values()]
    x = [direct(model, each.ids, 2)[each.keep] for model, each in zip((one, other), both, strict=True)]
    (side,) = source.read(0, len(made.contexts))
    assert_close(side, fx.pad_layers(x))
    said = [
        tokenizer.decode(each.ids[0, 1 : int(each.keep[0].nonzero().max()) + 1])
        for tokenizer, each in zip((byte_level(), metaspace()), both, strict=True)
    ]
    assert said[0].strip() == said[1].strip() != ""
    assert len(made.identity()["text"]) == 2
    for _, context, position in made.with_tokens():
        assert made.contexts.keep[context, position].all()


@dataclass(frozen=True)
class Chat(Contexts):
    roles: torch.Tensor = field()
    rendered: tuple[str, ...]


def talk(tokenizer, text="The whale was seen off the coast again. "):
    rendered = [text * 2, text + "Nobody saw it."]
    rows = [torch.tensor(ids) for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"]]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).int()
    keep = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    keep[:, 0] = False
    return Chat(ids, keep, (torch.arange(ids.numel()).view(ids.shape) % 3).to(torch.int8), tuple(rendered))


def test_a_chat_is_read_by_models_of_other_tokenizers_from_its_text():
    models = [gpt2(vocabulary=4096, positions=64), gpt2(vocabulary=len(metaspace()), positions=64)]
    chat = talk(metaspace())
    how = HOW | {"tokenizer": [byte_level(), metaspace()], "batch": 4}
    made = harvest(models, chat, layers=[1], **how)
    assert torch.equal(made.contexts.roles, chat.roles)
    assert torch.equal(made.contexts.ids, chat.ids)
    assert 0 < made.contexts.tokens < chat.tokens
    both = [each.contexts for each in made.source.sources.values()]
    assert both[1] is made.contexts
    x = [direct(model, each.ids, 1)[each.keep] for model, each in zip(models, both, strict=True)]
    assert torch.equal(made.source.read(0, 2)[0], torch.stack(x, 1))


def test_a_chat_goes_as_it_is_through_models_of_one_tokenizer():
    models = [gpt2(vocabulary=4096, positions=64), gpt2(vocabulary=5000, positions=64)]
    chat = talk(byte_level())
    for tokenizer in (byte_level(), None, [byte_level(), None]):
        assert harvest(models, chat, layers=[1], **HOW | {"tokenizer": tokenizer, "batch": 4}).contexts is chat


def test_a_short_model_cuts_a_chat_for_the_others_and_is_named_where_it_reads_it_itself():
    chat = talk(byte_level())
    wide, short = gpt2(vocabulary=4096, positions=64), gpt2(8, vocabulary=len(metaspace()), positions=10)
    how = HOW | {"tokenizer": [byte_level(), metaspace()], "batch": 4}
    made = harvest([wide, short], chat, layers=[1], **how)
    assert made.source.sources["GPT2LMHeadModel-2"].contexts.ids.shape == (2, 10)
    with pytest.raises(ValueError, match="^GPT2LMHeadModel-2: .* reads at most 10 tokens .* take context <= 10$"):
        harvest([wide, gpt2(vocabulary=4096, positions=10)], chat, layers=[1], **HOW | {"batch": 4})


# ---- names, revisions and adapters


@given(st.lists(st.sampled_from(["a", "b", "a-1", "a-2", "b-1"]), max_size=8))
def test_names_are_made_distinct_and_kept_where_they_are(names):
    made = distinct(names)
    assert len(set(made)) == len(names)
    for name, new in zip(names, made, strict=True):
        assert new == name if names.count(name) == 1 else re.fullmatch(rf"{name}-\d+", new)


def test_a_model_is_called_by_the_last_part_of_its_name(tmp_path, monkeypatch):
    named = gpt2()
    named.config.name_or_path = "org/model"
    monkeypatch.chdir(tmp_path)
    for model, name in [
        ("org/model", "model"),
        (TINY, "tiny-lm"),
        (f"{TINY}/", "tiny-lm"),
        (".", tmp_path.name),
        ("org/model@step1000", "model@step1000"),
        ("org/model@refs/pr/1", "model@refs/pr/1"),
        (named, "model"),
        (FIRST, "GPT2LMHeadModel"),
        (Peft(named), "model+finetuned"),
        (adapter_off(Peft(named)), "model"),
        (adapter_off(Peft(gpt2())), "GPT2LMHeadModel"),
    ]:
        assert short_name(model) == name


def test_a_revision_stands_behind_the_name(tmp_path, monkeypatch):
    opened = []

    def open_it(name, **options):
        opened.append((name, options.get("revision")))
        return gpt2()

    monkeypatch.setattr(opening.AutoModelForCausalLM, "from_pretrained", open_it)
    monkeypatch.setattr(
        opening.AutoTokenizer,
        "from_pretrained",
        lambda *name, **options: open_it(*name, **options) and make_tokenizer(),
    )
    monkeypatch.setattr(
        opening.AutoConfig, "from_pretrained", lambda *name, **options: open_it(*name, **options).config
    )
    models = ["org/model@step1", "org/model@step2", "org/model", FIRST]
    made = harvest(models, TEXT, layers=[1], **HOW | {"tokenizer": [None, None, None, make_tokenizer()]})
    assert made.layers[:3] == ("model@step1:1", "model@step2:1", "model:1")
    assert opened == [("org/model", revision) for revision in ("step1", "step2", None)] * 3
    folder = tmp_path / "a@b"
    folder.mkdir()
    assert at_revision(folder) == (folder, {})
    assert at_revision(str(folder)) == (str(folder), {})
    assert at_revision("@b") == ("@b", {})
    harvest("org/model@step3", TEXT, layers=[1], **HOW)
    assert opened[-1] == ("org/model", "step3")


class Peft(nn.Module):
    """As much of peft's own as is asked of a model with an adapter in its layers."""

    active_adapter = "finetuned"

    def __init__(self, model, *, is_prompt=False):
        super().__init__()
        self.base_model, self.active_peft_config = model, SimpleNamespace(is_prompt_learning=is_prompt)
        self.is_on = True
        for block in model.transformer.h[1:2]:
            block.register_forward_hook(
                lambda _m, _i, x: x if not self.is_on else x + 1 if torch.is_tensor(x) else (x[0] + 1, *x[1:])
            )

    def get_base_model(self):
        return self.base_model

    @contextmanager
    def disable_adapter(self):
        self.is_on = False
        try:
            yield
        finally:
            self.is_on = True

    def forward(self, **given):
        return self.base_model(**given)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_one_base_is_read_with_its_adapter_on_and_off(order):
    adapted = Peft(gpt2())
    both = [adapter_off(adapted), adapted]
    made = harvest([both[i] for i in order], TEXT, layers=[0, 2], **HOW)
    assert adapted.is_on
    names = ["GPT2LMHeadModel", "GPT2LMHeadModel+finetuned"]
    assert made.layers == tuple(f"{names[i]}:{layer}" for i in order for layer in (0, 2))
    base = harvest(gpt2(), TEXT, layers=[0, 2], **HOW)
    for x, y in zip(made, base, strict=True):
        off, on = (x[:, 2 * place : 2 * place + 2] for place in (order.index(0), order.index(1)))
        assert torch.equal(off, y)
        assert torch.equal(on[:, 0], y[:, 0])
        assert not torch.isclose(on[:, 1], y[:, 1]).any(1).all()
    assert adapted.is_on


def test_an_adapter_is_on_again_after_an_error():
    adapted = Peft(gpt2())
    off = adapter_off(adapted)
    with pytest.raises(IndexError):
        off(input_ids=torch.tensor([[99]]))
    assert adapted.is_on


def test_what_runs_with_the_adapter_is_not_called_through_the_model_without_it():
    off = adapter_off(Peft(gpt2()))
    assert off.transformer is off.with_adapter.transformer
    assert off.config is off.with_adapter.config
    assert not hasattr(off, "generate")


def test_a_model_without_an_adapter_or_with_one_that_is_in_no_layer_is_refused():
    assert without_wrapper(FIRST) is FIRST
    with pytest.raises(ValueError, match="adapter_off needs a model with a peft adapter, got GPT2LMHeadModel; put one"):
        adapter_off(FIRST)
    for model in (Peft(gpt2(), is_prompt=True), [FIRST, Peft(gpt2(), is_prompt=True)]):
        with pytest.raises(ValueError, match="Peft has an adapter that puts a prompt before the text.*; merge"):
            harvest(model, TEXT, layers=[1], **HOW)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "transformers"])
def test_adapters_of_peft_are_read_on_and_off(family, wrapped):
    peft = pytest.importorskip("peft")
    base = make_model(family)
    inside = {"gpt2": ["c_attn"], "llama": ["q_proj"]}[family]
    config = peft.LoraConfig(init_lora_weights=False, target_modules=inside, fan_in_fan_out=family == "gpt2")
    if wrapped:
        model = peft.get_peft_model(base, config).eval()
    else:
        base.add_adapter(config)
        model = base.eval()
    made = harvest([adapter_off(model), model], TEXT, layers=[0, 2], **HOW)
    name = type(make_model(family)).__name__
    assert made.layers[::2] == (f"{name}:0", f"{name}+default:0")
    clean = harvest(make_model(family), TEXT, layers=[0, 2], **HOW)
    for x, y in zip(made, clean, strict=True):
        assert_close(x[:, :2], y)
        assert not torch.isclose(x[:, 2:], y).all()
    alone = harvest(model, TEXT, layers=[0, 2], **HOW)
    assert all(torch.equal(x[:, 2:], y) for x, y in zip(made, alone, strict=True))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_folder_of_an_adapter_is_a_model_of_its_own(tmp_path):
    peft = pytest.importorskip("peft")
    base, adapter = tmp_path / "base", tmp_path / "lora"
    make_model().save_pretrained(base)
    config = peft.LoraConfig(init_lora_weights=False, target_modules=["c_attn"], fan_in_fan_out=True)
    peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), config).save_pretrained(adapter)
    made = harvest([base, adapter], TEXT, layers=[2], **HOW)
    assert made.layers == ("base:2", "lora:2")
    x = next(iter(made))
    assert not torch.isclose(x[:, 0], x[:, 1]).all()


# ---- what cannot be read


@pytest.mark.parametrize(
    ("models", "given", "sentence"),
    [
        ([], {}, "list of them, got an empty list; name at least one"),
        (["none", 3], {}, "a folder, a Hub name or a module, got int at place 1; give one list"),
        ([["none"]], {}, "a folder, a Hub name or a module, got list at place 0"),
        (3, {}, "harvest reads a language model .* or a list of them, got int"),
        (
            [FIRST, OTHER],
            {"tokenizer": None},
            "needs the tokenizer of GPT2LMHeadModel, which is given as a module; pass",
        ),
        (
            ["none", "none"],
            {"tokenizer": [make_tokenizer()]},
            "tokenizer is one for all .* got 1 for the models none-1, none-2",
        ),
        ([FIRST, OTHER], {"tokenizer": [make_tokenizer(), None]}, "needs the tokenizer of LlamaForCausalLM, which"),
        (["none", "none"], {"tokenizer": [byte_level(), SimpleNamespace()]}, "SimpleNamespace of none-2 does not tell"),
        ([FIRST, gpt2(positions=8)], {}, "^GPT2LMHeadModel-2: .* at most 8 tokens at once, got context=9; take"),
        ([FIRST, gpt2(layers=2)], {}, "^GPT2LMHeadModel-2: GPT2LMHeadModel has the layers 0 to 1, got 2"),
        ([FIRST, gpt2(vocabulary=40)], {}, "^GPT2LMHeadModel-2: .* the token ids 0 to 39, got 6.; use the model's own"),
        ([FIRST, OTHER], {"tokens": 0}, "at least one token, got tokens=0"),
        ([FIRST, gpt2()], {"tokens": 0, "tokenizer": [byte_level(), metaspace()]}, "at least one token, got tokens=0"),
    ],
)
def test_what_several_models_cannot_read_is_said(models, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        harvest(models, TEXT, layers=[2], **HOW | given)


def test_contexts_of_one_tokenizer_do_not_go_through_a_model_of_another():
    made = contexts(TEXT, make_tokenizer(), context=9)
    with pytest.raises(
        ValueError, match="none-1, none-2 have different tokenizers, and contexts hold the tokens of one"
    ):
        harvest(["none", "none"], made, layers=[2], **HOW | {"tokenizer": [byte_level(), metaspace()]})
    assert harvest([FIRST, OTHER], made, layers=[2], **HOW).contexts is made


def test_sources_that_keep_other_tokens_are_no_pair():
    made = contexts(TEXT, make_tokenizer(), context=9)
    fewer = Contexts(made.ids, made.keep & (torch.arange(9) > 1))
    one, other = (ModelSource([LayerReader(FIRST, [1])], each) for each in (made, fewer))
    with pytest.raises(
        ValueError, match="the same tokens of the text, and b keeps .* of them where .* are read; give them"
    ):
        SeveralSource({"a": one, "b": other})
    with pytest.raises(ValueError, match="at least one source, got none"):
        SeveralSource({})


# ---- from two models to a dictionary of both


def test_a_crosscoder_of_a_base_and_a_chat_model_is_trained_saved_and_measured(tmp_path):
    text = [*topics.values()]
    pair = harvest([TINY, CHAT], text, layers=[6], batch=256, tokens=2500, context=64)
    assert pair.layers == ("tiny-lm:6", "tiny-lm-chat:6")
    axes = {"layers": 2, "d_model": pair.d_model, "latents": 128}
    made = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(**axes), fx.BatchTopK(8)), fx.CrossLayerDecoder(fx.DenseWeight(**axes))
    )
    made = fx.isometric_start(made)
    batches = list(pair)
    scale = activation_scale(batches)
    trainer = Trainer(made, torch.optim.Adam(made.parameters(), lr=3e-3))
    for x in batches * 6:
        trainer.step(x * scale)
    calibrate(made, [x * scale])
    fold_scale(made, scale)
    about = {"base_model": pair.source.name, "layers": list(pair.layers)}
    fx.save_pretrained(made, tmp_path / "pair", about=about)
    again = fx.from_pretrained(tmp_path / "pair")
    held = harvest([TINY, CHAT], text[-20:], layers=[6], batch=256, tokens=600, context=64)
    found = measure_reconstruction(again, held)
    assert found.numbers() == measure_reconstruction(made, held).numbers()
    assert again.about["layers"] == list(pair.layers)
    print(found.numbers())
    assert found.numbers()["ev"] > 0.2
