"""Text files of any size, read in pieces of bounded size: text at its separators, and JSONL line by line."""

import json
from collections.abc import Iterator
from pathlib import Path

from fmxnn.core.kinds import is_list

LONGEST_LINE = 2**24
"""Characters of one record of a JSONL file, which is read whole."""
_AT_ONCE = 2**18


def separated(path: Path, separator: str, *, at_once: int = _AT_ONCE) -> Iterator[tuple[str, bool]]:
    """What stands between the separators of a text file, in pieces, and whether a piece ends what it belongs to.

    `at_once` characters are read at once, and bytes that are no UTF-8 are replaced. What is blank is left out; of a
    blank start only the last `at_once` characters are kept.
    """
    keep = len(separator) - 1  # what may be the start of a separator waits for the rest
    started, held = False, ""
    with path.open(encoding="utf-8", errors="replace") as file:
        while read := file.read(at_once):
            *whole, held = (held + read).split(separator)
            for text in whole:
                if started or text.strip():
                    yield text, True
                started = False
            sure = held[: max(0, len(held) - keep)]
            if started or sure.strip():
                yield sure, False
                started, held = True, held[len(sure) :]
            else:
                held = held[-max(at_once, keep) :]
    if started or held.strip():
        yield held, True


def json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """Each record of a JSONL file, behind where it stands, such as "file, line 3".

    Blank lines are left out, and counted. Raises ValueError, with file and line, for what is not UTF-8, not JSON,
    nested too deep or too long.
    """
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        number = 0
        while line := lines.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise ValueError(
                    f"{where}: a record has at most {LONGEST_LINE:,} characters, and this one more; give its text as "
                    "a .txt file"
                )
            if not line.isspace():
                yield where, _record(line, where)


def json_records(path: Path) -> Iterator[tuple[str, object]]:
    """Each record of a JSONL file, or of a .json file of lines or of one list, behind where it stands.

    A list is read whole. Raises ValueError, with the file and the line, for what cannot be read.
    """
    if path.suffix != ".json" or not _starts_a_list(path):
        yield from json_lines(path)
        return
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        records = _record(file.read(), f"{path}")
    if not is_list(records):
        raise ValueError(f"{path}: a .json file is one list or has a record a line, got {type(records).__name__}")
    for number, record in enumerate(records):
        yield f"{path}, entry {number}", record


def _starts_a_list(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        while read := file.read(_AT_ONCE):
            if not read.isspace():
                return read.lstrip().startswith("[")
    return False


def sound(text: str, where: str) -> str:
    """The text, if it can be written as UTF-8.

    Raises ValueError, with `where`, for half of a surrogate pair, which stands for no character.
    """
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"U+{ord(text[error.start]):04X} at character {error.start + 1}"
            raise ValueError(
                f"{where}: half of a surrogate pair ({half}) stands for no character; mend or take it out"
            ) from error
    return text


def _record(line: str, where: str) -> object:
    try:
        if not line.isascii():
            line.encode("utf-8")
        return json.loads(line)
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) - 0xDC00
        raise ValueError(
            f"{where}: byte 0x{byte:02x} at character {error.start + 1} is no UTF-8; save the file as UTF-8"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{where}: a record is nested too deep to be read; give records that are flat") from error
    except ValueError as error:
        raise ValueError(f"{where}: no JSON ({error}); mend it, or give a file with one record a line") from error
