"""Text that stays in its place: on one line, in one cell of a table, and no markup."""

_PICTURES = (
    {code: chr(0x2400 + code) for code in range(32)}
    | {code: "\ufffd" for code in range(0x80, 0xA0)}
    | {127: "␡", 9: "→", 10: "↵", 13: "↵", 0x85: "↵", 0x2028: "↵", 0x2029: "↵"}
)
_MARKUP = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;", ord("|"): "\\|", ord("`"): "\\`", ord("\\"): "\\\\"}
_MARKS = _MARKUP | {ord(mark): f"\\{mark}" for mark in "*_{}[]#~$"}


def writable(text: str) -> str:
    """Text that UTF-8 has bytes for: half a surrogate pair becomes its escape, such as `\\ud83d`."""
    return text.encode(errors="backslashreplace").decode()


def visible(text: str) -> str:
    """Text on one line: a line's end as ↵, a tab as →, other control characters as their pictures.

    Half a surrogate pair becomes its escape.
    """
    return writable(text.replace("\r\n", "↵").translate(_PICTURES))


def cell(text: str) -> str:
    """Text as one cell of a Markdown table: it opens no HTML, no code and no other cell.

    Links and emphasis in it are left as they are.
    """
    return visible(text).translate(_MARKUP)


def literal(text: str) -> str:
    """Text as one cell of a Markdown table in which every character stands for itself."""
    return visible(text).translate(_MARKS)
