"""The model card, written from the recipe."""

from collections.abc import Mapping
from typing import Any

import yaml
from torch import nn

from fmxnn.core.cells import cell
from fmxnn.core.errors import RecipeError
from fmxnn.core.files.strict_json import ABOUT_LIMITS, parse_json, to_json
from fmxnn.core.kinds import is_list, is_object
from fmxnn.core.recipe import describe
from fmxnn.saving.known import shown

_APART = "save what is large as a file of its own"
_NOTE = "  # "


def card(module: nn.Module, about: Mapping[str, Any]) -> str:
    """A Markdown card: the Python that builds the module, how to load it, its sizes, and `about`.

    `about` may hold base_model, layers, text, metrics and more.
    """
    front = ["---", "library_name: fmxnn", "tags:", "- crosscoder", "- sparse-dictionary", "- interpretability"]
    if isinstance(about.get("base_model"), str):
        front.append(f"base_model: {_yaml(about['base_model'])}")
    name = type(module).__name__
    rows = [("parameters", f"{sum(p.numel() for p in module.parameters()):,}"), *about.items()]
    table = [f"| {cell(key)} | {_cell(value)} |" for key, value in rows]
    return "\n".join(
        [
            *front,
            "---",
            f"# {name}",
            "",
            "A dictionary made with fmxnn. It is this module:",
            "",
            "```python",
            "import fmxnn as fx",
            "",
            f"module = {python(describe(module))}",
            "```",
            "",
            "Load it, in eval mode, from this repository or folder:",
            "",
            "```python",
            'module = fx.from_pretrained("path/or/repository")',
            "```",
            "",
            "| | |",
            "|---|---|",
            *table,
            "",
        ]
    )


def about_json(about: Mapping[str, Any]) -> str:
    """What `about.json` holds. Raises RecipeError for an `about` that from_pretrained would not read back."""
    try:
        said = to_json(about)
    except RecipeError as error:
        raise RecipeError(f"about cannot be saved: {error}") from error
    data = said.encode()
    if len(data) > ABOUT_LIMITS.bytes:
        raise RecipeError(
            f"about takes {len(data):,} bytes as JSON, and at most {ABOUT_LIMITS.bytes:,} are read back; {_APART}"
        )
    parse_json(data, "about", ABOUT_LIMITS._replace(way_out=_APART))
    return said


def python(recipe: Mapping[str, Any], indent: int = 0) -> str:
    """The constructor call of a recipe as Python, a line an argument that is a module itself."""
    (name, arguments), *_ = recipe.items()
    if name == "same":
        return f"...{_NOTE}the same module as {arguments or 'the top'}"
    call = shown(name)
    pad = " " * (indent + 4)
    parts: list[str] = []
    for key, value in arguments.items():
        if is_list(value) and value and is_object(value[0]):
            parts += [_argument(item, indent + 4) for item in value]
        else:
            parts.append(f"{key}={_argument(value, indent + 4)}")
    if not any("fx." in part or "torch." in part or _NOTE in part for part in parts):
        return f"{call}({', '.join(parts)})"
    return f"{call}(\n" + "".join(f"{pad}{_line(part)}\n" for part in parts) + " " * indent + ")"


def _line(part: str) -> str:
    """With its comma, before a note."""
    if part.endswith(")"):
        return f"{part},"
    text, note, rest = part.partition(_NOTE)
    return f"{text},{note}{rest}"


def _argument(value: object, indent: int) -> str:
    if is_object(value):
        return python(value, indent)
    return repr(tuple(value) if is_list(value) else value)


def _cell(value: object) -> str:
    return cell(", ".join(f"{k} {v}" for k, v in value.items()) if is_object(value) else str(value))


def _yaml(text: str) -> str:
    """A YAML string on one line, with escapes for what is not printed."""
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf")).strip()
