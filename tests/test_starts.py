import re
from functools import partial

import pytest
import torch
from reference import projected

from fmxnn import (
    ConcatWeight,
    CPWeight,
    Crosscoder,
    CrossLayerDecoder,
    CrossLayerEncoder,
    DenseWeight,
    EinsumWeight,
    PlacedWeight,
    RestrictedWeight,
    ShapeError,
    SumWeight,
    TensorRingWeight,
    TopK,
    Weight,
    causal_weight,
    data_start,
    gaussian_start,
    isometric_start,
    sae_stack_weight,
    tied_start,
    windowed_weight,
)
from fmxnn.weights.table_rows import parts_with

AXES = (3, 4, 50)
TUCKER = {"layers": 3, "d_model": 4, "latents": 50, "p": 3, "q": 4, "r": 12}
MAKERS = {
    "dense": lambda: DenseWeight(*AXES),
    "ring": lambda: TensorRingWeight(*AXES, ranks=(2, 2, 6)),
    "cp": lambda: CPWeight(*AXES, rank=12),
    "tucker": lambda: EinsumWeight("latents r, p q r, d_model q, layers p", **TUCKER),
}
UNTABLED = {"directions": lambda: EinsumWeight("latents d_model, latents layers", layers=3, d_model=4, latents=50)}
SUMS = {"sum": lambda: SumWeight(DenseWeight(*AXES), CPWeight(*AXES, rank=2))}
pytestmark = pytest.mark.usefixtures("float64")
assert_close = torch.testing.assert_close


def crosscoder(reader, writer=None):
    coder = Crosscoder(CrossLayerEncoder(reader(), TopK(2)), CrossLayerDecoder((writer or reader)()))
    torch.nn.init.ones_(coder.encoder.bias)
    torch.nn.init.ones_(coder.decoder.bias)
    return coder


def mean_norm(weight):
    return weight.to_dense().detach().flatten(0, 1).norm(dim=0).mean()


def directions(weight):
    return torch.nn.functional.normalize(weight.to_dense().detach().flatten(0, 1), dim=0)


ALL = {**MAKERS, **UNTABLED, **SUMS}
STARTS = (
    [(gaussian_start, name) for name in ALL]
    + [(tied_start, name) for name in ALL]
    + [(isometric_start, n) for n in {**MAKERS, **UNTABLED}]
)


def tokens(count=50):
    return torch.randn(5, count // 5, 3, 4) + torch.randn(3, 4)


def start_from_data(coder, **norms):
    return data_start(coder, tokens(60), **norms)


TIED = [pair for pair in STARTS if pair[0] is not gaussian_start] + [(start_from_data, name) for name in MAKERS]


@pytest.mark.parametrize(("start", "name"), STARTS)
def test_a_start_returns_the_crosscoder_with_zero_biases(start, name):
    coder = crosscoder(ALL[name])
    assert start(coder) is coder
    assert not coder.encoder.bias.any()
    assert not coder.decoder.bias.any()


@pytest.mark.parametrize(("start", "name"), [*TIED, *((gaussian_start, name) for name in ALL)])
def test_only_a_gaussian_start_unties_the_decoder(start, name):
    coder = start(crosscoder(ALL[name]))
    alike = (directions(coder.encoder.weight) * directions(coder.decoder.weight)).sum(0)
    if start is gaussian_start:
        assert alike.abs().mean() < 0.9
    else:
        assert_close(alike, torch.ones(50))


@pytest.mark.parametrize(("start", "name"), TIED)
@pytest.mark.parametrize("norms", [{}, {"encoder_norm": 3.0, "decoder_norm": 0.5}])
def test_the_mean_norms_of_a_tied_start_are_the_asked(start, name, norms):
    coder = start(crosscoder(ALL[name]), **norms)
    assert_close(mean_norm(coder.encoder.weight).item(), norms.get("encoder_norm", 1.0))
    assert_close(mean_norm(coder.decoder.weight).item(), norms.get("decoder_norm", 0.1))


@pytest.mark.parametrize(
    ("asked", "encoder", "decoder"), [({}, 300**-0.5, 9000**-0.5), ({"encoder_std": 2.0, "decoder_std": 0.5}, 2.0, 0.5)]
)
def test_a_gaussian_start_has_the_deviations_of_the_paper(asked, encoder, decoder):
    coder = gaussian_start(crosscoder(lambda: DenseWeight(3, 100, 3000)), **asked)
    for weight, std in ((coder.encoder.weight, encoder), (coder.decoder.weight, decoder)):
        entries = weight.to_dense().detach()  # 900,000 entries: the estimate of std spreads by std / sqrt(1.8e6)
        assert abs(entries.std() - std) < 5 * std / 1.8e6**0.5
        assert abs(entries.mean()) < 5 * std / 9e5**0.5


@pytest.mark.parametrize("name", MAKERS)
def test_an_isometric_start_keeps_lengths_up_to_one_scale(name):
    coder = isometric_start(crosscoder(MAKERS[name]))
    for weight in (coder.encoder.weight, coder.decoder.weight):
        x = torch.randn(20, 3, 4)
        ratio = weight.to_bonds(x).norm(dim=-1) / x.flatten(-2).norm(dim=-1)
        assert_close(ratio, ratio[:1].expand(20))
        rows = weight.table.norm(dim=-1)
        assert_close(rows, rows[:1].expand(50))


@pytest.mark.parametrize("name", MAKERS)
def test_an_isometric_start_is_a_dense_one_in_a_rotated_basis(name):
    coder = isometric_start(crosscoder(MAKERS[name]))
    norms = coder.encoder.weight.to_dense().detach().flatten(0, 1).norm(dim=0)
    assert_close(norms, torch.ones(50))


@pytest.mark.parametrize("ranks", [(5, 1, 15), (1, 4, 3), (4, 3, 12)])
def test_every_wide_ring_starts_isometric(ranks):
    weight = isometric_start(crosscoder(lambda: TensorRingWeight(*AXES, ranks=ranks))).encoder.weight
    x = torch.randn(20, 3, 4)
    ratio = weight.to_bonds(x).norm(dim=-1) / x.flatten(-2).norm(dim=-1)
    assert_close(ratio, ratio[:1].expand(20))


@pytest.mark.parametrize("name", MAKERS)
def test_a_data_start_has_a_token_for_each_atom(name):
    x = tokens(50)  # as many as latents: each is drawn once
    coder = data_start(crosscoder(MAKERS[name]), x)
    wanted = torch.nn.functional.normalize((x - x.mean((0, 1))).flatten(0, 1).flatten(1), dim=1)
    alike = wanted @ directions(coder.encoder.weight)
    best = alike.amax(1)
    assert_close(best, torch.ones(50))
    assert alike.argmax(1).unique().tolist() == list(range(50))


def test_a_data_start_projects_tokens_on_what_a_narrow_weight_can_write():
    x = tokens(50)
    weight = data_start(crosscoder(lambda: CPWeight(*AXES, rank=5)), x).encoder.weight
    written = weight.from_bonds(torch.eye(5)).flatten(1)  # its rows are orthogonal and of one length
    rest = (x - x.mean((0, 1))).flatten(0, 1).flatten(1)
    projected = rest @ written.T @ written / written.pow(2).sum(1).mean()
    alike = torch.nn.functional.normalize(projected, dim=1) @ directions(weight)
    assert_close(alike.amax(1), torch.ones(50))


@pytest.mark.parametrize("name", MAKERS)
def test_a_data_start_centres_what_is_read_and_written(name):
    x = tokens(60)
    mean = x.flatten(0, 1).mean(0)
    coder = data_start(crosscoder(MAKERS[name]), x)
    assert_close(coder.encoder.pre_activations(mean), torch.zeros(50))
    assert_close(coder.decoder(torch.zeros(50)), mean)
    assert coder.encoder.pre_activations(x).mean((0, 1)).abs().max() < 1e-12


def test_a_data_start_gives_each_part_the_layers_that_it_has():
    def parted():
        return ConcatWeight(
            PlacedWeight(DenseWeight(2, 4, 10), layers=3, at=[0, 2]), TensorRingWeight(3, 4, 20, ranks=(2, 2, 6))
        )

    x = tokens(40)
    weight = data_start(crosscoder(parted), x).encoder.weight
    rest = (x - x.mean((0, 1))).flatten(0, 1)
    for latent, atom in enumerate(weight.to_dense().detach().movedim(-1, 0)):
        seen = rest[:, [0, 2] if latent < 10 else [0, 1, 2]].flatten(1)
        atom = atom[[0, 2] if latent < 10 else [0, 1, 2]].flatten()
        alike = torch.nn.functional.normalize(seen, dim=1) @ torch.nn.functional.normalize(atom, dim=0)
        assert_close(alike.max(), torch.tensor(1.0))


@pytest.mark.parametrize("make", [DenseWeight, lambda *axes: TensorRingWeight(*axes, ranks=(2, 2, 6))])
def test_a_data_start_reaches_every_group_of_one_weight(make):
    groups = [[0, 2], [1], [0, 1, 2]]  # one of which is no run of layers
    x = tokens(60)
    weight = data_start(crosscoder(lambda: RestrictedWeight(make(3, 4, 60), at=groups)), x).encoder.weight
    rest = (x - x.mean((0, 1))).flatten(0, 1)
    for latent, atom in enumerate(weight.to_dense().detach().movedim(-1, 0)):
        group = groups[latent // 20]
        seen, atom = rest[:, group].flatten(1), atom[group].flatten()
        alike = torch.nn.functional.normalize(seen, dim=1) @ torch.nn.functional.normalize(atom, dim=0)
        assert_close(alike.max(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(50, 4, 3), ShapeError, "data_start takes (..., layers=3, d_model=4) activations, got (50, 4, 3)"),
        (torch.zeros(3, 4), ValueError, "data_start draws a token for each of latents=50, got 1; give more tokens"),
        (
            torch.zeros(7, 7, 3, 4),
            ValueError,
            "data_start draws a token for each of latents=50, got 49; give more tokens",
        ),
        (
            torch.full((50, 3, 4), torch.inf),
            ValueError,
            "data_start needs finite activations, got NaN or infinity; leave those tokens out",
        ),
        (
            torch.ones(50, 3, 4),
            ValueError,
            "data_start needs tokens that differ, got 50 times the same; give activations of other text",
        ),
    ],
)
def test_a_data_start_refuses_what_it_cannot_draw_from(x, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        data_start(crosscoder(MAKERS["ring"]), x)


@pytest.mark.parametrize(("maker", "name"), [(UNTABLED["directions"], "EinsumWeight"), (SUMS["sum"], "SumWeight")])
def test_a_data_start_needs_a_table(maker, name):
    message = f"data_start needs a factorised weight with latents in one term, got {name}; use tied_start"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        data_start(crosscoder(maker), tokens())


STACKED = {"layers": 3, "d_model": 4, "latents": 60}
UNLIKE = {
    "dense, weakly causal": (partial(sae_stack_weight, DenseWeight), partial(causal_weight, DenseWeight)),
    "ring per source": (
        partial(sae_stack_weight, DenseWeight),
        partial(causal_weight, partial(TensorRingWeight, ranks=(2, 2, 3))),
    ),
    "of all layers, in parts": (partial(CPWeight, rank=5), partial(windowed_weight, DenseWeight, window=2)),
    "in parts, of all layers": (partial(windowed_weight, DenseWeight, window=2), partial(CPWeight, rank=5)),
    "one weight, other layers": tuple(
        lambda at=at, **axes: RestrictedWeight(TensorRingWeight(**axes, ranks=(2, 2, 6)), at=at)
        for at in ([[0], [1], [2]], [[0, 1, 2], [1, 2], [2]])
    ),
    "of two factorisations": (DenseWeight, partial(TensorRingWeight, ranks=(2, 2, 3))),
}


@pytest.mark.parametrize("pair", UNLIKE)
@pytest.mark.parametrize("start", [tied_start, isometric_start, start_from_data])
def test_a_decoder_that_is_made_otherwise_starts_as_near_the_encoders_transpose_as_it_can(pair, start):
    coder = crosscoder(*(partial(make, **STACKED) for make in UNLIKE[pair]))
    torch.nn.utils.vector_to_parameters(
        torch.full((sum(p.numel() for p in coder.parameters()),), torch.nan), coder.parameters()
    )
    start(coder, encoder_norm=2.0, decoder_norm=0.3)  # nothing of what was there stays
    encoder, decoder = (side.weight.to_dense().detach() for side in (coder.encoder, coder.decoder))
    nearest, latents = torch.zeros(3, 4, 60), torch.arange(60)
    for part, mine, _ in parts_with(coder.decoder.weight, latents):
        basis = part.weight.from_bonds(torch.eye(part.weight.table.shape[1])).detach().flatten(1)
        for latent in latents[mine]:
            nearest[list(part.at), :, latent] = projected(basis, encoder[list(part.at), :, latent].flatten()).view(
                -1, 4
            )
    scale = 0.3 / nearest.flatten(0, 1).norm(dim=0).mean()
    assert_close(decoder, scale * nearest)
    assert_close(mean_norm(coder.encoder.weight).item(), 2.0)


@pytest.mark.parametrize("start", [tied_start, isometric_start, start_from_data])
def test_a_dense_decoder_writes_what_each_latent_reads_and_nothing_yet_elsewhere(start):
    coder = start(crosscoder(*(partial(make, **STACKED) for make in UNLIKE["dense, weakly causal"])))
    encoder, decoder = (side.weight.to_dense().detach() for side in (coder.encoder, coder.decoder))
    for latent in range(60):
        own = latent // 20
        assert_close(
            torch.cosine_similarity(encoder[own, :, latent], decoder[own, :, latent], dim=0), torch.tensor(1.0)
        )
        assert not decoder[[layer for layer in range(3) if layer != own], :, latent].any()
    assert_close(mean_norm(coder.decoder.weight).item(), 0.1)


@pytest.mark.parametrize("writer", [lambda: DenseWeight(2, 4, 50), UNTABLED["directions"], SUMS["sum"]])
def test_a_tied_start_needs_a_decoder_that_can_have_the_transpose(writer):
    message = (
        "a tied start needs a decoder with the encoder's layers and d_model, "
        "and of its factorisation or with latents in tables; use gaussian_start for others"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tied_start(crosscoder(MAKERS["dense"], writer))


def test_a_tied_start_needs_latents_that_write_what_they_read():
    def placed(at):
        return lambda: PlacedWeight(DenseWeight(len(at), 4, 50), layers=3, at=at)

    message = "a tied start needs latents that write a layer which they read, and some have none; use gaussian_start"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tied_start(crosscoder(placed([0]), placed([1, 2])))


def test_an_isometric_start_needs_a_factorised_weight():
    with pytest.raises(
        ValueError, match="^isometric_start needs a factorised weight, got SumWeight; use tied_start, or .*isometric_"
    ):
        isometric_start(crosscoder(SUMS["sum"]))


class Plain(Weight):
    def __init__(self):
        super().__init__()
        self.layers, self.d_model, self.latents = 1, 1, 2

    def to_latents(self, x):
        return x[..., 0, :].repeat_interleave(2, -1)

    def to_layers(self, z):
        return z.sum(-1)[..., None, None]


def test_a_weight_that_cannot_be_drawn_is_refused():
    message = (
        "a start needs a weight with normal_(std) and scale_(factor), and Plain lacks them; "
        "add both or draw it yourself"
    )
    for start in (gaussian_start, tied_start):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            start(crosscoder(Plain))
