"""What a caller gives, and what a folder lacks: a wrong name, type or place is one sentence with the way out."""

import pytest
from test_formats_faults import WRITTEN, complaint, write
from test_formats_sae import NAMES, write_any

import fmxnn as fx
from fmxnn.formats import FormatError
from fmxnn.integrity import IntegrityError

FORMATS = (*WRITTEN, *NAMES)
BY_LAYER = ("saelens", "polysae", "sparsify", "ckkissane")
SETTINGS = {"circuit_tracer": "config.yaml", "crosscode": "model_cfg.yaml"} | dict.fromkeys(BY_LAYER, "cfg.json")


def write_format(name, folder):
    """The file of settings of a folder in this format."""
    if name in WRITTEN:
        write(name, folder)
    else:
        write_any(folder, name)
    return folder / SETTINGS.get(name, "config.json")


@pytest.mark.parametrize("name", FORMATS)
def test_settings_that_are_broken_are_named_where_they_hide_the_format_too(name, tmp_path):
    config = write_format(name, tmp_path)
    config.write_text('{"a": ')
    with pytest.raises(FormatError) as caught:
        fx.from_pretrained(tmp_path)
    first, *rest = str(caught.value).split("\n")
    assert f"{config} cannot be read: " in first
    assert first.endswith("; fetch it again")
    assert rest[:1] == ([] if first.startswith(str(config)) else ["looked for:"])


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("ckkissane", "dictionary_learning_crosscoder")])
def test_settings_that_are_missing_are_named(name, tmp_path):
    config = write_format(name, tmp_path)
    config.unlink()
    assert complaint(tmp_path, IntegrityError, format=name) == f"{config} is missing; fetch it again, or name another: format="
