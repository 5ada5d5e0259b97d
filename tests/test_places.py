"""Every place of every family, against transformers' own outputs or a slow forward written here."""

import re

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from language import FAMILIES, MORE_FAMILIES, make_model, make_tokenizer, words
from torch import nn
from torch.testing import assert_close

from fmxnn import ShapeError
from fmxnn.activations import Contexts
from fmxnn.activations.configs import check_context, check_layers_of
from fmxnn.activations.families import family_of
from fmxnn.activations.harvesting import harvest
from fmxnn.activations.layer_reader import LayerReader, read_together
from fmxnn.activations.models import open_config, open_model, open_tokenizer
from fmxnn.activations.places import IN_BLOCKS, Place, find_places, residual_blocks

IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
PRE = {"mlp": "post_attention_layernorm"}
GPT2, PARALLEL = {"mlp": "ln_2"}, {"mlp": "input_layernorm", "parallel": True}
GEMMA = {
    "mlp": "pre_feedforward_layernorm",
    "after_attn": "post_attention_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}
OLMO2 = {"mlp": None, "after_attn": "post_attention_layernorm", "after_mlp": "post_feedforward_layernorm"}
BLOCKS = {
    "gpt2": GPT2,
    "gpt2_headless": GPT2,
    "gpt_neo": GPT2,
    "gptj": {"mlp": "ln_1", "parallel": True},
    "gpt_neox": PRE | {"parallel": True},
    "gpt_neox_sequential": PRE,
    "gemma": PRE,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gemma3_with_eyes": GEMMA,
    "llama": PRE,
    "llama_headless": PRE,
    "mistral": PRE,
    "mixtral": PRE,
    "qwen2": PRE,
    "qwen3": PRE,
    "stablelm": PRE,
    "phi": PARALLEL,
    "phi3": PRE,
    "cohere": PARALLEL,
    "olmo": PRE,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "glm4": {
        "mlp": "post_attention_layernorm",
        "after_attn": "post_self_attn_layernorm",
        "after_mlp": "post_mlp_layernorm",
    },
}
"""For the slow forward: the norm before the MLP, whether it reads what attention reads, and the norms after both."""
MODELS = {family: make_model(family) for family in ("gpt2", "gemma2", "gpt_neox")}
GPT2_MODEL = MODELS["gpt2"]


def spread(model):
    """The fresh model with numbers large enough that a norm or a sublayer left out is seen."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


def first(output):
    return output if torch.is_tensor(output) else output[0]


@pytest.mark.parametrize("family", FAMILIES | MORE_FAMILIES)
def test_every_place_of_a_family_is_what_its_forward_computes(family):
    model, oracle = spread(make_model(family)), BLOCKS[family]
    layers = (2, 0, 3)
    with torch.no_grad():
        hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states
        out, before, attn, read, mlp = read_together([LayerReader(model, layers, at=at) for at in IN_BLOCKS], IDS)
        for place, layer in enumerate(layers):
            block = residual_blocks(model)[layer]
            assert_close(before[:, :, place], hidden[layer])
            assert_close(attn[:, :, place] + mlp[:, :, place], out[:, :, place] - before[:, :, place])
            stream = before[:, :, place] + (0 if oracle.get("parallel") else attn[:, :, place])
            norm = block.get_submodule(oracle["mlp"]) if oracle["mlp"] else nn.Identity()
            assert_close(read[:, :, place], norm(stream))
            after = block.get_submodule(oracle["after_mlp"]) if "after_mlp" in oracle else nn.Identity()
            assert_close(mlp[:, :, place], after(first(block.mlp(read[:, :, place]))))
            if layer < 3:
                assert_close(out[:, :, place], hidden[layer + 1])
        embed, start, norm = LayerReader(model, ["embed", -1, "final_norm"])(IDS).unbind(-2)
        scale = 4 if family.startswith("gemma") else 1  # the root of d_model, which is part of the embedding there
        assert_close(embed, model.get_input_embeddings().weight[IDS] * scale)
        assert_close(start, hidden[0])
        assert_close(norm, hidden[-1])


def test_attention_is_read_after_the_norm_that_follows_it():
    model = spread(make_model("olmo2"))
    block = residual_blocks(model)[1]
    inner, outer = LayerReader(model, ["model.layers.1.self_attn", "attn_out.1"])(IDS).unbind(-2)
    assert_close(outer, block.post_attention_layernorm(inner))
    assert (inner - outer).abs().max() > 0.1


ENTRIES = [-1, *range(4), "embed", "final_norm", *(f"{at}.{layer}" for at in IN_BLOCKS[2:] for layer in range(4))]


@given(st.sampled_from(sorted(MODELS)), st.lists(st.sampled_from(ENTRIES), min_size=1, max_size=6, unique=True))
def test_places_read_together_are_those_read_alone_in_any_order(family, entries):
    model = MODELS[family]
    together = LayerReader(model, entries)(IDS)
    assert together.shape == (3, 7, len(entries), 16)
    assert not together.requires_grad
    for place, entry in enumerate(entries):
        assert_close(together[:, :, place], LayerReader(model, [entry])(IDS)[:, :, 0], rtol=0, atol=0)


@given(st.lists(st.sampled_from(ENTRIES), min_size=1, max_size=3, unique=True), st.permutations(IN_BLOCKS))
def test_two_readers_share_a_forward_whatever_they_read(entries, places):
    readers = [LayerReader(GPT2_MODEL, [2, 1], at=places[0]), LayerReader(GPT2_MODEL, entries)]
    readers.append(LayerReader(GPT2_MODEL, [0], at=places[1]))
    for reader, read in zip(readers, read_together(readers, IDS), strict=True):
        assert_close(read, reader(IDS), rtol=0, atol=0)


def test_nothing_after_the_last_place_runs():
    model = make_model()
    model.transformer.h[1].mlp.forward = model.transformer.h[2].forward = None
    assert LayerReader(model, ["attn_out.1", "embed", -1, 0])(IDS).shape == (3, 7, 4, 16)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_module_is_read_by_its_path_at_either_side():
    block = GPT2_MODEL.transformer.h[1]
    x = LayerReader(GPT2_MODEL, ["mlp_in.1"])(IDS)[:, :, 0]
    wide = LayerReader(GPT2_MODEL, [1], at="transformer.h.{}.mlp.act:in")(IDS)[:, :, 0]
    assert_close(wide, block.mlp.c_fc(x))
    for places in ({"layers": [1, 3], "at": "transformer.h.{}.mlp.act"}, {"layers": ["transformer.h.1.mlp.act:out"]}):
        assert_close(LayerReader(GPT2_MODEL, **places)(IDS)[:, :, 0], block.mlp.act(wide))


@pytest.mark.parametrize("layers", [range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), (each for each in (1, 2))])
def test_layers_may_be_any_sequence_of_whole_numbers(layers):
    reader = LayerReader(GPT2_MODEL, layers)
    assert reader.layers == (1, 2)
    assert all(type(layer) is int for layer in reader.layers)


def stream(model=GPT2_MODEL, text=None, **given):
    text = [words(200, i) for i in range(3)] if text is None else text
    given = {"tokenizer": make_tokenizer(), "context": 9, "batch": 64, "dtype": torch.float64} | given
    return harvest(model, text, **given)


def test_a_pair_is_read_of_the_same_tokens_in_one_forward():
    calls = []
    hook = GPT2_MODEL.register_forward_pre_hook(lambda *_: calls.append(1))
    pairs = stream(layers=[1, 3], at="mlp_in", to="mlp_out")
    x, y = next(iter(pairs))
    hook.remove()
    for place, layer in enumerate((1, 3)):
        assert_close(y[:, place], GPT2_MODEL.transformer.h[layer].mlp(x[:, place]))
    assert len(calls) <= len(pairs.contexts) // pairs.source.at_once + 2


def test_names_stand_in_layers_and_are_printed():
    made = stream(layers=["embed", -1, 2, "final_norm", "transformer.h.0.mlp:in"])
    assert made.layers == ("embed", -1, 2, "final_norm", "transformer.h.0.mlp:in")
    assert next(iter(made)).shape == (64, 5, 16)
    assert "from the layers embed, -1, 2, final_norm, transformer.h.0.mlp:in of GPT2LMHeadModel" in repr(made)


@pytest.mark.parametrize("at", ["block_out", "layers.{}", "layers.{}.mlp"])
def test_call_runs_any_model_such_as_one_of_images(at):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
    vit = tf.ViTModel(tf.ViTConfig(**sizes, image_size=8, patch_size=4)).double().eval()
    images = torch.randn(20, 3, 8, 8, dtype=torch.float64)
    ids = torch.arange(20, dtype=torch.int32)[:, None].expand(-1, 5)  # the number of an image, at each of its patches
    text = Contexts(ids, keep=torch.ones_like(ids, dtype=torch.bool))
    made = stream(vit, text, layers=[2, 0], at=at, call=lambda model, ids: model(pixel_values=images[ids[:, 0]]))
    x, context, position = next(made.with_tokens())
    hidden = vit(pixel_values=images, output_hidden_states=True).hidden_states
    wanted = hidden[1] if at != "layers.{}.mlp" else None
    assert x.shape == (64, 2, 16)
    assert made.d_model == 16
    if wanted is not None:
        assert_close(x[:, 1], wanted[context, position])


class Plain(nn.Module):
    """No config, blocks that are called in an order of their own, and one that is never called."""

    def __init__(self, order=(0, 1), width=4):
        super().__init__()
        self.wte, self.order = nn.Embedding(64, 4), order
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, width)])

    def forward(self, ids):
        x = self.wte(ids)
        for number in self.order:
            x = self.blocks[number](x)
        return x


def plain(ids_of=lambda ids: ids, **given):
    given = {"path": "blocks", "call": lambda model, ids: model(ids_of(ids))} | given
    return lambda model, layers: LayerReader(model, layers, **given)(IDS)


def test_a_module_without_a_config_is_read():
    model = Plain((2, 0))
    x = plain()(model, [0, "wte", 2])
    assert_close(x[:, :, 2], model.blocks[2](x[:, :, 1]))
    assert_close(x[:, :, 0], model.blocks[0](x[:, :, 2]))
    made = stream(Plain(), layers=[0], path="blocks", call=lambda model, ids: model(ids), dtype=torch.float32)
    assert next(iter(made)).shape == (64, 1, 4)


@pytest.mark.parametrize(
    ("read", "error", "words"),
    [
        (lambda: plain()(Plain(), [0, 2]), ValueError, "Plain never reached block_out.2; read a module that runs"),
        (lambda: plain()(Plain((0, 0, 1)), [0, 1]), ValueError, "block_out.0 ran twice in one forward"),
        (lambda: plain(lambda ids: ids[0])(Plain(), [1]), ShapeError, "context=7, d_model), got (7, 4); read a module"),
        (lambda: plain(lambda ids: ids[:, :2])(Plain(), [1]), ShapeError, "d_model), got (3, 2, 4); read a module"),
        (
            lambda: plain()(Plain((0, 1, 2), 5), [0, 2]),
            ShapeError,
            "have one d_model, got block_out.0 4, block_out.2 5; read them one by one",
        ),
    ],
)
def test_what_a_forward_does_not_give_is_said(read, error, words):
    with pytest.raises(error, match=re.escape(words)):
        read()


def test_an_error_of_the_model_leaves_no_hook():
    model = Plain()
    with pytest.raises(RuntimeError, match="of its own"):
        plain(call=lambda *_: (_ for _ in ()).throw(RuntimeError("of its own")))(model, [0])
    assert not any(part._forward_hooks for part in model.modules())


def granite():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    return tf.GraniteForCausalLM(tf.GraniteConfig(**sizes, vocab_size=64, residual_multiplier=0.5))


def gpt1():
    return tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def test_a_block_with_numbers_of_its_own_is_of_no_known_family():
    block = make_model().transformer.h[0]
    assert family_of(block).attn_out == "attn"
    block.register_buffer("scalar", torch.ones(1))
    assert family_of(block) is None
    block = make_model().transformer.h[1]
    block.crossattention = nn.Identity()
    assert family_of(block) is None


NOT_A_LIST, NO_ENTRY = "layers is a list, got", "an entry of layers is a whole number or the name of a place, got"


@pytest.mark.parametrize(
    ("model", "given", "error", "words"),
    [
        (GPT2_MODEL, {"layers": 3}, TypeError, (NOT_A_LIST, "3; write layers=[3]")),
        (GPT2_MODEL, {"layers": "embed"}, TypeError, (NOT_A_LIST, "'embed'; write layers=['embed']")),
        (GPT2_MODEL, {"layers": None}, TypeError, (NOT_A_LIST, "None")),
        (GPT2_MODEL, {"layers": [True]}, TypeError, (NO_ENTRY, "True; write layers=[0]")),
        (GPT2_MODEL, {"layers": [1, 2.0]}, TypeError, (NO_ENTRY, "2.0")),
        (GPT2_MODEL, {"layers": [[0]]}, TypeError, (NO_ENTRY, "[0]")),
        (GPT2_MODEL, {"layers": []}, ValueError, ("at least one layer, got none; write layers=[0]",)),
        (GPT2_MODEL, {"layers": [0, 4, -2]}, ValueError, ("GPT2LMHeadModel has the layers 0 to 3", "got 4, -2")),
        (GPT2_MODEL, {"layers": ["mlp_out.4"]}, ValueError, ("has the layers 0 to 3", "got 4")),
        (GPT2_MODEL, {"layers": [1, 0, 1]}, ValueError, ("1 and 1 in layers are one place; leave one out",)),
        (GPT2_MODEL, {"layers": [-1, "block_in.0"]}, ValueError, ("-1 and 'block_in.0' in layers are one place",)),
        (
            GPT2_MODEL,
            {"layers": [-1], "at": "mlp_in"},
            ValueError,
            ("layer -1", "has no mlp_in; leave it out of layers"),
        ),
        (GPT2_MODEL, {"layers": [0], "at": "embed"}, ValueError, ("belongs to no layer; write layers=['embed']",)),
        (
            GPT2_MODEL,
            {"layers": [0], "at": "resid"},
            ValueError,
            ("block_out, block_in", "{} stands", "got 'resid'"),
        ),
        (
            GPT2_MODEL,
            {"layers": ["emb"]},
            ValueError,
            ("no place 'emb'", "none of embed", "holds transformer, lm_head"),
        ),
        (GPT2_MODEL, {"layers": [""]}, ValueError, ("no place ''", "holds transformer")),
        (
            GPT2_MODEL,
            {"layers": [0, 9], "at": "transformer.h.{}.mlp"},
            ValueError,
            ("no place 'transformer.h.9.mlp'", "ends at 'transformer.h', which holds 0, 1, 2, 3"),
        ),
        (GPT2_MODEL, {"layers": ["lm_head:on"]}, ValueError, ("ends with :in or :out, got", "write 'lm_head:out'")),
        (
            granite(),
            {"layers": [1], "at": "mlp_out"},
            ValueError,
            ("GraniteDecoderLayer", "whose mlp_out is not known", "self_attn, mlp", "at='model.layers.{}.mlp:out'"),
        ),
        (gpt1(), {"layers": [1], "at": "attn_out"}, ValueError, ("Block is a block whose attn_out is not known",)),
        (gpt1(), {"layers": ["final_norm"]}, ValueError, ("no place 'final_norm'", "transformer.ln_f or", "layers=[")),
        (Plain(), {"layers": [0]}, ValueError, ("no list of blocks at transformer.h", "path='transformer.h'", "at='")),
    ],
)
def test_a_place_that_cannot_be_read_is_said(model, given, error, words):
    with pytest.raises(error) as raised:
        LayerReader(model, **given)
    assert all(each in str(raised.value) for each in words)
    assert "\n" not in str(raised.value)


class Many(nn.Module):
    """Takes its input by name and gives what it is told to."""

    def __init__(self, give):
        super().__init__()
        self.give = give

    def forward(self, flag=None, hidden_states=None):
        return self.give(hidden_states)


@pytest.mark.parametrize(
    "give",
    [
        lambda x: x,
        lambda x: (x, "weights"),
        lambda x: [None, x],
        lambda x: {"loss": None, "x": x},
        lambda x: tf.modeling_outputs.BaseModelOutput(last_hidden_state=x),
    ],
)
def test_a_hook_reads_and_writes_the_first_tensor_of_whatever_a_module_takes_or_gives(give):
    module, x, seen = Many(give), torch.ones(2), []
    with Place("it", module, "out").hook(seen.append):
        module(hidden_states=x)
    with Place("it", module, "out").hook(lambda x: x + 1):
        out = module(hidden_states=x)
    with Place("it", module, "in").hook(lambda x: x + 1):
        again = module(flag=torch.zeros(1), hidden_states=x)
    assert seen[0] is x
    assert type(out) is type(again) is type(give(x))
    for found in (out, again):
        values = [found] if torch.is_tensor(found) else list(found.values()) if hasattr(found, "values") else found
        assert any(torch.is_tensor(value) and value.tolist() == [2, 2] for value in values)
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_place_without_a_tensor_is_said(side):
    module = Many(lambda _: {"loss": None})
    with Place("mine", module, side).hook(lambda _: None), pytest.raises(TypeError, match="mine is no tensor but dict"):
        module(flag=3)


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def block_by_block(model):
    for number, block in enumerate(model.transformer.h):
        model.transformer.h[number] = torch.compile(block, backend="eager")
    return model


@pytest.mark.parametrize("compiled", [whole, in_place, block_by_block])
@torch.no_grad()
def test_a_compiled_model_is_read_and_stays_compiled(compiled):
    torch.compiler.reset()
    small = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_positions=16, n_embd=4, n_layer=1, n_head=1)).eval()
    entries = [0, "mlp_out.0", -1]
    wanted, logits = LayerReader(small, entries)(IDS), small(input_ids=IDS).logits
    model = compiled(small)
    for _ in range(2):
        assert_close(model(input_ids=IDS).logits, logits)
        assert_close(LayerReader(model, entries)(IDS), wanted)


class Folded(nn.Module):
    """What TransformerLens sets: `cfg` on a HookedTransformer that it loaded, `_weights_processed` on a bridge."""

    def __init__(self, normalization_type="LN", processed=False, init_weights=False):
        super().__init__()
        self.cfg = tf.PretrainedConfig(normalization_type=normalization_type, init_weights=init_weights)
        self._weights_processed, self.compatibility_mode = processed, True
        self.blocks = nn.ModuleList([nn.Identity()])


@pytest.mark.parametrize("model", [Folded("LNPre"), Folded("RMSPre"), Folded(processed=True)])
def test_weights_that_transformer_lens_folded_are_refused(model):
    with pytest.raises(ValueError, match=r"^Folded holds weights that TransformerLens folded.*no_processing=True"):
        LayerReader(model, [0], path="blocks")


@pytest.mark.parametrize("model", [Folded(), Folded("LNPre", init_weights=True)])
def test_a_model_of_transformer_lens_with_weights_of_its_own_is_read(model):
    assert LayerReader(model, ["blocks.0"]).places[0].side == "out"


@pytest.fixture
def never_opened(monkeypatch):
    def opened(*_, **__):
        raise AssertionError("something was opened")

    for auto in (tf.AutoConfig, tf.AutoModelForCausalLM, tf.AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", opened)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/no/such/model", "there is no folder '/no/such/model', '/no' is missing"),
        ("./model", "there is no folder './model', 'model' is missing"),
        ("../no-models-here/model", "is missing; give a folder that is there, or a Hub name such as 'gpt2'"),
        ("runs\\model", "there is no folder"),
        ("no/such/model", "there is no folder 'no/such/model', 'no' is missing"),
        ("owner/model/", "there is no folder 'owner/model/'"),
        ("tests/no-model/inside", "'tests/no-model' is missing"),
        ("x" * 500, "there is no folder 'xxx"),
    ],
)
@pytest.mark.parametrize("open_it", [open_model, open_tokenizer, open_config])
@pytest.mark.usefixtures("never_opened")
def test_a_folder_that_is_missing_is_said_at_once(open_it, name, words, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(words)) as raised:
        open_it(name)
    assert len(str(raised.value)) < 600


@pytest.mark.usefixtures("never_opened")
def test_a_path_a_file_and_a_folder_without_a_model_are_said_at_once(tmp_path):
    (tmp_path / "model.safetensors").touch()
    for model, sentence in (
        (tmp_path / "gone", "there is no folder .*gone' is missing"),
        (tmp_path / "model.safetensors", "is a file, and a model is a folder or a Hub name"),
        (tmp_path, "holds no config.json, so it is no saved model; give the folder"),
    ):
        with pytest.raises(FileNotFoundError, match=sentence):
            harvest(model, ["a text"], layers=[0])


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-70m"])
def test_what_may_be_a_hub_name_is_looked_up(name, monkeypatch):
    monkeypatch.setattr(tf.AutoTokenizer, "from_pretrained", lambda model: model)
    assert open_tokenizer(name) == name


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"layers": [4, 0]}, ValueError, "saved has the layers 0 to 3, got 4"),
        ({"layers": [-2], "at": "mlp_in"}, ValueError, "saved has the layers 0 to 3, .*got -2"),
        ({"layers": ["mlp_out.4"]}, ValueError, "saved has the layers 0 to 3, got 4"),
        ({"layers": [0], "at": "mlp_in", "to": "mlp"}, ValueError, "at and to are one of block_out, .*got 'mlp'"),
        ({"layers": [-1, 0], "to": "mlp_out"}, ValueError, "layer -1 .* has no mlp_out"),
        ({"layers": 3}, TypeError, "layers=.3."),
        ({"layers": [2, 0, 2]}, ValueError, "read once, and 2 and 2 in layers are one place; leave one out"),
    ],
)
def test_wrong_layers_are_said_before_weights_are_loaded(given, error, words, tmp_path, monkeypatch):
    GPT2_MODEL.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(error, match=words):
        harvest(tmp_path / "saved", ["a text"], **given)


def test_a_config_says_what_its_language_model_has():
    config = make_model("gemma3_with_eyes").config
    assert check_layers_of(config, [3, "embed", -1]) == (3, "embed", -1)
    with pytest.raises(ValueError, match="Gemma3Config has the layers 0 to 3"):
        check_layers_of(config, [4])
    assert check_layers_of(None, [99]) == check_layers_of(config, [99], "model.experts.{}", None) == (99,)
    with pytest.raises(ValueError, match="reads at most 16 tokens"):
        check_context(make_model("gemma3_with_eyes"), 17)


def test_places_say_their_names():
    found = find_places(GPT2_MODEL, [0, -1, "embed", "mlp_out.3", "transformer.h.1.mlp.act:in"])
    assert [place.name for place in found] == [
        "block_out.0",
        "block_in.0",
        "embed",
        "mlp_out.3",
        "transformer.h.1.mlp.act:in",
    ]
