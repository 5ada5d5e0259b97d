"""Which parts of an evaluation can be measured of what was given, and why the others cannot."""

from collections.abc import Sequence

from fmxnn.activations.own import OwnActivations, lacking_tokens
from fmxnn.reports.one_pass import Call

PARTS = ("reconstruction", "splice", "coherence", "probing", "features", "judge")


def measured(call: Call, parts: Sequence[str] | None) -> list[str]:
    """The parts that are measured: those asked for, or where none are named, all that can be.

    Probing tasks, latents and a judge ask for their part by being there. Raises ValueError, with the reason, for a part
    that was asked for and cannot be measured.
    """
    wanted, found = call.wanted, list[str]()
    given = {"probing": bool(wanted.tasks), "features": bool(wanted.latents), "judge": wanted.judge is not None}
    for part in PARTS if parts is None else parts:
        why = "" if given.get(part) is False else _why_not(call, part)  # what has nothing to work on lacks nothing
        if why and (parts is not None or part in given):
            raise ValueError(f"evaluate cannot measure the part {part}: {why}")
        if not why:
            found.append(part)
    return found


def _why_not(call: Call, part: str) -> str:
    """Why a part cannot be measured, if it cannot."""
    if part == "splice":
        return _why_not_spliced(call)
    model, tokenizer, *_ = call.language
    if part == "probing" and model is None:
        return "the language model reads the texts of the tasks; pass model=..."
    if part in ("features", "judge") and not _has_tokens(call):
        return lacking_tokens()
    if part in ("probing", "features", "judge") and tokenizer is None:
        return "it needs the tokenizer of the language model; pass tokenizer=..."
    return ""


def _why_not_spliced(call: Call) -> str:
    model, _, at, to, _ = call.language
    places = [at] if to is None else [at, to]
    if places != ["block_out"]:
        return (
            f"a reconstruction is put in the place of the residual stream after blocks, and this crosscoder is of "
            f"{' and '.join(places)}"[:300]
            + "; leave it out of parts"
        )
    if isinstance(call.activations, OwnActivations):
        return (
            "the language model reads whole contexts, and activations of your own are of some of its tokens; give the "
            "text, or what harvest gives"
        )
    if not all(isinstance(layer, int) and layer >= 0 for layer in call.activations.layers):
        named = ", ".join(map(str, call.activations.layers))[:200]
        return (
            f"it replaces layers of one language model by their numbers, and these are {named}; leave it out of parts"
        )
    if model is None:
        return "it runs the language model, and these activations come without one; pass model=..."
    return ""


def _has_tokens(call: Call) -> bool:
    return not isinstance(call.activations, OwnActivations) or call.activations.has_tokens
