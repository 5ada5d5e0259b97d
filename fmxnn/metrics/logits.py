"""Which tokens a latent's atom promotes and demotes, through a language model's final norm and unembedding."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.activations.families import find_beside
from fmxnn.coders.crosscoder import Crosscoder, crosscoder_in
from fmxnn.coders.normalisation import Normalised
from fmxnn.coders.skip import SkipCrosscoder
from fmxnn.core.errors import ShapeError
from fmxnn.metrics.asked import asked_latents
from fmxnn.metrics.excerpts import Pieces
from fmxnn.metrics.progress import Progress, silently
from fmxnn.weights.layer_map import layer_number
from fmxnn.weights.ragged import RaggedWeight
from fmxnn.weights.weight import BLOCK

_ROWS = 1 << 14  # of the unembedding at once
_LARGE = 2.0**20  # beside its square no epsilon of a norm counts
_Best = tuple[Tensor, Tensor]  # token ids and weights


class TokenWeight(NamedTuple):
    """A token's text, and how much one unit of a latent adds to its logit.

    ```python
    from fmxnn.metrics.logits import TokenWeight

    TokenWeight(" whale", 0.7).token  # ' whale'
    ```
    """

    token: str
    weight: float


@dataclass(frozen=True)
class LogitWeights:
    """The tokens that each of `latents` promotes and demotes most; see `logit_weights`.

    - `layer`: whose atoms these are, on the axis that the decoder writes
    - `promoted`, `demoted`: token ids of `latents tokens`, strongest first
    - `promoted_weights`, `demoted_weights`: what one unit of the latent adds to each, before the norm's division

    ```python
    from fmxnn.metrics import LogitWeights

    ids, weights = torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.1]])
    found = LogitWeights((7,), 0, promoted=ids, promoted_weights=weights, demoted=ids, demoted_weights=-weights)
    found.latents  # (7,)
    ```
    """

    latents: tuple[int, ...]
    layer: int
    promoted: Tensor
    promoted_weights: Tensor
    demoted: Tensor
    demoted_weights: Tensor

    @override
    def __repr__(self) -> str:
        """How much it holds."""
        latents, tokens = len(self.latents), self.promoted.shape[1]
        return f"<the {tokens} tokens that each of {latents} latents promotes, and demotes, at layer {self.layer}>"

    def of(self, latent: int, tokenizer: Any) -> tuple[tuple[TokenWeight, ...], tuple[TokenWeight, ...]]:
        """What one latent promotes (weights above 0) and demotes (below 0), as text.

        Give `Pieces(tokenizer)` instead where you ask for many. Raises ValueError for a latent that was not asked for.
        """
        if latent not in self._rows:
            raise ValueError(
                f"these are the logit weights of {len(self.latents)} latents, and {latent!r:.200} is none of them; "
                "name it: logit_weights(crosscoder, model, latents=[...])"
            )
        row, pieces = self._rows[latent], tokenizer if isinstance(tokenizer, Pieces) else Pieces(tokenizer)
        up, down = (
            [
                TokenWeight(pieces.split([token])[0].text, weight)
                for token, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True)
            ]
            for ids, weights in ((self.promoted, self.promoted_weights), (self.demoted, self.demoted_weights))
        )
        return tuple(one for one in up if one.weight > 0), tuple(one for one in down if one.weight < 0)

    @cached_property
    def _rows(self) -> dict[int, int]:
        return {latent: row for row, latent in enumerate(self.latents)}


@torch.no_grad()
def logit_weights(
    crosscoder: Crosscoder | Normalised | SkipCrosscoder,
    model: nn.Module,
    latents: Sequence[int] | None = None,
    *,
    layer: int = -1,
    tokens: int = 10,
    progress: Progress = silently,
) -> LogitWeights:
    """`-> latents tokens`: the tokens that each latent's atom promotes and demotes most.

    For an atom d of one decoder layer, in the units of the model's activations, the weights of the vocabulary are
    W (g * d), where W is the unembedding and g the final norm's scale; a LayerNorm takes the mean of d off first.
    The norm's divisor is left out, because each token has its own. While it is held fixed,
    logits(x + eps d) - logits(x) = eps * weights / divisor. Soft-capping comes after.

    - `latents`: which ones, None for all
    - `layer`: whose atom, on the axis that the decoder writes; -1 is the last
    - `tokens`: how many are kept of each side. All weights of the vocabulary are never held.
    - `progress`: `tqdm` shows how far it is

    Atoms written into the residual stream have such weights; those of another place, such as an MLP's input, do not.
    Raises ValueError for a latent or a layer that is not there, and for a model without an unembedding or a final norm
    that can be read. Raises ShapeError for a model of another d_model.
    """
    inner = crosscoder_in(crosscoder)
    chosen = asked_latents(inner, range(inner.decoder.weight.latents) if latents is None else latents)
    if tokens < 1:
        raise ValueError(f"logit_weights keeps tokens >= 1 of each side, got tokens={tokens!r:.200}")
    weight, (head, norm) = inner.decoder.weight, unembedding(model)
    at = layer_number(layer, weight.layers)
    width = weight.widths[at] if isinstance(weight, RaggedWeight) else weight.d_model
    if head.shape[1] != width:
        raise ShapeError(
            f"the crosscoder writes d_model={width} at layer {layer}, and {type(model).__name__} unembeds "
            f"d_model={head.shape[1]}; give the model whose activations it writes"
        )
    starts = range(0, len(chosen), BLOCK)
    found = [
        _extremes(norm(_atoms(crosscoder, chosen[start : start + BLOCK], at)[:, :width]), head, tokens)
        for start in progress(starts, desc="logit weights", total=len(starts))
    ]
    columns = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    return LogitWeights(tuple(chosen), at, *columns)


class FinalNorm:
    """`... d_model -> ... d_model`: a model's final norm on a direction, without the division by a token's own size.

    The scale is found from what the norm gives, so that Gemma's 1 + weight needs no name of its own. `like` has the
    device, the dtype and the last axis of the directions. Raises ValueError for what is no LayerNorm and no RMSNorm.

    ```python
    from fmxnn.metrics.logits import FinalNorm

    norm = FinalNorm(nn.LayerNorm(4), like=torch.empty(4))
    norm(torch.ones(4))  # zeros: a LayerNorm takes the mean off
    ```
    """

    def __init__(self, module: nn.Module, like: Tensor):
        dtype, d_model = _wide(like), like.shape[-1]
        norm, parameter = deepcopy(module).to(dtype), next(module.parameters(), like)
        probe = torch.full((d_model,), _LARGE, dtype=dtype, device=parameter.device)
        flat = probe.clone()
        probe[1::2] *= -1
        if d_model % 2 and d_model > 1:
            probe[-3:] = torch.tensor([_LARGE, _LARGE, -2 * _LARGE])  # its mean is zero, too
        bias = norm(torch.zeros_like(probe))
        scale, again, level = ((norm(x) - bias) * _size(x) / x for x in (probe, 4 * probe, flat))
        self.centred = bool(level.abs().max() < scale.abs().max() / 2)
        if not (torch.allclose(scale, again, rtol=1e-4) and (self.centred or torch.allclose(scale, level, rtol=1e-4))):
            raise ValueError(
                f"logit_weights reads a LayerNorm or an RMSNorm before the unembedding, and {type(module).__name__} "
                "divides by something else; multiply atoms and unembedding by hand"
            )
        self.scale = scale.to(like.device)

    def __call__(self, direction: Tensor) -> Tensor:
        """`... d_model -> ... d_model`"""
        direction = direction.to(self.scale)
        return self.scale * (direction - direction.mean(-1, keepdim=True) if self.centred else direction)


def unembedding(model: nn.Module) -> tuple[Tensor, FinalNorm]:
    """`-> vocabulary d_model`: a model's unembedding, and the norm before it.

    Raises ValueError for a model without one of them, and for a norm that can not be read.
    """
    found = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(found, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"logit_weights needs a model with an unembedding, and {type(model).__name__} has none; give the causal "
            "language model itself, neither its body alone nor its name"
        )
    return weight, FinalNorm(find_beside(model, "final_norm"), weight)


def _atoms(crosscoder: nn.Module, latents: list[int], layer: int) -> Tensor:
    """`-> latents d_model`: what one unit of each writes at a layer, in the units of the activations."""
    if isinstance(crosscoder, Normalised):
        return _atoms(crosscoder.crosscoder, latents, layer) / crosscoder.output.scale[layer]
    if isinstance(crosscoder, SkipCrosscoder):
        return _atoms(crosscoder.crosscoder, latents, layer)
    return crosscoder_in(crosscoder).decoder.weight.atoms(latents)[layer].T


def _extremes(directions: Tensor, head: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`latents d_model, vocabulary d_model -> latents tokens, ...`: ids and weights of the largest and the smallest."""
    most = min(tokens, len(head))
    none = directions.new_empty(len(directions), 0)
    up = down = (none.long(), none)
    for start in range(0, len(head), _ROWS):
        rows = head[start : start + _ROWS].to(directions.dtype)
        weights = directions.to(rows.device) @ rows.T
        ids = torch.arange(start, start + len(rows), device=rows.device).expand(len(directions), -1)
        up, down = (_best(kept, (ids, weights), most, largest) for kept, largest in ((up, True), (down, False)))
    return *up, *down


def _best(kept: _Best, given: _Best, most: int, largest: bool) -> _Best:
    ids, weights = (torch.cat([old.to(new.device), new], dim=1) for old, new in zip(kept, given, strict=True))
    values, order = weights.topk(min(most, weights.shape[1]), dim=1, largest=largest)
    return ids.gather(1, order), values


def _wide(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _size(x: Tensor) -> Tensor:
    """The root mean square."""
    return x.pow(2).mean().sqrt()
