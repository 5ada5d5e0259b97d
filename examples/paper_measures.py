"""What reproduce_paper.py measures of a job's dictionaries, as plain numbers for a JSON file."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor, nn

import fmxnn as fx
from fmxnn.activations import Contexts
from fmxnn.metrics import (
    Coherence,
    functional_coherence,
    measure_reconstruction,
    norm_coherence,
    off_to_on,
    spliced_loss,
)
from fmxnn.metrics.probing import LabelledTexts, load_probes, pooled_codes, probe

Dictionaries = list[tuple[fx.Crosscoder, slice]]
"""One crosscoder for all layers or an SAE for each, with its places on the layers axis."""
Numbers = dict[str, float]
HIDDEN = 8  # batches with a layer hidden
TRAIN_TEXTS, TEST_TEXTS = 600, 400  # of each task


def measured(dictionaries: Dictionaries, heldout: Callable[[], Iterator[Tensor]]) -> dict[str, Any]:
    """`-> tokens layers d_model`: reconstruction, a mean over dictionaries where there are several; both coherences of
    a crosscoder.
    """

    def rebuilt(crosscoder: fx.Crosscoder, place: slice) -> Numbers:
        return measure_reconstruction(crosscoder, (x[:, place].contiguous() for x in heldout())).numbers()

    numbers = mean_of(rebuilt(*each) for each in dictionaries)
    if len(dictionaries) > 1:
        return {"numbers": numbers}
    crosscoder = dictionaries[0][0]
    switched = off_to_on(crosscoder, islice(heldout(), HIDDEN))
    numbers |= {"off_to_on": switched.rate, "off_to_on_per_token": float(switched.per_token.mean())}
    norm, functional = norm_coherence(crosscoder.decoder.weight), functional_coherence(crosscoder, heldout())
    return {"numbers": numbers, "c_n": _told(norm), "c_f": _told(functional)}


def probed(
    dictionaries: Dictionaries,
    model: nn.Module,
    tokenizer: Any,
    folders: Iterable[Path],
    layers: Sequence[int],
    context: int,
) -> dict[str, Any]:
    """Sparse probing of a crosscoder, or of the middle layer's SAE, in the model's own units: the mean over tasks, and
    each task.
    """
    crosscoder, place = dictionaries[len(dictionaries) // 2]
    pooled = partial(pooled_codes, crosscoder, model, tokenizer, layers=layers[place], context=context)
    tasks: dict[str, Numbers] = {}
    for task in (task for folder in folders for task in load_probes(folder)):
        train, test = _some(task.train, TRAIN_TEXTS), _some(task.test, TEST_TEXTS)
        found = probe(pooled(train.texts).codes, train.labels, pooled(test.texts).codes, test.labels, resamples=100)
        tasks[task.name] = found.numbers()
    return {"probes": mean_of(tasks.values()), "tasks": tasks} if tasks else {}


def spliced(dictionaries: Dictionaries, model: nn.Module, text: Contexts, layers: Sequence[int]) -> dict[str, Any]:
    """The loss with one layer at a time replaced, a mean over layers, of dictionaries in the model's own units."""
    return {
        "splice": mean_of(
            spliced_loss(each, model, text, layers=layers[place]).numbers() for each, place in dictionaries
        )
    }


def mean_of(records: Iterable[Numbers]) -> Numbers:
    """The mean of every number."""
    rows = list(records)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _told(coherence: Coherence) -> dict[str, Any]:
    values = [None if value != value else round(value, 4) for value in coherence.values.tolist()]
    return {"variant": coherence.variant, **coherence.numbers(), "values": values}


def _some(texts: LabelledTexts, count: int) -> LabelledTexts:
    chosen = sorted(Random(0).sample(range(len(texts)), min(count, len(texts))))
    return LabelledTexts([texts.texts[i] for i in chosen], [texts.labels[i] for i in chosen])
