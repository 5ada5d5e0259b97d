"""Cards of latents as one HTML file that needs nothing else, as a folder, or as JSON."""

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fmxnn.core.cells import writable
from fmxnn.metrics.progress import Progress, silently
from fmxnn.reports.pages.cards import TEMPLATES
from fmxnn.reports.pages.export import record
from fmxnn.reports.pages.feature import Feature, LazyFeatures
from fmxnn.reports.pages.site import Head, write_site


@dataclass(frozen=True)
class FeaturePage:
    """Latents of a crosscoder on `layers` of `model`, seen on `tokens` tokens of text; see `feature_page`.

    Those that `feature_page` gives are made whenever you look at them, since their text takes much memory: keep a
    feature that you need often.

    ```python
    from fmxnn.reports.pages import FeaturePage

    page = FeaturePage("My latents", "tiny-lm", layers=(1, 2), tokens=1000, features=())
    page.save("features.html")
    ```
    """

    title: str
    model: str
    layers: tuple[int | str, ...]
    tokens: int
    features: Sequence[Feature]

    @property
    def latents(self) -> tuple[int, ...]:
        """Which latents it shows, in their order."""
        features = self.features
        lazy = isinstance(features, LazyFeatures)
        return features.latents if lazy else tuple(feature.latent for feature in features)

    def html(self, *, progress: Progress = silently) -> str:
        """The page: text, style and script in one, nothing fetched from anywhere."""
        shown, features = frozenset(self.latents), progress(self.features, desc="cards", total=len(self.features))
        return TEMPLATES.get_template("page.html").render(page=self, features=features, shown=shown)

    def save(self, path: str | Path, *, progress: Progress = silently) -> None:
        """Writes the page as one HTML file, or, where `path` is a folder, as an index with files beside it.

        A path is a folder where it ends in a slash, has no suffix, or is one already. Open the `index.html` in it; it
        needs no server, and a latent's card is read when it is looked at, so that it may hold any number of latents.
        An earlier page in that folder is replaced once the new one is whole. `progress`: `tqdm` shows how far it is.

        Raises OSError, saying why, where it cannot be written, and for a folder that holds anything else.
        """
        if str(path).endswith(("/", os.sep)) or Path(path).is_dir() or not Path(path).suffix:
            head = Head(self.title, self.model, self.layers, self.tokens)
            write_site(Path(path), head, self.latents, self.features, progress)
        else:
            _write(Path(path), [self.html(progress=progress)])

    def export(self, path: str | Path, *, progress: Progress = silently) -> None:
        """Writes the latents as JSON in the shape of neuronpedia.org; see `export.record` for its fields.

        Raises OSError as `save` does.
        """
        _write(Path(path), self._json(progress))

    def _json(self, progress: Progress) -> Iterator[str]:
        start = "["
        for feature in progress(self.features, desc="latents", total=len(self.features)):
            made = record(feature, model=self.model, layers=self.layers, tokens=self.tokens)
            yield start + json.dumps(made, ensure_ascii=False, allow_nan=False)
            start = ",\n"
        yield "]" if start != "[" else "[]"


def _write(path: Path, parts: Iterable[str]) -> None:
    """The whole file, or what stood there before."""
    target = Path(os.path.realpath(path))
    made = target.with_name(f".{secrets.token_hex(4)}.fmxnn")
    try:
        with made.open("w", encoding="utf-8") as file:
            file.writelines(map(writable, parts))  # of JSON, too, that is the escape
        made.replace(target)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error.strerror}; give the path of a file in a folder that exists"
        ) from error
    finally:
        with suppress(OSError):
            made.unlink()
