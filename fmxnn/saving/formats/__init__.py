"""Crosscoders and dictionaries that other libraries wrote: each format in a file of its own, known by its files."""

from pathlib import Path

from fmxnn.core.errors import FormatError
from fmxnn.saving.formats.circuit_tracer import CIRCUIT_TRACER
from fmxnn.saving.formats.ckkissane import CKKISSANE
from fmxnn.saving.formats.crosscode import CROSSCODE
from fmxnn.saving.formats.dictionary_learning import DICTIONARY_LEARNING
from fmxnn.saving.formats.dictionary_learning_crosscoder import DICTIONARY_LEARNING_CROSSCODER
from fmxnn.saving.formats.format import Format, Options, Reading, no_scale, options, unreadable
from fmxnn.saving.formats.gemma_scope import GEMMA_SCOPE
from fmxnn.saving.formats.llamascopium import LLAMASCOPIUM
from fmxnn.saving.formats.polysae import POLYSAE
from fmxnn.saving.formats.saelens import SAELENS
from fmxnn.saving.formats.sparsify import SPARSIFY

CROSSCODERS = (CKKISSANE, DICTIONARY_LEARNING_CROSSCODER, CROSSCODE, GEMMA_SCOPE, LLAMASCOPIUM)
FORMATS: tuple[Format, ...] = (*CROSSCODERS, SAELENS, SPARSIFY, DICTIONARY_LEARNING, CIRCUIT_TRACER, POLYSAE)
OWN = "config.json that names fmxnn, manifest.json, model.safetensors"

__all__ = ["FORMATS", "Format", "FormatError", "Options", "Reading", "format_of", "looked_for", "no_scale", "options"]


def format_of(folder: Path, name: str | None, *, own: bool) -> Format | None:
    """The format of a folder, by `name` where it is given and else by its files; None stands for our own.

    `own` says whether our own files are there. Raises FormatError for an unknown name, and for a folder that fits two
    formats or none, with what was looked for.
    """
    if name is not None:
        known = {"fmxnn": None, **{format.name: format for format in FORMATS}}
        if name not in known:
            raise FormatError(f"unknown format {name!r}; known are {', '.join(known)}")
        return known[name]
    fits: list[Format | None] = [None] if own else []
    fits += [format for format in FORMATS if format.recognises(folder)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        names = " and ".join("fmxnn" if format is None else format.name for format in fits)
        raise FormatError(
            f"{folder} fits {names}; say which: "
            f"format={('fmxnn' if fits[0] is None else fits[0].name)!r}\n{looked_for()}"
        )
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    then = "; ".join(unreadable(folder)) or "give its subfolder= or format="
    raise FormatError(f"{folder} fits no known format, it holds {held}; {then}\n{looked_for()}")


def looked_for() -> str:
    """What each format is known by, a line each."""
    return "\n".join(["looked for:", f"  fmxnn: {OWN}", *(f"  {format.name}: {format.files}" for format in FORMATS)])
