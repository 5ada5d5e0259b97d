"""Edits of a running model against runs by hand, which read and write by hooks of their own and keep no cache."""

import copy
import re
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language import FAMILIES, VOCABULARY, make_model
from torch.testing import assert_close
from transformers import DynamicCache

import fmxnn as fx
from fmxnn.activations import adding, attach
from fmxnn.activations.editing.writing import added
from fmxnn.activations.places import find_places, residual_blocks
from fmxnn.activations.text import Contexts
from fmxnn.coders.atoms import raw_atoms
from fmxnn.metrics.splice import spliced_loss

MODELS = {family: make_model(family) for family in FAMILIES}
for made in MODELS.values():
    made.generation_config.eos_token_id = None  # so that every text grows to the same length
MODEL, LAYERS, D_MODEL, LATENTS = MODELS["gpt2"], (0, 2, 3), 16, 24
IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
ONES = torch.ones_like(IDS)


def random_crosscoder(seed=0, layers=3, gate=None):
    torch.manual_seed(seed)
    weights = [fx.TensorRingWeight(layers, D_MODEL, LATENTS, ranks=(2, 5, 3)) for _ in range(2)]
    crosscoder = fx.Crosscoder(
        fx.CrossLayerEncoder(weights[0], gate or fx.TopK(5), mask=fx.LayerMask(0.5)), fx.CrossLayerDecoder(weights[1])
    )
    torch.nn.init.normal_(crosscoder.decoder.bias)
    return crosscoder.double()


def edited_codes(z, latents, change):
    z = z.clone()
    z[..., latents] = change(z[..., latents])
    return z


PATCH = torch.rand(2, 5, LATENTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def patched(z):
    z = z.clone()
    known = min(z.shape[1], 5)
    z[:, :known, [3, 8]] = PATCH[:, :known][..., [3, 8]]
    return z


EDITS = {
    "ablate": (lambda run: run.ablate(list(range(12))), lambda z: edited_codes(z, range(12), torch.zeros_like)),
    "scale": (lambda run: run.scale(range(24), 2.0), lambda z: 2 * z),
    "set": (
        lambda run: run.set([4, 5], [1.5, -0.5]),
        lambda z: edited_codes(z, [4, 5], lambda _: z.new_tensor([1.5, -0.5])),
    ),
    "clamp": (lambda run: run.clamp(range(24), low=0.1, high=0.2), lambda z: z.clamp(0.1, 0.2)),
    "patch": (lambda run: run.patch(PATCH, latents=[3, 8]), patched),
    "steer": (
        lambda run: run.steer([5, 7], [4.0, -2.0]),
        lambda z: edited_codes(z, [5, 7], lambda c: c + z.new_tensor([4.0, -2.0])),
    ),
}


def both(run):
    run.scale(range(24), 2.0)
    run.set(3, 1.0)
    run.steer(5, 3.0)
    run.clamp(3, high=0.5)
    run.steer(5, 1.0)


def both_by_hand(z):
    z = edited_codes(2 * z, [3], lambda c: torch.full_like(c, 0.5))
    return edited_codes(z, [5], lambda c: c + 4.0)


EDITS["several"] = (both, both_by_hand)


def shares(delta, way, layers):
    """`... layers d_model`: what is written at each layer."""
    if way in ("each", "telescoped"):
        before = {layer: sorted(layers)[: sorted(layers).index(layer)] for layer in layers}
        last = [layers.index(earlier[-1]) if (earlier := before[layer]) else None for layer in layers]
        return [delta[..., n, :] - (0 if way == "each" or p is None else delta[..., p, :]) for n, p in enumerate(last)]
    return [delta[..., n, :] if layer == way else None for n, layer in enumerate(layers)]


def kept_tokens(ids, mask):
    """All but padding, the first token of each context, and BOS and EOS (0)."""
    return mask.bool() & (mask.cumsum(1) != 1) & (ids != 0)


@torch.no_grad()
def by_hand(model, crosscoder, ids, mask, change, *, layers=LAYERS, at="block_out", way="telescoped", where=None):
    """The logits, from one forward that reads and one that writes."""
    more = {"attention_mask": mask, "use_cache": False, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    places, read = find_places(model, layers, at=at), {}
    with ExitStack() as hooks:
        for place in places:
            hooks.enter_context(place.hook(lambda x, place=place: read.__setitem__(place.name, x)))
        model(input_ids=ids, **more)
    x = torch.stack([read[place.name] for place in places], dim=-2)
    z = crosscoder.eval().encode(x)
    where = kept_tokens(ids, mask) if where is None else where
    delta = (crosscoder.decode(change(z)) - crosscoder.decode(z)) * where[..., None, None]
    with ExitStack() as hooks:
        for place, share in zip(places, shares(delta, way, layers)):
            hooks.enter_context(place.hook(lambda x, share=share: None if share is None else x + share))
        return model(input_ids=ids, **more).logits


def logits_with(make, model=MODEL, *, crosscoder=None, layers=LAYERS, **named):
    """Of a model in which `make` has made its edits."""
    with torch.no_grad(), attach(crosscoder or random_crosscoder(), model, layers, **named) as run:
        make(run)
        return model(IDS).logits


def options(way):
    return {"only": way} if isinstance(way, int) else {"way": way}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_equals_a_run_by_hand(family, edit):
    model, crosscoder, (make, change) = MODELS[family], random_crosscoder().train(), EDITS[edit]
    for way in ("telescoped", "each", 2):
        with torch.no_grad(), attach(crosscoder, model, LAYERS, **options(way)) as run:
            make(run)
            found = model(IDS).logits
        assert_close(found, by_hand(model, crosscoder, IDS, ONES, change, way=way))
        assert (found - model(IDS).logits).abs().max() > 1e-4
        crosscoder.train()
    assert crosscoder.training


@given(
    st.permutations([0, 1, 2, 3]).flatmap(lambda order: st.integers(1, 4).map(lambda n: tuple(order[:n]))),
    st.sampled_from(["telescoped", "each", "only"]),
    st.sampled_from(["block_in", "block_out"]),
)
def test_what_stands_at_a_layer_from_the_edits_alone(layers, way, at):
    blocks = torch.nn.ModuleList([torch.nn.Identity() for _ in range(4)])
    model, crosscoder = Toy(blocks).double().eval(), random_crosscoder(layers=len(layers))
    places, clean, found = find_places(model, layers, at=at, path="stack"), [], []
    for seen, opened in ((clean, False), (found, True)):
        with ExitStack() as stack:
            if opened:
                chosen = {"only": layers[0]} if way == "only" else {"way": way}
                run = stack.enter_context(attach(crosscoder, model, layers, at=at, path="stack", **chosen))
                run.scale(range(24), 3.0)
            for place in places:
                stack.enter_context(place.hook(lambda x, seen=seen: seen.append(x)))
            model(IDS)
    clean, found = clean[-len(layers) :], found[-len(layers) :]  # the second pass
    order = sorted(layers)
    x = torch.stack([clean[order.index(layer)] for layer in layers], dim=-2)
    z = crosscoder.eval().encode(x)
    delta = crosscoder.decode(3 * z) - crosscoder.decode(z)
    delta[:, 0] = 0  # the first token
    for number, layer in enumerate(order):
        each = {each: delta[..., layers.index(each), :] for each in order[: number + 1]}
        expected = {
            "telescoped": each[layer],
            "each": sum(each.values()),
            "only": delta[..., 0, :] if layer >= layers[0] else torch.zeros_like(each[layer]),
        }[way]
        assert_close(found[number] - clean[number], expected)


class Toy(torch.nn.Module):
    """A residual stream through blocks at a place of their own."""

    def __init__(self, stack):
        super().__init__()
        torch.manual_seed(3)
        self.table = torch.nn.Embedding(VOCABULARY, D_MODEL)
        self.stack = stack

    def forward(self, ids):
        hidden = self.table(ids)
        for block in self.stack:
            hidden = block(hidden)
        return SimpleNamespace(logits=hidden @ self.table.weight.T)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_nothing_changes_logits_are_bit_equal(family):
    model = make_model(family).float()
    crosscoder = random_crosscoder().float()
    with torch.no_grad():
        clean = model(IDS).logits
        silent = [latent for latent in range(LATENTS) if not fired(model, crosscoder)[..., latent].any()]
        for make in (
            lambda run: None,
            lambda run: run.steer([3, 4], 0.0),
            lambda run: run.scale(range(24), 1.0),
            lambda run: run.ablate(silent),
            lambda run: run.add(torch.zeros(3, D_MODEL)),
        ):
            with attach(crosscoder, model, LAYERS) as run:
                make(run)
                assert torch.equal(model(IDS).logits, clean)
        for options in ({}, {"only": 2}):
            with attach(crosscoder, model, LAYERS, reconstruct=True, **options):
                assert_close(model(IDS).logits, clean, rtol=0, atol=1e-5)
    assert silent


@torch.no_grad()
def fired(model, crosscoder, ids=IDS, layers=LAYERS):
    return crosscoder.eval().encode(clean_activations(model, ids, layers))


@torch.no_grad()
def clean_activations(model, ids, layers=LAYERS, at="block_out", path=None):
    read, places = [], find_places(model, layers, at=at, path=path)
    with ExitStack() as hooks:
        for place in places:
            hooks.enter_context(place.hook(lambda x: read.append(x)))
        model(ids)
    return torch.stack(read, dim=-2)


@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("only", [None, 2])
def test_a_reconstruction_takes_the_place_of_what_stands_there(keep_error, only):
    crosscoder = random_crosscoder().eval()
    x = clean_activations(MODEL, IDS)
    z = crosscoder.encode(x)
    new = edited_codes(z, range(12), torch.zeros_like)
    expected = crosscoder.decode(new) + (x - crosscoder.decode(z) if keep_error else 0)
    where = kept_tokens(IDS, ONES).unsqueeze(-1)
    with torch.no_grad(), ExitStack() as hooks:
        for number, place in enumerate(find_places(MODEL, LAYERS)):
            if only in (None, LAYERS[number]):
                hooks.enter_context(
                    place.hook(lambda h, number=number: torch.where(where, expected[..., number, :], h))
                )
        logits = MODEL(IDS).logits
    with torch.no_grad(), attach(crosscoder, MODEL, LAYERS, only=only, reconstruct=True, keep_error=keep_error) as run:
        run.ablate(list(range(12)))
        assert_close(MODEL(IDS).logits, logits)


@torch.no_grad()
def grown(model, crosscoder, ids, mask, change, steps, **options):
    """Greedy decoding where every step computes everything again."""
    for _ in range(steps):
        logits = by_hand(model, crosscoder, ids, mask, change, **options)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask[:, -1:]], dim=1)
    return ids, logits


PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
MASKS = {family: PADDED for family in FAMILIES} | {"gemma2": ONES}  # in float64 its eager attention gives nan there


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edit", ["several", "patch", "steer"])
def test_generation_with_a_cache_equals_a_loop_without(family, edit):
    model, crosscoder, (make, change) = MODELS[family], random_crosscoder(), EDITS[edit]
    for more in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        mask = MASKS[family]
        expected, logits = grown(model, crosscoder, IDS, mask, change, 5)
        with attach(crosscoder, model, LAYERS) as run:
            make(run)
            found = model.generate(
                IDS, attention_mask=mask, max_new_tokens=5, do_sample=False, output_logits=True,
                return_dict_in_generate=True, **more,
            )  # fmt: skip
        assert torch.equal(found.sequences, expected)
        assert_close(found.logits[-1], logits[:, -1].to(found.logits[-1].dtype))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize(
    "more", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"do_sample": True}, {"prefill_chunk_size": 3}], ids=str
)
def test_the_clean_cache_follows_beams_cuts_and_chunks(family, more):
    model, crosscoder = MODELS[family], random_crosscoder()
    one = "prompt_lookup_num_tokens" in more
    ids, mask = (IDS[1:], PADDED[1:]) if one else (IDS, MASKS[family])
    plain = {} if one else {"use_cache": False, **more, "prefill_chunk_size": None}
    texts = []
    with attach(crosscoder, model, LAYERS) as run:
        EDITS["several"][0](run)
        for options in (more, plain):
            torch.manual_seed(0)
            texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, **{"do_sample": False} | options))
    assert torch.equal(*texts)


def test_a_loop_of_ones_own_may_keep_copy_and_cut_its_cache():
    crosscoder, (make, change) = random_crosscoder(), EDITS["several"]
    whole = by_hand(MODEL, crosscoder, IDS, ONES, change)
    with torch.no_grad(), attach(crosscoder, MODEL, LAYERS) as run:
        make(run)
        first = MODEL(IDS[:, :3])
        branch = copy.deepcopy(first.past_key_values)
        for cache in (first.past_key_values, branch):
            for step in range(3, 7):
                assert_close(MODEL(IDS[:, step : step + 1], past_key_values=cache).logits[:, 0], whole[:, step])
        branch.crop(-2)
        assert_close(MODEL(IDS[:, 5:], past_key_values=branch).logits, whole[:, 5:])
        cache = MODEL(IDS[:, :3]).past_key_values
        cache.reorder_cache(torch.tensor([1, 0]))
        assert_close(MODEL(IDS.flip(0)[:, 3:5], past_key_values=cache).logits, whole.flip(0)[:, 3:5])
        cache.batch_select_indices(torch.tensor([1]))
        assert_close(MODEL(IDS[:1, 5:], past_key_values=cache).logits, whole[:1, 5:])


def test_edits_may_be_taken_back_and_made_again_between_tokens():
    crosscoder, (make, change) = random_crosscoder(), EDITS["several"]
    where = kept_tokens(IDS, ONES) & (torch.arange(7) != 3)
    expected = by_hand(MODEL, crosscoder, IDS, ONES, change, where=where)
    with torch.no_grad(), attach(crosscoder, MODEL, LAYERS) as run:
        make(run)
        cache = MODEL(IDS[:, :3]).past_key_values
        run.clear()
        assert_close(MODEL(IDS[:, 3:4], past_key_values=cache).logits, expected[:, 3:4])
        make(run)
        assert_close(MODEL(IDS[:, 4:], past_key_values=cache).logits, expected[:, 4:])


def test_a_sum_is_rounded_once():
    x, delta = torch.randn(1, 50, 20).bfloat16(), torch.randn(50, 20)
    found = added(x, torch.ones(1, 50, dtype=torch.bool), delta)
    assert torch.equal(found, (x.double() + delta).bfloat16())


def test_a_cache_of_the_clean_model_may_be_gone_on_with():
    crosscoder, (make, change) = random_crosscoder(), EDITS["several"]
    where = kept_tokens(IDS, ONES) & (torch.arange(7) >= 4)
    with torch.no_grad():
        cache = MODEL(IDS[:, :4]).past_key_values
        with attach(crosscoder, MODEL, LAYERS) as run:
            make(run)
            found = MODEL(IDS[:, 4:], past_key_values=cache).logits
        assert_close(found, by_hand(MODEL, crosscoder, IDS, ONES, change, where=where)[:, 4:])


def test_a_cache_of_an_edited_model_is_no_clean_one():
    sentence = "codes need the clean model's cache.*was filled by an edited model.*start with a new cache"
    with torch.no_grad():
        for given in (None, DynamicCache()):
            with attach(random_crosscoder(), MODEL, LAYERS) as run:
                run.steer(3, 1.0)
                cache = MODEL(IDS, past_key_values=given).past_key_values
                run.ablate(3)
                with pytest.raises(ValueError, match=sentence):
                    MODEL(IDS[:, :1], past_key_values=cache)
        with attach(random_crosscoder(), MODEL, LAYERS) as run:
            run.ablate(3)
            cache = MODEL(IDS).past_key_values
        assert type(cache) is DynamicCache
        with attach(random_crosscoder(), MODEL, LAYERS) as run:
            run.ablate(3)
            with pytest.raises(ValueError, match=sentence):
                MODEL(IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_alone_runs_the_model_once(family):
    model, calls = make_model(family), []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), attach(random_crosscoder(), model, LAYERS) as run:
        run.steer(3, 1.0)
        model(IDS)
        assert len(calls) == 1
        run.ablate(3)
        model(IDS, use_cache=False)
        assert len(calls) == 2  # the clean pass ends at the last layer that is read


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_read_nor_written(side):
    crosscoder, make = random_crosscoder(gate=fx.BatchTopK(5)), EDITS["several"][0]
    mask = PADDED if side == "left" else PADDED.flip(1)
    real = mask[0].bool()
    with torch.no_grad(), attach(crosscoder, MODEL, LAYERS) as run:
        make(run)
        alone = MODEL(IDS[:1, real]).logits
        together = MODEL(IDS, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        assert_close(together.logits[:1, real], alone)
        other = torch.where(mask.bool(), IDS, 5)
        again = MODEL(other, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        assert torch.equal(again.logits[mask.bool()], together.logits[mask.bool()])


@pytest.mark.parametrize(
    ("tokens", "where"),
    [
        (slice(4, None), torch.arange(7) >= 4),
        (slice(2, 5), (torch.arange(7) >= 2) & (torch.arange(7) < 5)),
        (torch.tensor([[True, False, True, False, True]]), torch.tensor([1, 0, 1, 0, 1, 0, 0]).bool()),
        (IDS % 2 == 0, IDS % 2 == 0),
    ],
    ids=["from", "range", "one mask", "masks"],
)
def test_which_tokens_are_edited_is_ones_choice(tokens, where):
    crosscoder, (make, change) = random_crosscoder(), EDITS["several"]
    expected = by_hand(MODEL, crosscoder, IDS, ONES, change, where=where.expand(2, 7))
    with torch.no_grad(), attach(crosscoder, MODEL, LAYERS, tokens=tokens) as run:
        make(run)
        assert_close(MODEL(IDS).logits, expected)
        cache = MODEL(IDS[:, :3]).past_key_values
        assert_close(MODEL(IDS[:, 3:], past_key_values=cache).logits, expected[:, 3:])


def test_bos_eos_and_first_tokens_stay_as_they_are():
    ids = IDS.clone()
    ids[0, 3] = 0
    crosscoder, (make, change) = random_crosscoder(), EDITS["several"]
    expected = by_hand(MODEL, crosscoder, ids, ONES, change)
    with torch.no_grad(), attach(crosscoder, MODEL, LAYERS) as run:
        make(run)
        assert_close(MODEL(ids).logits, expected)


def test_steering_is_in_raw_units_whatever_the_normaliser():
    torch.manual_seed(0)
    normalisation = fx.Normalisation.of(torch.tensor([0.1, 3.0, 20.0]).double(), torch.randn(3, D_MODEL).double())
    normalised = fx.Normalised(random_crosscoder(), normalisation)
    skipping = fx.SkipCrosscoder(normalised).double()
    torch.nn.init.normal_(skipping.skip)
    logits = []
    for crosscoder in (normalised, fx.fold(normalised), skipping):
        for make in (lambda run: run.steer([5, 5, 7], [1.0, 3.0, 2.0]), EDITS["several"][0]):
            with torch.no_grad(), attach(crosscoder, MODEL, LAYERS) as run:
                make(run)
                logits.append(MODEL(IDS).logits)
    assert_close(logits[0::2], [logits[0]] * 3)
    assert_close(logits[1::2], [logits[1]] * 3)
    ones = torch.eye(LATENTS).double()
    assert_close(raw_atoms(skipping, range(LATENTS)), normalised.decode(ones) - normalised.decode(0 * ones))
    with (
        torch.no_grad(),
        adding(MODEL, 4 * raw_atoms(normalised, [5])[0] + 2 * raw_atoms(normalised, [7])[0], layers=LAYERS),
    ):
        each = MODEL(IDS).logits
    with torch.no_grad(), attach(normalised, MODEL, LAYERS, way="each") as run:
        run.steer([5, 7], [4.0, 2.0])
        assert_close(MODEL(IDS).logits, each)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["transcoder", "skip", "normalised skip"])
def test_a_cross_layer_transcoder_takes_the_place_of_the_mlps(family, kind):
    model, crosscoder = MODELS[family], random_crosscoder()
    if kind != "transcoder":
        crosscoder = fx.SkipCrosscoder(crosscoder).double()
        torch.nn.init.normal_(crosscoder.skip)
    if kind == "normalised skip":
        scales = [fx.Normalisation.of(torch.rand(3).double() + 0.5, torch.randn(3, D_MODEL).double()) for _ in range(2)]
        crosscoder = fx.Normalised(crosscoder, scales[0], output=scales[1])
    crosscoder.eval()
    x, y = (clean_activations(model, IDS, at=at) for at in ("mlp_in", "mlp_out"))
    z = crosscoder.encode(x)
    delta = crosscoder.decode(edited_codes(z, range(12), torch.zeros_like)) - crosscoder.decode(z)
    where, places = kept_tokens(IDS, ONES).unsqueeze(-1), find_places(model, LAYERS, at="mlp_out")
    for options, new in (
        ({}, lambda h, number: h + delta[..., number, :]),
        ({"reconstruct": True}, lambda _, number: (y + delta)[..., number, :]),
        ({"reconstruct": True, "keep_error": False}, lambda _, number: (crosscoder(x) + delta)[..., number, :]),
    ):
        with torch.no_grad(), ExitStack() as hooks:
            for number, place in enumerate(places):
                hooks.enter_context(place.hook(lambda h, n=number, new=new: torch.where(where, new(h, n), h)))
            expected = model(IDS).logits
        with torch.no_grad(), attach(crosscoder, model, LAYERS, at="mlp_in", to="mlp_out", **options) as run:
            run.ablate(list(range(12)))
            assert_close(model(IDS).logits, expected)


@pytest.mark.parametrize("at", ["attn_out", "mlp_out", "block_in"])
def test_other_places_are_written_as_by_hand(at):
    crosscoder, (make, change) = random_crosscoder(), EDITS["several"]
    way = "telescoped" if at == "block_in" else "each"
    expected = by_hand(MODEL, crosscoder, IDS, ONES, change, at=at, way=way)
    with torch.no_grad(), attach(crosscoder, MODEL, LAYERS, at=at) as run:
        make(run)
        assert_close(MODEL(IDS).logits, expected)


def test_gradients_flow_through_the_second_pass_alone():
    model, crosscoder = make_model(), random_crosscoder()
    for parameter in (*model.parameters(), *crosscoder.parameters()):
        parameter.requires_grad_(False)
    strengths = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    with attach(crosscoder, model, LAYERS) as run:
        run.scale(range(24), 2.0)
        run.steer([5, 7], strengths)
        found = torch.autograd.grad(model(IDS).logits[..., :5].sum(), strengths)[0]
        again = torch.autograd.grad(model(IDS).logits[..., :5].sum(), strengths)[0]
    assert_close(found, again)
    for number in range(2):
        step = 1e-5 * torch.eye(2, dtype=torch.float64)[number]
        sides = []
        for moved in (strengths.detach() + step, strengths.detach() - step):
            with torch.no_grad(), attach(crosscoder, model, LAYERS) as run:
                run.scale(range(24), 2.0)
                run.steer([5, 7], moved)
                sides.append(model(IDS).logits[..., :5].sum())
        assert_close(found[number], (sides[0] - sides[1]) / 2e-5, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_model_and_crosscoder_may_have_different_dtypes(dtypes):
    model, crosscoder = make_model().to(dtypes[0]), random_crosscoder().to(dtypes[1])
    exact = random_crosscoder().to(dtypes[1]).double()
    with torch.no_grad():
        for make in (EDITS["steer"][0], EDITS["ablate"][0]):
            with attach(crosscoder, model, LAYERS) as run:
                make(run)
                found = model(IDS).logits
            with attach(exact, make_model().to(dtypes[0]).double(), LAYERS) as run:
                make(run)
                expected = run.model(IDS).logits
            assert found.dtype == dtypes[0]
            assert_close(found.double(), expected, rtol=0, atol=0.03)  # 8 bits


@given(st.integers(0, 2), st.integers(1, 7))
def test_a_delta_of_ones_own_goes_to_its_columns(contexts, columns):
    delta = torch.randn(max(contexts, 1), columns, 3, D_MODEL, dtype=torch.float64)
    where = kept_tokens(IDS, ONES)[..., None, None]
    full = torch.zeros(2, 7, 3, D_MODEL, dtype=torch.float64)
    full[:, :columns] = delta
    with torch.no_grad():
        with ExitStack() as hooks:
            for number, place in enumerate(find_places(MODEL, LAYERS)):
                hooks.enter_context(place.hook(lambda x, number=number: x + (full * where)[..., number, :]))
            expected = MODEL(IDS).logits
        with adding(MODEL, delta, layers=LAYERS):
            assert_close(MODEL(IDS).logits, expected)
            cache = MODEL(IDS[:, :4]).past_key_values
            assert_close(MODEL(IDS[:, 4:], past_key_values=cache).logits, expected[:, 4:])
        with attach(random_crosscoder(), MODEL, LAYERS, way="each") as run:
            run.add(delta)
            assert_close(MODEL(IDS).logits, expected)


def test_a_model_may_be_called_in_any_way():
    crosscoder, (make, change) = random_crosscoder(), EDITS["several"]
    expected = by_hand(MODEL, crosscoder, IDS, ONES, change)
    embedded = MODEL.get_input_embeddings()(IDS)
    with torch.no_grad(), attach(crosscoder, MODEL, LAYERS) as run:
        make(run)
        for args, named in (
            ((IDS,), {}),
            ((), {"inputs_embeds": embedded}),
            ((IDS, None, ONES), {"use_cache": True, "output_hidden_states": True}),
            ((), {"input_ids": IDS, "labels": IDS}),
        ):
            assert_close(MODEL(*args, **named).logits, expected)
        assert_close(MODEL(IDS, return_dict=False)[0], expected)
        assert_close(MODEL(IDS, logits_to_keep=2).logits, expected[:, -2:])
        run.clear()
        assert torch.equal(MODEL(IDS).logits, MODEL(IDS).logits)


class Wrapped(torch.nn.Module):
    """As an adapter wraps a model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, *args, **named):
        return self.model(*args, **named)


def test_a_wrapped_model_may_take_anything():
    crosscoder, (make, change), model = random_crosscoder(), EDITS["several"], Wrapped(MODEL).eval()
    expected = by_hand(MODEL, crosscoder, IDS, ONES, change)
    with torch.no_grad(), attach(crosscoder, model, LAYERS, path="model.transformer.h") as run:
        make(run)
        assert_close(model(IDS).logits, expected)
        assert_close(model(input_ids=IDS, attention_mask=ONES).logits, expected)


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
        for hook in getattr(module, kind)
    ]


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_no_hook_is_left_behind(error):
    model, calls = make_model(), []
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}

    def fail(*_):
        calls.append(1)
        if len(calls) > stops[0]:
            raise error("in the middle")

    def generate(run):
        EDITS["ablate"][0](run)
        model.generate(IDS, attention_mask=ONES, max_new_tokens=9)

    stops = list(range(12))  # in clean passes and in others, at the prompt and later
    while len(stops) > 1:
        calls.clear()
        hook = residual_blocks(model)[1].register_forward_hook(fail)
        with pytest.raises(error, match="^in the middle$"):
            logits_with(generate, model)
        hook.remove()
        assert not hooks_of(model)
        stops.pop(0)
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    with attach(random_crosscoder(), model, LAYERS) as run:
        hook = residual_blocks(model)[1].register_forward_hook(fail)
        run.ablate(3)
        with pytest.raises(error):
            model(IDS)
        hook.remove()
        assert_close(model(IDS).logits, ablated_by_hand(3))


def ablated_by_hand(latent):
    return by_hand(make_model(), random_crosscoder(), IDS, ONES, lambda z: edited_codes(z, [latent], torch.zeros_like))


def test_two_models_may_be_attached_to_at_once_and_one_not_twice():
    one, other = make_model(), make_model("llama")
    with attach(random_crosscoder(), one, LAYERS) as run, attach(random_crosscoder(), other, LAYERS):
        with pytest.raises(RuntimeError, match="GPT2LMHeadModel is attached to already.*close the first"):
            attach(random_crosscoder(), one, LAYERS).__enter__()
        run.ablate(3)
        assert_close(one(IDS).logits, ablated_by_hand(3))
    assert not hooks_of(one)
    assert not hooks_of(other)
    with pytest.raises(RuntimeError, match="attachment is closed.*edit inside: with attach"):
        run.ablate(3)
    with attach(random_crosscoder(), one, LAYERS):
        pass


def test_a_part_called_alone_is_said():
    with attach(random_crosscoder(), MODEL, LAYERS) as run:
        run.ablate(3)
        with pytest.raises(
            RuntimeError, match="part of GPT2LMHeadModel was called alone.*call the model that was attached"
        ):
            MODEL.transformer(IDS)
        MODEL.train()  # put back below
        with pytest.raises(RuntimeError, match="GPT2LMHeadModel is in train mode.*model.eval"):
            MODEL(IDS)
        MODEL.eval()


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda run: run.ablate(24), ValueError, "latents 0 to 23, got 24"),
        (lambda run: run.steer([3, -1], 1.0), ValueError, "latents 0 to 23, got -1"),
        (lambda run: run.scale(3.5, 1.0), TypeError, "a latent is a whole number, got 3.5"),
        (lambda run: run.scale([3.5], 1.0), TypeError, "a latent is a whole number, got [3.5]; several are a list"),
        (lambda run: run.ablate("3"), TypeError, "a latent is a whole number, got '3'"),
        (lambda run: run.steer(3, "4"), TypeError, "given a number, as in run.steer(5, 4.0), got '4'"),
        (lambda run: run.steer(3, None), TypeError, "given a number, as in run.steer(5, 4.0), got None"),
        (lambda run: run.set(3, float("nan")), ValueError, "a finite number, got nan"),
        (lambda run: run.scale([3, 4], [1.0, float("inf")]), ValueError, "a finite number, got [1.0, inf]"),
        (lambda run: (run.ablate(3), MODEL(IDS[0])), ValueError, "got (7,); give one text as ids[None]"),
        (lambda run: run.scale([3, 4], [1.0, 2.0, 3.0]), ValueError, "2 latents take one number, or 2, got (3,)"),
        (lambda run: run.clamp(3), ValueError, "clamp needs low, high or both, got neither"),
        (lambda run: run.clamp(3, low=2.0, high=1.0), ValueError, "low <= high, got low=2.0 and high=1.0"),
        (lambda run: run.patch(torch.zeros(2, 5, 7)), ValueError, "(contexts, context, latents=24), got (2, 5, 7)"),
        (lambda run: run.add(torch.zeros(2, 16)), ValueError, "(layers=3, d_model), or (contexts, context, layers=3"),
        (lambda run: run.add(torch.ones(3, 5)), ValueError, "here are (2, 7, 16), and vectors of d_model=5 were"),
        (lambda run: run.patch(torch.zeros(3, 5, 24)), ValueError, "given for 3 contexts does not fit a call with 2"),
    ],
)  # fmt: skip
def test_an_edit_that_cannot_be_made_is_said(make, kind, sentence):
    with pytest.raises(kind, match=re.escape(sentence)):
        logits_with(make)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"layers": None}, "attach needs the layers that the crosscoder was trained on, and it was not"),
        ({"layers": 3}, "layers is a list, got 3; write layers=[3]"),
        ({"layers": ("base:2", "chat:2", "chat:mlp_out.3")}, "one model, and the crosscoder reads several"),
        ({"layers": ("a:embed", "b:embed", "b:-1")}, "its layers are a:embed, b:embed, b:-1; add what it writes"),
        ({"model": "gpt2"}, "attach changes a model while you call it, so it takes the module, got 'gpt2'; open it"),
        ({"tokens": [1, 2]}, "a mask of bool (contexts, context), or a slice of columns, got [1, 2]"),
        ({"layers": (0, 4, 1)}, "layers 0 to 3, got 4"),
        ({"layers": (0, 1)}, "(..., layers=3, d_model=16), got (2, 16) from the layers 0, 1"),
        ({"only": 1}, "only is one of the layers 0, 2, 3, got 1"),
        ({"way": "sum"}, "attach knows the ways telescoped, each, got 'sum'"),
        ({"way": "each", "only": 2}, "way='each' says how edits of several layers add up"),
        ({"way": "telescoped", "reconstruct": True}, "with only= or reconstruct=True they do not; leave it out"),
        ({"way": "telescoped", "at": "mlp_out"}, "the residual stream (block_in, block_out), got mlp_out of 0, 2, 3"),
        ({"tokens": slice(-1, None)}, "columns of the text counted from its start, without a step, got slice(-1"),
        ({"tokens": torch.ones(2, 7)}, "a mask of bool (contexts, context), or a slice of columns, got torch.float32"),
        ({"tokens": torch.ones(3, 7).bool()}, "mask of tokens has 3 contexts and the call has 2"),
        ({"crosscoder": torch.nn.Linear(2, 2)}, "expected a Crosscoder, or a module that holds one"),
    ],
)  # fmt: skip
def test_an_attachment_that_cannot_be_made_is_said(asked, sentence):
    crosscoder, model = asked.pop("crosscoder", random_crosscoder()), asked.pop("model", MODEL)
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)):
        logits_with(lambda run: run.ablate(3), model, crosscoder=crosscoder, **asked)


def test_a_crosscoder_of_another_width_is_said():
    weights = [fx.DenseWeight(3, 8, 24) for _ in range(2)]
    crosscoder = fx.Crosscoder(fx.CrossLayerEncoder(weights[0], fx.TopK(3)), fx.CrossLayerDecoder(weights[1]))
    sentence = "layers=3, d_model=8.*got .*16|here are .2, 7, 16., and vectors of d_model=8 were"
    for make in (lambda run: run.ablate(3), lambda run: run.steer(3, 1.0)):
        with pytest.raises(ValueError, match=sentence):
            logits_with(make, crosscoder=crosscoder)


def test_layers_and_places_come_from_what_was_saved(tmp_path):
    fx.save_pretrained(
        random_crosscoder(), tmp_path / "c", about={"layers": [0, 2, 3], "at": "mlp_in", "to": "mlp_out"}
    )
    logits = []
    for named in ({}, {"layers": LAYERS, "at": "mlp_in", "to": "mlp_out"}):
        with torch.no_grad(), attach(fx.from_pretrained(tmp_path / "c"), MODEL, **named) as run:
            run.steer(3, 1.0)
            logits.append(MODEL(IDS).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_may_start_from_bos_alone(family):
    model, (make, change) = MODELS[family], EDITS["several"]
    start = torch.zeros(2, 1, dtype=torch.long)
    expected, _ = grown(model, random_crosscoder(), start, torch.ones_like(start), change, 4)
    with attach(random_crosscoder(), model, LAYERS) as run:
        make(run)
        found = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)


def test_a_spliced_loss_is_that_of_a_model_with_one_layer_reconstructed():
    crosscoder, keep = random_crosscoder(), kept_tokens(IDS, ONES)
    report = spliced_loss(crosscoder, MODEL, Contexts(IDS.int(), keep), layers=LAYERS)
    counted = keep[:, :-1] & keep[:, 1:]
    for number, layer in enumerate(LAYERS):
        settings = {"only": layer, "reconstruct": True, "keep_error": False, "tokens": keep}
        with torch.no_grad(), attach(crosscoder, MODEL, LAYERS, **settings):
            logits = MODEL(IDS).logits[:, :-1][counted]
        assert_close(report.ce[number], torch.nn.functional.cross_entropy(logits, IDS[:, 1:][counted]))


PLACES = {
    "the embedding as layer -1": ((-1, 1, 3), {}),
    "by name": (("embed", "mlp_out.1", "final_norm"), {}),
    "attention": ((0, 2, 3), {"at": "attn_out"}),
    "mlp": ((3, 0, 1), {"at": "mlp_out"}),
    "before the mlp": ((0, 2, 3), {"at": "mlp_in"}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", PLACES)
def test_every_place_of_a_family_is_written_as_by_hand(family, place):
    (layers, at), (make, change), crosscoder = PLACES[place], EDITS["several"], random_crosscoder()
    way = "telescoped" if -1 in layers else "each"
    expected = by_hand(MODELS[family], crosscoder, IDS, ONES, change, layers=layers, way=way, **at)
    with torch.no_grad(), attach(crosscoder, MODELS[family], layers, **at) as run:
        make(run)
        assert_close(MODELS[family](IDS).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["another text", "another model"])
@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_codes_are_patched_from_another_text_or_model(family, source, layout):
    crosscoder, (model, ids) = random_crosscoder().eval(), (MODELS[family], IDS[:, :5].flip(0))
    if source == "another model":
        torch.manual_seed(7)
        model, ids = FAMILIES[family]().double().eval(), IDS
    codes, given_ids, mask = fired(model, crosscoder, ids), IDS, ONES
    if layout == "sparse":
        codes, given_ids, mask = fx.to_csr(codes[0]), IDS[:1], ONES[:1]  # one text's, as of `latents_of`
    dense, chosen = codes.to_dense(), [*range(0, LATENTS, 2)]

    def change(z):
        z = z.clone()
        z[:, : dense.shape[-2], chosen] = dense[..., chosen]
        return z

    expected = by_hand(MODELS[family], crosscoder, given_ids, mask, change)
    with torch.no_grad(), attach(crosscoder, MODELS[family], LAYERS) as run:
        run.patch(codes, latents=chosen)
        assert_close(MODELS[family](given_ids).logits, expected)
    assert (expected - MODELS[family](given_ids).logits).abs().max() > 1e-4


@pytest.mark.parametrize("edit", ["steer", "scale", "set"])
def test_what_learns_may_start_where_nothing_changes(edit):
    model, crosscoder = make_model(), random_crosscoder()
    for parameter in (*model.parameters(), *crosscoder.parameters()):
        parameter.requires_grad_(False)
    silent = next(latent for latent in range(LATENTS) if not fired(model, crosscoder)[..., latent].any())
    latent, start = (silent, 0.0) if edit == "set" else (range(24), 1.0 if edit == "scale" else 0.0)
    clean = model(IDS).logits

    def logits(number):
        with attach(crosscoder, model, LAYERS) as run:
            getattr(run, edit)(latent, number)
            return model(IDS).logits

    number = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    here = logits(number)
    assert torch.equal(here, clean)
    found = torch.autograd.grad(here[..., :5].sum(), number)[0]
    sides = [logits(torch.tensor(start + step, dtype=torch.float64))[..., :5].sum() for step in (1e-5, -1e-5)]
    assert found.abs() > 1e-6
    assert_close(found, (sides[0] - sides[1]) / 2e-5, rtol=1e-6, atol=1e-6)


class Adapted(Wrapped):
    """As peft wraps a model: `generate` goes past this module's own forward."""

    def get_base_model(self):
        return self.model

    def generate(self, *args, **named):
        return self.model.generate(*args, **named)


def test_a_model_with_an_adapter_is_edited_in_calls_and_in_generate():
    crosscoder, (make, change), adapted = random_crosscoder(), EDITS["several"], Adapted(MODEL).eval()
    expected, _ = grown(MODEL, crosscoder, IDS, ONES, change, 3)
    logits = by_hand(MODEL, crosscoder, IDS, ONES, change)
    with torch.no_grad(), attach(crosscoder, adapted, LAYERS) as run:
        make(run)
        assert_close(adapted(IDS).logits, logits)
        found = adapted.generate(IDS, attention_mask=ONES, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, expected)
    with torch.no_grad():
        with adding(MODEL, torch.ones(1, D_MODEL), layers=[2]):
            logits = MODEL(IDS).logits
        with adding(adapted, torch.ones(1, D_MODEL), layers=[2]):
            assert torch.equal(adapted(IDS).logits, logits)


def test_hooks_of_ones_own_stay_and_run_in_their_order():
    model, crosscoder, calls = make_model(), random_crosscoder(), []
    blocks = residual_blocks(model)
    before = blocks[2].register_forward_hook(lambda _module, _args, output: calls.append(("before", output)))
    with torch.no_grad(), attach(crosscoder, model, LAYERS) as run:
        after = blocks[2].register_forward_hook(lambda _module, _args, output: calls.append(("after", output)))
        run.ablate(range(24))
        edited = model(IDS).logits
    assert hooks_of(model) == [*blocks[2]._forward_hooks]
    assert [name for name, _ in calls[-2:]] == ["before", "after"]
    first, second = (output if isinstance(output, torch.Tensor) else output[0] for _, output in calls[-2:])
    assert not torch.equal(first, second)  # one saw what stood there, the other what was put there
    before.remove()
    after.remove()
    with torch.no_grad(), attach(crosscoder, model, LAYERS) as run:
        run.ablate(range(24))
        assert torch.equal(model(IDS).logits, edited)


def test_an_attachment_says_what_it_does_and_offers_edits_alone():
    with attach(random_crosscoder(), MODEL, LAYERS) as run:
        assert repr(run) == "<GPT2LMHeadModel edited at layers 0, 2, 3: no edits>"
        run.ablate(17)
        run.scale([2, 3], 2.0)
        run.steer(5, 4.0)
        assert repr(run).endswith(": ablate(17), scale([2, 3], 2.0), steer(5, 4.0)>")
        run.clear()
        assert repr(run).endswith(": no edits>")
        run.set(1, 2.0)
        run.clamp(1, high=1.0)
        run.patch(PATCH, latents=[3])
        run.add(torch.ones(3, D_MODEL))
        assert repr(run).endswith(
            ": set(1, 2.0), clamp(1, low=None, high=1.0), patch(codes, latents=[3]), add(3 x 16)>"
        )
    assert repr(run) == "<GPT2LMHeadModel edited at layers 0, 2, 3, not open>"
    edits = {"ablate", "scale", "set", "clamp", "patch", "steer", "add", "clear"}
    assert {name for name in dir(run) if not name.startswith("_")} == edits | {"crosscoder", "model"}


def test_a_folded_crosscoder_still_knows_its_layers(tmp_path):
    normalised = fx.Normalised(random_crosscoder(), fx.Normalisation.of(torch.ones(3) * 2, torch.zeros(3, D_MODEL)))
    fx.save_pretrained(normalised.double(), tmp_path / "c", about={"layers": [0, 2, 3], "at": "mlp_out"})
    normalised = fx.from_pretrained(tmp_path / "c")
    logits = []
    for crosscoder in (normalised, fx.fold(normalised), fx.unfold(fx.fold(normalised), normalised.normalisation)):
        with torch.no_grad(), attach(crosscoder, MODEL) as run:
            run.scale(range(24), 2.0)
            logits.append(MODEL(IDS).logits)
    assert_close(logits[1:], logits[:1] * 2)


@pytest.mark.parametrize("how", ["module", "wrapper"])
def test_a_compiled_model_is_refused(how):
    model = make_model()
    if how == "module":
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match="is compiled, and compiled code may pass by edits.*disable_compile=True"):
        logits_with(lambda run: run.ablate(3), model)
