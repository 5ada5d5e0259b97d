"""One call for all measures of a crosscoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmxnn.activations.configs import model_name
from fmxnn.activations.harvesting import harvest
from fmxnn.activations.models import Model, open_model
from fmxnn.activations.places import Layer
from fmxnn.activations.text import Contexts, Source, contexts
from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.coders.inputs import check_activations
from fmxnn.metrics import spliced_loss
from fmxnn.metrics.judge import Judge
from fmxnn.metrics.probing.pooling import pooled_codes
from fmxnn.metrics.probing.probing import ProbeResult, probe
from fmxnn.metrics.probing.tasks import LabelledTexts, ProbeTask, load_probes
from fmxnn.metrics.progress import Progress, silently
from fmxnn.reports.evaluation import Evaluation
from fmxnn.reports.one_pass import Call, Run, Streams, Wanted

PARTS = ("reconstruction", "splice", "coherence", "probing", "features", "judge")


@torch.no_grad()
def evaluate(
    crosscoder: Crosscoder,
    text: Source | Contexts,
    *,
    model: Model | None = None,
    layers: Sequence[Layer] | None = None,
    tokenizer: Any = None,
    probes: str | Path | Sequence[ProbeTask | str | Path] = (),
    latents: Sequence[int] = (),
    judge: Judge | None = None,
    parts: Sequence[str] | None = None,
    name: str = "",
    context: int = 128,
    batch: int = 8,
    device: str | torch.device | None = None,
    progress: Progress = silently,
) -> Evaluation:
    """Measures a crosscoder on held-out `text`: metrics, probing, feature pages and a judge's counts in one call.

    - `model`, `text`, `tokenizer`, `context`: those of `harvest`
    - `layers`: those that the crosscoder was trained on; `latents`: those that get a page each
    - `probes`: tasks, or what `load_probes` reads
    - `judge`: is asked about every latent, which may cost money; look at its `estimate` first
    - `parts`: which of `PARTS` are measured, None for all; a part with nothing to work on is left out
    - `batch`: contexts that run at once; `device`: where the language model runs
    - `progress`: `tqdm` shows how far it is

    A crosscoder that was saved with its model and layers (`save_pretrained(..., about=...)`) knows them. Each number is
    that of its function in `fmxnn.metrics` at its defaults, over all kept tokens. The text is read once for all but the
    spliced loss. The crosscoder must read the model's own activations (`fold_scale`).

    Raises ValueError for an unknown part, a model or layers that are not known or a missing tokenizer, and what those
    functions raise.
    """
    parts = _checked(parts)
    read = tuple(known(crosscoder, "layers", layers))
    model, tokenizer = open_model(known(crosscoder, "model", model), tokenizer)
    wanted = Wanted(_tasks(probes), tuple(latents), judge)
    if tokenizer is None and (not isinstance(text, Contexts) or any(wanted)):
        raise ValueError("evaluate needs the tokenizer of a model that is given as a module; pass tokenizer=...")
    text = text if isinstance(text, Contexts) else contexts(text, tokenizer, context=context)
    stream = harvest(model, text, layers=read, batch=1, device=device)
    check_activations(crosscoder, (len(read), stream.d_model), read)
    call = Call(crosscoder, stream, tokenizer, wanted, Run(batch, progress))
    return Evaluation(name or _name(crosscoder), model_name(model), read, **_found(call, parts))


def _found(call: Call, parts: Sequence[str]) -> dict[str, Any]:
    """The parts of an `Evaluation`; the judge comes last, so that what costs money is asked when all else went well."""
    streams = Streams(call, parts)
    found = streams.read()
    found |= _splice(call) if "splice" in parts else {}
    found |= _probing(call) if "probing" in parts else {}
    return found | streams.judged()


def _checked(parts: Sequence[str] | None) -> Sequence[str]:
    """The parts asked for, all of them where none are named."""
    asked = PARTS if parts is None else parts
    if not asked or not set(asked) <= set(PARTS):
        unknown = ", ".join(part for part in asked if part not in PARTS)
        raise ValueError(
            f"evaluate knows the parts {', '.join(PARTS)}, got {unknown or 'none'}; leave parts out for all"
        )
    return asked


def _splice(call: Call) -> dict[str, Any]:
    model, text, layers = call.stream.model, call.stream.contexts, call.stream.layers
    return {"splice": spliced_loss(call.crosscoder, model, text, layers=layers, **call.run._asdict())}


def _probing(call: Call) -> dict[str, Any]:
    tasks, found = call.wanted.tasks, dict[str, ProbeResult]()
    for task in call.run.progress(tasks, desc="probing", total=len(tasks)):
        train, test = (_pooled(call, split) for split in (task.train, task.test))
        found[task.name] = probe(train, task.train.labels, test, task.test.labels)
    return {"probes": found}


def _pooled(call: Call, split: LabelledTexts) -> Tensor:
    """`-> texts latents`"""
    model, layers, context = call.stream.model, call.stream.layers, call.stream.contexts.ids.shape[1]
    return pooled_codes(call.crosscoder, model, call.tokenizer, split.texts, layers=layers, context=context).codes


def known(crosscoder: Crosscoder, what: str, given: Any) -> Any:
    """What was given, or else what the crosscoder was saved with."""
    about: dict[str, Any] = getattr(crosscoder, "about", {})
    found = about.get("base_model" if what == "model" else what) if given is None else given
    if found is None:
        example = {"model": "model='openai-community/gpt2'", "layers": "layers=range(2, 10)"}[what]
        raise ValueError(
            f"evaluate needs the {what} that the crosscoder was trained on, and it was not saved with it; pass "
            f"{example}"
        )
    return found


def _tasks(probes: str | Path | Sequence[ProbeTask | str | Path]) -> tuple[ProbeTask, ...]:
    given = [probes] if isinstance(probes, (str, Path)) else probes
    return tuple(task for each in given for task in ([each] if isinstance(each, ProbeTask) else load_probes(each)))


def _name(crosscoder: Crosscoder) -> str:
    """Where it was loaded from, or what it is made of."""
    weight = crosscoder.encoder.weight
    return Path(
        str(getattr(crosscoder, "pretrained_from", f"{type(weight).__name__} of {weight.latents:,} latents"))
    ).name
