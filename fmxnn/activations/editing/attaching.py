"""A crosscoder in a language model that runs: its latents ablated, scaled, set, patched, or added."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.activations.editing.additions import check_latents, factors_of
from fmxnn.activations.editing.calls import Tokens, at_tokens, check_tokens
from fmxnn.activations.editing.edits import Edits
from fmxnn.activations.editing.interception import Interception, edited_model
from fmxnn.activations.editing.ways import Way, Writing
from fmxnn.activations.places import Layer, find_places
from fmxnn.activations.trained_on import trained_on
from fmxnn.coders.atoms import raw_atoms
from fmxnn.coders.crosscoder import Crosscoder, crosscoder_in
from fmxnn.coders.inputs import check_activations
from fmxnn.core.errors import ShapeError

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
    inner, model = crosscoder_in(crosscoder), edited_model(model, "attach")
    instead = "add what it writes for one of them: adding(model, delta, layers=[6])"
    layers, read, written = trained_on(crosscoder, "attach", layers=layers, at=at, to=to, instead=instead)
    reads = find_places(model, layers, at=read, path=path)
    writes = reads if written == read else find_places(model, layers, at=written, path=path)
    check_activations(inner, (len(reads), inner.encoder.weight.d_model), tuple(layers))
    _check_writer(inner, len(writes))
    writing = Writing(tuple(layers), written, way=way, only=only, keeps=keep_error if reconstruct else None)
    return Attached(Edits(crosscoder, model, (reads, writes), writing, tokens))


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

    def __init__(self, edits: Edits):
        self.crosscoder, self.model, self._edits = edits.crosscoder, edits.model, edits
        self._interception: Interception | None = None

    @override
    def __repr__(self) -> str:
        """What is edited, where, and how."""
        layers, edits = ", ".join(map(str, self._edits.writing.layers)), ", ".join(self._edits.said)
        now = f": {edits or 'no edits'}" if self._interception is not None else ", not open"
        return f"<{type(self.model).__name__} edited at layers {layers:.200}{now:.500}>"

    def __enter__(self) -> Self:
        if self._interception is not None:
            raise RuntimeError("this attachment is open already; make another with attach(...)")
        self._interception = Interception(self.model, self._edits).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._interception is not None:
            self._interception.__exit__()
        self._interception = None
        self.clear()

    def ablate(self, latents: Latents) -> None:
        """Sets them to zero wherever they fire."""
        self._set(f"ablate({latents!r:.60})", latents, 0.0)

    def scale(self, latents: Latents, factor: Numbers) -> None:
        """Multiplies them by `factor`."""
        chosen, factors = self._chosen(latents, factor)

        def edit(z: Tensor, _where: Tensor, _past: int) -> None:
            z[:, chosen] = z[:, chosen] * factors.to(z)

        self._edits.make(f"scale({latents!r:.60}, {factor!r:.60})", edit)

    def set(self, latents: Latents, value: Numbers) -> None:
        """Gives them `value` at every edited token, whether they fire there or not."""
        self._set(f"set({latents!r:.60}, {value!r:.60})", latents, value)

    def clamp(self, latents: Latents, *, low: float | None = None, high: float | None = None) -> None:
        """Keeps them between `low` and `high`; with `low` above zero they fire everywhere."""
        chosen, _ = self._chosen(latents, 0.0)
        if low is None and high is None:
            raise ValueError("clamp needs low, high or both, got neither; clamp(9, low=0.0, high=2.0)")
        if low is not None and high is not None and low > high:
            raise ValueError(f"clamp needs low <= high, got low={low} and high={high}; exchange them")

        def edit(z: Tensor, _where: Tensor, _past: int) -> None:
            z[:, chosen] = z[:, chosen].clamp(low, high)

        self._edits.make(f"clamp({latents!r:.60}, low={low}, high={high})", edit)

    def patch(self, codes: Tensor, *, latents: Latents | None = None) -> None:
        """`contexts context latents -> `: gives them the codes that they have on another text or in another model.

        Column c of `codes` goes to column c of the text; later tokens keep their own codes. `context latents` stands
        for every context, and may be torch.sparse_csr. None patches all latents.
        """
        known = crosscoder_in(self.crosscoder).encoder.weight.latents
        chosen, _ = self._chosen(range(known) if latents is None else latents, 0.0)
        if codes.ndim not in (2, 3) or codes.shape[-1] != known:
            raise ShapeError(
                f"patch takes codes of (contexts, context, latents={known}), got {tuple(codes.shape)}; "
                "give those of crosscoder.encode"
            )
        dense = codes.to_dense()
        given = (dense.unsqueeze(0) if dense.ndim == 2 else dense)[..., chosen]

        def edit(z: Tensor, where: Tensor, past: int) -> None:
            there, rows = at_tokens(given, where, past)
            z[there.nonzero().to(z.device), torch.tensor(chosen, device=z.device)] = rows.to(z)

        self._edits.make(f"patch(codes{'' if latents is None else f', latents={latents!r:.60}'})", edit)

    def steer(self, latents: Latents, strength: Numbers) -> None:
        """Adds `strength` times the latent's atom at every edited token, in the units of the model's activations.

        It is what the latent would write if its code were larger by `strength`, of a linear decoder. Several latents
        add up. The strength may be a tensor that learns.
        """
        chosen, strengths = self._chosen(latents, strength)
        atoms = raw_atoms(self.crosscoder, chosen)
        self._edits.additions.add_atoms(atoms.to(torch.promote_types(atoms.dtype, torch.float32)), strengths)
        self._edits.said.append(f"steer({latents!r:.60}, {strength!r:.60})")

    def add(self, delta: Tensor) -> None:
        """`layers d_model -> `, or `contexts context layers d_model -> `: adds vectors of your own.

        The first is added at every edited token, the second at the tokens of one text, column by column. Raises
        ShapeError for other axes.
        """
        self._check_open()
        self._edits.additions.add(delta, len(self._edits.writes))
        self._edits.said.append(f"add({' x '.join(map(str, delta.shape))})")

    def clear(self) -> None:
        """Forgets the edits made so far, so that later calls run as the model is."""
        self._edits.clear()

    def _set(self, said: str, latents: Latents, value: Numbers) -> None:
        chosen, values = self._chosen(latents, value)

        def edit(z: Tensor, _where: Tensor, _past: int) -> None:
            z[:, chosen] = values.to(z).expand(len(z), len(chosen))

        self._edits.make(said, edit)

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
