"""Envelopes against the DSSE specification, securesystemslib, and forgers."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope as SslibEnvelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from cenacle.crypto import SigningKey, VerifyKey
from cenacle.documents import Document, Envelope, Party, Terms, Veto
from cenacle.documents.base import canonical_json
from cenacle.documents.dsse import pae
from cenacle.errors import CenacleError, DocumentError, SignatureError

Signer = Callable[[str], SigningKey]


@pytest.fixture(scope="module")
def terms() -> Terms:
    return Terms.from_fields({"expires": "2027-12-31"})


@pytest.fixture
def signed(terms: Terms, signer: Signer) -> Envelope:
    return Envelope.sign(terms, signer("clinic"))


# --- the specification -----------------------------------------------------------------------


def test_the_published_encoding() -> None:
    """The test vector of the DSSE specification (protocol.md)."""
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


@pytest.mark.parametrize(
    ("payload_type", "payload", "encoded"),
    [
        ("", b"", b"DSSEv1 0  0 "),
        ("t", b"\x00\xff", b"DSSEv1 1 t 2 \x00\xff"),
        ("größe", b"x", "DSSEv1 7 größe 1 x".encode()),  # lengths are of bytes
        ("a 1 b", b"c", b"DSSEv1 5 a 1 b 1 c"),
    ],
)
def test_the_encoding_counts_bytes(payload_type: str, payload: bytes, encoded: bytes) -> None:
    assert pae(payload_type, payload) == encoded


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(texts, st.binary(max_size=8), texts, st.binary(max_size=8))
@settings(max_examples=200)
def test_no_two_payloads_encode_alike(one: str, a: bytes, other: str, b: bytes) -> None:
    assert (pae(one, a) == pae(other, b)) == ((one, a) == (other, b))


def test_the_fields_are_the_standard_ones(signed: Envelope, terms: Terms, signer: Signer) -> None:
    key = signer("clinic")
    fields = signed.to_fields()
    assert fields.keys() == {"payload", "payloadType", "signatures"}
    assert base64.b64decode(fields["payload"]) == terms.canonical_bytes()
    assert fields["payloadType"] == "application/vnd.cenacle.terms+json"
    (signature,) = fields["signatures"]
    assert signature.keys() == {"keyid", "sig"}
    assert signature["keyid"] == key.verify_key.keyid
    message = pae(fields["payloadType"], terms.canonical_bytes())
    key.verify_key.verify(base64.b64decode(signature["sig"]), message)


# --- with securesystemslib -------------------------------------------------------------------


def sslib_key(key: VerifyKey) -> Key:
    return SSlibKey(key.keyid, "ed25519", "ed25519", {"public": key.raw.hex()})


def test_securesystemslib_verifies_ours(terms: Terms, signer: Signer) -> None:
    keys = [signer("hospital-a"), signer("hospital-b")]
    ours = Envelope.sign(terms, *keys)
    theirs = SslibEnvelope.from_dict(json.loads(ours.to_json()))
    public = [sslib_key(key.verify_key) for key in keys]
    assert set(theirs.verify(public, 2)) == {key.verify_key.keyid for key in keys}
    with pytest.raises(VerificationError):
        theirs.verify([sslib_key(signer("clinic").verify_key)], 1)


def test_we_verify_securesystemslib_s(terms: Terms) -> None:
    signer = CryptoSigner.generate_ed25519()
    key = VerifyKey(bytes.fromhex(signer.public_key.keyval["public"]))
    signer.public_key.keyid = key.keyid  # ours are the digests of the raw keys
    theirs = SslibEnvelope(terms.canonical_bytes(), Terms.media_type, {})
    theirs.sign(signer)
    ours = Envelope.from_json(json.dumps(theirs.to_dict()))
    assert ours.open(Terms, key) == terms


# --- signing and opening ---------------------------------------------------------------------


def test_every_document_round_trips(example: tuple[str, Document], signer: Signer) -> None:
    _, document = example
    keys = [signer("hospital-a"), signer("clinic")]
    envelope = Envelope.from_json(Envelope.sign(document, *keys).to_json())
    assert envelope.open(type(document), *(key.verify_key for key in keys)) == document
    assert envelope.digest == document.digest
    assert envelope.to_json() == canonical_json(envelope.to_fields()).decode()


def test_signatures_add_up(terms: Terms, signer: Signer) -> None:
    one, other = signer("hospital-a"), signer("hospital-b")
    first = Envelope.sign(terms, one)
    both = first.signed_by(other)
    assert len(first.signatures) == 1
    assert both == Envelope.sign(terms, one, other) == both.signed_by(one)
    message = pae(Terms.media_type, terms.canonical_bytes())
    apart = first.with_signature(other.verify_key.keyid, other.sign(message))
    assert apart == both
    assert apart.open(Terms, other.verify_key, one.verify_key) == terms


def test_a_signature_is_missing(signed: Envelope, signer: Signer) -> None:
    absent = signer("hospital-a").verify_key
    with pytest.raises(SignatureError, match="is missing") as caught:
        signed.open(Terms, absent)
    assert absent.keyid[:16] in str(caught.value.expected)
    assert signer("clinic").verify_key.keyid[:16] in str(caught.value.found)
    with pytest.raises(SignatureError, match="is missing"):
        signed.open(Terms, signer("clinic").verify_key, absent)
    nobody = Envelope(signed.payload, signed.payload_type, {})
    with pytest.raises(SignatureError, match="nobody"):
        nobody.open(Terms, absent)


def test_opening_takes_a_key(signed: Envelope) -> None:
    with pytest.raises(SignatureError, match="without a key"):
        signed.open(Terms)


@pytest.mark.parametrize(
    "forge",
    [
        pytest.param(lambda e, k, o: o.sign(pae(e.payload_type, e.payload)), id="another key's"),
        pytest.param(lambda e, k, o: k.sign(e.payload), id="over the bare payload"),
        pytest.param(lambda e, k, o: k.sign(pae(e.payload_type, b"{}")), id="another payload's"),
        pytest.param(lambda e, k, o: k.sign(pae(Veto.media_type, e.payload)), id="another type's"),
        pytest.param(lambda e, k, o: k.sign(pae(e.payload_type, e.payload))[:63], id="truncated"),
        pytest.param(lambda e, k, o: k.sign(pae(e.payload_type, e.payload)) + b"\0", id="longer"),
        pytest.param(lambda e, k, o: bytes(64), id="zeros"),
        pytest.param(lambda e, k, o: b"", id="empty"),
    ],
)
def test_a_signature_is_wrong(
    signed: Envelope, signer: Signer, forge: Callable[[Envelope, SigningKey, SigningKey], bytes]
) -> None:
    key = signer("clinic")
    forged = signed.with_signature(key.verify_key.keyid, forge(signed, key, signer("hospital-a")))
    with pytest.raises(SignatureError, match="does not verify"):
        forged.open(Terms, key.verify_key)
    with pytest.raises(SignatureError):
        Envelope.from_json(forged.to_json()).open(Terms, key.verify_key)


def test_one_wrong_signature_spoils_the_right_ones(terms: Terms, signer: Signer) -> None:
    one, other = signer("hospital-a"), signer("hospital-b")
    envelope = Envelope.sign(terms, one, other).with_signature(one.verify_key.keyid, bytes(64))
    with pytest.raises(SignatureError):
        envelope.open(Terms, other.verify_key, one.verify_key)
    assert envelope.open(Terms, other.verify_key) == terms  # only what is asked for is judged


def test_a_signature_under_another_s_key_id_counts_for_neither(
    terms: Terms, signer: Signer
) -> None:
    one, other = signer("hospital-a"), signer("hospital-b")
    message = pae(Terms.media_type, terms.canonical_bytes())
    envelope = Envelope(terms.canonical_bytes(), Terms.media_type, {}).with_signature(
        other.verify_key.keyid, one.sign(message)
    )
    for key in (one, other):
        with pytest.raises(SignatureError):
            envelope.open(Terms, key.verify_key)


def test_another_kind_of_document_does_not_open(signed: Envelope, signer: Signer) -> None:
    key = signer("clinic")
    for call in (signed.peek, lambda kind: signed.open(kind, key.verify_key)):
        with pytest.raises(DocumentError, match="another kind") as caught:
            call(Party)
        assert Terms.media_type in str(caught.value.found)
    relabelled = Envelope(signed.payload, Party.media_type, signed.signatures)
    with pytest.raises(SignatureError):
        relabelled.open(Party, key.verify_key)


def test_what_is_signed_must_be_canonical(terms: Terms, signer: Signer) -> None:
    key = signer("clinic")
    for payload in (
        terms.canonical_bytes() + b"\n",
        json.dumps(terms.to_fields()).encode(),
        b'{"expires":"2027-12-31T23:59:59Z"}',
        b"",
        b"\xff",
        b"[]",
    ):
        envelope = Envelope(payload, Terms.media_type, {}).signed_by(key)
        with pytest.raises(DocumentError):
            envelope.open(Terms, key.verify_key)


# --- parsing ---------------------------------------------------------------------------------


def _set(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda fields: {**fields, **changes}


def _signature(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda fields: {**fields, "signatures": [{**fields["signatures"][0], **changes}]}


@pytest.mark.parametrize(
    "alter",
    [
        pytest.param(lambda fields: None, id="null"),
        pytest.param(lambda fields: [], id="list"),
        pytest.param(lambda fields: "text", id="text"),
        pytest.param(lambda fields: 7, id="number"),
        pytest.param(lambda fields: {}, id="empty"),
        pytest.param(lambda fields: list(fields), id="names alone"),
        pytest.param(_set(unknown=1), id="unknown field"),
        pytest.param(_set(payload=None), id="payload null"),
        pytest.param(_set(payload=7), id="payload number"),
        pytest.param(_set(payload=["e30="]), id="payload list"),
        pytest.param(_set(payload="e30"), id="payload padding"),
        pytest.param(_set(payload="ä"), id="payload alphabet"),
        pytest.param(_set(payloadType=None), id="type null"),
        pytest.param(_set(payloadType=7), id="type number"),
        pytest.param(_set(payloadType=["x"]), id="type list"),
        pytest.param(_set(signatures=None), id="signatures null"),
        pytest.param(_set(signatures={}), id="signatures mapping"),
        pytest.param(_set(signatures="ab"), id="signatures text"),
        pytest.param(_set(signatures=[None]), id="signature null"),
        pytest.param(_set(signatures=["keyid"]), id="signature text"),
        pytest.param(_set(signatures=[["keyid", "sig"]]), id="signature list"),
        pytest.param(_set(signatures=[{}]), id="signature empty"),
        pytest.param(_signature(unknown="x"), id="signature unknown field"),
        pytest.param(_signature(keyid=7), id="keyid number"),
        pytest.param(_signature(keyid=None), id="keyid null"),
        pytest.param(_signature(sig=7), id="sig number"),
        pytest.param(_signature(sig="A"), id="sig padding"),
        pytest.param(_signature(sig="ä"), id="sig alphabet"),
        pytest.param(
            lambda fields: {**fields, "signatures": fields["signatures"] * 2}, id="doubled"
        ),
        pytest.param(
            lambda fields: {
                **fields,
                "signatures": [fields["signatures"][0], {**fields["signatures"][0], "sig": "AAAA"}],
            },
            id="two by one key",
        ),
        *(
            pytest.param(
                lambda fields, name=name: {k: v for k, v in fields.items() if k != name},
                id=f"no {name}",
            )
            for name in ("payload", "payloadType", "signatures")
        ),
        *(
            pytest.param(
                lambda fields, name=name: {
                    **fields,
                    "signatures": [{k: v for k, v in fields["signatures"][0].items() if k != name}],
                },
                id=f"no {name}",
            )
            for name in ("keyid", "sig")
        ),
    ],
)
def test_refuses(signed: Envelope, alter: Callable[[dict[str, Any]], Any]) -> None:
    fields = signed.to_fields()
    altered = alter(copy.deepcopy(fields))
    with pytest.raises(DocumentError, match="envelope is not valid"):
        Envelope.from_fields(altered)
    with pytest.raises(DocumentError):
        Envelope.from_json(json.dumps(altered))
    assert Envelope.from_fields(fields) == signed


def test_parsing_leaves_the_caller_s_fields_alone(signed: Envelope) -> None:
    fields = signed.to_fields()
    before = copy.deepcopy(fields)
    Envelope.from_fields(fields)
    assert fields == before


@given(st.data())
@settings(max_examples=250)
def test_mutated_envelopes_open_unchanged_or_not_at_all(
    terms: Terms, signer: Signer, data: st.DataObject
) -> None:
    key = signer("clinic")
    altered = bytearray(Envelope.sign(terms, key).to_json().encode())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(altered) - 1))
        match data.draw(st.sampled_from(["set", "drop", "insert"])):
            case "set":
                altered[position] = data.draw(st.integers(0, 255))
            case "drop":
                del altered[position]
            case _:
                altered.insert(position, data.draw(st.integers(0, 255)))
    with contextlib.suppress(CenacleError):
        assert Envelope.from_json(bytes(altered)).open(Terms, key.verify_key) == terms


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5) | st.sampled_from(["e30=", "keyid", "sig"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["payload", "payloadType", "signatures", "keyid", "sig"]), inner
            )
        ),
    )
)
@settings(max_examples=200)
def test_arbitrary_fields(fields: Any) -> None:
    with contextlib.suppress(CenacleError):
        Envelope.from_fields(fields)


@given(st.binary(max_size=100))
@settings(max_examples=150)
def test_arbitrary_bytes(data: bytes) -> None:
    with contextlib.suppress(CenacleError):
        Envelope.from_json(data)
