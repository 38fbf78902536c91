"""What every document shares: strict parsing, canonical bytes, digests.

A document is a frozen model. It is written by people as YAML or JSON, kept and signed as
canonical JSON (RFC 8785), and named by the SHA-256 of those bytes. Defaults are written
out in the canonical form, so a later change of a default cannot change what was signed.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Final, Self, TypeVar

import rfc8785
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
    "JsonObject",
    "Name",
    "Natural",
    "NonEmpty",
    "PositiveInt",
    "Timestamp",
    "b64",
    "canonical_json",
    "format_time",
    "minutes",
    "parse_json",
    "parse_time",
    "parse_yaml",
    "sha256_digest",
    "short",
    "unb64",
    "validate_fields",
]

T = TypeVar("T")

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
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def unb64(text: str) -> bytes:
    """The inverse of :func:`b64`; refuses white space, missing padding and other alphabets."""
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:  # binascii.Error, or text beyond ASCII
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

_TIME: Final = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", re.ASCII)
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


def parse_time(text: str) -> datetime:
    """An RFC 3339 UTC time with whole seconds, as an aware ``datetime``."""
    if not _TIME.fullmatch(text):
        raise DocumentError(
            "a time has the wrong form", found=repr(text), expected="2027-01-31T12:00:00Z"
        )
    try:
        return datetime.fromisoformat(text)  # of this one form; ten times as fast as strptime
    except ValueError:
        raise DocumentError("a time does not exist", found=repr(text)) from None


def format_time(moment: datetime) -> str:
    """The inverse of :func:`parse_time`; fractions of a second are dropped."""
    return moment.astimezone(UTC).replace(microsecond=0, tzinfo=None).isoformat() + "Z"


def minutes(moment: datetime) -> str:
    """A moment for people to read, e.g. ``2027-01-31 12:00``."""
    return moment.isoformat(" ", "minutes")[:16]


def _normalise_time(value: Any) -> Any:
    if isinstance(value, str) and _DATE.fullmatch(value):
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
        return validate_fields(cls, cls.model_validate_json, cls.model_fields, fields)

    def to_fields(self) -> dict[str, Any]:
        """Plain JSON values, defaults written out, absent fields left out."""
        return self.model_dump(mode="json", exclude_none=True)


def validate_fields(cls: type[T], read: Callable[[str], T], names: Iterable[str], fields: Any) -> T:
    """Plain JSON values as a ``cls``, by its reader of JSON text; see :meth:`Frozen.from_fields`.

    Args:
        names: the fields that ``cls`` knows.
    """
    try:
        return read(json.dumps(fields, allow_nan=False))
    except ValidationError as error:
        raise _explain(cls, names, error) from None
    except (TypeError, ValueError, RecursionError):
        raise DocumentError(
            f"a {cls.__name__.lower()} has values that JSON cannot hold",
            remedy="use strings, numbers, true/false, lists and mappings only",
        ) from None


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
        from cenacle.documents.yaml_form import dump_yaml  # noqa: PLC0415

        return dump_yaml(self.to_fields())


def canonical_json(value: Any) -> bytes:
    """RFC 8785 canonical JSON of plain values."""
    try:
        if _is_plain(value):
            return _PLAIN.encode(value).encode()
        return rfc8785.dumps(value)
    except (ValueError, RecursionError) as error:  # CanonicalizationError, UnicodeEncodeError
        raise DocumentError(f"a value has no canonical JSON form ({error})") from None


# For these values Python's own encoder, which is written in C, gives RFC 8785's bytes: it escapes
# the same characters in the same way, and ASCII names sort alike as code points and in UTF-16.
_PLAIN: Final = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
)
_SCALARS: Final = frozenset({str, bool, type(None)})


def _is_plain(value: Any) -> bool:
    """No fraction, no inexact integer, ASCII names, and only JSON's own types."""
    kind = type(value)
    if kind in _SCALARS:
        return True
    if kind is dict:
        for name, item in value.items():
            if type(name) is not str or not name.isascii():
                return False
            if type(item) not in _SCALARS and not _is_plain(item):
                return False
        return True
    if kind is list or kind is tuple:
        return all(type(item) in _SCALARS or _is_plain(item) for item in value)
    return kind is int and -(2**53) < value < 2**53


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
        names = Counter(name for name, _ in pairs)
        twice = sorted(name for name, times in names.items() if times > 1)
        raise DocumentError("a document names a field twice", found=", ".join(twice[:8]))
    return fields


def _refuse_constant(name: str) -> Any:
    raise DocumentError("a document holds a number that is not finite", found=name)


def parse_json(data: bytes | str) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or infinity, bounded size and depth."""
    _check_size(len(data))
    try:
        text = data if isinstance(data, str) else data.decode()  # json.loads would take UTF-16
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise DocumentError("a document is not valid JSON", expected="JSON in UTF-8") from None
    _check_value(value)
    return value


def _check_value(value: Any) -> None:
    level, depth = [value], 0
    while level:
        below: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is str:
                if not item.isascii():
                    _check_text(item)
            elif kind is dict:
                if not all(name.isascii() for name in item):
                    _check_text("".join(item))
                below += item.values()
            elif kind is list:
                below += item
            elif kind is float and not math.isfinite(item):  # 1e999 is spelled like a number
                _refuse_constant(str(item))
        level, depth = below, depth + 1
        if level and depth > _MAX_DEPTH:
            raise DocumentError(
                "a document is nested too deeply", expected=f"<= {_MAX_DEPTH} levels"
            )


def _check_text(text: str) -> None:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise DocumentError(
            "a document holds text that is not Unicode", found="half of a surrogate pair"
        )


def parse_yaml(text: str | bytes) -> Any:
    """YAML as plain values: what JSON has, and nothing else of what YAML 1.1 can say.

    Dates, ``yes``, ``010`` and ``1:30`` stay text; only ``true`` and ``false`` are booleans.

    Raises:
        DocumentError: with line and column, or for aliases, tags, duplicate or non-text keys.
    """
    from cenacle.documents.yaml_form import load_yaml  # noqa: PLC0415 - for people's files alone

    _check_size(len(text))
    value = load_yaml(text)
    _check_value(value)
    return value


def _explain(cls: type[Any], names: Iterable[str], error: ValidationError) -> DocumentError:
    problems = []
    remedy = None
    for item in error.errors(include_url=False, include_context=False)[:8]:
        # A choice between forms adds its tag to the path, where it often repeats a field's name.
        loc = item["loc"]
        kept = [p for i, p in enumerate(loc) if i == 0 or p != loc[i - 1] or isinstance(p, int)]
        path = ".".join(str(part) for part in kept) or "the document"
        if item["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
            problems.append(f"{path}: unknown field")
            remedy = f"known fields are {', '.join(sorted(names))}"
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
    return digest.rpartition(":")[2][:12]


def _check_json(fields: dict[str, Any]) -> dict[str, Any]:
    waiting: list[Any] = [fields]
    while waiting:
        match waiting.pop():
            case dict() as value:
                waiting += value.values()
            case list() as value:
                waiting += value
            # Canonical JSON writes 1e16 as an integer, and has no exact integer that large.
            case int() | float() as value if abs(value) >= 2**53 and (
                isinstance(value, int) or abs(value) < 1e21
            ):
                raise ValueError(f"{value} is too large to be an exact number; write it as text")
    return fields


JsonObject = Annotated[dict[str, Any], AfterValidator(_check_json)]
"""Free-form fields that have a canonical form."""

NonEmpty = Annotated[str, StringConstraints(min_length=1, max_length=500)]
PositiveInt = Annotated[int, Field(ge=1, le=2**53 - 1)]
Natural = Annotated[int, Field(ge=0, le=2**53 - 1)]
