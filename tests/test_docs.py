"""What the documents name is there: tests, public names, pages; and the code in the tables of variants is the code of
its blocks.
"""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*DOCS.rglob("*.md"), ROOT / "README.md"]
ROOMS = ["", ".activations", ".saving.formats", ".metrics", ".training", ".reports", ".reports.pages"]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@pytest.mark.parametrize("room", [f"fmxnn{inside}" for inside in ROOMS])
def test_every_public_name_is_in_the_reference(room):
    entries = re.findall(r"::: (\S+)\n +options: {[^[}]*(?:\[(.*)\])?}", (DOCS / "api.md").read_text())
    shown = {module: names.split(", ") if names else [] for module, names in entries}
    module = importlib.import_module(room)
    for name in module.__all__:
        home = getattr(getattr(module, name), "__module__", None)  # a string or a tuple has none
        assert home is None or home in shown, f"docs/api.md lacks {home}, which holds {name}"
        assert not shown.get(home) or name in shown[home], f"docs/api.md lacks {name} of {home}"


@every_page
def test_every_test_that_a_page_names_is_there(page):
    for file, name in re.findall(r"(test_\w+\.py)::(\w+)", page.read_text()):
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), f"{file} has no {name}"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_code_in_the_tables_of_variants_is_that_of_the_blocks():
    text = (DOCS / "variants.md").read_text()
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    codes = [code for row in rows for code in re.findall(r"`([^`]*[(=][^`]*)`", row)]
    assert len(codes) > 40
    assert [code for code in codes if code not in blocks] == []
