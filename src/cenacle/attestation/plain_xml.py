"""A small, safe part of XML and its canonical form, for signed files of vendors.

Read: elements, attributes, namespaces, text and comments in UTF-8. Refused, so that no attack on
XML has a place to start: document types (hence entities), processing instructions, ``xml:``
attributes, and anything large or deep. What is left has a simple canonical form, the one of
Canonical XML 1.1 (W3C recommendation of 2 May 2008) without comments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn
from xml.parsers import expat

from cenacle.errors import InputError

__all__ = ["Element", "canonical", "parse_xml"]

_MAX_BYTES: Final = 1 << 20
_MAX_ELEMENTS: Final = 10_000
_MAX_DEPTH: Final = 16
_MAX_PREFIXES: Final = 64
_XMLNS: Final = "http://www.w3.org/2000/xmlns/"
_IN_TEXT: Final = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "\r": "&#xD;"})
_IN_VALUE: Final = str.maketrans(
    {"&": "&amp;", "<": "&lt;", '"': "&quot;", "\t": "&#x9;", "\n": "&#xA;", "\r": "&#xD;"}
)


@dataclass(eq=False, slots=True)
class Element:
    """One element; two are equal only if they are the same.

    Attributes:
        tag: ``{namespace}local``.
        attributes: by ``{namespace}local``, or ``local`` without a namespace.
        children: elements and text, in order.
    """

    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)
    _name: str = ""
    _written: list[tuple[str, str, str]] = field(default_factory=list)
    _scope: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Element]:
        return (child for child in self.children if isinstance(child, Element))

    @property
    def text(self) -> str:
        """All text directly inside."""
        return "".join(child for child in self.children if isinstance(child, str))

    def one(self, tag: str) -> Element:
        """The one child of this tag; :class:`InputError` if there is none or there are more."""
        found = [child for child in self if child.tag == tag]
        if len(found) != 1:
            raise InputError(
                "an XML file is not built as expected",
                found=f"{len(found)} elements {_local(tag)} in {_local(self.tag)}",
                expected="one",
            )
        return found[0]


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _refuse(what: str) -> NoReturn:
    raise InputError(
        "an XML file is not plain enough to be read safely",
        found=what,
        expected="elements, attributes and text in UTF-8",
    )


class _Builder:
    def __init__(self) -> None:
        self.root: Element | None = None
        self._open: list[Element] = []
        self._count = 0

    def start(self, name: str, given: list[str]) -> None:
        self._count += 1
        if self._count > _MAX_ELEMENTS or len(self._open) >= _MAX_DEPTH:
            _refuse("too many elements, or too deep")
        pairs = list(zip(given[::2], given[1::2], strict=True))
        scope = dict(self._open[-1]._scope) if self._open else {}
        plain = []
        for key, value in pairs:
            if key == "xmlns" or key.startswith("xmlns:"):
                prefix = key[6:]
                if prefix in ("xml", "xmlns") or (prefix and not value) or value == _XMLNS:
                    _refuse(f"a declaration of {key}")
                scope[prefix] = value
                if len(scope) > _MAX_PREFIXES:
                    _refuse("too many namespaces")
            else:
                plain.append((key, value))
        written = []
        for key, value in plain:
            prefix, colon, local = key.rpartition(":")
            written.append((_resolve(scope, prefix) if colon else "", key, value))
            if not local:
                _refuse("an attribute without a name")
        attributes = {_join(uri, key.rpartition(":")[2]): value for uri, key, value in written}
        if len(attributes) != len(written):
            _refuse("an attribute twice")
        prefix, _, local = name.rpartition(":")
        uri = _resolve(scope, prefix) if prefix or "" in scope else ""
        element = Element(_join(uri, local), attributes, [], name, written, scope)
        if self._open:
            self._open[-1].children.append(element)
        else:
            self.root = element
        self._open.append(element)

    def end(self, name: str) -> None:
        del name  # the parser has compared it
        self._open.pop()

    def characters(self, data: str) -> None:
        if self._open:
            self._open[-1].children.append(data)


def _join(uri: str, local: str) -> str:
    return f"{{{uri}}}{local}" if uri else local


def _resolve(scope: Mapping[str, str], prefix: str) -> str:
    if prefix not in scope:  # xml: among them
        _refuse(f"the prefix {prefix[:20]!r}, which is not declared")
    return scope[prefix]


def _declaration(version: str, encoding: str | None, standalone: int) -> None:
    del version, standalone
    if encoding is not None and encoding.lower() != "utf-8":
        _refuse("another encoding")


def parse_xml(data: bytes) -> Element:
    """The root element.

    Raises:
        InputError: not well-formed, too large, or with parts that are refused here.
    """
    if len(data) > _MAX_BYTES:
        _refuse(f"{len(data)} bytes")
    try:
        data.decode()  # the parser would read UTF-16 from its byte order mark
    except UnicodeDecodeError:
        _refuse("another encoding")
    builder = _Builder()
    parser: Any = expat.ParserCreate("utf-8")
    parser.ordered_attributes = True
    parser.buffer_text = True
    parser.XmlDeclHandler = _declaration
    parser.StartDoctypeDeclHandler = lambda *_: _refuse("a document type")
    parser.ProcessingInstructionHandler = lambda *_: _refuse("a processing instruction")
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.characters
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise InputError("an XML file is not well-formed", found=str(error)[:80]) from None
    if builder.root is None:
        _refuse("no element")
    return builder.root


def canonical(element: Element, *, without: Element | None = None) -> bytes:
    """Canonical XML 1.1 of an element and what is in it.

    As the specification demands, the outermost element shows all namespaces in scope.

    Args:
        without: an element inside that is left out.
    """
    return "".join(_write(element, {}, without)).encode()


def _write(element: Element, shown: Mapping[str, str], without: Element | None) -> Iterator[str]:
    yield f"<{element._name}"
    scope = element._scope
    for prefix in sorted(scope):
        if scope[prefix] != shown.get(prefix, ""):
            name = f"xmlns:{prefix}" if prefix else "xmlns"
            yield f' {name}="{scope[prefix].translate(_IN_VALUE)}"'
    for _, key, value in sorted(
        element._written, key=lambda item: (item[0], item[1].rpartition(":")[2])
    ):
        yield f' {key}="{value.translate(_IN_VALUE)}"'
    yield ">"
    for child in element.children:
        if isinstance(child, str):
            yield child.translate(_IN_TEXT)
        elif child is not without:
            yield from _write(child, scope, without)
    yield f"</{element._name}>"
