"""One crosscoder in training: the step, and everything that a checkpoint must hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.inputs import check_batch
from fmxnn.core.errors import NonFiniteError
from fmxnn.core.seeds import seed_of
from fmxnn.gates.scored import Scored
from fmxnn.sparse.codes import Codes
from fmxnn.training.inputs import check_optimizer
from fmxnn.training.losses import dead_latent_loss, reconstruction_loss
from fmxnn.training.passes import Pass, dense_pass, is_plain, sparse_pass
from fmxnn.training.resuming import check_settings, restore_run, run_state
from fmxnn.weights.weight import Tabled


@dataclass(frozen=True)
class AuxiliaryLoss:
    """Revives dead latents: `weight` times the `k` most active of those silent for `after` tokens rebuilding the residual. (chat-tuning crosscoders, A.1)

    Beside a `Scored` gate the most active are those of the largest score, the pre-activation times the norm, as the gate itself chooses.
    """

    k: int = 512
    weight: float = 1 / 32
    after: int = 10_000_000


class Trainer:
    """Trains a crosscoder a batch at a time: loss, clipping, optimiser, and the counters of a run.

    Masks are drawn from a generator seeded by (seed, step), so a run resumed at a step goes on bit for bit.
    `dtype=torch.bfloat16` runs the products under autocast; parameters, thresholds, the loss and the optimiser
    stay as they are. Raises ValueError for an optimiser that leaves out a parameter which requires a gradient, and warns of parameters in it that
    are not the crosscoder's. `step(x)` raises NonFiniteError before the update, with weights, threshold and counters untouched.
    After the last step call `calibrate`, which sets the threshold of a BatchTopK from activations.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int = 0,
        auxiliary: AuxiliaryLoss | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        check_optimizer(crosscoder, optimizer)
        self.crosscoder, self.optimizer = crosscoder, optimizer
        self.seed, self.auxiliary, self.dtype = seed, auxiliary, dtype
        self.clip = 1.0
        self.penalty: Callable[[Pass], Tensor] | None = None
        """What is added to the error, say `lambda run: 0.04 * l1_penalty(run.codes, weight.norms())`."""
        self.schedules: list[Callable[[int], None]] = []
        """Each is called with the number of steps done, after each step and on resuming; of two that set one thing the later wins. See `anneal_k`."""
        self.run = token_hex(8)
        """Which run this is; a resumed one is the same run."""
        self.steps = 0
        self.tokens = 0
        self.silent = torch.zeros(crosscoder.encoder.weight.latents, dtype=torch.int64, device=self.device)
        """`latents`: tokens since each latent fired."""

    @property
    def device(self) -> torch.device:
        """Where the crosscoder is, and where batches are moved to."""
        return self.crosscoder.encoder.bias.device

    def step(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """`tokens layers d_model, tokens layers d_model`: one update of every parameter. Gives loss, error, l0, dead share and gradient norm,
        unsynchronised. `y` is what a transcoder rebuilds from x, of the same tokens at the decoder's layers; None: x itself.
        Any batch axes will do. Raises ShapeError and TypeError, before anything is updated, for an x or y of other axes, without tokens or
        not in floating point, and ValueError for a learning rate that is not finite.
        """
        check_settings(self.optimizer, self.clip)
        x, y = self.placed(x, y)
        self.crosscoder.train()
        buffers = {name: buffer.clone() for name, buffer in self.crosscoder.named_buffers()}
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed_of(self.seed, "mask", self.steps))
            loss, error, z = self._loss(x, y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for p in self.crosscoder.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([cast("Tensor", p.grad) for p in parameters])
        if not torch.isfinite(loss + norm):  # the step's one synchronisation
            self.optimizer.zero_grad(set_to_none=True)
            for name, buffer in self.crosscoder.named_buffers():
                buffer.copy_(buffers[name])
            raise NonFiniteError(self._blame(x, y, loss))
        self._update(parameters, norm)
        tokens, fired = x.shape[:-2].numel(), _firings(z)
        self.silent = torch.where(fired > 0, 0, self.silent + tokens)
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens
        self.follow_schedule(self.steps)
        dead = (self.silent >= 100 * tokens).double().mean()
        return {
            "loss": loss.detach(),
            "error": error.detach(),
            "l0": fired.sum() / tokens,
            "dead": dead,
            "gradient_norm": norm,
        }

    def placed(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`tokens layers d_model, tokens layers d_model`: a batch and what is rebuilt from it, on the crosscoder's device and in its dtype.
        Raises ShapeError and TypeError as `step` does.
        """
        check_batch(self.crosscoder, x, y)
        like = self.crosscoder.encoder.bias
        x = x.to(like.device, like.dtype, non_blocking=True)  # bf16 activations must not make a bf16 loss
        return x, x if y is None else y.to(like.device, like.dtype, non_blocking=True)

    @property
    def schedule(self) -> Callable[[int], None]:
        """All of `schedules`, one after the other."""
        return self.follow_schedule

    @schedule.setter
    def schedule(self, schedule: object) -> NoReturn:
        """Raises AttributeError: it would replace the schedules that are there."""
        raise AttributeError(
            "a trainer has several schedules, and a new one replaces none; add it: trainer.schedules.append(schedule)"
        )

    def follow_schedule(self, steps: int) -> None:
        """Puts everything that `schedules` set where it stands after so many steps."""
        for schedule in self.schedules:
            schedule(steps)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors from which a run goes on, beside the crosscoder itself, and as plain values its counters and what must stay the same."""
        return run_state(self)

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave, with the optimiser's settings as they are now. Raises ValueError for tensors that do not fit."""
        restore_run(self, tensors, numbers)

    def _update(self, parameters: list[torch.nn.Parameter], norm: Tensor) -> None:
        """Clips the gradients' norm and steps; a fused optimiser divides as it reads them, in place of a pass of its own."""
        if all(group.get("fused") for group in self.optimizer.param_groups):
            fused = cast("Any", self.optimizer)
            fused.grad_scale = (norm / self.clip).clamp(min=1)
            fused.step()
            del fused.grad_scale
        else:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
            self.optimizer.step()

    def _loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | Codes]:
        crosscoder, plan = self.crosscoder, self.crosscoder.plan(x.shape[:-2].numel())
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if plan.taken.backend == "dense" or not is_plain(crosscoder):
                run, read = dense_pass(crosscoder, x, y), None
            else:
                run, read = sparse_pass(crosscoder, x, y, propose=plan.taken.propose)
            loss = error = reconstruction_loss(y, run.x_hat)
            if self.penalty is not None:
                loss = loss + self.penalty(run)
            if self.auxiliary is not None:
                loss = loss + self.auxiliary.weight * self._revived(run, read)
        return loss, error, run.codes

    def _revived(self, run: Pass, read: Tensor | None) -> Tensor:
        """The auxiliary loss; beside sparse codes only the dead latents' pre-activations are computed."""
        options, encoder, weight = (
            cast("AuxiliaryLoss", self.auxiliary),
            self.crosscoder.encoder,
            self.crosscoder.decoder.weight,
        )
        dead, residual = self.silent >= options.after, run.y - run.x_hat
        gate = encoder.sparsifier if isinstance(encoder.sparsifier, Scored) else None
        if read is None:
            score = None if gate is None else gate.scores(run.x)
            return dead_latent_loss(residual, run.pre, dead, weight.to_layers, options.k, score=score)
        index, reader, writer = dead.nonzero().flatten(), cast("Tabled", encoder.weight), cast("Tabled", weight)
        if not len(index):
            return residual.new_zeros(())
        rows, written = cast("Tensor", reader.table)[index], cast("Tensor", writer.table)[index]
        share = min(1.0, len(index) / min(options.k, len(dead)))
        score = (
            None if gate is None else gate.scores(run.x)[index]
        )  # norms of the whole decoder: only where some latent is dead
        pre = read @ rows.T + encoder.bias[index]
        return share * dead_latent_loss(
            residual, pre, dead[index], lambda z: writer.from_bonds(z @ written), options.k, score=score
        )

    def _blame(self, x: Tensor, y: Tensor, loss: Tensor) -> str:
        what, where = f"the loss is {loss.item()}", "the activations are finite; lower the learning rate"
        if loss.isfinite():
            what, where = (
                "the gradient is not finite",
                "the loss is; look for a penalty without a derivative, such as a root of 0",
            )
        for kind, given in (("targets", y), ("tokens", x)):
            bad = ~given.flatten(0, -3).isfinite().all(-1)
            if bad.any():
                layers = bad.any(0).nonzero().flatten().tolist()
                where = (
                    f"{int(bad.any(1).sum())} of its {len(bad)} {kind} hold NaN or infinity, at layers axis {layers}"
                )
        return f"{what} at step {self.steps}, batch {self.steps}: {where}; nothing was updated, and the last checkpoint is as it was"


def _firings(z: Tensor | Codes) -> Tensor:
    """`tokens latents -> latents`: on how many tokens each latent fired."""
    return z.firsts.diff() if isinstance(z, Codes) else (z != 0).flatten(0, -2).sum(0)
