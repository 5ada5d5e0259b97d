"""Gates that keep the largest pre-activations: of each token, or of a whole batch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.gates.axis import AlongAxis
from fmxnn.gates.gate import Counted, Thresholded, above, fitting_k
from fmxnn.gates.steps import Moves
from fmxnn.gates.thresholds import Calibrated, warn_local, warn_unset
from fmxnn.sparse import codes as sparse
from fmxnn.sparse.across_ranks import LOCAL, WORLD, name_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TopK(Counted, AlongAxis):
    """`... latents -> ... latents`: keeps the `k` largest positive pre-activations of each token.

    ```python
    gate = fx.TopK(2)
    gate(torch.tensor([3.0, 1.0, -5.0, 2.0]))  # 3, 0, 0, 2
    fx.TopK(2, dim=1)(torch.randn(8, 64, 7, 7))  # as an activation: 2 of 64 channels at each pixel
    ```
    """

    takes_tables = True

    def __init__(self, k: int, *, dim: int = -1):
        super().__init__(k)
        self.dim = dim

    @override
    def extra_repr(self) -> str:
        """How many latents a token keeps, and the axis if it is not the last."""
        return f"k={self.k}{self.shown_axis()}"

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        return self.along(pre, self._largest)

    def choose(self, read: Tensor, table: Tensor, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`: sparse codes, without the pre-activations.

        `propose` is for BatchTopK.
        """
        return sparse.choose(read, table, bias, "each", fitting_k(self, len(bias)))

    def _largest(self, pre: Tensor) -> Tensor:
        top = pre.relu().topk(fitting_k(self, pre.shape[-1]), dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)


class BatchTopK(Thresholded, Counted, Calibrated, AlongAxis):
    """`... latents -> ... latents`: keeps the `tokens k` largest positive pre-activations of a whole batch.

    In training the count is exact (fewer only where fewer are positive), and a token may hold more or fewer than
    `k`. In eval mode each token stands alone: kept is what exceeds `threshold`, in units of the pre-activations.
    It is a moving average of the smallest value kept in training. Before training it is -1, and eval mode keeps
    every positive and warns. (Bussmann et al. 2024; fmxcoders, section 3)

    - `decay`: the share of the old threshold that stays at a move. Each training forward is a move; within
      `one_step` all forwards of an optimiser step are one.
    - `group`: whose tokens are one batch in training. `"world"` or a process group: those of all its ranks, exactly
      as if one process held them. `"local"`: those of this process. None is the same, and warns once where there
      are several ranks. A recipe says "world" for any process group.
    - `dim`: the axis of the latents; all others are tokens. Sparse codes need the last.

    Raises RuntimeError in training for a group that was not initialised, and ValueError on all ranks where k or
    latents differ.

    ```python
    gate = fx.BatchTopK(1)
    pre = torch.tensor([[9.0, 8.0, -1.0], [1.0, 2.0, 0.5]])
    gate(pre)  # 9 and 8: two of the batch, both of its first token
    gate.eval()(pre + 1)  # 10 and 9: what exceeds the threshold of 8
    ```
    """

    added_later: ClassVar[tuple[str, ...]] = ("dim", "group")
    takes_tables = True

    threshold: Tensor
    asked = False
    """Whether eval mode has looked if the threshold was ever set; see `warn_unset`."""
    asked_ranks = False
    """Whether training has looked if there are several ranks; see `warn_local`."""

    def __init__(self, k: int, *, decay: float = 0.9, group: "str | ProcessGroup | None" = None, dim: int = -1):
        super().__init__(k)
        if not 0 <= decay < 1:
            raise ValueError(
                "BatchTopK needs 0 <= decay < 1, the share of the old threshold that stays at a step, "
                f"got decay={decay}"
            )
        self.decay, self.group, self.dim = decay, group, dim
        self.register_buffer("threshold", torch.full((), -1.0, dtype=torch.float32))
        self._moves = Moves()

    @property
    def group(self) -> str | None:
        """Whose tokens are one batch, as a recipe says it: "world" for any process group, "local", or None."""
        return self._group

    @group.setter
    def group(self, group: "str | ProcessGroup | None") -> None:
        """Takes a process group too. Raises ValueError for anything else."""
        self._ranks = "" if group is None or group == LOCAL else name_of(group)
        """The name of a process group; empty for this process alone."""
        self._group = WORLD if self._ranks else None if group is None else LOCAL

    @property
    @override
    def obstacle(self) -> str:
        """Why codes cannot be sparse, if they cannot."""
        if self.training and self._ranks and torch.compiler.is_compiling():
            return "a compiled graph holds no codes whose number varies, and over ranks it does"
        return self.why_not_last()

    @override
    def extra_repr(self) -> str:
        """The number kept a token, and whose tokens are one batch."""
        return f"k={self.k}" + (f", group={self.group!r}" if self.group else "") + self.shown_axis()

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        if not self.training:
            warn_unset(self)
            return self.along(pre, self._above)
        warn_local(self)
        z = self.select(pre)
        self._follow(z)
        return z

    def choose(self, read: Tensor, table: Tensor, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`: the same codes, without the pre-activations."""
        if not self.training:
            warn_unset(self)
            return sparse.choose(read, table, bias, "above", self.threshold, propose=propose)
        warn_local(self)
        if self._ranks:
            z = sparse.choose(read, table, bias, "ranks", self.k, propose=propose, group=self._ranks)
        else:
            count = read.shape[0] * fitting_k(self, len(bias))
            z = sparse.choose(read, table, bias, "batch", count, propose=propose)
        self._follow(z.values)
        return z

    def select(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`: the exact choice, with the threshold untouched.

        In eval mode it is among these tokens alone, so that one rank can measure while the others do not.
        """
        return self.along(pre, self._largest)

    def ranked(self, pre: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """`... latents -> `: itself and all of them."""
        yield self, pre

    def _above(self, pre: Tensor) -> Tensor:
        return above(pre, self.threshold.clamp(min=0))

    def _largest(self, pre: Tensor) -> Tensor:
        tokens = pre.reshape(-1, pre.shape[-1])
        if self.training and self._ranks:
            kept = sparse.keep_largest_of_ranks(tokens, self.k, self._ranks)
        else:
            kept = sparse.keep_largest(tokens, len(tokens) * fitting_k(self, pre.shape[-1]))
        return torch.where(kept.view_as(pre), pre, 0.0)

    @torch.no_grad()
    def _follow(self, z: Tensor) -> None:
        """Moves the threshold by the smallest of these codes; a rank without codes gives the others infinity."""
        if not (z.numel() or self._ranks):
            return
        positive = z.detach().masked_fill(z <= 0, torch.inf)
        smallest = positive.amin() if z.numel() else positive.new_full((), torch.inf)
        self._moves.follow(self.threshold, smallest.to(self.threshold.dtype), self.decay, self._ranks)
