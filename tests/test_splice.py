import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from language import FAMILIES, VOCABULARY, make_model, make_tokenizer, words
from torch.testing import assert_close

import fmxnn as fx
from fmxnn.activations.layer_reader import LayerReader
from fmxnn.activations.places import residual_blocks
from fmxnn.activations.text import Contexts, contexts
from fmxnn.metrics.splice import spliced_loss

MODELS = {family: make_model(family) for family in FAMILIES}
MODEL, LAYERS, D_MODEL = MODELS["gpt2"], (0, 2, 3), 16
TEXT = contexts([words(29, i) for i in range(3)], make_tokenizer(), context=9)  # documents end inside contexts
ABLATIONS, FORMS = ("zero", "mean"), ("ce", "kl")


def random_crosscoder(seed=0, layers=3, d_model=D_MODEL):
    torch.manual_seed(seed)
    weights = [fx.TensorRingWeight(layers, d_model, 24, ranks=(2, 5, 3)) for _ in range(2)]
    crosscoder = fx.Crosscoder(
        fx.CrossLayerEncoder(weights[0], fx.TopK(3), mask=fx.LayerMask(0.5)), fx.CrossLayerDecoder(weights[1])
    )
    torch.nn.init.normal_(crosscoder.decoder.bias)
    return crosscoder.double()


def exact_crosscoder(scale=1.0, layers=3):
    """A latent for each side of each coordinate: relu(x) - relu(-x) = x."""
    size = layers * D_MODEL
    weights = [fx.DenseWeight(layers, D_MODEL, 2 * size) for _ in range(2)]
    with torch.no_grad():
        for weight, gain in zip(weights, (1.0, scale)):
            weight.factors[0].copy_(
                gain * torch.cat([torch.eye(size), -torch.eye(size)]).view(2 * size, layers, D_MODEL)
            )
    return fx.Crosscoder(fx.CrossLayerEncoder(weights[0], torch.nn.ReLU()), fx.CrossLayerDecoder(weights[1])).double()


def by_hand(model, ids, layer=None, where=None, new=None):
    """The logits with `new` put in where `where` after `layer`: block after block, then norm and head."""
    given, blocks = [], residual_blocks(model)
    hooks = [
        block.register_forward_pre_hook(lambda _m, args, more: given.append((args, more)), with_kwargs=True)
        for block in blocks
    ]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    hidden = given[0][0][0]
    for number, (block, (args, more)) in enumerate(zip(blocks, given)):
        hidden = block(hidden, *args[1:], **more)
        if number == layer:
            hidden = torch.where(where, new, hidden)
    inner = model.base_model
    norm = next(getattr(inner, name) for name in ("ln_f", "final_layer_norm", "norm") if hasattr(inner, name))
    logits = model.get_output_embeddings()(norm(hidden))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def reference_report(crosscoder, model, text, layers):
    """Clean cross-entropy, and both losses of each layer: spliced, zero, mean."""
    ids, keep = text.ids.long(), text.keep
    x = LayerReader(model, layers)(ids)
    x_hat = crosscoder.eval()(x)
    means = (
        torch.stack([torch.stack([x[c, t] for c, t in keep.nonzero().tolist()]).mean(0)] * len(ids))
        .unsqueeze(1)
        .expand_as(x)
    )
    clean = by_hand(model, ids)
    losses = torch.empty(2, 3, len(layers), dtype=torch.float64)
    for place, layer in enumerate(layers):
        for kind, new in enumerate((x_hat, torch.zeros_like(x), means)):
            logits = by_hand(model, ids, layer, keep.unsqueeze(-1), new[:, :, place])
            losses[0, kind, place], losses[1, kind, place] = reference.token_losses(clean, logits, ids, keep)
    return reference.token_losses(clean, clean, ids, keep)[0], losses


def tensors(report):
    return torch.stack(
        [torch.stack([*each]) for each in (report.spliced, report.ablated["zero"], report.ablated["mean"])], dim=1
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_equals_a_run_by_hand(family):
    model, crosscoder = MODELS[family], random_crosscoder()
    clean, losses = reference_report(crosscoder, model, TEXT, LAYERS)
    report = spliced_loss(crosscoder, model, TEXT, layers=LAYERS)
    assert_close(report.clean, clean)
    assert_close(tensors(report), losses)
    assert_close(report.ce, losses[0, 0])
    assert_close(report.kl, losses[1, 0])
    assert_close(report.score("zero"), (losses[0, 1] - losses[0, 0]) / (losses[0, 1] - clean))
    assert_close(report.score("mean", "kl"), 1 - losses[1, 0] / losses[1, 2])
    assert report.layers == LAYERS
    assert report.tokens == int((TEXT.keep[:, 1:] & TEXT.keep[:, :-1]).sum()) < TEXT.tokens


def test_the_models_own_loss_is_the_clean_one():
    text = Contexts(TEXT.ids[:1], torch.ones_like(TEXT.keep[:1]))
    report = spliced_loss(random_crosscoder(), MODEL, text, layers=LAYERS)
    assert_close(report.clean, MODEL(input_ids=text.ids.long(), labels=text.ids.long()).loss.item())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_reconstruction_scores_one_and_changes_nothing(family):
    report = spliced_loss(exact_crosscoder(), MODELS[family], TEXT, layers=LAYERS)
    for ablation in ABLATIONS:
        for form in FORMS:
            assert torch.equal(report.score(ablation, form), torch.ones(3).double())
    assert torch.equal(report.kl, torch.zeros(3).double())
    assert report.numbers() == {
        "ce_clean": report.clean, "ce": report.clean, "kl": 0.0,
        "ce_score_zero": 1.0, "ce_score_mean": 1.0, "kl_score_zero": 1.0, "kl_score_mean": 1.0,
    }  # fmt: skip


def test_a_reconstruction_of_zeros_or_means_scores_zero():
    zero = spliced_loss(exact_crosscoder(0.0), MODEL, TEXT, layers=LAYERS)
    assert torch.equal(zero.score("zero"), torch.zeros(3).double())
    assert torch.equal(zero.score("zero", "kl"), torch.zeros(3).double())
    mean = exact_crosscoder(0.0)
    with torch.no_grad():
        mean.decoder.bias.copy_(LayerReader(MODEL, LAYERS)(TEXT.ids.long())[TEXT.keep].mean(0))
    report = spliced_loss(mean, MODEL, TEXT, layers=LAYERS)
    assert_close(report.score("mean"), torch.zeros(3).double())
    assert_close(report.score("mean", "kl"), torch.zeros(3).double())


@given(st.integers(0, 10**6), st.integers(1, 12), st.permutations(range(3)), st.integers(0, 4))
def test_batches_order_of_layers_scale_of_codes_and_padding_do_not_matter(seed, batch, order, padding):
    crosscoder = random_crosscoder(seed)
    report = spliced_loss(crosscoder.train(), MODEL, TEXT, layers=LAYERS)
    assert crosscoder.training
    for weight in (crosscoder.encoder.weight, crosscoder.decoder.weight):
        weight.factors[-1].data = weight.factors[-1].data[:, order]
    crosscoder.decoder.bias.data = crosscoder.decoder.bias.data[order]
    crosscoder.encoder.weight.factors[0].data *= 1.7  # (z, D) -> (c z, D / c)
    crosscoder.decoder.weight.factors[0].data /= 1.7
    pad = torch.nn.functional.pad
    text = Contexts(pad(TEXT.ids, (0, padding)), pad(TEXT.keep, (0, padding)))
    other = spliced_loss(crosscoder, MODEL, text, layers=[LAYERS[place] for place in order], batch=batch)
    assert_close(tensors(other), tensors(report)[:, :, order])
    assert_close(other.clean, report.clean)
    assert other.tokens == report.tokens


def test_contexts_without_a_kept_token_change_nothing():
    empty = Contexts(torch.cat([TEXT.ids, TEXT.ids[:2]]), torch.cat([TEXT.keep, torch.zeros(2, 9, dtype=torch.bool)]))
    crosscoder = random_crosscoder()
    one, other = (spliced_loss(crosscoder, MODEL, text, layers=LAYERS, batch=1) for text in (TEXT, empty))
    assert_close(tensors(other), tensors(one))


def test_what_is_not_kept_is_not_replaced():
    keep = TEXT.keep.clone()
    keep[::2, 3:6] = False
    text = replace(TEXT, keep=keep)
    report = spliced_loss(random_crosscoder(), MODEL, text, layers=LAYERS)
    _, losses = reference_report(random_crosscoder(), MODEL, text, LAYERS)
    assert_close(tensors(report), losses)


def test_modes_and_hooks_are_given_back_whatever_happens():
    model, crosscoder = make_model().train(), random_crosscoder().train()
    spliced_loss(crosscoder, model, TEXT, layers=LAYERS)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) > 9:  # among the splices
            raise ArithmeticError("in the middle")

    hook = model.lm_head.register_forward_hook(fail)
    with pytest.raises(ArithmeticError, match="^in the middle$"):
        spliced_loss(crosscoder, model, TEXT, layers=LAYERS, batch=2)
    hook.remove()
    assert model.training
    assert crosscoder.training
    assert not any(block._forward_hooks or "forward" in vars(block) for block in residual_blocks(model))


class Half(torch.nn.Module):
    def forward(self, hidden):
        return hidden / 2 + 1, "cache"


class Toy(torch.nn.Module):
    """Two blocks that give tuples, at a place of their own."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, D_MODEL)
        self.stack = torch.nn.ModuleList([Half(), Half()])

    def forward(self, input_ids, **_):
        hidden = self.table(input_ids)
        for block in self.stack:
            hidden, _ = block(hidden)
        return SimpleNamespace(logits=hidden @ self.table.weight.T)


def test_blocks_may_give_tuples_and_stand_anywhere():
    model, ids = Toy().double(), TEXT.ids.long()
    report = spliced_loss(exact_crosscoder(0.0, layers=1), model, TEXT, layers=(0,), path="stack")
    hidden = torch.where(TEXT.keep.unsqueeze(-1), 0.0, model.table(ids) / 2 + 1) / 2 + 1
    entropy, divergence = reference.token_losses(model(ids).logits, hidden @ model.table.weight.T, ids, TEXT.keep)
    assert_close(report.ce.item(), entropy)
    assert_close(report.kl.item(), divergence)


class Gossip(Toy):
    """Its last block reads the first one's residual as well."""

    def forward(self, input_ids, **_):
        first, _ = self.stack[0](self.table(input_ids))
        second, _ = self.stack[1](first)
        return SimpleNamespace(logits=(second + first * torch.arange(D_MODEL)) @ self.table.weight.T)


def test_a_model_that_reads_more_than_the_residual_is_run_whole():
    model, ids = Gossip().double(), TEXT.ids.long()
    report = spliced_loss(exact_crosscoder(0.0, layers=1), model, TEXT, layers=(1,), path="stack")
    first = model.table(ids) / 2 + 1
    second = torch.where(TEXT.keep.unsqueeze(-1), 0.0, first / 2 + 1)
    logits = (second + first * torch.arange(D_MODEL)) @ model.table.weight.T
    entropy, divergence = reference.token_losses(model(ids).logits, logits, ids, TEXT.keep)
    assert_close(report.ce.item(), entropy)
    assert_close(report.kl.item(), divergence)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_before_the_replaced_layer_do_no_work(family):
    model, worked = make_model(family), []
    blocks = residual_blocks(model)
    for number, block in enumerate(blocks):
        inner = next(
            part for part in block.modules() if isinstance(part, torch.nn.LayerNorm) or "Norm" in type(part).__name__
        )
        inner.register_forward_hook(lambda *_, number=number: worked.append(number))
    spliced_loss(
        random_crosscoder(layers=2), model, replace(TEXT, ids=TEXT.ids[:3], keep=TEXT.keep[:3]), layers=(1, 2), batch=1
    )
    # of three contexts: sizes, the means, clean; after each replaced layer three, and on the first one more to see
    # that it may
    assert [worked.count(number) for number in range(4)] == [7, 7, 7 + 3 * 3 + 1, 3 + 2 * (3 * 3 + 1)]


def test_a_forward_of_somebody_elses_is_put_back():
    model = make_model()
    blocks, crosscoder = residual_blocks(model), random_crosscoder()
    expected = spliced_loss(crosscoder, model, TEXT, layers=LAYERS)
    own = blocks[1].forward
    blocks[1].forward = wrapped = lambda *args, **more: own(*args, **more)
    assert_close(tensors(spliced_loss(crosscoder, model, TEXT, layers=LAYERS)), tensors(expected))
    assert vars(blocks[1])["forward"] is wrapped


def test_a_model_in_bfloat16_is_measured_in_float32():
    model = make_model().bfloat16()
    report = spliced_loss(random_crosscoder().float(), model, TEXT, layers=LAYERS)
    expected = spliced_loss(random_crosscoder(), MODEL, TEXT, layers=LAYERS)
    assert report.ce.dtype == torch.float64
    assert_close(report.clean, expected.clean, rtol=0, atol=0.02)  # the logits have 8 bits


OTHER = Contexts(torch.full((2, 9), 99, dtype=torch.int32), torch.ones(2, 9, dtype=torch.bool))
LONG = Contexts(torch.ones(1, 17, dtype=torch.int32), torch.ones(1, 17, dtype=torch.bool))
EMPTY = Contexts(torch.ones(0, 9, dtype=torch.int32), torch.ones(0, 9, dtype=torch.bool))
LONELY = Contexts(TEXT.ids[:2], torch.eye(2, 9).bool())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layers": (0, 2, 4)}, "GPT2LMHeadModel has the layers 0 to 3, got 4; name layers among these"),
        (
            {"layers": (-1, 1, "mlp_out.2")},
            "spliced_loss replaces what blocks give, so layers are their numbers from 0, got -1, mlp_out.2; "
            "name blocks",
        ),
        ({"text": OTHER}, "GPT2LMHeadModel knows the token ids 0 to 63, got 99; use the model's own tokenizer"),
        ({"text": LONG}, "GPT2LMHeadModel reads at most 16 tokens at once, got context=17; take context <= 16"),
        (
            {"text": EMPTY},
            "spliced_loss needs two kept tokens in a row to count a prediction, and 0 contexts with 0 kept tokens "
            "hold none; give more text",
        ),
        (
            {"text": LONELY},
            "spliced_loss needs two kept tokens in a row to count a prediction, and 2 contexts with 2 kept tokens "
            "hold none; give more text",
        ),
        ({"text": "a text"}, "spliced_loss reads Contexts, got str; make them: contexts(text, tokenizer, context=128)"),
        ({"batch": 0}, "spliced_loss needs batch >= 1, the contexts that run at once, got batch=0"),
    ],
)
def test_what_cannot_be_spliced_is_said(change, sentence):
    asked = {"crosscoder": random_crosscoder(), "text": TEXT, "layers": LAYERS, "batch": 8} | change
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(sentence)}$"):
        spliced_loss(asked["crosscoder"], MODEL, asked["text"], layers=asked["layers"], batch=asked["batch"])


def test_an_unknown_score_is_said():
    report = spliced_loss(random_crosscoder(), MODEL, TEXT, layers=LAYERS)
    with pytest.raises(ValueError, match="^SpliceReport knows ablation zero, mean, got 'noise'$"):
        report.score("noise")
    with pytest.raises(ValueError, match="^SpliceReport knows form ce, kl, got 'js'$"):
        report.score("zero", "js")
