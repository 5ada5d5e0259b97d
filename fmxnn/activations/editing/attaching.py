"""A crosscoder in a language model that runs: its latents ablated, scaled, set, patched, or added."""

from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from fmxnn.activations.editing.additions import Additions, check_latents, factors_of
from fmxnn.activations.editing.calls import Call, Tokens, at_tokens, check_tokens, edited
from fmxnn.activations.editing.interception import Interception, adds
from fmxnn.activations.editing.ways import Way, Writing
from fmxnn.activations.editing.writing import Change, replaced
from fmxnn.activations.places import Layer, Place, find_places
from fmxnn.coders.atoms import raw_atoms
from fmxnn.coders.crosscoder import Crosscoder, crosscoder_in
from fmxnn.coders.inputs import check_activations
from fmxnn.core.errors import ShapeError
from fmxnn.core.modes import evaluating

Latents = int | Sequence[int]
Numbers = float | Sequence[float] | Tensor


def attach(
    crosscoder: nn.Module,
    model: nn.Module,
    layers: Sequence[Layer] | None = None,
    *,
    at: str | None = None,
    to: str | None = None,
    path: str | None = None,
    way: Way | None = None,
    only: Layer | None = None,
    reconstruct: bool = False,
    keep_error: bool = True,
    tokens: Tokens = None,
) -> "Attached":
    """A context in which every call of `model`, `generate` too, is changed by edits of a crosscoder's latents.

    Where an edit depends on codes, each call runs the model twice: once as it is, for the codes z, and once with
    decode(z') - decode(z) added. Steering alone runs it once.

    - `crosscoder`: a Crosscoder, or one inside a Normalised or SkipCrosscoder, of the model's own activations
    - `layers`, `at`, `to`: what it was trained on, as `harvest` takes them; by default what was saved `about` it
    - `way`: how edits of several layers add up in a residual stream; "telescoped" (the default there) or "each"
    - `only`: the one layer that is written; None writes all of them
    - `reconstruct`: puts what the crosscoder writes in the place of what stands there, with its error added unless
      `keep_error` is false
    - `tokens`: a mask (contexts, context) of the tokens that are edited, or a slice of columns; by default all but the
      first of each text, BOS, EOS and padding

    Only calls of the whole model are changed, in eval mode and not compiled. Raises ValueError for layers, places and
    ways that do not fit, and ShapeError for another number of layers.
    """
    check_tokens(tokens)
    inner, about = crosscoder_in(crosscoder), cast("Mapping[str, Any]", getattr(crosscoder, "about", {}))
    layers = about.get("layers") if layers is None else layers
    if layers is None:
        raise ValueError("attach does not know the crosscoder's layers; give them: layers=range(2, 10)")
    read = at or about.get("at") or "block_out"
    written = to or about.get("to") or read
    reads = find_places(model, layers, at=read, path=path)
    writes = reads if written == read else find_places(model, layers, at=written, path=path)
    check_activations(inner, (len(reads), inner.encoder.weight.d_model), tuple(layers))
    _check_writer(inner, len(writes))
    writing = Writing(tuple(layers), written, way=way, only=only, keeps=keep_error if reconstruct else None)
    return Attached(crosscoder, model, (reads, writes), writing, tokens)


class Attached:
    """A crosscoder in a running model, made by `attach`; edits are made while it is open and act on later calls.

    They act on the codes in the order in which they are made. `latents` is one number or several.

    ```python
    from fmxnn.activations import attach
    from fmxnn.activations.models import open_model

    model, tokenizer = open_model("examples/tiny-lm", dtype=torch.float32)
    encoder = fx.CrossLayerEncoder(fx.DenseWeight(2, 128, 64), fx.TopK(8))
    crosscoder = fx.Crosscoder(encoder, fx.CrossLayerDecoder(fx.DenseWeight(2, 128, 64)))
    with attach(crosscoder, model, layers=[4, 8]) as run:
        run.ablate(17)
        run.steer(5, 4.0)
        logits = model(torch.tensor([[0, 5, 9]])).logits
    ```
    """

    def __init__(
        self,
        crosscoder: nn.Module,
        model: nn.Module,
        places: tuple[Sequence[Place], Sequence[Place]],
        writing: Writing,
        tokens: Tokens,
    ):
        self.crosscoder, self.model = cast("Crosscoder", crosscoder), model
        reads, self.writes = places
        self.reads = (*reads, *self.writes) if writing.keeps and reads is not self.writes else tuple(reads)
        self._sides, self._writing, self._tokens = places, writing, tokens
        self._edits, self._additions = list[Any](), Additions()
        self._interception: Interception | None = None

    def __enter__(self) -> Self:
        if self._interception is not None:
            raise RuntimeError("this attachment is open already; make another with attach(...)")
        self._interception = Interception(self.model, self).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._interception is not None:
            self._interception.__exit__()
        self._interception = None
        self.clear()

    def ablate(self, latents: Latents) -> None:
        """Sets them to zero wherever they fire."""
        self.set(latents, 0.0)

    def scale(self, latents: Latents, factor: Numbers) -> None:
        """Multiplies them by `factor`."""
        chosen, factors = self._chosen(latents, factor)

        def edit(z: Tensor, _where: Tensor, _past: int) -> None:
            z[:, chosen] = z[:, chosen] * factors.to(z)

        self._edits.append(edit)

    def set(self, latents: Latents, value: Numbers) -> None:
        """Gives them `value` at every edited token, whether they fire there or not."""
        chosen, values = self._chosen(latents, value)

        def edit(z: Tensor, _where: Tensor, _past: int) -> None:
            z[:, chosen] = values.to(z).expand(len(z), len(chosen))

        self._edits.append(edit)

    def clamp(self, latents: Latents, *, low: float | None = None, high: float | None = None) -> None:
        """Keeps them between `low` and `high`; with `low` above zero they fire everywhere."""
        chosen, _ = self._chosen(latents, 0.0)
        if low is None and high is None:
            raise ValueError("clamp needs low, high or both, got neither; clamp(9, low=0.0, high=2.0)")
        if low is not None and high is not None and low > high:
            raise ValueError(f"clamp needs low <= high, got low={low} and high={high}; exchange them")

        def edit(z: Tensor, _where: Tensor, _past: int) -> None:
            z[:, chosen] = z[:, chosen].clamp(low, high)

        self._edits.append(edit)

    def patch(self, codes: Tensor, *, latents: Latents | None = None) -> None:
        """`contexts context latents -> `: gives them the codes that they have on another text or in another model.

        Column c of `codes` goes to column c of the text; later tokens keep their own codes. `context latents` stands
        for every context. None patches all latents.
        """
        known = crosscoder_in(self.crosscoder).encoder.weight.latents
        chosen, _ = self._chosen(range(known) if latents is None else latents, 0.0)
        if codes.ndim not in (2, 3) or codes.shape[-1] != known:
            raise ShapeError(
                f"patch takes codes of (contexts, context, latents={known}), got {tuple(codes.shape)}; "
                "give those of crosscoder.encode"
            )
        given = (codes.unsqueeze(0) if codes.ndim == 2 else codes)[..., chosen]

        def edit(z: Tensor, where: Tensor, past: int) -> None:
            there, rows = at_tokens(given, where, past)
            z[there.nonzero().to(z.device), torch.tensor(chosen, device=z.device)] = rows.to(z)

        self._edits.append(edit)

    def steer(self, latents: Latents, strength: Numbers) -> None:
        """Adds `strength` times the latent's atom at every edited token, in the units of the model's activations.

        It is what the latent would write if its code were larger by `strength`, of a linear decoder. Several latents
        add up. The strength may be a tensor that learns.
        """
        chosen, strengths = self._chosen(latents, strength)
        atoms = raw_atoms(self.crosscoder, chosen)
        self._additions.add_atoms(atoms.to(torch.promote_types(atoms.dtype, torch.float32)), strengths)

    def add(self, delta: Tensor) -> None:
        """`layers d_model -> `, or `contexts context layers d_model -> `: adds vectors of your own.

        The first is added at every edited token, the second at the tokens of one text, column by column. Raises
        ShapeError for other axes.
        """
        self._check_open()
        self._additions.add(delta, len(self.writes))

    def clear(self) -> None:
        """Forgets the edits made so far, so that later calls run as the model is."""
        self._edits.clear()
        self._additions = Additions()

    @property
    def asks(self) -> bool:
        """Whether the next call needs a clean pass."""
        return bool(self._edits) or self._writing.replaces

    def changes(self, call: Call, clean: Sequence[Tensor]) -> Sequence[Change | None]:
        """For each written place what happens there in this call."""
        where = edited(call, self.model, self._tokens)
        if not where.any():
            return [None] * len(self.writes)
        delta = self._additions.at(where, call.past)
        if not self.asks:
            return self._added(where, delta)
        x = self._gathered(clean[: len(self._sides[0])], where)
        check_activations(crosscoder_in(self.crosscoder), x.shape, self._writing.layers)
        with evaluating(self.crosscoder):
            moved = self._moved(x, where, call.past)
            delta = moved if delta is None else delta if moved is None else delta.to(moved.device) + moved
            if not self._writing.replaces:
                return self._added(where, delta)
            kept = self._gathered(clean[-len(self.writes) :], where) if self._writing.keeps else self.crosscoder(x)
        new = kept if delta is None else kept + delta.to(kept.device)
        return [
            _replaces(where, new[:, number]) if number in self._writing.written else None
            for number in range(len(self.writes))
        ]

    def _added(self, where: Tensor, delta: Tensor | None) -> list[Change | None]:
        shares = [None] * len(self.writes) if delta is None else self._writing.shares(delta)
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
        changed = (new != z).any(-1)
        if not changed.any():
            return None
        moved = self.crosscoder.decode(new[changed]) - self.crosscoder.decode(z[changed])
        return moved.new_zeros(len(z), *moved.shape[1:]).index_put((changed,), moved)

    def _chosen(self, latents: Latents, numbers: Numbers) -> tuple[list[int], Tensor]:
        """The latents, and a number for each."""
        self._check_open()
        inner = crosscoder_in(self.crosscoder)
        chosen = check_latents(inner.encoder.weight.latents, latents)
        return chosen, factors_of(numbers, len(chosen), inner.encoder.bias)

    def _check_open(self) -> None:
        if self._interception is None:
            raise RuntimeError(
                "this attachment is closed, and an edit would do nothing; edit inside: with attach(...) as run:"
            )


def _check_writer(crosscoder: Crosscoder, layers: int) -> None:
    if crosscoder.decoder.weight.layers != layers:
        raise ShapeError(
            f"the crosscoder writes layers={crosscoder.decoder.weight.layers}, and {layers} layers were given; give it "
            "the layers that it was trained on, in their order"
        )


def _replaces(where: Tensor, new: Tensor) -> Change:
    """`contexts context, tokens d_model -> `: the change that puts `new` in the place of what stands there."""
    return lambda x: replaced(x, where.to(x.device), new)
