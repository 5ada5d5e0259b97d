"""Edits of a crosscoder's latents, and what they change in one call of the model."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fmxnn.activations.editing.additions import Additions
from fmxnn.activations.editing.calls import Call, Tokens, edited
from fmxnn.activations.editing.interception import adds
from fmxnn.activations.editing.ways import Writing
from fmxnn.activations.editing.writing import Change, replaced
from fmxnn.activations.places import Place
from fmxnn.coders.crosscoder import Crosscoder, crosscoder_in
from fmxnn.coders.inputs import check_activations
from fmxnn.core.modes import evaluating

Edit = Callable[[Tensor, Tensor, int], None]
"""`tokens latents, contexts context, past -> `: changes the codes of the edited tokens where they stand."""


class Edits:
    """What is done to codes, in the order in which it was asked for, and what is added whatever they are.

    - `sides`: the places that the crosscoder reads, and those that it writes
    - `writing`: how what it writes is put there; `tokens`: which tokens are edited

    ```python
    from fmxnn.activations.editing.edits import Edits
    from fmxnn.activations.editing.ways import Writing
    from fmxnn.activations.models import open_model
    from fmxnn.activations.places import find_places

    model, _ = open_model("examples/tiny-lm")
    dense = fx.DenseWeight(2, 128, 64)
    crosscoder = fx.Crosscoder(fx.CrossLayerEncoder(dense, fx.TopK(8)), fx.CrossLayerDecoder(dense))
    places, writing = find_places(model, [4, 8]), Writing((4, 8), "block_out", way=None, only=None, keeps=None)
    Edits(crosscoder, model, (places, places), writing, tokens=None).asks  # False: nothing was asked for
    ```
    """

    def __init__(
        self,
        crosscoder: nn.Module,
        model: nn.Module,
        sides: tuple[Sequence[Place], Sequence[Place]],
        writing: Writing,
        tokens: Tokens,
    ):
        self.crosscoder, self.model, self.writing = cast("Crosscoder", crosscoder), model, writing
        reads, self.writes = sides
        self.reads = (*reads, *self.writes) if writing.keeps and reads is not self.writes else tuple(reads)
        self._sides, self._tokens = sides, tokens
        self.clear()

    def make(self, said: str, edit: Edit) -> None:
        """One more edit of codes, and what it is called."""
        self.said.append(said)
        self._edits.append(edit)

    def clear(self) -> None:
        """Forgets every edit and addition made so far."""
        self.said, self._edits, self.additions = list[str](), list[Edit](), Additions()

    @property
    def asks(self) -> bool:
        """Whether the next call needs a clean pass."""
        return bool(self._edits) or self.writing.replaces

    def changes(self, call: Call, clean: Sequence[Tensor]) -> Sequence[Change | None]:
        """For each written place what happens there in this call."""
        where = edited(call, self.model, self._tokens)
        if not where.any():
            return [None] * len(self.writes)
        delta = self.additions.at(where, call.past)
        if not self.asks:
            return self._added(where, delta)
        x = self._gathered(clean[: len(self._sides[0])], where)
        check_activations(crosscoder_in(self.crosscoder), x.shape, self.writing.layers)
        with evaluating(self.crosscoder):
            moved = self._moved(x, where, call.past)
            delta = moved if delta is None else delta if moved is None else delta.to(moved.device) + moved
            if not self.writing.replaces:
                return self._added(where, delta)
            kept = self._gathered(clean[-len(self.writes) :], where) if self.writing.keeps else self.crosscoder(x)
        new = kept if delta is None else kept + delta.to(kept.device)
        return [
            _replaces(where, new[:, number]) if number in self.writing.written else None
            for number in range(len(self.writes))
        ]

    def _added(self, where: Tensor, delta: Tensor | None) -> list[Change | None]:
        shares = [None] * len(self.writes) if delta is None else self.writing.shares(delta)
        return [adds(where, share) for share in shares]

    def _gathered(self, read: Sequence[Tensor], where: Tensor) -> Tensor:
        """`-> tokens layers d_model`: what was read of the edited tokens, as the crosscoder takes it."""
        like = crosscoder_in(self.crosscoder).encoder.bias
        return torch.stack([x[where.to(x.device)].to(like.device, like.dtype) for x in read], dim=-2)

    def _moved(self, x: Tensor, where: Tensor, past: int) -> Tensor | None:
        """`tokens layers d_model -> tokens layers d_model`: decode(z') - decode(z), None where no code changes."""
        with torch.no_grad():
            z = self.crosscoder.encode(x)
        new = z.clone()
        for edit in self._edits:
            edit(new, where, past)
        changed = (new != z).any(-1) | new.requires_grad  # a factor that learns may start where it changes nothing
        if not changed.any():
            return None
        moved = self.crosscoder.decode(new[changed]) - self.crosscoder.decode(z[changed])
        return moved.new_zeros(len(z), *moved.shape[1:]).index_put((changed,), moved)


def _replaces(where: Tensor, new: Tensor) -> Change:
    """`contexts context, tokens d_model -> `: the change that puts `new` in the place of what stands there."""
    return lambda x: replaced(x, where.to(x.device), new)
