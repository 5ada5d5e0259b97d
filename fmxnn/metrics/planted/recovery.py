"""How much of a planted truth a crosscoder has found; needs scipy (`pip install 'fmxnn[metrics]'`)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import beta
from torch import Tensor

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.core.errors import ShapeError
from fmxnn.core.modes import evaluating
from fmxnn.metrics.coherence import functional_coherence, norm_coherence
from fmxnn.metrics.planted.planted import PlantedFeatures
from fmxnn.sparse.codes import to_dense_codes
from fmxnn.weights.weight import Weight

HELD_OUT = range(-16, 0)
BLOCK = 1024


@dataclass(frozen=True)
class Support:
    """On which layers features live, and the latents matched to them: `true` and `learned`, both `features layers`.

    The three shares are per feature (`axis=1`) or per layer (`axis=0`). They are nan where nothing was to be found, or
    nothing was.

    ```python
    from fmxnn.metrics.planted.recovery import Support

    support = Support(torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]]))
    support.precision(), support.recall()  # tensor([1.]), tensor([0.5])
    ```
    """

    true: Tensor
    learned: Tensor

    def precision(self, axis: int = 1) -> Tensor:
        """The share of the learned layers that are true."""
        return self._both(axis) / self.learned.sum(axis)

    def recall(self, axis: int = 1) -> Tensor:
        """The share of the true layers that are learned."""
        return self._both(axis) / self.true.sum(axis)

    def iou(self, axis: int = 1) -> Tensor:
        """Layers in both over layers in either."""
        return self._both(axis) / (self.true | self.learned).sum(axis)

    def _both(self, axis: int) -> Tensor:
        return (self.true & self.learned).sum(axis).double()


@dataclass(frozen=True)
class Recovery:
    """What was found, feature by feature; all tensors have axis `features` first and are on the CPU in float64.

    - `latent`: the latent matched to each feature, -1 where none is; `cosine`: of the two atoms over all layers, 0
      where unmatched, nan where the feature never fired on the tokens seen and is not judged
    - `nearest`: the largest cosine of each feature to any latent; `nearest_feature` (`latents`): of each latent to any
      feature, nan for one left out
    - `f1`: of the matched latent's firing as a detector of the feature's firing, 0 where unmatched
    - `c_n`, `c_f`: coherence of the matched latent beside the feature's closed form (`features 2`: learned, true), nan
      where either is missing
    - `silent`: latents left out since they never fired on the tokens seen; `zero`: latents left out since their atom is
      zero
    - `chance`: what `nearest` is on average for random atoms, as many as were not left out

    ```python
    from fmxnn.metrics.planted import PlantedFeatures
    from fmxnn.metrics.planted.recovery import recovery

    truth = PlantedFeatures(layers=5, d_model=32, features=20)
    found = recovery(truth.crosscoder(), truth, batches=range(-2, 0), tokens=256)
    found.numbers()["mcc"]
    ```
    """

    kinds: tuple[tuple[str, str], ...]
    latent: Tensor
    cosine: Tensor
    nearest: Tensor
    nearest_feature: Tensor
    support: Support
    f1: Tensor
    c_n: Tensor
    c_f: Tensor
    silent: int
    zero: int
    chance: float

    def numbers(self, where: Tensor | None = None) -> dict[str, float]:
        """Every headline number by name, over all features judged or those of `where` (bool, `features`)."""
        where = torch.ones_like(self.cosine, dtype=torch.bool) if where is None else where
        where = where & ~self.cosine.isnan()
        cosine = self.cosine[where]
        support = Support(self.support.true[where], self.support.learned[where])
        of = {
            "mcc": cosine,
            "recovered": (cosine >= 0.9).double(),
            "nearest": self.nearest[where],
            "detection_f1": self.f1[where],
        }
        of |= {"precision": support.precision(), "recall": support.recall(), "iou": support.iou()}
        for name, pair in (("c_n", self.c_n[where]), ("c_f", self.c_f[where])):
            off = pair[:, 0] - pair[:, 1]
            of |= {f"{name}_bias": off, f"{name}_error": off.abs()}
        return {"features": int(where.sum()), **{name: float(values.nanmean()) for name, values in of.items()}}

    def by_kind(self) -> dict[str, dict[str, float]]:
        """The numbers of all features, and of those of each span and of each motion."""
        found = {"all": self.numbers()}
        for part in (0, 1):
            for name in dict.fromkeys(kind[part] for kind in self.kinds):
                found[name] = self.numbers(torch.tensor([kind[part] == name for kind in self.kinds]))
        return found

    def table(self) -> str:
        """`by_kind` in Markdown, with what was left out below."""
        rows = self.by_kind()
        lines = ["| kind | " + " | ".join(rows["all"]) + " |", "|---" * (len(rows["all"]) + 1) + "|"]
        lines += [
            f"| {kind} | " + " | ".join(f"{value:.3g}" for value in numbers.values()) + " |"
            for kind, numbers in rows.items()
        ]
        back, judged = float(self.nearest_feature.nanmean()), int(rows["all"]["features"])
        return "\n".join(lines) + (
            f"\n\nNearest feature of a latent: {back:.3g} on average. Random atoms would have nearest = "
            f"{self.chance:.3g}. Left out: "
            f"{self.silent} silent latents, {self.zero} atoms of zeros, {len(self.cosine) - judged} features that "
            "never fired.\n"
        )


@torch.no_grad()
def cosines(weight: Weight, atoms: Tensor) -> Tensor:
    """`features layers d_model -> features latents`: cosines of true atoms and a weight's, each over all its layers.

    They are in float64, and nan for an atom of zeros. Beside the result the atoms of 1,024 latents at a time are held.
    Raises ShapeError for other layers or d_model.
    """
    if atoms.shape[1:] != (weight.layers, weight.d_model):
        layers, d_model = atoms.shape[1:]
        raise ShapeError(
            f"the truth has (layers={layers}, d_model={d_model}) and the weight (layers={weight.layers}, "
            f"d_model={weight.d_model}); "
            "compare a crosscoder that was trained on this truth"
        )
    true = torch.nn.functional.normalize(atoms.double().flatten(1), dim=1)
    found: list[Tensor] = []
    for start in range(0, weight.latents, BLOCK):
        learned = weight.atoms(slice(start, min(start + BLOCK, weight.latents))).to(true.device).double().flatten(0, 1)
        found.append(true @ learned / learned.norm(dim=0))
    return torch.cat(found, 1)


def match(cosine: Tensor) -> Tensor:
    """`features latents -> features`: the one-to-one matching of largest summed cosine (Hungarian).

    It is -1 where no latent is left, or none has a cosine above 0. nan leaves a pair out. 4,096 features among 8,192
    latents take about a second.
    """
    gain = cosine.nan_to_num(nan=0.0).clamp(min=0).cpu()
    features, latents = (torch.from_numpy(index) for index in linear_sum_assignment(gain.numpy(), maximize=True))
    matched = torch.full((len(gain),), -1)
    matched[features] = latents.where(gain[features, latents] > 0, -1)
    return matched


def chance_cosine(latents: int, dimensions: int) -> float:
    """The expected largest cosine of any fixed direction to `latents` random ones.

    There are so many `dimensions`, layers times d_model. The cosine of a random direction is 2 B - 1 with B of the Beta
    law whose two parameters are (dimensions - 1) / 2.
    """
    if latents < 1 or dimensions < 2:
        return float("nan")
    middle = (torch.arange(10_000).double() + 0.5) / 10_000
    return float((2 * beta.ppf(middle.pow(1 / latents).numpy(), (dimensions - 1) / 2, (dimensions - 1) / 2) - 1).mean())


@torch.no_grad()
def recovery(
    crosscoder: Crosscoder,
    truth: PlantedFeatures,
    *,
    batches: Iterable[int] = HELD_OUT,
    tokens: int = 1024,
    share: float = 0.1,
) -> Recovery:
    """How much of `truth` the crosscoder has found, on the truth's `batches` of `tokens` each.

    A range below 0 is held out where training counts up from 0. Features are matched to latents by `match` on the
    cosines of their atoms over all layers. A feature or a latent that never fires on these tokens is left out, as an
    atom of zeros is, and counted. An atom lives on the layers where its norm is above `share` of its largest; the rule
    is the same for features and latents.

    Nothing depends on the order of latents or on the free scale z -> c z, D -> D / c. A crosscoder trained on scaled
    activations is folded first (`fold_scale`). Memory: a few `features latents` in float64, and what
    `functional_coherence` needs. Raises ShapeError for other layers or d_model.
    """
    if not 0 <= share < 1:
        raise ValueError(f"recovery needs 0 <= share < 1, of an atom's largest norm, got share={share}")
    numbers = tuple(batches)
    found = cosines(crosscoder.decoder.weight, truth.atoms).cpu()
    functional = functional_coherence(crosscoder, (truth.batch(number, tokens)[0] for number in numbers))
    active = cast("Tensor", functional.active_tokens).cpu()
    fired = torch.stack([(truth.codes(number, tokens) > 0).sum(0) for number in numbers]).sum(0).cpu()
    cosine, silent, zero = _compared(found, active, fired)
    latent, norm = match(cosine), norm_coherence(crosscoder.decoder.weight)
    both, matched, judged = _hits(crosscoder, truth, latent, numbers, tokens), latent >= 0, fired > 0
    true, learned = truth.atoms.double().norm(dim=-1).cpu(), norm.per_layer.T.cpu()[latent]
    known = torch.where(cosine.isnan(), -torch.inf, cosine)
    return Recovery(
        kinds=truth.kinds,
        latent=latent,
        cosine=torch.where(matched, cosine[torch.arange(len(latent)), latent], 0.0).where(judged, torch.nan),
        nearest=_finite(known.amax(1)),
        nearest_feature=_finite(known.amax(0)),
        support=Support(_above(true, share), _above(learned, share) & matched.unsqueeze(1)),
        f1=torch.where(matched, 2 * both / (fired + active[latent]), 0.0).where(judged, torch.nan),
        c_n=_beside(norm.values, latent, truth.norm_coherence),
        c_f=_beside(functional.values, latent, truth.functional_coherence),
        silent=int(silent.sum()),
        zero=int(zero.sum()),
        chance=chance_cosine(int((~silent & ~zero).sum()), truth.layers * truth.d_model),
    )


def _compared(cosine: Tensor, active: Tensor, fired: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`features latents, latents, features -> features latents, latents, latents`: nan for what is left out.

    Then which latents are silent, and which have an atom of zeros.
    """
    zero = cosine.isnan().all(0)
    silent = (active == 0) & ~zero
    left_out = silent | (fired == 0).unsqueeze(1)
    return cosine.masked_fill(left_out, torch.nan), silent, zero


def _hits(
    crosscoder: Crosscoder, truth: PlantedFeatures, latent: Tensor, batches: Sequence[int], tokens: int
) -> Tensor:
    """`features -> features`: on how many tokens a feature and its matched latent fire together."""
    like, both = crosscoder.encoder.bias, torch.zeros(len(latent), dtype=torch.float64)
    with evaluating(crosscoder):
        for number in batches:
            x, z = truth.batch(number, tokens)
            learned = to_dense_codes(crosscoder.encode(x.to(like.device, like.dtype)))[:, latent.to(like.device)]
            both += ((learned != 0) & (z.to(like.device) > 0)).sum(0).cpu()
    return both


def _above(norms: Tensor, share: float) -> Tensor:
    return norms > share * norms.amax(1, keepdim=True)


def _beside(learned: Tensor, latent: Tensor, true: Tensor) -> Tensor:
    return torch.stack([learned.cpu()[latent].where(latent >= 0, torch.nan), true.cpu()], 1)


def _finite(cosine: Tensor) -> Tensor:
    return cosine.where(cosine.isfinite(), torch.nan)
