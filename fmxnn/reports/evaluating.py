"""One call for all measures of a crosscoder."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fmxnn.activations.members import Size
from fmxnn.activations.models import Model
from fmxnn.activations.own import told_apart
from fmxnn.activations.places import Layer
from fmxnn.activations.text import Contexts, Source
from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.inputs import check_activations
from fmxnn.core.progress import Progress, silently
from fmxnn.metrics import spliced_loss
from fmxnn.metrics.asked import whole_latents
from fmxnn.metrics.judge import Judge
from fmxnn.metrics.probing.pooling import pooled_codes
from fmxnn.metrics.probing.probing import ProbeResult, probe
from fmxnn.metrics.probing.tasks import LabelledTexts, ProbeTask, load_probes
from fmxnn.reports.evaluation import Evaluation
from fmxnn.reports.lacking import PARTS, measured
from fmxnn.reports.one_pass import Call, Run, Streams, Wanted
from fmxnn.reports.reading import Said, as_given, of_text


@torch.no_grad()
def evaluate(
    crosscoder: Crosscoder,
    text: Source | Contexts | Iterable[Any],
    *,
    model: Model | None = None,
    layers: Sequence[Layer] | None = None,
    at: str | None = None,
    to: str | None = None,
    tokenizer: Any = None,
    probes: str | Path | Sequence[ProbeTask | str | Path] = (),
    latents: Sequence[int] = (),
    judge: Judge | None = None,
    parts: Sequence[str] | None = None,
    name: str = "",
    context: int = 128,
    column: str = "text",
    batch: int = 8,
    device: str | torch.device | None = None,
    progress: Progress = silently,
) -> Evaluation:
    """Measures a crosscoder on held-out `text`: metrics, probing, feature pages and a judge's counts in one call.

    - `text`: a text as `harvest` reads it, or activations: what `harvest` gives, or batches as for `OwnActivations`
    - `model`, `at`, `to`, `tokenizer`, `context`, `column`: those of `harvest`
    - `layers`: those that the crosscoder was trained on; `latents`: those that get a page each
    - `probes`: tasks, or what `load_probes` reads
    - `judge`: is asked about every latent, which may cost money; look at its `estimate` first
    - `parts`: which are measured of `PARTS`; None is all that can be
    - `batch`: contexts that run at once; `device`: where the language model runs; `progress`: `tqdm` shows how far

    A crosscoder that was saved with its model, layers and places (`save_pretrained(..., about=...)`) knows them. Each
    number is that of its function in `fmxnn.metrics` at its defaults, over all kept tokens. The text is read once for
    all but the spliced loss. The crosscoder must read the model's own activations (`fold_scale`).

    Raises ValueError, saying what is missing, for a part that was asked for. Raises what those functions raise.
    """
    _check_parts(parts)
    wanted, (given, read) = Wanted(_tasks(probes), whole_latents(latents), judge), told_apart(text)
    said = Said(model, tokenizer, layers, at, to, Size(context, column=column), device)
    find = as_given if read else partial(of_text, shown=any(wanted))
    activations, language = find(crosscoder, given, said)
    check_activations(crosscoder, (len(activations.layers), activations.d_model), activations.layers)
    call = Call(crosscoder, activations, language, wanted, Run(batch, progress))
    found = _found(call, measured(call, parts))
    return Evaluation(name or _name(crosscoder), activations.name, tuple(activations.layers), **found)


def _check_parts(parts: Sequence[str] | None) -> None:
    if parts is None:
        return
    if not parts or not set(parts) <= set(PARTS):
        unknown = ", ".join(part for part in parts if part not in PARTS)
        raise ValueError(
            f"evaluate knows the parts {', '.join(PARTS)}, got {unknown or 'none'}; leave parts out for all"
        )


def _found(call: Call, parts: Sequence[str]) -> dict[str, Any]:
    """The parts of an `Evaluation`; the judge comes last, so that what costs money is asked when all else went well."""
    streams = Streams(call, parts)
    found = streams.read()
    found |= _splice(call) if "splice" in parts else {}
    found |= _probing(call) if "probing" in parts and call.wanted.tasks else {}
    return found | streams.judged()


def _splice(call: Call) -> dict[str, Any]:
    model, read = cast("nn.Module", call.language.model), call.activations
    layers = read.layers
    return {"splice": spliced_loss(call.crosscoder, model, read.contexts, layers=layers, **call.run._asdict())}


def _probing(call: Call) -> dict[str, Any]:
    tasks, found = call.wanted.tasks, dict[str, ProbeResult]()
    if not tasks:
        return {}
    for task in call.run.progress(tasks, desc="probing", total=len(tasks)):
        train, test = (_pooled(call, split) for split in (task.train, task.test))
        found[task.name] = probe(train, task.train.labels, test, task.test.labels)
    return {"probes": found}


def _pooled(call: Call, split: LabelledTexts) -> Tensor:
    """`-> texts latents`"""
    model, tokenizer, at, _, context = call.language
    given = (call.crosscoder, cast("nn.Module", model), tokenizer, split.texts)
    return pooled_codes(*given, layers=call.activations.layers, at=at, context=context).codes


def _tasks(probes: str | Path | Sequence[ProbeTask | str | Path]) -> tuple[ProbeTask, ...]:
    given = [probes] if isinstance(probes, (str, Path)) else probes
    return tuple(task for each in given for task in ([each] if isinstance(each, ProbeTask) else load_probes(each)))


def _name(crosscoder: Crosscoder) -> str:
    """Where it was loaded from, or what it is made of."""
    weight = crosscoder.encoder.weight
    return Path(
        str(getattr(crosscoder, "pretrained_from", f"{type(weight).__name__} of {weight.latents:,} latents"))
    ).name
