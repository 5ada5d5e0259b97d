"""A loop over an objective: the step, and everything that a checkpoint must hold."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from secrets import token_hex
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.core.errors import NonFiniteError
from fmxnn.core.seeds import seed_of
from fmxnn.core.sharding import is_sharded
from fmxnn.training.objective import Objective
from fmxnn.training.optimizers import check_optimizer, check_settings, optimizer_state, restore_optimizer
from fmxnn.training.ranks import finite_everywhere, groups_of, warn_apart
from fmxnn.training.resuming import name_of, noted
from fmxnn.training.terms import AuxiliaryLoss, Term

_INNER = "crosscoder."
"""What stands before the names of a crosscoder's own tensors in an objective; checkpoints leave it out."""


class Trainer:
    """Trains an objective a batch at a time: loss, clipping, optimiser, and the counters of a run.

    * `module`: an Objective, or one inside DistributedDataParallel, `torch.compile` or `fully_shard`: what is given is
      what is called. A crosscoder, Normalised or SkipCrosscoder is put into an Objective of its own.
    * `seed`: masks are drawn from a generator seeded by (seed, step), so a run resumed at a step goes on bit for bit.
    * `auxiliary`: a term of the loss of this name, beside those that the objective has.
    * `dtype`: bfloat16 runs the products under autocast; parameters, thresholds and the optimiser stay as they are.

    Raises ValueError for an optimiser that leaves out a parameter which requires a gradient, and warns of parameters
    in it that are not the objective's. After the last step `calibrate` sets the threshold of a BatchTopK.

    ```python
    crosscoder = fx.Crosscoder(
        fx.CrossLayerEncoder(fx.DenseWeight(2, 4, 16), fx.BatchTopK(2)), fx.CrossLayerDecoder(fx.DenseWeight(2, 4, 16))
    )
    trainer = fx.training.Trainer(crosscoder, torch.optim.Adam(crosscoder.parameters(), lr=1e-3))
    trainer.step(torch.randn(32, 2, 4))["loss"]
    ```
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int = 0,
        auxiliary: AuxiliaryLoss | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        found = next((part for part in module.modules() if isinstance(part, Objective)), None)
        self.objective = Objective(module) if found is None else found
        """The crosscoder, and the terms of its loss."""
        self.module = self.objective if found is None else module
        """What each step calls: the objective, or what was wrapped around it."""
        check_optimizer(self._parameters(), optimizer)
        warn_apart(self.module)
        self.optimizer, self.seed, self.dtype = optimizer, seed, dtype
        if auxiliary is not None:
            self.auxiliary = auxiliary
        self.clip = 1.0
        self.schedules: list[Callable[[int], None]] = []
        """Each is called with the number of steps done, after each step and on resuming; of two that set one thing
        the later wins. See `anneal_k`."""
        self.run = token_hex(8)
        """Which run this is; a resumed one is the same run."""
        self.steps = 0
        self.tokens = 0

    @property
    def crosscoder(self) -> Crosscoder:
        """What is trained: the crosscoder that the objective holds, or the Normalised or SkipCrosscoder."""
        return cast("Crosscoder", self.objective.crosscoder)

    @property
    def penalty(self) -> Term | None:
        """A term of the loss: `trainer.penalty = lambda run: 0.04 * l1_penalty(run.codes, weight.norms())`."""
        return self.objective.terms.get("penalty")

    @penalty.setter
    def penalty(self, penalty: Term | None) -> None:
        """Puts it before the other terms; None takes it away."""
        others = {name: term for name, term in self.objective.terms.items() if name != "penalty"}
        self.objective.terms = others if penalty is None else {"penalty": penalty, **others}

    @property
    def auxiliary(self) -> Term | None:
        """The auxiliary loss, the term of this name, if there is one."""
        return self.objective.terms.get("auxiliary")

    @auxiliary.setter
    def auxiliary(self, auxiliary: Term | None) -> None:
        """Puts it behind the other terms; None takes it away."""
        others = {name: term for name, term in self.objective.terms.items() if name != "auxiliary"}
        self.objective.terms = others if auxiliary is None else {**others, "auxiliary": auxiliary}

    @property
    def silent(self) -> Tensor:
        """`latents`: tokens since each latent fired."""
        return self.objective.silent

    @silent.setter
    def silent(self, silent: Tensor) -> None:
        """Copies the counts into the objective's buffer."""
        self.objective.silent.copy_(silent)

    @property
    def device(self) -> torch.device:
        """Where the crosscoder is, and where batches are moved to."""
        return self.objective.coder.encoder.bias.device

    def step(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """`tokens layers d_model, tokens layers d_model`: one update of every parameter.

        Gives what the objective gives (loss, error, l0, dead and its terms) and the gradient's norm, unsynchronised.
        `y` is what a transcoder rebuilds from x, of the same tokens at the decoder's layers; None: x itself. Any batch
        axes will do. Raises ShapeError and TypeError for an x or y of other axes, without tokens or not in floating
        point, ValueError for a learning rate that is not finite, and NonFiniteError for a loss or gradient that is
        not: weights, thresholds and counters are then as they were.
        """
        check_settings(self.optimizer, self.clip)
        x, y = self.placed(x, y)
        self.module.train()
        with self._as_it_was():
            numbers = self._run(x, y)
            numbers["loss"].backward()
            parameters = [p for p in self.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([cast("Tensor", p.grad) for p in parameters])
            norm = cast("Any", norm).full_tensor() if is_sharded(norm) else norm  # of sharded parameters
            loss = numbers["loss"] = numbers["loss"].detach()
            if not finite_everywhere(loss + norm, self.module):  # the step's one synchronisation
                raise NonFiniteError(self._blame(x, y, loss, norm))
        self._update(parameters, norm)
        self.steps, self.tokens = self.steps + 1, self.tokens + x.shape[:-2].numel()
        self.follow_schedule(self.steps)
        return {**numbers, "gradient_norm": norm}

    def placed(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`tokens layers d_model, tokens layers d_model`: a batch and what is rebuilt; see `Objective.placed`."""
        return self.objective.placed(x, y)

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
        """What a run goes on from, beside the crosscoder: tensors, and as plain values what must stay the same."""
        tensors, about = optimizer_state(self.optimizer, self._parameters())
        terms = self.objective.terms
        objective: dict[str, Any] = {"seed": self.seed, "dtype": str(self.dtype), "clip": str(self.clip)}
        objective |= {"auxiliary": noted(terms.pop("auxiliary", None)), "penalty": noted(terms.pop("penalty", None))}
        objective |= {"schedules": [name_of(schedule) for schedule in self.schedules]}
        objective |= {"terms": {name: noted(term) for name, term in terms.items()}} if terms else {}
        counters = {"run": self.run, "steps": self.steps, "tokens": self.tokens, "seed": self.seed}
        return {**self._own(), **tensors}, {**counters, "objective": objective, **about}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave, with the optimiser's settings as they are now.

        Raises ValueError for tensors that do not fit, with the trainer as it was.
        """
        own = self._own()
        for name, mine in own.items():
            given = tensors.get(name)
            if given is None or (given.shape, given.dtype) != (mine.shape, mine.dtype):
                got = "none" if given is None else f"{given.dtype} {tuple(given.shape)}"
                wanted = (
                    f"counts tokens for each of {len(mine)} latents"
                    if name == "silent"
                    else f"is {mine.dtype} {tuple(mine.shape)}"
                )
                raise ValueError(f"{name!r} {wanted}, got {got}")
        restore_optimizer(self.optimizer, {name: value for name, value in tensors.items() if name not in own})
        for name, mine in own.items():
            mine.copy_(tensors[name])
        self.run, self.steps, self.tokens, self.seed = (numbers[key] for key in ("run", "steps", "tokens", "seed"))

    def _own(self) -> dict[str, Tensor]:
        """The objective's own state beside the crosscoder's: what is silent, and what its terms hold."""
        return {name: value for name, value in self.objective.state_dict().items() if not name.startswith(_INNER)}

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name.removeprefix(_INNER): value for name, value in self.objective.named_parameters()}

    def _run(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Calls the module, with the masks of this step."""
        with (
            torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32),
        ):
            # torch.manual_seed also seeds devices that are not there, which takes a fifth of a small step
            seed = torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed
            seed(seed_of(self.seed, "mask", self.steps))
            numbers = dict(self.module(x) if y is x else self.module(x, y))
        self.optimizer.zero_grad(set_to_none=True)
        return numbers

    @contextmanager
    def _as_it_was(self) -> Generator[None]:
        """Puts thresholds and counters back, and leaves no gradient, where a step ends before its update."""
        before, done = {name: buffer.clone() for name, buffer in self.module.named_buffers()}, False
        try:
            yield
            done = True
        finally:
            if not done:
                self.optimizer.zero_grad(set_to_none=True)
                for name, buffer in self.module.named_buffers():
                    buffer.copy_(before[name])

    def _update(self, parameters: list[nn.Parameter], norm: Tensor) -> None:
        """Clips the gradients' norm and steps; a fused optimiser divides as it reads, without a pass of its own."""
        sharded = any(map(is_sharded, parameters))
        if not sharded and all(group.get("fused") for group in self.optimizer.param_groups):
            fused = cast("Any", self.optimizer)
            fused.grad_scale = (norm / self.clip).clamp(min=1)
            fused.step()
            del fused.grad_scale
        else:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
            self.optimizer.step()

    def _blame(self, x: Tensor, y: Tensor, loss: Tensor, norm: Tensor) -> str:
        what, where = f"the loss is {loss.item()}", "the activations are finite; lower the learning rate"
        if loss.isfinite() and norm.isfinite():
            what, where = "a loss is not finite", "the one of this rank is; see what another rank says"
        elif loss.isfinite():
            what = "the gradient is not finite"
            where = "the loss is; look for a penalty without a derivative, such as a root of 0"
            if groups_of(self.module):  # the gradient is that of all of them
                where = "the loss of this rank is; see what another rank says"
        for kind, given in (("targets", y), ("tokens", x)):
            bad = ~given.flatten(0, -3).isfinite().all(-1)
            if bad.any():
                layers = bad.any(0).nonzero().flatten().tolist()
                count = f"{int(bad.any(1).sum())} of its {len(bad)} {kind}"
                where = f"{count} hold NaN or infinity, at layers axis {layers}"
        at = f"at step {self.steps}, batch {self.steps}"
        return f"{what} {at}: {where}; nothing was updated, and the last checkpoint is as it was"
