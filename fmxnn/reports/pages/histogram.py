"""How often and how strongly latents fire, counted in bins while the tokens pass."""

import torch
from torch import Tensor

from fmxnn.metrics.firing import ChosenCodes

BINS = 64


class Histograms:
    """`tokens latents`: for each of `latents`, a histogram of its positive activations.

    It has BINS bins from 0 to the smallest power of two above the largest activation so far. When that grows, bins
    merge in pairs, so that batch boundaries do not matter and no activation is kept.

    ```python
    from fmxnn.reports.pages.histogram import Histograms

    seen = Histograms([0, 1])
    seen.update(torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    seen.densities  # tensor([0.5, 1.0])
    ```
    """

    def __init__(self, latents: list[int]):
        self.tokens = 0
        self._chosen = ChosenCodes(latents)
        self.counts = torch.zeros(len(latents), BINS, dtype=torch.long)
        self.fired = torch.zeros(len(latents), dtype=torch.long)
        self.largest = torch.zeros(len(latents), dtype=torch.float64)

    @property
    def densities(self) -> Tensor:
        """`-> latents`: the share of tokens on which each fires, of whatever sign."""
        return self.fired.double() / max(self.tokens, 1)

    @property
    def widths(self) -> Tensor:
        """`-> latents`: how wide each one's bins are, in units of the activations; 0 where none fired."""
        return torch.ldexp((self.largest > 0).double(), _exponents(self.largest)) / BINS

    def update(self, z: Tensor) -> None:
        """`tokens latents -> `: adds a batch of codes, dense or torch.sparse_csr."""
        _, latent, activation = self._chosen(z)
        self.tokens += z.shape[0]
        self.fired += torch.bincount(latent, minlength=len(self.fired))
        latent, activation = latent[activation > 0], activation[activation > 0]
        before = _exponents(self.largest)
        self.largest = self.largest.scatter_reduce(0, latent, activation, "amax")
        grown = (_exponents(self.largest) - before).clamp(max=BINS.bit_length()).unsqueeze(1)
        merged = torch.arange(BINS).expand_as(self.counts) >> grown
        self.counts = torch.zeros_like(self.counts).scatter_add(1, merged, self.counts)
        bins = (activation / self.widths[latent]).long()
        self.counts.index_put_((latent, bins), torch.ones_like(bins), accumulate=True)


def _exponents(largest: Tensor) -> Tensor:
    """The smallest e with largest < 2^e; for latents that have not fired far below any."""
    return torch.where(largest > 0, torch.frexp(largest).exponent, -1000)
