"""The measures of the house, read from the source: `python tests/house.py` prints goal and now side by side.

`test_house.py` asserts the same measures. Lines, files and functions are counted as they stand in the files.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fmxnn"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted(path for path in (ROOT / "tests").rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
ORDER = [
    "core",
    "sparse",
    "weights",
    "gates",
    "coders",
    "activations",
    "training",
    "saving",
    "metrics",
    "diffing",
    "reports",
]
"""A folder imports only folders before it."""
FACE = ("core", "weights", "gates", "coders")
"""The rooms of which the package's own `__all__` has every name."""
DOCUMENT, ARGUMENTS, LINE, FILE, FUNCTION, LADDER, OPENING = 4, 5, 120, 300, 45, 3, 110
"""At least so many words of a docstring; at most so many of the others, below so many of the ladder."""
_SAID = set(
    [
        "a",
        "all",
        "an",
        "and",
        "are",
        "as",
        "has",
        "is",
        "it",
        "its",
        "itself",
        "of",
        "one",
        "same",
        "that",
        "the",
        "these",
        "this",
    ]
)

Place = tuple[int, str]
"""A value, and where it is and what."""


def room(path: Path) -> str:
    """The folder of the package, `fmxnn` for a file beside the folders, or `tests`."""
    if not path.is_relative_to(PACKAGE):
        return "tests"
    inside = path.relative_to(PACKAGE).parts
    return inside[0] if len(inside) > 1 else "fmxnn"


@dataclass(frozen=True)
class Measure:
    """A measure of each file: what it finds there, and the largest value that is good (0: nothing may be found)."""

    name: str
    goal: str
    limit: int
    find: Callable[[Path], Iterator[Place]]
    files: tuple[Path, ...] = tuple(FILES)
    share: bool = False
    """Whether the table shows the share of public names without a fault."""

    def broken(self, where: str) -> list[str]:
        """What is beyond the limit in a room, file and line first."""
        return [
            f"{path.relative_to(ROOT)}:{said}"
            for path in self.files
            if room(path) == where
            for value, said in places(self.find, path)
            if value > self.limit
        ]

    def now(self) -> str:
        """The largest value of all files, how many places there are where there should be none, or a share."""
        values = [value for path in self.files for value, _ in places(self.find, path)]
        if self.share:
            return f"{1 - sum(values) / sum(len(list(public(path))) for path in FILES):.0%}"
        return str(max(values, default=0) if self.limit else sum(values))


@cache
def places(find: Callable[[Path], Iterator[Place]], path: Path) -> tuple[Place, ...]:
    """What is found in a file, looked for once."""
    return tuple(find(path))


# ---- what is found in one file


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def classes(path: Path) -> list[ast.ClassDef]:
    return [node for node in ast.walk(TREES[path]) if isinstance(node, ast.ClassDef)]


def public(path: Path) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Public classes and functions of a file, and the public methods of its public classes."""

    def walk(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
        for inner in getattr(node, "body", []):
            kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            if isinstance(inner, kinds) and not inner.name.startswith("_"):
                yield inner
                if isinstance(inner, ast.ClassDef):
                    yield from walk(inner)

    yield from walk(TREES[path])


def long_file(path: Path) -> Iterator[Place]:
    lines = len(path.read_text().splitlines())
    yield lines, f"1 {lines} lines"


def long_line(path: Path) -> Iterator[Place]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        yield len(line), f"{number} {len(line)} characters"


def long_function(path: Path) -> Iterator[Place]:
    for node in functions(TREES[path]):
        lines = (node.end_lineno or 0) - node.lineno + 1
        yield lines, f"{node.lineno} {node.name} has {lines} lines"


def constructor(path: Path) -> Iterator[Place]:
    """Arguments of `__init__`, and fields of a dataclass but one that only the package makes; see decision 0015."""
    for node in classes(path):
        count = _fields(node) if _is_dataclass(node) and not _is_result(node) else 0
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                a = method.args
                count = len(a.posonlyargs + a.args + a.kwonlyargs) - 1 + bool(a.vararg) + bool(a.kwarg)
        yield count, f"{node.lineno} {node.name} takes {count} arguments"


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.dump(each) for each in node.decorator_list)


def _fields(node: ast.ClassDef) -> int:
    said = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    return sum("init=False" not in ast.unparse(each) for each in said)


def _is_result(node: ast.ClassDef) -> bool:
    """Whether the package makes a frozen dataclass at one place alone: a result, or the options of a command."""
    frozen = any("frozen=True" in ast.unparse(each) for each in node.decorator_list)
    return frozen and _made().get(node.name, 0) == 1


@cache
def _made() -> dict[str, int]:
    """At how many places of the package each name is called, by itself or by tyro, which reads a command line."""
    count: dict[str, int] = {}
    for tree in TREES.values():
        for node in (each for each in ast.walk(tree) if isinstance(each, ast.Call)):
            by_tyro = ast.unparse(node.func) == "tyro.cli"
            name = ast.unparse(node.args[0] if by_tyro else node.func)
            count[name] = count.get(name, 0) + 1
    return count


def upward(path: Path) -> Iterator[Place]:
    if path.parent == PACKAGE:
        return
    here = room(path)
    for other in files_of(path):
        there = room(other)
        if here not in ORDER or there not in ORDER or ORDER.index(there) > ORDER.index(here):
            yield 1, f"1 imports {there}"


def files_of(path: Path) -> Iterator[Path]:
    """The files of the package that a file imports; a folder stands for its `__init__.py`."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fmxnn"):
            at = PACKAGE.joinpath(*str(node.module).split(".")[1:])
            for name in (at / alias.name for alias in node.names):
                tried = (name.with_suffix(".py"), name / "__init__.py", at.with_suffix(".py"))
                yield next((file for file in tried if file in TREES), at / "__init__.py")


def ladder(path: Path) -> Iterator[Place]:
    for node in functions(TREES[path]):
        calls = (each.func for each in ast.walk(node) if isinstance(each, ast.Call))
        asked = sum(isinstance(func, ast.Name) and func.id == "isinstance" for func in calls)
        yield (
            asked,
            f"{node.lineno} {node.name} asks isinstance {asked} times; write a method or a singledispatch function",
        )


def inner_import(path: Path) -> Iterator[Place]:
    for node in functions(TREES[path]):
        if any(isinstance(inner, (ast.Import, ast.ImportFrom)) for inner in ast.walk(node)):
            yield 1, f"{node.lineno} {node.name} imports"


def is_overload(node: ast.AST) -> bool:
    """Whether it is one of several signatures of a function, which says nothing of its own."""
    return any(isinstance(name, ast.Name) and name.id == "overload" for name in getattr(node, "decorator_list", ()))


def undocumented(path: Path) -> Iterator[Place]:
    if not ast.get_docstring(TREES[path]):
        yield 1, "1 the file has no docstring"
    for node in public(path):
        if not ast.get_docstring(node) and not is_overload(node):
            yield 1, f"{node.lineno} {node.name} has no docstring"


def unannotated(path: Path) -> Iterator[Place]:
    for node in public(path):
        if isinstance(node, ast.ClassDef):
            continue
        given = [each for each in ast.walk(node.args) if isinstance(each, ast.arg)]
        bare = [each.arg for each in given if each.annotation is None and each.arg not in ("self", "cls")]
        if bare or node.returns is None:
            yield 1, f"{node.lineno} {node.name} has no type for {', '.join(bare) or 'what it gives'}"


def opening(path: Path) -> Iterator[Place]:
    for node in public(path):
        first = (ast.get_docstring(node) or "").partition("\n")[0]
        yield len(first), f"{node.lineno} {node.name} opens with {len(first)} characters"


def says_nothing(path: Path) -> Iterator[Place]:
    """Docstrings of three words or fewer, or of no word that is not in the name."""
    for node in public(path):
        said = ast.get_docstring(node) or ""
        words = re.findall(r"\w+", said.lower())
        new = {word.rstrip("s") for word in words} - {word.rstrip("s") for word in _SAID}
        new -= {word.rstrip("s") for word in re.findall(r"[A-Z]?[a-z]+", node.name)} | {node.name.lower().rstrip("s")}
        if said and "`" not in said and (len(words) < DOCUMENT or not new):
            yield 1, f"{node.lineno} {node.name} says {said!r}"


def no_example(path: Path) -> Iterator[Place]:
    """Exported classes, but errors and protocols, without a fenced block that sybil runs."""
    for node in TREES[path].body:
        shown = isinstance(node, ast.ClassDef) and node.name in exported() and not _is_contract(node)
        if shown and "```python" not in (ast.get_docstring(node) or ""):
            yield 1, f"{node.lineno} {node.name} has no example"


def _is_contract(node: ast.ClassDef) -> bool:
    bases = [ast.unparse(base) for base in node.bases]
    return any(base.endswith(("Error", "Exception", "Warning")) or base.startswith("Protocol") for base in bases)


def opens_models(path: Path) -> Iterator[Place]:
    if re.search(r"Auto(Model\w*|Tokenizer)\b", path.read_text()) and path.name != "models.py":
        yield 1, "1 opens a model or a tokenizer; use fmxnn.activations.models"


# ---- what is found in the package as a whole


def listed(path: Path) -> list[str]:
    """The `__all__` of a file."""
    for node in TREES[path].body:
        if isinstance(node, ast.Assign) and any(ast.unparse(each) == "__all__" for each in node.targets):
            return list(ast.literal_eval(node.value))
    return []


@cache
def exported() -> frozenset[str]:
    """Every name in an `__all__` of the package or of a folder in it."""
    return frozenset(name for path in FILES if path.name == "__init__.py" for name in listed(path))


def rooms_of_face() -> dict[str, str]:
    """The room from which each name of the package's own `__init__.py` is imported."""
    found: dict[str, str] = {}
    for node in ast.walk(TREES[PACKAGE / "__init__.py"]):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fmxnn."):
            found |= {alias.name: str(node.module).split(".")[1] for alias in node.names}
    return found


def face(path: Path) -> Iterator[Place]:
    """A door without `__all__`; and what the package's own lacks, or has out of the order of the rooms."""
    if path.name != "__init__.py":
        return
    names = listed(path)
    if not names and path.parent.name != "formats":
        yield 1, "1 has no __all__"
    if path.parent != PACKAGE:
        return
    for other in FACE:
        for name in sorted(set(listed(PACKAGE / other / "__init__.py")) - set(names)):
            yield 1, f"1 lacks {name} of {other}"
    rooms = rooms_of_face()
    for before, name in pairwise(names):
        if ORDER.index(rooms[before]) > ORDER.index(rooms[name]):
            yield 1, f"1 has {name} of {rooms[name]} behind {before} of {rooms[before]}"


def entries(path: Path) -> Iterator[Place]:
    if path == PACKAGE / "__init__.py":
        held = [each.name for each in PACKAGE.iterdir() if each.name not in ("__pycache__", "py.typed")]
        yield len(held), f"1 stands beside {len(held)} entries"


def circles(path: Path) -> Iterator[Place]:
    if path == PACKAGE / "__init__.py":
        graph = {each: {file for file in files_of(each) if file.name != "__init__.py"} for each in FILES}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            yield 1, f"1 {error}"


MEASURES = (
    Measure("entries beside py.typed", "<= 12", 12, entries),
    Measure("lines of a file", f"<= {FILE}", FILE, long_file),
    Measure("characters of a line", f"<= {LINE}", LINE, long_line, (*FILES, *TESTS)),
    Measure("lines of a function", f"<= {FUNCTION}", FUNCTION, long_function),
    Measure("arguments of a constructor", f"<= {ARGUMENTS}", ARGUMENTS, constructor),
    Measure("imports of later folders", "0", 0, upward),
    Measure("circles of files", "0", 0, circles),
    Measure("isinstance in a function", f"<= {LADDER - 1}", LADDER - 1, ladder),
    Measure("imports in functions", "0", 0, inner_import),
    Measure("faults of __all__", "0", 0, face),
    Measure("places that open models", "0", 0, opens_models),
    Measure("documented", "100%", 0, undocumented, share=True),
    Measure("annotated", "100%", 0, unannotated, share=True),
    Measure("opening of a docstring", f"<= {OPENING}", OPENING, opening),
    Measure("docstrings that say nothing", "0", 0, says_nothing),
    Measure("exported classes without example", "0", 0, no_example),
)
ROOMS = sorted({room(path) for path in (*FILES, *TESTS)})


def table() -> str:
    """Each measure with its goal, what it is now, and how many places of which rooms are beyond the goal."""
    rows = [("measure", "goal", "now", "beyond the goal")]
    for measure in MEASURES:
        found = {where: len(measure.broken(where)) for where in ROOMS}
        rows.append(
            (
                measure.name,
                measure.goal,
                measure.now(),
                ", ".join(f"{where} {count}" for where, count in found.items() if count),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main() -> None:
    """The table; with the names of rooms behind it, what is beyond the goal there, place by place."""
    print(table())
    for where in sys.argv[1:]:
        for measure in MEASURES:
            for place in measure.broken(where):
                print(f"{measure.name}: {place}")


if __name__ == "__main__":
    main()
