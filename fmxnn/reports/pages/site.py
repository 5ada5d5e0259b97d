"""Latents as a folder: an index over all of them, and files of cards that a browser reads when they are needed."""

import json
import re
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

from fmxnn.core.cells import writable
from fmxnn.core.errors import IntegrityError
from fmxnn.core.files import write_folder
from fmxnn.core.files.manifest import in_force, read_manifest
from fmxnn.metrics.progress import Progress, silently
from fmxnn.reports.pages.cards import TEMPLATES, chip
from fmxnn.reports.pages.feature import Feature

BUNCH = 64
"""Cards in one file: some hundred KiB, which a browser reads at once."""
_SHOWN_TOP, _SHOWN_LOGITS = 8, 5
_NAMES = ("index.html", "site.js", "table.js")
_CARDS = re.compile(r"cards-\d{5}\.js")
_CODE = ("search.js", "site.js")


class Head(NamedTuple):
    """What stands above the index.

    ```python
    from fmxnn.reports.pages.site import Head

    Head("My latents", "tiny-lm", layers=(1, 2), tokens=1000)
    ```
    """

    title: str
    model: str
    layers: tuple[int | str, ...]
    tokens: int


def write_site(
    folder: Path, head: Head, latents: Sequence[int], features: Sequence[Feature], progress: Progress = silently
) -> None:
    """Writes index.html, its script and its table, and the cards, a bunch a file; see `FeaturePage.save`.

    Only one bunch of features is held at a time. Raises IntegrityError, with the folder as it was, where it cannot be
    written or holds anything but an earlier page.
    """

    def fill(made: Path) -> None:
        index, shown = Index(head.tokens), frozenset(latents)
        card = TEMPLATES.get_template("card.html").module.card  # type: ignore[attr-defined]
        starts = range(0, len(features), BUNCH)
        for number, start in enumerate(progress(starts, desc="cards", total=len(starts))):
            cards = list[str]()
            for place, feature in enumerate(features[start : start + BUNCH], start):
                index.add(feature)
                cards.append(str(card(feature, head.layers, shown, -place)))
            _write(made / cards_file(number), script("cards", number, cards))
        _write(made / "table.js", script("table", index.table()))
        _write(made / "site.js", "\n".join(TEMPLATES.get_template(name).render() for name in _CODE))
        _write(made / "index.html", TEMPLATES.get_template("site.html").render(page=head, count=len(features)))

    _check_ours(folder)
    write_folder(folder, fill)


def cards_file(number: int) -> str:
    """The name of the file of a bunch."""
    return f"cards-{number:05d}.js"


def script(name: str, *values: object) -> str:
    """A call of a function as JavaScript, which a page without a server can read, where it cannot fetch JSON.

    It closes no script element, and no character in it ends a line.
    """
    texts = (json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")) for value in values)
    call = f"{name}({','.join(texts)});\n"
    return (
        call.replace("</", "<\\/").replace("<!", "\\u003c!").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )


class Index:
    """The numbers and tokens of all latents in columns, as small as a browser can read them at once.

    ```python
    from fmxnn.reports.pages.site import Index

    Index(tokens=1000).table()["latents"]  # []
    ```
    """

    def __init__(self, tokens: int):
        self.tokens = tokens
        self._words: dict[str, int] = {}
        self._columns: dict[str, list[Any]] = {
            name: [] for name in ("latents", "fired", "largest", "norm", "functional", "top", "promoted", "demoted")
        }

    def add(self, feature: Feature) -> None:
        """Adds a latent's numbers and first tokens to the end of every column."""
        row = {
            "latents": feature.latent,
            "fired": round(feature.density * self.tokens),
            "largest": _short(feature.largest),
            "norm": _short(feature.norm_coherence),
            "functional": _short(feature.functional_coherence),
            "top": self._numbered([one.token for one in feature.top[:_SHOWN_TOP]]),
            "promoted": self._numbered([one.token for one in feature.promoted[:_SHOWN_LOGITS]]),
            "demoted": self._numbered([one.token for one in feature.demoted[:_SHOWN_LOGITS]]),
        }
        for name, column in self._columns.items():
            column.append(row[name])

    def table(self) -> dict[str, Any]:
        """Columns with an entry a latent; tokens are numbers of `words`. A number that does not exist is null."""
        return {"bunch": BUNCH, "tokens": self.tokens, "words": list(self._words), **self._columns}

    def _numbered(self, tokens: list[str]) -> list[int]:
        return [self._words.setdefault(chip(token), len(self._words)) for token in tokens]


def _short(value: float) -> float | None:
    return None if isnan(value) else float(f"{value:.4g}")


def _check_ours(folder: Path) -> None:
    """Raises IntegrityError for a folder that holds what no page wrote."""
    there = [path.name for path in folder.iterdir() if not path.name.startswith(".fmxnn")] if folder.is_dir() else []
    if not there:
        return
    manifest = in_force(folder)
    files = read_manifest(manifest) if manifest else {}
    if not all(name in files for name in _NAMES) or not all(name in _NAMES or _CARDS.fullmatch(name) for name in files):
        held = ", ".join(sorted(there)[:3]) + (", ..." if len(there) > 3 else "")
        raise IntegrityError(
            f"{folder} holds {held}, which no feature page wrote, and stays as it is; give a new folder, such as "
            f"{folder / 'features'}"
        )


def _write(path: Path, text: str) -> None:
    path.write_text(writable(text), encoding="utf-8")
