"""Several language models, opened for the same text; needs transformers (`pip install 'fmxnn[harvest]'`)."""

from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fmxnn.activations.adapters import AdapterOff, adapter_name, without_wrapper
from fmxnn.activations.aligned import Aligned, WithText, aligned_to, same_for_all
from fmxnn.activations.aligned_text import aligned_contexts
from fmxnn.activations.configs import check_context, check_vocabulary, longest_context, model_name
from fmxnn.activations.layer_reader import LayerReader
from fmxnn.activations.models import Model, as_tokenizer, at_revision, open_tokenizer
from fmxnn.activations.reading import ModelReading
from fmxnn.activations.several import SeveralSource, naming
from fmxnn.activations.source import ModelSource
from fmxnn.activations.text import Contexts, contexts, documents
from fmxnn.activations.text import Source as Text
from fmxnn.activations.vocabularies import check_offsets, same_tokens


class Size(NamedTuple):
    """How a text is cut and read: tokens of a context, kept tokens read in all, contexts at once, a record's column.

    ```python
    from fmxnn.activations.members import Size

    Size(context=32, tokens=10_000)
    ```
    """

    context: int = 128
    tokens: int | None = None
    at_once: int = 32
    column: str = "text"


def read_several(
    models: Sequence[Model], text: Text | Contexts, tokenizer: Any, *, reading: ModelReading, size: Size
) -> SeveralSource:
    """What `harvest` reads of a list of models. What can be known before a model is opened is checked before.

    Raises ValueError, with the name of the model, for what one of them cannot read.
    """
    _check_models(models)
    names = distinct([short_name(model) for model in models])
    tokenizers = _tokenizers(models, tokenizer, names, needed=not isinstance(text, Contexts))
    same = _same(tokenizers, names, text)
    for name, model in zip(names, models, strict=True):
        with naming(name):
            reading = reading.known(model)
    opened = list[list[LayerReader]]()
    for name, model, own in zip(names, models, tokenizers, strict=True):
        with naming(name):
            opened.append(reading.open(model, own)[0])
            if not isinstance(text, Contexts):
                check_context(opened[-1][0].model, size.context)
    longest = [longest_context(readers[0].model) for readers in opened]
    aligned = _read(text, tokenizers, size, same=same, longest=min(filter(None, longest), default=None))
    for name, readers, each in zip(names, opened, aligned.each, strict=True):
        with naming(name):
            check_context(readers[0].model, each.context)
            check_vocabulary(readers[0].model, each.known.ids)
    sources = [
        ModelSource(readers, each, at_once=size.at_once) for readers, each in zip(opened, aligned.each, strict=True)
    ]
    return SeveralSource(dict(zip(names, sources, strict=True)), aligned)


def _read(text: Text | Contexts, tokenizers: Sequence[Any], size: Size, *, same: bool, longest: int | None) -> Aligned:
    """What each model reads of the text, or of contexts that are there already."""
    if isinstance(text, Contexts):
        if same or not isinstance(text, WithText):
            return same_for_all(text, len(tokenizers))
        return aligned_to(text, text.rendered, tokenizers, longest=longest)
    if same:
        read = contexts(text, tokenizers[0], context=size.context, tokens=size.tokens, column=size.column)
        return same_for_all(read, len(tokenizers))
    return aligned_contexts(documents(text, size.column), tokenizers, context=size.context, tokens=size.tokens)


# ---- what each model is called


def short_name(model: Model) -> str:
    """The last part of a folder or Hub name, with the revision behind "@"; of a module, with its adapter behind "+"."""
    adapter = None
    if isinstance(model, nn.Module):
        inside = model.with_adapter if isinstance(model, AdapterOff) else without_wrapper(model)
        model, adapter = model_name(inside), adapter_name(model)
    name, revision = at_revision(model)
    path = Path(name)
    behind = [*(f"@{each}" for each in revision.values()), *([] if adapter is None else [f"+{adapter}"])]
    return (path.name or path.resolve().name) + "".join(behind)


def distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where several are the same: a, b, a are a-1, b, a-2."""
    often = Counter(names)
    taken = {name for name in names if often[name] == 1}
    found = list[str]()
    for name in names:
        new = name if often[name] == 1 else next(new for n in count(1) if (new := f"{name}-{n}") not in taken)
        taken.add(new)
        found.append(new)
    return found


# ---- what can be known before a model is opened


def _check_models(models: Sequence[object]) -> None:
    if not models:
        raise ValueError("harvest reads a language model or a list of them, got an empty list; name at least one")
    for number, model in enumerate(models):
        if not isinstance(model, str | Path | nn.Module):
            raise ValueError(
                f"each model of a list is a folder, a Hub name or a module, got {type(model).__name__} at place "
                f"{number}; give one list of models"
            )


def _tokenizers(models: Sequence[Model], given: Any, names: Sequence[str], *, needed: bool) -> list[Any]:
    """The tokenizer of each model: one for all, one each, or that of the name."""
    each = [*map(as_tokenizer, given)] if isinstance(given, list | tuple) else [as_tokenizer(given)] * len(models)
    if len(each) != len(models):
        raise ValueError(
            f"tokenizer is one for all models or a list with one for each, got {len(each)} for the models "
            f"{', '.join(names)}; give as many, with None where a named model has its own"
        )
    for number, (model, one) in enumerate(zip(models, each, strict=True)):
        if one is None and not isinstance(model, nn.Module):
            each[number] = open_tokenizer(model)
        elif one is None and needed:
            raise ValueError(
                f"harvest needs the tokenizer of {names[number]}, which is given as a module; pass tokenizer=..., one "
                "for all models or a list with one for each"
            )
    return each


def _same(tokenizers: Sequence[Any], names: Sequence[str], text: Text | Contexts) -> bool:
    """Whether the same ids go through every model. Raises ValueError where they cannot, and the text has no other."""
    known = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    if all(same_tokens(known[0], other) for other in known[1:]):
        return True
    if isinstance(text, Contexts) and not isinstance(text, WithText):
        raise ValueError(
            f"the models {', '.join(names)} have different tokenizers, and contexts hold the tokens of one; give the "
            "text itself, or tokenizer=... to say that its tokens fit all models"
        )
    for tokenizer, name in zip(tokenizers, names, strict=True):
        check_offsets(tokenizer, name)
    return False
