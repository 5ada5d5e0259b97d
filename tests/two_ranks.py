"""What each of two processes does in tests/test_frameworks.py: `python two_ranks.py RANK FOLDER`.

The processes find each other by files, so that no port is taken.
"""

import json
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fmxnn as fx
from fmxnn.training import AuxiliaryLoss, CheckpointError, NonFiniteError, Trainer, save_checkpoint

RANK, FOLDER = int(sys.argv[1]), Path(sys.argv[2])
START = dist.init_process_group


def start(name, backend="gloo"):
    START(backend, init_method=f"file://{FOLDER}/store-{name}", rank=RANK, world_size=2)


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=1e-2)


def made(backend="auto", terms=None):
    torch.manual_seed(0)
    decoder = fx.CrossLayerDecoder(fx.TensorRingWeight(2, 4, 16, ranks=(2, 2, 2)))
    encoder = fx.CrossLayerEncoder(fx.DenseWeight(2, 4, 16), fx.TopK(2))
    objective = fx.Objective(fx.Crosscoder(encoder, decoder, backend=backend).double(), terms)
    with torch.no_grad():
        encoder.bias[:4] = -3.0  # dead ones, the same for every process
    objective.silent[:4] = 1_000
    return objective


def batch(step):
    return torch.randn(32, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def differ(ours, theirs):
    pairs = zip(ours.values(), theirs.values(), strict=True)
    return max(float((mine - other).abs().max()) for mine, other in pairs)


def whole(module):
    return {
        name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in module.state_dict().items()
    }


def equals_one_process(wrap, backend):
    """Two halves of a batch train as the whole batch does in one process, terms and all."""

    def terms(objective):
        weight = objective.crosscoder.decoder.weight
        return {
            "l1": lambda run: 0.04 * fx.l1_penalty(run.codes, weight.norms()),
            "auxiliary": AuxiliaryLoss(k=2, after=900),
        }

    one, many = made(backend), made(backend)
    for objective in (one, many):
        objective.terms = {"l1": terms(objective)["l1"]}
    trainer, alone = Trainer(wrapped := wrap(many), adam(wrapped)), torch.optim.Adam(one.parameters(), lr=1e-2)
    for step in range(3):
        trainer.step(batch(step).chunk(2)[RANK])
        one(batch(step))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
        alone.step()
        alone.zero_grad()
    assert differ(whole(many.crosscoder), whole(one.crosscoder)) < 1e-12
    many.terms = terms(many)
    assert trainer.step(batch(3).chunk(2)[RANK])["auxiliary"] > 0


def all_or_none_update(wrap):
    """A loss that is infinite in one process, with a finite gradient, stops both."""
    spoilt = {"spoilt": lambda run: torch.tensor(float("inf") if RANK == 1 else 0.0)}
    objective = made(terms=spoilt)
    module = wrap(objective)
    trainer, before = Trainer(module, adam(module)), {name: value.clone() for name, value in whole(objective).items()}
    with pytest.raises(NonFiniteError, match="the loss is inf" if RANK else "another rank"):
        trainer.step(batch(RANK))
    assert trainer.steps == 0
    assert differ(whole(objective), before) == 0


def the_gradient_of_all_is_not_blamed_on_a_rank_whose_loss_is_finite():
    module = DistributedDataParallel(made())
    spoilt = batch(RANK) * (float("nan") if RANK else 1)
    with pytest.raises(NonFiniteError, match="its .* tokens hold NaN" if RANK else "see what another rank says"):
        Trainer(module, adam(module)).step(spoilt)


def apart_is_warned_of():
    objective = made()
    with pytest.warns(
        UserWarning, match=r"2 processes run, .*Objective averages its gradients with none.*DistributedDataParallel\("
    ):
        Trainer(objective, adam(objective))


def wrapped_crosscoders_are_one_sentence():
    crosscoder = made().crosscoder
    wrapped = DistributedDataParallel(crosscoder)
    with pytest.raises(
        TypeError,
        match=r"got DistributedDataParallel without encoder.*DistributedDataParallel\(fx.Objective\(crosscoder\)\)",
    ):
        Trainer(wrapped, adam(wrapped))


def sharded_parts_are_one_sentence():
    objective = made(terms={"zero": lambda run: run.x_hat.new_zeros(())})
    fully_shard(objective.crosscoder.decoder)
    fully_shard(objective)
    trainer = Trainer(objective, adam(objective))
    with pytest.raises(TypeError, match=r"decoder.* is sharded then; .*fully_shard\(objective\)"):
        trainer.step(batch(0))


def an_optimiser_from_before_sharding_is_one_sentence():
    objective = made()
    before = adam(objective)
    with pytest.raises(ValueError, match="none of this crosscoder's, .*sharded"):
        Trainer(fully_shard(objective), before)


def sharded_weights_are_not_saved():
    objective = fully_shard(made())
    trainer = Trainer(objective, adam(objective))
    with pytest.raises(CheckpointError, match="is sharded, .*torch.distributed.checkpoint"):
        save_checkpoint(FOLDER / f"checkpoints-{RANK}", trainer, {})
    assert not (FOLDER / f"checkpoints-{RANK}").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*find_unused_parameters.*")
    for name, blocks in json.loads((FOLDER / "blocks.json").read_text()).items():
        dist.init_process_group = partial(start, name)
        exec("\n".join(blocks), {})  # a block of the page, which is code of this repository
    dist.init_process_group = START
    start("laws")
    try:
        for wrap in (DistributedDataParallel, fully_shard):
            for backend in ("dense", "sparse"):
                equals_one_process(wrap, backend)
            all_or_none_update(wrap)
        the_gradient_of_all_is_not_blamed_on_a_rank_whose_loss_is_finite()
        apart_is_warned_of()
        wrapped_crosscoders_are_one_sentence()
        sharded_parts_are_one_sentence()
        an_optimiser_from_before_sharding_is_one_sentence()
        sharded_weights_are_not_saved()
    finally:
        dist.destroy_process_group()
