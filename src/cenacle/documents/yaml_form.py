"""Documents as people write them: YAML without its traps, read and written."""

from __future__ import annotations

import re
from typing import Any

import yaml

from cenacle.errors import DocumentError

__all__ = ["dump_yaml", "load_yaml"]


class _StrictLoader(yaml.SafeLoader):
    """YAML without its traps: no anchors, tags or duplicate keys, only JSON's numbers."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise DocumentError(
                "a YAML document uses an alias", expected="plain values", remedy="write it out"
            )
        if event.tag is not None:
            raise DocumentError(
                "a YAML document uses a tag", found=event.tag, expected="plain values"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise DocumentError("a YAML key is not text", found=type(key).__name__)
            if key in seen:
                raise DocumentError("a document names a field twice", found=key)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _StrictDumper(yaml.SafeDumper):
    """Quotes whatever text either YAML 1.1 or :class:`_StrictLoader` would not read as text."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Without double quotes PyYAML folds these line breaks into spaces.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_StrictDumper.add_representer(str, _represent_text)

# YAML 1.1 also reads yes and no as booleans, dates, 010 as 8, 1:30 as 90, and 1e-5 as text.
_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _regexp, _first in (
    ("null", r"(?:~|null|)\Z", ["~", "n", ""]),
    ("bool", r"(?:true|false)\Z", ["t", "f"]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)\Z", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:0|[1-9][0-9]*)(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)\Z",
        list("-+0123456789"),
    ),
):
    for _yaml in (_StrictLoader, _StrictDumper):
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_regexp), _first)


def load_yaml(text: str | bytes) -> Any:
    """Plain values; see :func:`~cenacle.documents.base.parse_yaml`, which checks them further.

    Raises:
        DocumentError: with line and column, or for aliases, tags, duplicate or non-text keys.
    """
    try:
        return yaml.load(text, _StrictLoader)  # noqa: S506 - a SafeLoader, made stricter
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown place"
        raise DocumentError(
            "a document is not valid YAML", found=f"{error.problem} at {where}"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise DocumentError("a document is not valid YAML", expected="YAML 1.1 in UTF-8") from None


def dump_yaml(value: Any) -> str:
    """The text that :func:`load_yaml` reads as these plain values."""
    text: str = yaml.dump(  # a SafeDumper, made stricter
        value, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=100
    )
    return text
