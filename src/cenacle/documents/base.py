"""What every document shares: strict parsing, canonical bytes, digests.

A document is a frozen model. It is written by people as YAML or JSON, kept and signed as
canonical JSON (RFC 8785), and named by the SHA-256 of those bytes. Defaults are written
out in the canonical form, so a later change of a default cannot change what was signed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Final, Self

import rfc8785
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from cenacle.errors import DocumentError

__all__ = [
    "MAX_DOCUMENT_BYTES",
    "Base64",
    "Digest",
    "Document",
    "Frozen",
    "Name",
    "Natural",
    "NonEmpty",
    "PositiveInt",
    "Timestamp",
    "b64",
    "canonical_json",
    "format_time",
    "parse_json",
    "parse_time",
    "parse_yaml",
    "sha256_digest",
    "short",
    "unb64",
]

MAX_DOCUMENT_BYTES: Final = 4 * 1024 * 1024
_MAX_DEPTH: Final = 32

Name = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$", max_length=63)
]
"""A party, asset or output: lower-case letters, digits and inner hyphens (an RFC 1123 label)."""

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
"""``sha256:`` and 64 lower-case hexadecimal digits."""


def b64(data: bytes) -> str:
    """Standard base64 (RFC 4648, section 4), as text."""
    return base64.b64encode(data).decode("ascii")


def unb64(text: str) -> bytes:
    """The inverse of :func:`b64`; refuses white space, missing padding and other alphabets."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DocumentError(
            "a base64 field does not decode", found=f"{len(text)} characters", expected="base64"
        ) from None
    if b64(data) != text:
        raise DocumentError("a base64 field is not in canonical form", expected="RFC 4648 padding")
    return data


def _check_b64(text: str) -> str:
    try:
        unb64(text)
    except DocumentError as error:
        raise ValueError(error.diagnostics()) from None
    return text


Base64 = Annotated[str, AfterValidator(_check_b64), StringConstraints(max_length=1 << 20)]

_TIME: Final = re.compile(r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$")
_DATE: Final = re.compile(r"^\d{4}-\d{2}-\d{2}$")


def parse_time(text: str) -> datetime:
    """An RFC 3339 UTC time with whole seconds, as an aware ``datetime``."""
    if not _TIME.match(text):
        raise DocumentError(
            "a time has the wrong form", found=repr(text), expected="2027-01-31T12:00:00Z"
        )
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        raise DocumentError("a time does not exist", found=repr(text)) from None


def format_time(moment: datetime) -> str:
    """The inverse of :func:`parse_time`; fractions of a second are dropped."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _normalise_time(value: Any) -> Any:
    if isinstance(value, str) and _DATE.match(value):
        return value + "T23:59:59Z"  # a bare date means until its end, UTC
    return value


def _check_time(text: str) -> str:
    try:
        parse_time(text)
    except DocumentError as error:
        raise ValueError(error.diagnostics()) from None
    return text


Timestamp = Annotated[str, BeforeValidator(_normalise_time), AfterValidator(_check_time)]
"""RFC 3339, UTC, whole seconds; a bare date is read as its last second."""


class Frozen(BaseModel):
    """Base of everything inside a document: immutable, strict, unknown fields refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )

    @classmethod
    def from_fields(cls, fields: Any) -> Self:
        """Validate plain JSON values (dicts, lists, strings, numbers).

        Raises:
            DocumentError: naming each field that is missing, unknown or wrong.
        """
        try:
            return cls.model_validate_json(json.dumps(fields, allow_nan=False))
        except ValidationError as error:
            raise _explain(cls, error) from None
        except (TypeError, ValueError, RecursionError):
            raise DocumentError(
                f"a {cls.__name__.lower()} has values that JSON cannot hold",
                remedy="use strings, numbers, true/false, lists and mappings only",
            ) from None

    def to_fields(self) -> dict[str, Any]:
        """Plain JSON values, defaults written out, absent fields left out."""
        return self.model_dump(mode="json", exclude_none=True)


class Document(Frozen):
    """A signed noun. Subclasses fix ``kind`` and get a media type from it."""

    media_type: ClassVar[str]

    def canonical_bytes(self) -> bytes:
        """RFC 8785 canonical JSON: what is digested and signed."""
        return canonical_json(self.to_fields())

    @property
    def digest(self) -> str:
        return sha256_digest(self.canonical_bytes())

    @classmethod
    def from_yaml(cls, text: str | bytes) -> Self:
        """Parse what a person wrote (YAML, hence JSON too)."""
        return cls.from_fields(parse_yaml(text))

    @classmethod
    def from_canonical(cls, data: bytes) -> Self:
        """Parse canonical bytes and refuse any other spelling of the same document."""
        document = cls.from_fields(parse_json(data))
        if document.canonical_bytes() != data:
            raise DocumentError(
                f"a {cls.__name__.lower()} is not in canonical form",
                expected="RFC 8785 JSON with every default written out",
                remedy="let cenacle write and sign the document",
            )
        return document

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_fields(), sort_keys=False, allow_unicode=True, width=100)


def canonical_json(value: Any) -> bytes:
    """RFC 8785 canonical JSON of plain values."""
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, RecursionError) as error:
        raise DocumentError(f"a value has no canonical JSON form ({error})") from None


def sha256_digest(data: bytes | bytearray | memoryview) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _check_size(size: int) -> None:
    if size > MAX_DOCUMENT_BYTES:
        raise DocumentError(
            "a document is too large", found=f"{size} bytes", expected=f"<= {MAX_DOCUMENT_BYTES}"
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DocumentError("a document names a field twice", found=", ".join(twice))
    return fields


def _refuse_constant(name: str) -> Any:
    raise DocumentError("a document holds a number that is not finite", found=name)


def parse_json(data: bytes | str) -> Any:
    """Strict JSON: no duplicate keys, no NaN, bounded size and depth."""
    _check_size(len(data))
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise DocumentError("a document is not valid JSON", expected="JSON in UTF-8") from None
    _check_depth(value, 0)
    return value


def _check_depth(value: Any, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise DocumentError("a document is nested too deeply", expected=f"<= {_MAX_DEPTH} levels")
    if isinstance(value, dict):
        for item in value.values():
            _check_depth(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_depth(item, depth + 1)


class _StrictLoader(yaml.SafeLoader):
    """YAML without its traps: no anchors, no duplicate keys, no ``yes``/``no``, no dates."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise DocumentError(
                "a YAML document uses an alias", expected="plain values", remedy="write it out"
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


_KEPT_TAGS: Final = {f"tag:yaml.org,2002:{tag}" for tag in ("null", "int", "float")}
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag in _KEPT_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf")
)
_StrictLoader.add_implicit_resolver(  # YAML 1.1 reads 1e-5 as text; people mean a number
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str | bytes) -> Any:
    """YAML as plain values. Dates stay text, only ``true``/``false`` are booleans.

    Raises:
        DocumentError: with line and column, or for aliases, duplicate or non-text keys.
    """
    _check_size(len(text))
    try:
        value = yaml.load(text, _StrictLoader)  # noqa: S506 - a SafeLoader, made stricter
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown place"
        raise DocumentError(
            "a document is not valid YAML", found=f"{error.problem} at {where}"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise DocumentError("a document is not valid YAML", expected="YAML 1.1 in UTF-8") from None
    _check_depth(value, 0)
    return value


def _explain(cls: type[BaseModel], error: ValidationError) -> DocumentError:
    problems = []
    remedy = None
    for item in error.errors(include_url=False, include_context=False)[:8]:
        path = ".".join(str(part) for part in item["loc"]) or "the document"
        if item["type"] == "extra_forbidden":
            problems.append(f"{path}: unknown field")
            remedy = f"known fields are {', '.join(sorted(cls.model_fields))}"
        elif item["type"] == "missing":
            problems.append(f"{path}: missing")
        else:
            shown = repr(item["input"])
            got = shown if len(shown) <= 60 else shown[:57] + "..."
            problems.append(f"{path}: {item['msg'].removeprefix('Value error, ')} (got {got})")
    more = error.error_count() - len(problems)
    if more > 0:
        problems.append(f"and {more} more")
    return DocumentError(
        f"the {cls.__name__.lower()} is not valid: {'; '.join(problems)}", remedy=remedy
    )


def short(digest: str) -> str:
    """The first 12 hexadecimal digits, for tables and messages."""
    return digest.removeprefix("sha256:")[:12]


NonEmpty = Annotated[str, StringConstraints(min_length=1, max_length=500)]
PositiveInt = Annotated[int, Field(ge=1, le=2**53 - 1)]
Natural = Annotated[int, Field(ge=0, le=2**53 - 1)]
