"""YAML of plain values: no anchors, no tags, each name once."""

from typing import Any, cast

import yaml

from fmxnn.core.excerpt import excerpt
from fmxnn.core.files.strict_json import LONGEST_NUMBER, Limits, Refused, check_leaves, naming

TUPLE = "tag:yaml.org,2002:python/tuple"
_Fast: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Fifty times as fast as the loader in Python, which stands in where PyYAML was built without libyaml."""


class _Plain(_Fast):
    """The safe loader, in which a tuple is a list and a name stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise Refused("has a name that is no word")
            if name.value in seen:
                raise Refused(f"gives {excerpt(name.value)} twice, and each name stands once")
            seen.add(name.value)
        return super().construct_mapping(node, deep=deep)


_Plain.add_constructor(TUPLE, _Plain.construct_sequence)


def parse_yaml(data: bytes, name: object, limits: Limits) -> object:
    """What the bytes of a YAML file hold; `name` is what an error calls them. Raises `limits.error`.

    Its parts are counted as the parser meets them, names among them, and none is made before all are known to be few
    and plain.
    """
    with naming(name, limits, "YAML", yaml.YAMLError):
        text = data.decode()
        _check_events(text, limits)
        found: object = yaml.load(text, Loader=cast("type[yaml.SafeLoader]", _Plain))
        check_leaves(found)
        return found


def _check_events(text: str, limits: Limits) -> None:
    """Raises Refused at the first part that is too many, too deep, or not plain."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Fast)):
        _check_plain(event)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > limits.depth:
            raise Refused(f"is nested deeper than the {limits.depth} levels that {limits.kind} may have")
        if count > limits.values:
            raise Refused(f"holds more than the {limits.values:,} values that {limits.kind} may hold")


def _check_plain(event: Any) -> None:
    """Raises Refused for an anchor, an alias, a tag and a number without end."""
    if getattr(event, "anchor", None) is not None:  # an alias has one too
        raise Refused(f"has the anchor or alias {excerpt(event.anchor)}, and settings are written out")
    tag = getattr(event, "tag", None)
    if tag is not None and not (tag == TUPLE and isinstance(event, yaml.SequenceStartEvent)):
        raise Refused(f"has the tag {excerpt(tag)}, and settings are plain values")
    if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and _long_number(event.value):
        raise Refused(f"holds a number of {len(event.value):,} characters, and one has at most {LONGEST_NUMBER:,}")


def _long_number(value: str) -> bool:
    """Some numbers take time that grows with the square of their digits."""
    return len(value) > LONGEST_NUMBER and value[0] in "+-.0123456789"
