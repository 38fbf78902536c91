"""Plain XML: its canonical form, and what is refused before anything is read."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation.plain_xml import canonical, parse_xml
from cenacle.errors import InputError


@pytest.mark.parametrize(
    ("document", "form"),
    [
        # Each form was made by libxml2 (xmlC14NDocDumpMemory, inclusive, without comments).
        pytest.param(
            '<a xmlns="urn:u" xmlns:b="urn:v" b:z="1" a="2"><b:c xmlns:b="urn:v" xmlns="">t&amp;'
            "&#13;&#x9;<![CDATA[<&>]]><!-- c -->x</b:c>"
            '<d xmlns:b="urn:w" b:q="&#10;&#9;&quot;&lt;&gt;\t" xmlns:a="urn:u"/></a>',
            '<a xmlns="urn:u" xmlns:b="urn:v" a="2" b:z="1"><b:c xmlns="">t&amp;&#xD;\t&lt;&amp;'
            '&gt;x</b:c><d xmlns:a="urn:u" xmlns:b="urn:w" b:q="&#xA;&#x9;&quot;&lt;> "></d></a>',
            id="everything",
        ),
        pytest.param(
            '<?xml version="1.0" encoding="UTF-8"?>\n<a>\r\n<b  c = \'d"\' />\n</a>\n',
            '<a>\n<b c="d&quot;"></b>\n</a>',
            id="white-space",
        ),
        pytest.param(
            '<ä xmlns:é="urn:u" é:ö="ß">ñ</ä>',
            '<ä xmlns:é="urn:u" é:ö="ß">ñ</ä>',
            id="beyond-ascii",
        ),
        pytest.param(
            '<a xmlns="urn:u"><b xmlns=""><c xmlns="urn:u"/><d/></b></a>',
            '<a xmlns="urn:u"><b xmlns=""><c xmlns="urn:u"></c><d></d></b></a>',
            id="no-namespace-inside",
        ),
        pytest.param(
            '<a xmlns:x="urn:1" xmlns:y="urn:1" y:b="1" x:a="2" c="3"/>',
            '<a xmlns:x="urn:1" xmlns:y="urn:1" c="3" x:a="2" y:b="1"></a>',
            id="attributes-by-namespace",
        ),
    ],
)
def test_canonical_form(document: str, form: str) -> None:
    assert canonical(parse_xml(document.encode())) == form.encode()
    assert canonical(parse_xml(form.encode())) == form.encode()


def test_an_element_alone_shows_its_namespaces() -> None:
    root = parse_xml(b'<a xmlns="urn:u" xmlns:x="urn:v"><x:b xmlns:y="urn:z"/></a>')
    inside = root.one("{urn:v}b")
    assert canonical(inside) == b'<x:b xmlns="urn:u" xmlns:x="urn:v" xmlns:y="urn:z"></x:b>'
    assert canonical(root, without=inside) == b'<a xmlns="urn:u" xmlns:x="urn:v"></a>'


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "a document type"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>', "a document type"),
        ('<?xml-stylesheet href="x"?><a/>', "a processing instruction"),
        ("<a><?p q?></a>", "a processing instruction"),
        ('<a xml:lang="en"/>', "the prefix 'xml'"),
        ("<x:a/>", "the prefix 'x'"),
        ('<a x:b="1"/>', "the prefix 'x'"),
        ('<a xmlns:xml="urn:1"/>', "a declaration of xmlns:xml"),
        ('<a xmlns:xmlns="urn:1"/>', "a declaration of xmlns:xmlns"),
        ('<a xmlns:x=""/>', "a declaration of xmlns:x"),
        ('<a xmlns="http://www.w3.org/2000/xmlns/"/>', "a declaration of xmlns"),
        ('<a xmlns:x="urn:1" xmlns:y="urn:1" x:b="1" y:b="2"/>', "an attribute twice"),
        ('<?xml version="1.0" encoding="UTF-16"?><a/>', "another encoding|not well-formed"),
        ("<a>" * 20 + "</a>" * 20, "too deep"),
        ("<a " + " ".join(f'xmlns:n{n}="urn:1"' for n in range(65)) + "/>", "too many namespaces"),
        ("<a>" + "<b/>" * 10_001 + "</a>", "too many elements"),
        ("<a>" + " " * (1 << 20) + "</a>", "bytes"),
        ("", "not well-formed"),
        ("<a>", "not well-formed"),
        ("<a></b>", "not well-formed"),
        ("<a>&b;</a>", "not well-formed"),
        ('<a b="1" b="2"/>', "not well-formed"),
        ("<a/><a/>", "not well-formed"),
        ("\x00", "not well-formed"),
    ],
    ids=lambda text: text[:24].replace("\x00", "zero") if text.startswith(("<", "\x00")) else "",
)
def test_what_is_not_plain_is_refused(document: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        parse_xml(document.encode())


@pytest.mark.parametrize(
    "document",
    ["<a/>".encode("utf-16"), b"<a>\xff</a>", b"<a>\xc0\x80</a>"],
    ids=["utf-16", "ff", "nul"],
)
def test_other_encodings_are_refused(document: bytes) -> None:
    with pytest.raises(InputError):
        parse_xml(document)


PIECES = st.sampled_from(
    ["<a>", "</a>", "<a/>", '<b c="d">', "</b>", "text", "&amp;", "&b;", "<!-- x -->", "<![CDATA[",
     "]]>", "<?p?>", "<!DOCTYPE a>", ' xmlns="u"', '<x:a xmlns:x="u">', "</x:a>", "<", ">", "\x00"]
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(PIECES, max_size=12))
def test_any_text_is_read_or_refused_in_words(pieces: list[str]) -> None:
    try:
        root = parse_xml("".join(pieces).encode())
    except InputError:
        return
    form = canonical(root)
    assert canonical(parse_xml(form)) == form
