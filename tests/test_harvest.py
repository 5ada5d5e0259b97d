import re
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language import FAMILIES, make_model, make_tokenizer, words
from torch import nn
from torch.testing import assert_close

import fmxnn as fx
from fmxnn.activations.batches import activation_scale, bunches, rebatch
from fmxnn.activations.harvesting import harvest
from fmxnn.activations.layer_reader import LayerReader
from fmxnn.activations.places import residual_blocks
from fmxnn.activations.source import ModelSource
from fmxnn.activations.text import Contexts, contexts, separate_contexts
from fmxnn.core.seeds import seed_of

MODEL = make_model()
MODELS = {family: make_model(family) for family in FAMILIES}
TEXT = [words(137, i) for i in range(7)]


def stream(batch=32, seed=0, *, epochs=1, block=5, model=MODEL, text=TEXT):
    return harvest(
        model,
        text,
        layers=(0, 2),
        tokenizer=make_tokenizer(),
        context=9,
        batch=batch,
        block=block,
        seed=seed,
        epochs=epochs,
        dtype=torch.float64,
    )


def keys(batches):
    return [(int(c), int(p)) for _, context, position in batches for c, p in zip(context, position, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_reads_the_residual_stream_of_each_family(family):
    model = make_model(family)
    ids = torch.randint(3, 60, (3, 7))
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    last = []
    hook = residual_blocks(model)[3].register_forward_hook(
        lambda _m, _i, output: last.append(output if torch.is_tensor(output) else output[0])
    )
    model(input_ids=ids)
    hook.remove()
    read = LayerReader(model, (2, 0, 3))(ids)
    assert read.shape == (3, 7, 3, 16)
    assert_close(read[:, :, 0], hidden[3])
    assert_close(read[:, :, 1], hidden[1])
    assert_close(read[:, :, 2], last[0])  # hidden_states[-1] is after the final norm
    assert not read.requires_grad


class Tuple(nn.Module):
    def forward(self, x):
        return x + 1, "cache"


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Module()
        self.body.blocks = nn.ModuleList([Tuple() for _ in range(3)])

    def forward(self, input_ids, **_):
        x = input_ids.double().unsqueeze(-1)
        for block in self.body.blocks:
            x, _ = block(x)
        raise AssertionError("the forward went on after the last block that is read")


def test_blocks_may_give_tuples_stand_anywhere_and_stop_the_forward():
    toy = Toy()
    read = LayerReader(toy, (1, 2), path="body.blocks")(torch.tensor([[5, 6]]))
    assert read.squeeze(-1).tolist() == [[[7, 8], [8, 9]]]
    assert all(not block._forward_hooks for block in toy.body.blocks)


def test_later_blocks_cost_nothing():
    model = make_model()
    model.transformer.h[2].forward = None
    assert LayerReader(model, (0, 1))(torch.tensor([[5, 6]])).shape == (1, 2, 2, 16)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: LayerReader(MODEL, (1, 4, -2)),
            "GPT2LMHeadModel has the layers 0 to 3, got 4, -2; name layers among these",
        ),
        (lambda: LayerReader(MODEL, ()), "layers names at least one layer, got none; write layers=[0]"),
        (
            lambda: LayerReader(MODEL, (1, 1)),
            "each place is read once, and 1 and 1 in layers are one place; leave one out",
        ),
        (
            lambda: residual_blocks(MODEL, "model.h"),
            "GPT2LMHeadModel has no list of blocks at model.h; give its place, as in path='transformer.h', or read "
            "modules by their paths, as in at='encoder.layer.{}'",
        ),
        (
            lambda: residual_blocks(nn.Linear(2, 2)),
            "Linear has no list of blocks at transformer.h, gpt_neox.layers, model.layers, "
            "model.language_model.layers, h, layers, language_model.layers; give its place, as in "
            "path='transformer.h', or read modules by their paths, as in at='encoder.layer.{}'",
        ),
        (
            lambda: harvest(MODEL, TEXT, layers=(0,), context=9),
            "harvest needs the tokenizer of a model that is given as a module; pass tokenizer=...",
        ),
        (
            lambda: harvest(MODEL, TEXT, layers=(0,), tokenizer=make_tokenizer(), context=17),
            "GPT2LMHeadModel reads at most 16 tokens at once, got context=17; take context <= 16",
        ),
        (
            lambda: stream(batch=10_000),
            "the text gives 954 tokens, and one batch needs 10,000; give more text or a smaller batch",
        ),
        (
            lambda: stream(model=make_model().requires_grad_(False), text=contexts(TEXT, Foreign(), context=9)),
            "GPT2LMHeadModel knows the token ids 0 to 63, got 99; use the model's own tokenizer",
        ),
        (
            lambda: harvest(MODEL, TEXT, layers=(0,), tokenizer=make_tokenizer(), context=9, device="cuda"),
            "device 'cuda' was asked for and torch sees no GPU; use device='cpu'",
        ),
    ],
)
def test_what_cannot_be_harvested_is_said(make, sentence):
    if "GPU" in sentence and torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        make()


@pytest.mark.parametrize("name", ["batch", "block", "epochs"])
@pytest.mark.parametrize("value", [0, -2, 2.5, None])
def test_a_size_below_one_is_refused_before_a_model_is_loaded(name, value):
    with pytest.raises(ValueError, match=f"^a stream needs {name} >= 1, a whole number, got {name}={value}$"):
        harvest("no-such-model", TEXT, layers=(0,), **{name: value})


@pytest.mark.parametrize("context", [1, 0, -4])
def test_a_context_below_two_is_refused(context):
    with pytest.raises(
        ValueError, match=f"^a context holds a first token and at least one more, got context={context}$"
    ):
        harvest(MODEL, TEXT, layers=(0,), tokenizer=make_tokenizer(), context=context)


def test_a_text_in_place_of_a_path_says_that_a_string_is_a_path():
    with pytest.raises(
        FileNotFoundError,
        match="a string that stands alone is a path; give the path of a file, or texts as a list of strings",
    ):
        harvest(MODEL, "A long text. " * 400, layers=(0,), tokenizer=make_tokenizer(), context=9)


class Foreign:
    bos_token_id, eos_token_id, all_special_ids = None, 0, [0]

    def __call__(self, texts, **_):
        return {"input_ids": [[99] * 20 for _ in texts]}


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 200), st.integers(1, 3))
def test_no_token_comes_twice_in_an_epoch_and_none_is_lost_but_the_tail(seed, block, batch, epochs):
    made = stream(batch=batch, block=block, seed=seed, epochs=epochs)
    batches = list(made.with_tokens())
    assert len(made) == len(batches) == made.rows // batch * epochs
    per_epoch = made.rows // batch
    wanted = {(int(c), int(p)) for c, p in made.contexts.keep.nonzero()}
    for epoch in range(epochs):
        seen = keys(batches[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert len(seen) == len(set(seen)) == per_epoch * batch
        assert set(seen) <= wanted


def test_each_row_is_the_activation_of_its_token_whatever_is_read_at_once():
    made = stream(batch=64)
    direct = made.reader(made.contexts.ids.long())
    for x, context, position in made.with_tokens():
        assert_close(x, direct[context, position])


@given(st.integers(0, 99), st.integers(1, 7), st.integers(0, 40))
def test_starting_at_a_batch_equals_skipping_those_before(seed, block, first):
    made = stream(batch=48, block=block, seed=seed, epochs=2)
    rest = list(islice(made.with_tokens(), first, None))
    later = made.starting_at(first)
    again = list(later.with_tokens())
    assert len(later) == len(again) == len(rest)
    for mine, theirs in zip(again, rest, strict=True):
        assert keys([mine]) == keys([theirs])
        assert torch.equal(mine[0], theirs[0])


def test_starting_late_reads_a_few_blocks_only():
    made, read = stream(batch=32), []
    hook = MODEL.register_forward_pre_hook(lambda _m, _a, given: read.append(len(given["input_ids"])), with_kwargs=True)
    next(iter(made.starting_at(len(made) - 2)))
    hook.remove()
    assert 0 < sum(read) <= 3 * 5


LENGTHS = st.lists(st.integers(0, 15), min_size=1, max_size=20)


@given(LENGTHS, st.integers(1, 90), st.integers(0, 9))
def test_contexts_of_like_length_run_together_within_a_budget_of_tokens(lengths, tokens, seed):
    keep = torch.arange(16) < torch.tensor(lengths).unsqueeze(1)
    keep &= torch.rand(keep.shape, generator=torch.Generator().manual_seed(seed)) < 0.8
    last = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in keep]
    found = list(bunches(keep, tokens))
    seen = [row for rows, _ in found for row in rows.tolist()]
    assert len(seen) == len(set(seen))
    assert {row for row, length in enumerate(last) if length} <= set(seen)
    for rows, longest in found:
        assert len(rows) * longest <= max(tokens, longest)
        assert longest >= max(last[row] for row in rows.tolist())
    ran = sum(len(rows) * longest for rows, longest in found)
    assert ran <= 16 * len(lengths)
    if 8 * sum(last) < 7 * keep.numel():
        assert [longest for _, longest in found] == sorted((longest for _, longest in found), reverse=True)
        assert all(longest == max(last[row] for row in rows.tolist()) for rows, longest in found)
    else:
        assert seen == list(range(len(lengths)))


@pytest.mark.parametrize("family", FAMILIES)
@given(st.data())
def test_contexts_of_any_lengths_are_read_in_order_as_if_they_ran_alone(family, data):
    model = MODELS[family]
    lengths = data.draw(LENGTHS)
    ids = torch.randint(3, 60, (len(lengths), 16), generator=torch.Generator().manual_seed(len(lengths)))
    keep = torch.arange(16) < torch.tensor(lengths).unsqueeze(1)
    keep[:, 0] = False
    keep[:, 5] &= data.draw(st.booleans())  # a token in the middle may be left out
    readers = [LayerReader(model, (2, 0)), LayerReader(model, (1,), at="mlp_in")]
    source = ModelSource(readers, Contexts(ids.int(), keep), at_once=data.draw(st.integers(1, 5)))
    start = data.draw(st.integers(0, len(lengths) - 1))
    stop = data.draw(st.integers(start + 1, len(lengths)))
    near = {} if family.startswith("gpt") else {"rtol": 1e-5, "atol": 1e-6}  # the others norm and rotate in float32
    for side, reader in zip(source.read(start, stop), readers, strict=True):
        alone = [reader(ids[row : row + 1])[0][keep[row]] for row in range(start, stop)]
        assert_close(side, torch.cat(alone), **near)


def test_short_contexts_do_not_cost_what_a_long_one_does():
    made, cut = separate_contexts([words(14), *(words(2, i) for i in range(30))], make_tokenizer(), context=16)
    run = []
    hook = MODEL.register_forward_pre_hook(
        lambda _m, _a, given: run.append(given["input_ids"].numel()), with_kwargs=True
    )
    (x,) = ModelSource([LayerReader(MODEL, (0,))], made, at_once=4).read(0, 31)
    hook.remove()
    assert cut == 0
    assert len(x) == 14 + 30 * 2
    assert sum(run) < 2 * (15 + 30 * 3)
    assert all(tokens <= 4 * made.context for tokens in run)


def test_a_stream_says_what_it_gives():
    assert repr(stream(batch=32)) == "Activations(29 batches of 32 tokens from the layers 0, 2 of GPT2LMHeadModel)"


def test_the_order_follows_from_the_seed_and_the_epoch():
    per_epoch = len(stream(batch=32))
    one, same, other = (keys(stream(batch=32, seed=seed, epochs=2).with_tokens()) for seed in (3, 3, 4))
    assert one == same
    assert one != other
    assert one[: per_epoch * 32] != one[per_epoch * 32 :]
    assert one[: per_epoch * 32] != sorted(one[: per_epoch * 32])


def test_a_model_in_training_mode_is_put_into_eval():
    model = make_model().train()
    assert not stream(model=model).model.training


def test_a_folder_is_harvested_like_the_model_in_it(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    MODEL.save_pretrained(tmp_path)
    made = harvest(tmp_path, TEXT, layers=(0, 2), context=9, batch=32, block=5, dtype=torch.float64)
    assert made.d_model == 16
    assert made.layers == (0, 2)
    for mine, theirs in zip(made, stream(), strict=True):
        assert_close(mine, theirs)


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 6))
def test_rebatching_keeps_rows_and_their_order(lengths, batch):
    x = torch.randn(sum(lengths), 2, 3)
    made = list(rebatch(x.split(lengths) if lengths else [], batch))
    assert all(len(each) == batch for each in made)
    assert torch.equal(torch.cat([torch.empty(0, 2, 3), *made]), x[: len(x) // batch * batch])


def test_rebatching_names_the_batch_that_does_not_fit():
    sentence = (
        "batch 1 of the activations is (4, 2, 5), expected (tokens, layers=2, d_model=3); stack one activation "
        "per layer: torch.stack(hidden, dim=-2)"
    )
    with pytest.raises(fx.ShapeError, match=f"^{re.escape(sentence)}$"):
        list(rebatch([torch.zeros(4, 2, 3), torch.zeros(4, 2, 5)], 100))
    sentence = (
        "batch 0 of the activations is (4, 2), expected (tokens, layers, d_model); stack one activation per "
        "layer: torch.stack(hidden, dim=-2)"
    )
    with pytest.raises(fx.ShapeError, match=f"^{re.escape(sentence)}$"):
        list(rebatch([torch.zeros(4, 2)], 2))
    with pytest.raises(ValueError, match="^rebatch needs batch >= 1, a whole number, got batch=0$"):
        list(rebatch([torch.zeros(4, 2, 3)], 0))


def test_the_scale_brings_the_mean_norm_to_the_root_of_d_model():
    batches = [torch.randn(20, 3, 7, dtype=torch.float64) * 5, torch.randn(4, 3, 7, dtype=torch.float64)]
    scale = activation_scale(batches)
    assert_close((torch.cat(batches) * scale).norm(dim=-1).mean(), torch.tensor(7.0, dtype=torch.float64).sqrt())
    with pytest.raises(
        ValueError,
        match=re.escape(
            "activation_scale needs activations that are not all zero, got 3 of them with a summed norm of 0.0"
        ),
    ):
        activation_scale([torch.zeros(1, 3, 7)])


@given(st.lists(st.one_of(st.integers(), st.text()), min_size=1, max_size=4))
def test_a_seed_is_a_function_of_its_parts_in_63_bits(parts):
    assert seed_of(*parts) == seed_of(*parts)
    assert 0 <= seed_of(*parts) < 2**63
    assert seed_of(*parts) != seed_of(*parts, "more")
    assert seed_of(1, 23) != seed_of(12, 3)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_activations_that_are_not_finite_have_no_scale(bad):
    batches = [torch.ones(3, 2, 4), torch.ones(3, 2, 4)]
    batches[1][2, 0, 1] = bad
    with pytest.raises(
        ValueError,
        match=r"^activation_scale needs finite activations, got NaN or infinity in 1 of 6 of batch 1; harvest in ",
    ):
        activation_scale(batches)
