"""The cost model: what it takes, what it says, and what moves it."""

import copy

import pytest
import torch

from fmxnn import (
    BatchTopK,
    CPWeight,
    Crosscoder,
    CrossLayerDecoder,
    CrossLayerEncoder,
    DenseWeight,
    JumpReLU,
    TensorRingWeight,
    TopK,
    factorize,
)
from fmxnn.coders import planner, planning
from fmxnn.coders.planner import Planner
from fmxnn.coders.planning import Bonds, Sizes, plan

CPU = torch.device("cpu")


def coder(sparsifier, latents=2048):
    return Crosscoder(
        CrossLayerEncoder(DenseWeight(4, 64, latents), sparsifier), CrossLayerDecoder(DenseWeight(4, 64, latents))
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_few_codes_of_many_are_sparse_and_many_of_few_are_dense(training, device):
    where = torch.device(device)
    assert (
        plan(Sizes(4096, 131072, Bonds(2048, 2048), 32), torch.float32, where, training=training).taken.backend
        == "sparse"
    )
    assert (
        plan(Sizes(1024, 256, Bonds(512, 512), 256), torch.float32, where, training=training).taken.backend == "dense"
    )
    assert plan(Sizes(1, 64, Bonds(32, 32), 4), torch.float32, where, training=training).taken.backend == "dense"


def test_flops_are_those_of_a_loop_over_products():
    dense, sparse = plan(Sizes(10, 100, Bonds(20, 30), 5), torch.float64, CPU, training=True).choices
    forward, backward = 2 * 10 * 100 * (20 + 30), 2 * 10 * 100 * (20 + 30 + 30)
    assert dense.flops == forward + backward
    assert sparse.flops == 2 * 10 * 100 * 20 + 2 * 50 * (30 + 30 + 30 + 20)


def test_small_maps_cost_every_choice_the_same_and_are_named_where_they_rule():
    polyadic = [CPWeight(16, 64, 128, rank=32) for _ in range(2)]
    one = Crosscoder(CrossLayerEncoder(polyadic[0], BatchTopK(8)), CrossLayerDecoder(polyadic[1]))
    maps = polyadic[0].small_flops
    for training, times in ((True, 3), (False, 1)):
        with_maps = plan(Sizes(100, 512, Bonds(128, 512), 8, maps), torch.float64, CPU, training=training)
        without = plan(Sizes(100, 512, Bonds(128, 512), 8), torch.float64, CPU, training=training)
        for choice, bare in zip(with_maps.choices, without.choices, strict=True):
            assert choice.flops == bare.flops + times * 100 * maps
            assert choice.seconds > bare.seconds
        assert one.train(training).plan(100).taken.flops > 100 * maps
    assert "the small maps take" in one.explain()
    assert "the small maps take" not in coder(BatchTopK(8)).explain()


def test_a_proposal_is_considered_where_the_processor_has_bf16_only(monkeypatch):
    sizes = Sizes(1024, 8192, Bonds(2048, 2048), 32)
    for fast in (True, False):
        monkeypatch.setattr(planning, "FAST_BF16", fast)
        assert any(choice.propose for choice in plan(sizes, torch.float32, CPU, training=True).choices) == fast
        assert plan(sizes, torch.float32, CPU, training=True).taken.propose == fast
        assert not any(choice.propose for choice in plan(sizes, torch.float64, CPU, training=True).choices)


def test_explain_prints_every_choice_and_marks_the_one_taken(monkeypatch):
    monkeypatch.setattr(planning, "FAST_BF16", True)
    lines = coder(BatchTopK(8)).explain(512).splitlines()
    assert lines[0].split() == ["backend", "GFLOP", "MB", "moved", "ms", "predicted"]
    assert [line.split()[0] for line in lines[1:4]] == ["dense", "sparse", "sparse"]
    assert sum("<- taken" in line for line in lines) == 1
    for part in ("training step", "tokens=512, latents=2048, k=8", "read=256 and written=256", "times of one core"):
        assert part in lines[-1]


def test_a_number_of_codes_that_is_not_known_runs_dense_and_says_why():
    assert "JumpReLU keeps a number of codes that is not known beforehand" in coder(JumpReLU(2048)).explain()
    unset = coder(BatchTopK(8)).eval()
    assert unset.plan().taken.backend == "dense"
    assert "the threshold is not set" in unset.explain()
    unset.encoder.sparsifier.threshold.fill_(1.0)
    assert "the threshold is not set" not in unset.explain()


@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_a_backend_set_by_hand_is_taken(backend):
    one = coder(TopK(8))
    one.backend = backend
    assert one.plan().taken.backend == backend
    assert one.explain().endswith(f"; {backend}: set by hand")


def test_a_plan_that_is_kept_follows_everything_it_was_made_from():
    def half(c):
        c.half()

    def swapped(c):
        c.decoder.weight = DenseWeight(2, 16, 512)

    changes = {
        "backend": lambda c: setattr(c, "backend", "dense"),
        "mode": lambda c: c.eval(),
        "threshold": lambda c: c.eval().encoder.sparsifier.threshold.fill_(0.5),
        "k": lambda c: setattr(c.encoder.sparsifier, "k", 400),
        "gate": lambda c: setattr(c.encoder, "sparsifier", TopK(2)),
        "dtype": half,
        "weight": swapped,
    }
    for name, change in changes.items():
        kept = Crosscoder(
            CrossLayerEncoder(TensorRingWeight(2, 16, 512), BatchTopK(4)),
            CrossLayerDecoder(TensorRingWeight(2, 16, 512)),
        )
        before = kept.plan(256)
        assert kept.plan(256) is before
        change(kept)
        fresh = copy.deepcopy(kept)
        fresh._planner = Planner()
        assert str(kept.plan(256)) == str(fresh.plan(256)) != str(before), name
        assert str(kept.plan(8)) != str(kept.plan(256))


def test_sparse_codes_are_encoded_without_a_plan(monkeypatch):
    one, planned = coder(BatchTopK(8)), []
    before = one.plan(256)
    real = planner.plan

    def counted(*given, **named):
        planned.append(given)
        return real(*given, **named)

    monkeypatch.setattr(planner, "plan", counted)
    one.encode(torch.randn(16, 4, 64), layout=torch.sparse_csr)
    assert not planned
    assert one.plan(256) is before


def test_sparse_codes_may_be_had_where_the_decoder_alone_is_dense():
    class Mine(CrossLayerDecoder):
        def forward(self, z):
            return 2 * super().forward(z)

    one = Crosscoder(CrossLayerEncoder(DenseWeight(4, 64, 128), TopK(8)), Mine(DenseWeight(4, 64, 128)))
    one.backend = "sparse"
    with pytest.raises(TypeError, match="the sparse backend cannot run: Mine overrides forward"):
        one.plan()
    assert one.encode(torch.randn(3, 4, 64), layout=torch.sparse_csr).layout == torch.sparse_csr


def test_a_copy_keeps_no_plan_of_what_is_changed_in_it():
    one = coder(BatchTopK(8))
    one.plan(256)
    made = factorize(one, lambda *axes: CPWeight(*axes, rank=3), sweeps=1)
    assert made.plan(256).sizes.bonds == Bonds(3, 3)
    assert one.plan(256).sizes.bonds == Bonds(256, 256)
