"""How well the layers are rebuilt, and with how many latents."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fmxnn.activations.own_batches import sides_of
from fmxnn.coders.crosscoder import Crosscoder, crosscoder_in
from fmxnn.coders.inputs import check_activations, check_targets
from fmxnn.coders.normalisation import Normalised
from fmxnn.coders.skip import SkipCrosscoder
from fmxnn.core.errors import ShapeError
from fmxnn.core.modes import evaluating
from fmxnn.sparse.codes import to_dense_codes

Compat = Literal["saebench-0.6"]


@dataclass(frozen=True)
class ReconstructionReport:
    """Reconstruction of every layer (float64, axis `layers`) and on average; `densities` has axis `latents`.

    - `mse`: squared error averaged over tokens and coordinates; in squared units of the activations
    - `ev`: 1 - residual / variance around the layer's mean; `mean("ev")` is the headline, `ev_pooled` sums both over
      layers first
    - `cos`: cosine of x and x_hat; `l2_ratio`: norm of x_hat over norm of x; rows of x that are zero are left out of
      both and counted in `zero_rows`
    - `relative_reconstruction_bias`: sum of the squared norm of x_hat over the sum of <x, x_hat> (1: neither shrunk nor
      blown up)
    - `l0`: latents that fire a token, of whatever sign; `dead`: share of latents that never fired; `densities`: share
      of tokens on which each fires (nan and empty where no codes were given)
    - `compat`: the mse and ev of each layer by another library's formulas, under its name; see `numbers`

    ```python
    from fmxnn.metrics import Reconstruction

    measured = Reconstruction()
    x = torch.randn(64, 2, 3)
    measured.update(x, 0.9 * x)
    measured.compute().mean("ev")  # about 0.99
    ```
    """

    tokens: int
    mse: Tensor
    ev: Tensor
    ev_pooled: float
    cos: Tensor
    l2_ratio: Tensor
    relative_reconstruction_bias: Tensor
    zero_rows: Tensor
    l0: float
    dead: float
    densities: Tensor
    compat: Mapping[Compat, Mapping[str, Tensor]]

    def mean(self, name: str) -> float:
        """The mean over layers of a number that is given per layer, such as `mean("mse")`."""
        return float(getattr(self, name).mean())

    def numbers(self, compat: Compat | None = None) -> dict[str, float]:
        """Every headline number by name, for a log line or a table.

        With `compat="saebench-0.6"` it is mse and ev as SAEBench 0.6.0 computes them. Its mse is the mean over tokens
        of ||x - x_hat||^2 / (tokens of the token's batch), so it shrinks with the batch. Its ev is 1 - R / (E - (E /
        d_model)^2) with R and E the means over batches of mean ||x - x_hat||^2 and mean ||x||^2, so nothing is centred
        and it may exceed 1. A batch is one `update`. SAEBench has one layer; here is the mean over layers.
        """
        if compat is not None:
            if compat not in self.compat:
                raise ValueError(f"numbers knows compat {', '.join(map(repr, self.compat))}, got {compat!r}")
            return {name: float(value.mean()) for name, value in self.compat[compat].items()}
        per_layer = ("mse", "ev", "cos", "l2_ratio", "relative_reconstruction_bias")
        return {
            **{name: self.mean(name) for name in per_layer},
            "ev_pooled": self.ev_pooled,
            "l0": self.l0,
            "dead": self.dead,
        }


class Reconstruction:
    """`... layers d_model, ... layers d_model, ... latents`: sums over activations, reconstructions and codes.

    Sums are in float64. Batch boundaries do not matter, but for `compat`, whose formulas depend on them. Drop BOS, EOS
    and padding first, as in training. (fmxcoders, section 4.1)

    ```python
    from fmxnn.metrics import Reconstruction

    measured = Reconstruction()
    for x in torch.randn(4, 64, 2, 3):
        measured.update(x, x.round())
    measured.compute().numbers()["mse"]
    ```
    """

    def __init__(self) -> None:
        self.tokens = self._batches = 0
        self._sums: dict[str, Tensor] = {}
        self._mean = self._spread = torch.zeros(())
        self._fired: Tensor | None = None

    def update(self, x: Tensor, x_hat: Tensor, z: Tensor | None = None) -> None:
        """`... layers d_model, ... layers d_model, ... latents`: adds a batch; codes dense or torch.sparse_csr.

        Raises ShapeError where shapes differ, ValueError for values that are not finite or codes given for some batches
        only.
        """
        if x.shape != x_hat.shape or x.ndim < 2:
            raise ShapeError(
                f"Reconstruction compares two tensors (..., layers, d_model), got {tuple(x.shape)} and "
                f"{tuple(x_hat.shape)}"
            )
        if self.tokens and (z is None) != (self._fired is None):
            raise ValueError("Reconstruction needs codes with every batch or with none")
        x, x_hat = (
            tensor.detach().double().flatten(0, -3) if tensor.ndim > 2 else tensor.detach().double().unsqueeze(0)
            for tensor in (x, x_hat)
        )
        if not x.shape[0]:
            return
        if not (x.isfinite().all() and x_hat.isfinite().all()):
            raise ValueError(
                f"Reconstruction needs finite values; there is a NaN or an infinity after {self.tokens} tokens"
            )
        self._merge(x)
        self._batches += 1
        energy, rebuilt, inner = x.pow(2).sum(-1), x_hat.pow(2).sum(-1), (x * x_hat).sum(-1)
        present = energy > 0
        lengths = energy.sqrt().where(present, 1.0), rebuilt.sqrt()
        product = lengths[0] * lengths[1].where(lengths[1] > 0, 1.0)
        residual = (x - x_hat).pow(2).sum(-1)
        self._add("residual", residual.sum(0))
        self._add("batch residual", residual.mean(0))
        self._add("batch energy", energy.mean(0))
        self._add("cos", (inner / product * present).sum(0))
        self._add("ratio", (lengths[1] / lengths[0] * present).sum(0))
        self._add("rebuilt", rebuilt.sum(0))
        self._add("inner", inner.sum(0))
        self._add("present", present.double().sum(0))
        if z is not None:
            fired = (to_dense_codes(z.detach()) != 0).flatten(0, -2).sum(0)
            self._fired = fired if self._fired is None else self._fired + fired

    def compute(self) -> ReconstructionReport:
        """The report so far. Raises ValueError before the first token."""
        if not self.tokens:
            raise ValueError("Reconstruction has seen no tokens; call update first")
        sums, d_model, present = self._sums, self._mean.shape[-1], self._sums["present"]
        residual, spread = sums["residual"], self._spread.sum(-1)
        densities = torch.empty(0).double() if self._fired is None else self._fired.double() / self.tokens
        return ReconstructionReport(
            tokens=self.tokens,
            mse=residual / (self.tokens * d_model),
            ev=1 - residual / spread,
            ev_pooled=float(1 - residual.sum() / spread.sum()),
            cos=sums["cos"] / present,
            l2_ratio=sums["ratio"] / present,
            relative_reconstruction_bias=sums["rebuilt"] / sums["inner"],
            zero_rows=(self.tokens - present).long(),
            l0=float("nan") if self._fired is None else float(densities.sum()),
            dead=float("nan") if self._fired is None else float((densities == 0).double().mean()),
            densities=densities,
            compat={"saebench-0.6": self._saebench()},
        )

    def _saebench(self) -> dict[str, Tensor]:
        residual, energy = self._sums["batch residual"], self._sums["batch energy"] / self._batches
        spread = energy - (energy / self._mean.shape[-1]).pow(2)
        return {"mse": residual / self.tokens, "ev": 1 - residual / self._batches / spread}

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _merge(self, x: Tensor) -> None:
        """Mean and squared deviations of the stream, merged batch by batch, which large means do not blur. (Chan et al.
        1979)
        """
        count, mean = x.shape[0], x.mean(0)
        spread = (x - mean).pow(2).sum(0)
        if self.tokens:
            shift = mean - self._mean
            self._spread = self._spread + spread + shift.pow(2) * (self.tokens * count / (self.tokens + count))
            self._mean = self._mean + shift * (count / (self.tokens + count))
        else:
            self._mean, self._spread = mean, spread
        self.tokens += count


@torch.no_grad()
def measure_reconstruction(
    crosscoder: Crosscoder | Normalised | SkipCrosscoder, batches: Iterable[Any]
) -> ReconstructionReport:
    """`... layers d_model`: reconstruction over batches, in eval mode (no mask, threshold selection).

    A batch is x, or a pair (x, y) for a transcoder, which rebuilds y from x; both may stand beside token ids, which are
    not looked at (see `OwnActivations`). The crosscoder's mode is put back after. A Normalised is measured in the units
    of the data. Raises ShapeError for other layers or d_model, and where a transcoder gets no y.
    """
    measured = Reconstruction()
    with evaluating(crosscoder):
        for batch in batches:
            measured.update(*rebuilt(crosscoder, *sides_of(batch)))
    return measured.compute()


def rebuilt(
    crosscoder: Crosscoder | Normalised | SkipCrosscoder, x: Tensor, y: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`... layers d_model, ... layers d_model -> ... layers d_model, ... layers d_model, ... latents`.

    What is to be rebuilt, how it was rebuilt, and the codes; without y, x itself is to be rebuilt. Raises ShapeError as
    `measure_reconstruction` does.
    """
    inner = crosscoder_in(crosscoder)
    like = inner.encoder.bias
    check_activations(inner, x.shape)
    check_targets(inner, x, y)
    x = x.to(like.device, like.dtype)
    y = x if y is None else y.to(like.device, like.dtype)
    z = crosscoder.encode(x)
    skips = any(isinstance(part, SkipCrosscoder) for part in crosscoder.modules())  # decode leaves a skip out
    return y, crosscoder(x) if skips else crosscoder.decode(z), z
