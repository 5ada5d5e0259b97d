"""What a language model loses when one layer is replaced by its reconstruction."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from fmxnn.activations.configs import check_context, check_vocabulary
from fmxnn.activations.editing.writing import Output, giving, residual_of, skipping, with_residual
from fmxnn.activations.layer_reader import LayerReader
from fmxnn.activations.places import Layer, residual_blocks
from fmxnn.activations.text import Contexts
from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.inputs import check_activations
from fmxnn.core.modes import evaluating
from fmxnn.core.progress import Progress, silently

Ablation = Literal["zero", "mean"]
Form = Literal["ce", "kl"]


class Losses(NamedTuple):
    """`layers, layers`: cross-entropy and KL with a layer replaced, in nats a predicted token.

    The KL is that of the clean prediction from the one made with that layer replaced.

    ```python
    from fmxnn.metrics.splice import Losses

    Losses(ce=torch.tensor([3.2, 3.4]), kl=torch.tensor([0.1, 0.2])).kl.mean()
    ```
    """

    ce: Tensor
    kl: Tensor


@dataclass(frozen=True)
class SpliceReport:
    """One layer at a time replaced by its reconstruction, by zero and by its mean.

    Every tensor is float64 with axis `layers`.

    - `clean`: cross-entropy of the model as it is; `tokens`: predictions counted
    - `spliced`: losses with the reconstruction; `ce` and `kl` are its two tensors
    - `ablated`: losses with nothing (`"zero"`) or the mean over the text (`"mean"`) in the layer's place

    ```python
    from fmxnn.metrics import SpliceReport
    from fmxnn.metrics.splice import Losses

    spliced, zero = Losses(torch.tensor([3.2]), torch.tensor([0.1])), Losses(torch.tensor([5.0]), torch.tensor([2.0]))
    report = SpliceReport((4,), tokens=100, clean=3.0, spliced=spliced, ablated={"zero": zero, "mean": zero})
    report.score("zero")  # tensor([0.9])
    ```
    """

    layers: tuple[Layer, ...]
    tokens: int
    clean: float
    spliced: Losses
    ablated: dict[Ablation, Losses]

    @property
    def ce(self) -> Tensor:
        """`-> layers`: cross-entropy with the reconstruction in place, in nats a token."""
        return self.spliced.ce

    @property
    def kl(self) -> Tensor:
        """`-> layers`: KL(clean || spliced), in nats a token."""
        return self.spliced.kl

    def score(self, ablation: Ablation = "zero", form: Form = "ce") -> Tensor:
        """`-> layers`: the share of an ablation's harm that the reconstruction spares.

        It is (ablated - spliced) / (ablated - clean), of cross-entropies or of KL divergences, whose clean one is 0: 1
        if the reconstruction is exact, 0 if it is as bad as the ablation, negative where it harms more. Raises
        ValueError for an unknown ablation or form.
        """
        for name, value, allowed in (("ablation", ablation, get_args(Ablation)), ("form", form, get_args(Form))):
            if value not in allowed:
                raise ValueError(f"SpliceReport knows {name} {', '.join(allowed)}, got {value!r}")
        clean, ablated = {"ce": self.clean, "kl": 0.0}[form], getattr(self.ablated[ablation], form)
        return (ablated - getattr(self.spliced, form)) / (ablated - clean)

    def numbers(self) -> dict[str, float]:
        """Every headline number by name, averaged over layers, for a log line or a table."""
        scores = {
            f"{form}_score_{name}": float(self.score(name, form).mean())
            for form in get_args(Form)
            for name in get_args(Ablation)
        }
        return {"ce_clean": self.clean, "ce": float(self.ce.mean()), "kl": float(self.kl.mean()), **scores}


@torch.no_grad()
def spliced_loss(
    crosscoder: Crosscoder,
    model: nn.Module,
    text: Contexts,
    *,
    layers: Sequence[Layer],
    batch: int = 8,
    path: str | None = None,
    progress: Progress = silently,
) -> SpliceReport:
    """How a language model's predictions suffer when only layer l is replaced by its reconstruction, for each l.

    The reconstruction comes from the clean activations of all `layers`, in the units of the model's own residual stream
    (fold a training scale first: `fold_scale`); from layer l the model runs on. Tokens with `keep` false stay as they
    are. A prediction counts where it is made at a kept token and of a kept token. All layers replaced at once would
    equal the last alone, which hides the others, so it is not offered. The means for mean ablation are taken over the
    kept tokens of `text`, which is read twice.

    - `batch`: contexts that run at once; log-probabilities of all their tokens over the vocabulary are held twice
    - `path`: where the blocks of an unknown family are
    - `progress`: `tqdm` shows how far it is

    A context costs a forward, one that ends at the last of `layers`, and from each of `layers` on three. The first
    batch costs one more from each, to see that later blocks read nothing of earlier ones but the residual stream; where
    they do, the three are whole. Both modules run in eval mode and are put back after.

    Raises ValueError for a layer that the model lacks, contexts longer than it reads, ids outside its vocabulary or no
    prediction to count. Raises ShapeError for a crosscoder of other layers or d_model.
    """
    reader = LayerReader(model, layers, path=path)
    predictions = _check_text(model, text, batch)
    with evaluating(crosscoder, model):
        check_activations(
            crosscoder, reader(text.ids[:1, :2].to(_device(model)).long()).shape[-2:], layers, writes=True
        )
        total = -(-len(text) // batch)
        means = _means(reader, text, progress(_batches(model, text, batch), desc="means", total=total))
        splice = _Splice(reader, residual_blocks(model, path))
        batches = progress(_batches(model, text, batch), desc="spliced loss", total=total)
        sums = [_summed(crosscoder, splice, means, ids, keep) for ids, keep in batches if keep.any()]
    clean, losses = (torch.stack(parts).sum(0).cpu() / predictions for parts in zip(*sums, strict=True))
    spliced, zero, mean = (Losses(*each) for each in losses.unbind(1))
    return SpliceReport(reader.layers, predictions, float(clean), spliced, {"zero": zero, "mean": mean})


def _summed(
    crosscoder: Crosscoder, splice: "_Splice", means: Tensor, ids: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor]:
    """`contexts context, contexts context -> , 2 3 layers`: the clean cross-entropy; then cross-entropy and KL spliced,
    without the layer, at its mean.
    """
    expected, outputs = splice.clean(ids, keep)
    like, x = crosscoder.encoder.bias, torch.stack([residual_of(output)[keep] for output in outputs], dim=-2)
    x_hat = crosscoder(x.to(like.device, like.dtype)).to(x)
    losses = torch.zeros(2, 3, len(outputs), dtype=torch.float64, device=x.device)
    for place, output in enumerate(outputs):
        for kind, new in enumerate((x_hat[:, place], torch.zeros_like(means[place]), means[place])):
            found = splice(place, with_residual(output, keep, new), ids, keep)
            losses[0, kind, place] = _cross_entropy(found, ids, keep)
            losses[1, kind, place] = (
                functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1).double().sum()
            )
    return _cross_entropy(expected, ids, keep), losses


class _Splice:
    """A language model's log-probabilities `tokens vocabulary` as it is, and with one layer giving something else."""

    def __init__(self, reader: LayerReader, blocks: nn.ModuleList):
        self.model, self._blocks = reader.model, blocks
        self._layers = [layer for layer in reader.layers if isinstance(layer, int) and layer >= 0]
        if len(self._layers) < len(reader.layers):
            others = ", ".join(str(layer) for layer in reader.layers if layer not in self._layers)
            raise ValueError(
                f"spliced_loss replaces what blocks give, so layers are their numbers from 0, got {others}; name blocks"
            )
        self._runs_on: list[bool] = []

    def clean(self, ids: Tensor, keep: Tensor) -> tuple[Tensor, list[Output]]:
        """The model as it is, and what each of the layers gives."""
        given: dict[int, Output] = {}
        with ExitStack() as hooks:
            for layer in self._layers:
                hooks.enter_context(
                    giving(self._blocks[layer], lambda output, layer=layer: given.setdefault(layer, output))
                )
            expected = _log_probabilities(self.model, ids, keep)
        outputs = [given[layer] for layer in self._layers]
        if not self._runs_on:
            self._runs_on = [
                torch.equal(self._from(place, output, ids, keep), expected) for place, output in enumerate(outputs)
            ]
        return expected, outputs

    def __call__(self, place: int, output: Output, ids: Tensor, keep: Tensor) -> Tensor:
        """With this layer giving `output`."""
        if self._runs_on[place]:
            return self._from(place, output, ids, keep)
        with giving(self._blocks[self._layers[place]], lambda _: output):
            return _log_probabilities(self.model, ids, keep)

    def _from(self, place: int, output: Output, ids: Tensor, keep: Tensor) -> Tensor:
        """The same without the work of the layer and of those before it."""
        with skipping(self._blocks[: self._layers[place] + 1], output):
            return _log_probabilities(self.model, ids, keep)


def _check_text(model: nn.Module, text: Contexts, batch: int) -> int:
    """How many predictions count."""
    if not isinstance(text, Contexts):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"spliced_loss reads Contexts, got {type(text).__name__}; make them: contexts(text, tokenizer, context=128)"
        )
    if batch < 1:
        raise ValueError(f"spliced_loss needs batch >= 1, the contexts that run at once, got batch={batch}")
    predictions = int(_counted(text.keep).sum())
    if not predictions:
        raise ValueError(
            f"spliced_loss needs two kept tokens in a row to count a prediction, and {len(text)} contexts with "
            f"{text.tokens} kept tokens hold none; "
            "give more text"
        )
    check_context(model, text.ids.shape[1])
    check_vocabulary(model, text.ids)
    return predictions


def _means(reader: LayerReader, text: Contexts, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """`-> layers d_model`: over the kept tokens of the text."""
    total = torch.zeros(())
    for ids, keep in batches:
        total = reader(ids)[keep].double().sum(0) + total.to(ids.device)
    return total / text.tokens


def _batches(model: nn.Module, text: Contexts, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`contexts context, contexts context`: ids and keep, where the model runs."""
    device = _device(model)
    for ids, keep in zip(text.ids.split(batch), text.keep.split(batch), strict=True):
        yield ids.to(device).long(), keep.to(device)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _counted(keep: Tensor) -> Tensor:
    """`contexts context -> contexts context-1`: where a prediction is made at a kept token and of a kept token."""
    return keep[:, :-1] & keep[:, 1:]


def _log_probabilities(model: nn.Module, ids: Tensor, keep: Tensor) -> Tensor:
    """`contexts context, contexts context -> tokens vocabulary`: of the predictions that count, in float32 at least."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1][_counted(keep)]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _cross_entropy(found: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    targets = ids[:, 1:][_counted(keep)]
    return -found.gather(1, targets.unsqueeze(1)).double().sum()
