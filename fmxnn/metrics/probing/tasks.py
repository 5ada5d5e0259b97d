"""Labelled texts for probing: folders, records, and public data sets; needs `pip install 'fmxnn[metrics]'`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmxnn.activations.text import text_of
from fmxnn.activations.textfiles import json_lines, sound
from fmxnn.metrics.probing.data_sets import DATA_SETS, Pairs

SPLITS = ("train", "test")


@dataclass(frozen=True)
class LabelledTexts:
    """One split: texts, the label of each as a string, and how many records without any text were left out.

    ```python
    from fmxnn.metrics.probing import LabelledTexts

    LabelledTexts.of([{"text": "the tide turned", "label": "sea"}, {"text": "a green hill", "label": "land"}]).labels
    ```
    """

    texts: list[str]
    labels: list[str]
    empty: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> "LabelledTexts":
        """From records of {"text": a string, "label": a string or a number}.

        Raises ValueError, with its number, for another.
        """
        return _gathered((_pair(record, f"record {number}") for number, record in enumerate(records)))


@dataclass(frozen=True)
class ProbeTask:
    """What a probe is trained on and what it is measured on.

    ```python
    from fmxnn.metrics.probing import LabelledTexts, ProbeTask

    texts = LabelledTexts(["the tide turned", "a green hill"], ["sea", "land"])
    ProbeTask("sea or land", train=texts, test=texts)
    ```
    """

    name: str
    train: LabelledTexts
    test: LabelledTexts


def load_probes(source: str | Path, *, seed: int = 0, train: int = 2000, test: int = 500) -> list[ProbeTask]:
    """The tasks in a folder, in a folder of such folders, or of a public data set in `DATA_SETS`.

    A folder has train.jsonl and test.jsonl of {"text", "label"}; folders come in the order of their names. Of a data
    set up to `train` and `test` texts of each label are read, drawn with `seed` where it is read whole. Files are read
    as they are. Raises FileNotFoundError for a missing folder or file, and ValueError, with file and line, for a broken
    one.
    """
    if str(source) in DATA_SETS:
        read = DATA_SETS[str(source)]
        return [ProbeTask(str(source), _gathered(read("train", seed, train)), _gathered(read("test", seed, test)))]
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(source)!r} of train.jsonl and test.jsonl, and no data set of that name; the "
            f"data sets are {', '.join(DATA_SETS)}"
        )
    inner = sorted(each for each in folder.iterdir() if any((each / f"{split}.jsonl").is_file() for split in SPLITS))
    return [ProbeTask(each.name, *(_file(each / f"{split}.jsonl") for split in SPLITS)) for each in inner or [folder]]


def _file(path: Path) -> LabelledTexts:
    if not path.is_file():
        raise FileNotFoundError(
            f'there is no {str(path)!r}; a probe is a folder with train.jsonl and test.jsonl of {{"text", "label"}}'
        )
    return _gathered((_pair(record, where) for where, record in json_lines(path)))


def _pair(record: Any, where: str) -> tuple[str, str]:
    text = text_of(record)
    label = None if text is None else record.get("label")
    if text is None or not isinstance(label, (str, int, float)):
        raise ValueError(
            f'{where}: a record needs a "text" that is a string and a "label" that is a string or a number'
        )
    return sound(text, where), sound(str(label), where)


def _gathered(pairs: Pairs) -> LabelledTexts:
    texts, labels, empty = list[str](), list[str](), 0
    for text, label in pairs:
        if text.strip():
            texts.append(text)
            labels.append(label)
        else:
            empty += 1
    return LabelledTexts(texts, labels, empty)
