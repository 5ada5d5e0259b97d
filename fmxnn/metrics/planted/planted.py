"""Activations with known cross-layer features: a truth that a crosscoder can be held against."""

from dataclasses import dataclass, field
from itertools import product
from math import floor, log, sqrt
from typing import cast

import torch
from torch import Tensor, nn

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.decoder import CrossLayerDecoder
from fmxnn.coders.encoder import CrossLayerEncoder
from fmxnn.core.seeds import seed_of
from fmxnn.gates.jump_relu import JumpReLU
from fmxnn.metrics.planted.planting import MOTIONS, NEVER, SPANS, Firing, Planting, Surroundings, normal, unit
from fmxnn.weights.factorized import DenseWeight

LEAST = 0.5
ROUNDING = 1e-3


class PlantedFeatures(nn.Module):
    """`-> tokens layers d_model, tokens features`: x = z atoms + offset, with features of known spans and motions.

    Everything depends on the arguments alone, and a batch also on its number: `batch(3, tokens=1024)` is always the
    same. Buffers: `atoms` (`features layers d_model`), `offset` and `massive` (`layers d_model`). `kinds` names each
    feature's span and motion.

    `.to(...)` moves it and casts what `batch` gives, at first the default dtype on the CPU. Codes are drawn in float32
    by the device's own generator: they do not depend on the dtype, and a GPU's tokens are not a CPU's. Raises
    ValueError where a span does not fit the layers, or the rarest feature would never fire.

    ```python
    from fmxnn.metrics.planted import PlantedFeatures

    truth = PlantedFeatures(layers=6, d_model=16, features=24)
    x, z = truth.batch(0, tokens=32)
    truth.kinds[0]  # the span and motion of the first feature
    ```
    """

    atoms: Tensor
    offset: Tensor
    massive: Tensor

    def __init__(self, layers: int, d_model: int, features: int, *, planting: Planting | None = None, seed: int = 0):
        super().__init__()
        self.layers, self.d_model, self.features = layers, d_model, features
        self.planting, self.seed = Planting() if planting is None else planting, seed
        self._check()
        atoms = self._plant(torch.Generator().manual_seed(seed_of(seed, "atoms")))
        surroundings = self.planting.surroundings
        growth = surroundings.growth ** torch.arange(layers).double()
        around = unit(
            normal(2, layers, d_model, generator=torch.Generator().manual_seed(seed_of(seed, "surroundings")))
        )
        buffers = {
            "atoms": atoms,
            "offset": surroundings.mean * around[0],
            "massive": surroundings.massive_norm * around[1],
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, (buffer * growth.unsqueeze(-1)).to(torch.get_default_dtype()), persistent=False)

    def extra_repr(self) -> str:
        """Sizes, and how many features fire a token."""
        sizes = f"layers={self.layers}, d_model={self.d_model}, features={self.features}, seed={self.seed}"
        return f"{sizes}, {float(self.frequencies.sum()):.3g} features a token, {self.planting}"

    @property
    def frequencies(self) -> Tensor:
        """`-> features`: the share of tokens on which each feature fires, exact by construction, in float64."""
        rank = torch.arange(1, self.features + 1, dtype=torch.float64, device=self.atoms.device)
        return self.planting.firing.most * rank**-self.planting.firing.zipf

    @property
    def spans(self) -> Tensor:
        """`-> features layers`: where each feature lives."""
        return (self.atoms != 0).any(-1)

    @property
    def norm_coherence(self) -> Tensor:
        """`-> features`: c_n of the true atoms, sum over layers of N / max N. (fmxcoders, equation 4)"""
        norms = self.atoms.double().norm(dim=-1)
        return norms.sum(1) / norms.amax(1)

    @property
    def functional_coherence(self) -> Tensor:
        """`-> features`: c_f of a reader that weighs layers by their share of the feature's energy.

        Such a reader's code is z = sum_l s_l z with s_l = N_l^2 / sum N^2. Hiding layer l takes the share S_l = s_l of
        it at every token, so c_f = sum s / max s, which is the sum over layers of N^2 / max N^2. (fmxcoders, equation
        5)
        """
        energy = self.atoms.double().pow(2).sum(-1)
        return energy.sum(1) / energy.amax(1)

    @property
    def separable(self) -> bool:
        """Whether each layer can be read alone: its features, the offset and the massive direction are independent.

        Then `crosscoder()` has the codes exactly, and `functional_coherence` for its c_f. It takes no more features a
        layer than d_model.
        """
        return _independent(self._things().movedim(1, 0))

    @torch.no_grad()
    def batch(self, number: int, tokens: int) -> tuple[Tensor, Tensor]:
        """`-> tokens layers d_model, tokens features`: activations and true codes of batch `number`.

        The number may be negative.
        """
        z, around = self.codes(number, tokens), self.planting.surroundings
        x = (z @ self.atoms.flatten(1)).view(tokens, self.layers, self.d_model) + self.offset
        massive = torch.rand(tokens, generator=self._generator("massive", number), device=x.device) < around.massive
        return x + massive.to(x.dtype).view(-1, 1, 1) * self.massive, z

    @torch.no_grad()
    def codes(self, number: int, tokens: int) -> Tensor:
        """`-> tokens features`: the true codes of batch `number` alone.

        A feature that fires does so at 1/2 + an exponential of mean 1/2.
        """
        firing, generator, device = self.planting.firing, self._generator("codes", number), self.atoms.device
        groups = -(-self.features // firing.group)
        shared = torch.randn(tokens, groups, generator=generator, device=device, dtype=torch.float32)
        own = torch.randn(tokens, self.features, generator=generator, device=device, dtype=torch.float32)
        drive = own.mul_(sqrt(1 - firing.correlation)).add_(
            shared.mul_(sqrt(firing.correlation)).repeat_interleave(firing.group, 1)[:, : self.features]
        )
        frequency = self.frequencies
        token, feature = (drive > -torch.special.ndtri(frequency).float()).nonzero(as_tuple=True)
        tail = torch.special.log_ndtr(
            -drive[token, feature].double()
        )  # uniform in [0, frequency] where the feature fires, as a logarithm
        z = torch.zeros(tokens, self.features, dtype=self.atoms.dtype, device=device)
        z[token, feature] = (LEAST + (1 - LEAST) * (frequency.log()[feature] - tail)).to(z.dtype)
        return z

    @torch.no_grad()
    def crosscoder(self) -> Crosscoder:
        """The dictionary that an oracle would build: latent i writes atom i and reads code i alone, in eval mode.

        Where the truth is `separable`, each layer is read alone, and layers are weighed by their share of the feature's
        energy. Otherwise the layers are read together, which is exact while all atoms are independent, and the best in
        least squares beyond that.
        """
        things, energy = self._things(), self.atoms.double().pow(2).sum(-1)
        if self.separable:
            shares = energy / energy.sum(1, keepdim=True)
            readers = shares.unsqueeze(-1) * torch.linalg.pinv(things.movedim(1, 0)).permute(2, 0, 1)[: self.features]
        else:
            readers = torch.linalg.pinv(things.flatten(1)).T[: self.features].view_as(self.atoms)
        limit = LEAST * (ROUNDING if _independent(things.flatten(1)) else 0.5)
        encoder = CrossLayerEncoder(DenseWeight(self.layers, self.d_model, self.features), JumpReLU(self.features))
        decoder = CrossLayerDecoder(DenseWeight(self.layers, self.d_model, self.features))
        made = Crosscoder(encoder, decoder).to(self.atoms.device, self.atoms.dtype).eval()
        for weight, rows in ((encoder.weight, readers), (decoder.weight, self.atoms)):
            cast("DenseWeight", weight).factors[0].copy_(rows)
        encoder.bias.copy_(-(readers * self.offset).sum((1, 2)))
        decoder.bias.copy_(self.offset)
        cast("JumpReLU", encoder.sparsifier).threshold.fill_(limit)
        return made

    def _things(self) -> Tensor:
        """`-> features+2 layers d_model`: all that a token can be made of; what it never is made of is zero. Of the
        last two the direction alone matters.
        """
        around = torch.stack([self.offset, self.massive * (self.planting.surroundings.massive > 0)]).double()
        norms = around.flatten(1).norm(dim=1).view(2, 1, 1)
        return torch.cat([self.atoms.double(), around / norms.where(norms > 0, 1.0)])

    def _plant(self, generator: torch.Generator) -> Tensor:
        """`-> features layers d_model`; kinds come in rounds, each a permutation of all, so that none is more frequent
        than another.
        """
        every = list(product(self.planting.spans, self.planting.motions))
        rounds = [torch.randperm(len(every), generator=generator) for _ in range(-(-self.features // len(every)))]
        self.kinds = tuple(every[i] for i in torch.cat(rounds).tolist()[: self.features])
        profiles = torch.stack([SPANS[span].draw(self.layers, generator) for span, _ in self.kinds])
        atoms = torch.empty(self.features, self.layers, self.d_model, dtype=torch.float64)
        for name in dict.fromkeys(self.planting.motions):
            these = torch.tensor([motion == name for _, motion in self.kinds])
            atoms[these] = MOTIONS[name](profiles[these] > 0, self.d_model, self.planting.turn, generator)
        return atoms * profiles.unsqueeze(-1)

    def _generator(self, *what: int | str) -> torch.Generator:
        return torch.Generator(self.atoms.device).manual_seed(seed_of(self.seed, *what))

    def _check(self) -> None:
        for name, least in (("layers", 1), ("d_model", 2), ("features", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"PlantedFeatures needs {name} >= {least}, got {name}={getattr(self, name)}")
        for name in self.planting.spans:
            if self.layers < SPANS[name].least:
                raise ValueError(
                    f"the span {name!r} needs layers >= {SPANS[name].least}, got layers={self.layers}; leave it out "
                    "of Planting(spans=...)"
                )
        firing = self.planting.firing
        rarest = firing.most * self.features**-firing.zipf
        if rarest < NEVER:
            largest = log(firing.most / NEVER) / log(self.features)
            raise ValueError(
                f"at zipf={firing.zipf} the rarest of features={self.features} fires on a share of {rarest:.1g} of "
                "the tokens, which is never; "
                f"take zipf <= {floor(100 * largest) / 100}"
            )


@dataclass(frozen=True)
class Training:
    """The training that a truth is meant for: `steps` batches of `tokens`, for `latents` of which `k` fire a token.

    ```python
    from fmxnn.metrics.planted.planted import Training

    Training(latents=128, k=3, steps=1200, tokens=256)
    ```
    """

    latents: int
    k: int
    steps: int
    tokens: int


@dataclass(frozen=True)
class Preset:
    """Sizes of a truth, and the training that it is meant for.

    ```python
    from fmxnn.metrics.planted import PRESETS

    preset = PRESETS["seconds"]
    truth = preset.truth(seed=0)
    x, z = truth.batch(0, tokens=preset.training.tokens)
    ```
    """

    layers: int
    d_model: int
    features: int
    training: Training
    planting: Planting = field(default_factory=Planting)

    def truth(self, *, seed: int = 0) -> PlantedFeatures:
        """The features of these sizes."""
        return PlantedFeatures(self.layers, self.d_model, self.features, planting=self.planting, seed=seed)


LIFELIKE = Planting(
    firing=Firing(correlation=0.3), surroundings=Surroundings(growth=1.1, mean=3.0, massive=0.001, massive_norm=30.0)
)
PRESETS = {
    "seconds": Preset(6, 32, 96, Training(latents=128, k=3, steps=1200, tokens=256)),
    "minutes": Preset(8, 64, 384, Training(latents=512, k=4, steps=6000, tokens=512), LIFELIKE),
    "gpu": Preset(12, 256, 2048, Training(latents=4096, k=5, steps=20_000, tokens=4096), LIFELIKE),
}
"""`seconds`: features alone, for a test or a first look. `minutes` and `gpu`: with correlations, layers that grow,
large means and massive tokens.
"""


def _independent(things: Tensor) -> bool:
    """`... rows columns`: whether the rows that are not zero are linearly independent."""
    count = (things != 0).any(-1).sum(-1)
    return bool((count <= things.shape[-1]).all()) and torch.equal(torch.linalg.matrix_rank(things), count)
