"""A gate for each run of neighbouring latents."""

from collections.abc import Iterator
from typing import NoReturn, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.gates.gate import Chooser, HasK
from fmxnn.gates.questions import threshold_of, why_dense
from fmxnn.gates.thresholds import Calibrated, ranked
from fmxnn.sparse import codes as sparse
from fmxnn.sparse.tables import Tables, split_rows


class SplitGate(Calibrated):
    """`... latents -> ... latents`: each run of neighbouring latents goes through a gate of its own.

    `runs` says how many latents each gate takes. `k`, where every gate has one, is what they keep together.
    Codes are sparse where every gate's can be.

    ```python
    gate = fx.SplitGate(fx.TopK(2), fx.BatchTopK(4), runs=(8, 24))
    gate(torch.randn(5, 32)).shape  # (5, 32)
    ```
    """

    takes_tables = True
    k_is_fixed = True

    def __init__(self, *gates: nn.Module, runs: tuple[int, ...]):
        super().__init__()
        if len(gates) != len(runs) or not gates:
            raise ValueError(
                f"SplitGate takes one run of latents for each gate, got {len(gates)} gates and runs={tuple(runs)}; "
                "give as many runs as gates"
            )
        self.gates, self.runs, self.latents = nn.ModuleList(gates), tuple(runs), sum(runs)

    @override
    def extra_repr(self) -> str:
        """How many latents each gate takes."""
        return f"runs={self.runs}"

    @property
    def k(self) -> int:
        """The sum of the gates'."""
        return sum(cast("HasK", gate).k for gate in self.gates)

    @k.setter
    def k(self, k: int) -> NoReturn:
        """Raises TypeError: how a sum is shared out is not known."""
        raise TypeError(
            f"SplitGate's k is the sum of its {len(self.gates)} gates', got k={k!r:.200}; "
            "set a gate's own: split.gates[0].k"
        )

    @property
    def threshold(self) -> Tensor:
        """The smallest of the gates' that have one."""
        found = [threshold.amin() for gate in self.gates if (threshold := threshold_of(gate)) is not None]
        if not found:
            raise AttributeError("no gate of this SplitGate has a threshold")
        return torch.stack(found).amin()

    @property
    def obstacle(self) -> str:
        """Why codes cannot be sparse, if they cannot."""
        return next(filter(None, map(why_dense, self.gates)), "")

    def forward(self, pre: Tensor) -> Tensor:
        """`... latents -> ... latents`"""
        return torch.cat(
            [gate(run) for gate, run in zip(self.gates, pre.split(self.runs, dim=-1), strict=True)], dim=-1
        )

    def choose(self, read: Tensor, table: Tensor | Tables, bias: Tensor, *, propose: bool = False) -> sparse.Codes:
        """`tokens bonds, latents bonds, latents -> tokens latents`: sparse codes, each gate's from its own rows."""
        pieces = zip(self.gates, split_rows(read, table, self.runs), bias.split(self.runs), strict=True)
        return sparse.side_by_side(
            [
                cast("Chooser", gate).choose(mine, cast("Tensor", rows), shift, propose=propose)
                for gate, (mine, rows), shift in pieces
            ]
        )

    def ranked(self, pre: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """`... latents -> `: what each gate ranks of its own run."""
        for gate, run in zip(self.gates, pre.split(self.runs, dim=-1), strict=True):
            yield from ranked(gate, run)
