"""AWS Nitro: documents of test enclaves and genuine ones, and every way to spoil them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation.aws_root import AWS_NITRO_ROOT, AWS_NITRO_ROOT_SHA256
from cenacle.attestation.claims import Evidence
from cenacle.attestation.nitro import NitroPolicy, NitroVerifier, judge_nitro
from cenacle.attestation.nitro_document import decode, unwrap
from cenacle.documents.base import b64, unb64
from cenacle.documents.clauses import all_met
from cenacle.errors import EvidenceError, InputError

NOW = datetime(2027, 2, 1, 10, 0, 0, tzinfo=UTC)
BOUND = bytes(range(64))
# The genuine documents were made on 25 December 2025.
GENUINE = datetime(2025, 12, 25, 13, 16, 0, tzinfo=UTC)
GENUINE_DEBUG = datetime(2025, 12, 25, 8, 21, 0, tzinfo=UTC)

Spoil = Callable[[Any], object]


def test_root_is_the_one_that_aws_publishes() -> None:
    root = x509.load_der_x509_certificate(AWS_NITRO_ROOT)
    assert root.fingerprint(hashes.SHA256()).hex() == AWS_NITRO_ROOT_SHA256
    assert AWS_NITRO_ROOT_SHA256.startswith("641a0321a3e244ef")
    root.verify_directly_issued_by(root)


def test_claims(enclave: Any) -> None:
    claims = enclave.verifier().authenticate(enclave.evidence(), BOUND, NOW)
    assert claims.measurements == {
        f"pcr{index}": "sha384:" + f"{value:02x}" * 48
        for index, value in ((0, 0x10), (1, 0x11), (2, 0x12), (8, 0x18))
    }
    assert claims.properties == {
        "module_id": enclave.module_id,
        "parent_role": "sha384:" + "13" * 48,
        "parent_instance": "sha384:" + "14" * 48,
    }
    assert (claims.kind, claims.protection, claims.issued) == ("nitro", "tee", NOW)


@pytest.mark.parametrize("size", [32, 64])
def test_registers_of_other_sizes(enclave: Any, size: int) -> None:
    enclave.pcrs[16] = b"\x20" * size
    claims = enclave.verifier().inspect(enclave.evidence(), NOW).claims
    assert claims.measurements["pcr16"] == f"sha{size * 8}:" + "20" * size


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(lambda e: e.pcrs.update({0: bytes(48)}), "debug mode", id="pcr0-zero"),
        pytest.param(lambda e: e.pcrs.update({2: bytes(48)}), "debug mode", id="pcr2-zero"),
        pytest.param(lambda e: e.pcrs.pop(1), "debug mode", id="pcr1-absent"),
        pytest.param(lambda e: e.pcrs.update({32: bytes(48)}), "index in pcrs", id="pcr32"),
        pytest.param(lambda e: e.pcrs.update({-1: bytes(48)}), "index in pcrs", id="pcr-1"),
        pytest.param(lambda e: e.pcrs.update({"0": bytes(48)}), "index in pcrs", id="pcr-text"),
        pytest.param(lambda e: e.pcrs.update({5: bytes(47)}), "PCR 5", id="pcr-short"),
        pytest.param(lambda e: e.pcrs.update({5: "x" * 48}), "PCR 5", id="pcr-no-bytes"),
        pytest.param(lambda e: e.pcrs.clear(), "pcrs", id="no-pcrs"),
        pytest.param(lambda e: e.fields.update(pcrs=[]), "pcrs", id="pcrs-list"),
        pytest.param(lambda e: setattr(e, "module_id", ""), "module_id", id="no-module"),
        pytest.param(lambda e: setattr(e, "module_id", b"i"), "module_id", id="module-bytes"),
        pytest.param(lambda e: setattr(e, "digest", "SHA256"), "another digest", id="digest"),
        pytest.param(lambda e: e.fields.update(timestamp=0), "timestamp", id="time-zero"),
        pytest.param(lambda e: e.fields.update(timestamp=1 << 63), "timestamp", id="time-far"),
        pytest.param(lambda e: e.fields.update(timestamp=True), "timestamp", id="time-bool"),
        pytest.param(lambda e: e.fields.update(timestamp=1.5), "timestamp", id="time-float"),
        pytest.param(lambda e: e.fields.update(certificate=None), "lacks a field", id="no-leaf"),
        pytest.param(lambda e: e.fields.update(certificate=b""), "certificate", id="empty-leaf"),
        pytest.param(
            lambda e: e.fields.update(certificate=b"\x30" * 1025), "certificate", id="long-leaf"
        ),
        pytest.param(
            lambda e: e.fields.update(certificate=b"\x30\x03"), "does not parse", id="bad-leaf"
        ),
        pytest.param(lambda e: e.fields.update(cabundle=[]), "cabundle", id="no-bundle"),
        pytest.param(
            lambda e: e.fields.update(cabundle=[b"x"] * 8), "cabundle", id="endless-bundle"
        ),
        pytest.param(lambda e: e.fields.update(public_key=b""), "public_key", id="empty-key"),
        pytest.param(
            lambda e: e.fields.update(public_key=bytes(1025)), "public_key", id="long-key"
        ),
        pytest.param(lambda e: e.fields.update(nonce=bytes(513)), "nonce", id="long-nonce"),
        pytest.param(lambda e: setattr(e, "user_data", bytes(513)), "user_data", id="long-data"),
        pytest.param(lambda e: setattr(e, "user_data", "text"), "user_data", id="data-text"),
        pytest.param(lambda e: e.fields.update(more=1), "unknown field", id="unknown-field"),
        pytest.param(lambda e: e.fields.update({7: 1}), "unknown field", id="numbered-field"),
        pytest.param(
            lambda e: e.fields.update(more=cbor2.CBORTag(35, "(a+)+")), "not valid CBOR", id="tag"
        ),
        pytest.param(
            lambda e: e.fields.update(more=cbor2.CBORTag(99999, 0)), "not valid CBOR", id="own-tag"
        ),
        pytest.param(lambda e: e.fields.update(more=[[[[]]]]), "not valid CBOR", id="deep"),
        pytest.param(lambda e: e.protected.update({4: b"k"}), "another algorithm", id="header"),
        pytest.param(lambda e: e.protected.update({1: -7}), "another algorithm", id="es256"),
        pytest.param(
            lambda e: e.unprotected.update({4: b"k"}), "nothing protects", id="unprotected"
        ),
        pytest.param(
            lambda e: setattr(e, "signer", "other"), "key of its certificate", id="other-signer"
        ),
    ],
)
def test_spoiled_documents_are_refused(enclave: Any, spoil: Spoil, why: str) -> None:
    spoil(enclave)
    with pytest.raises(EvidenceError, match=why):
        enclave.verifier().inspect(enclave.evidence(), NOW)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(lambda d: b"", "credible length", id="empty"),
        pytest.param(lambda d: d[:-1], "not valid CBOR", id="cut"),
        pytest.param(lambda d: d + b"\x00", "one form", id="more"),
        pytest.param(lambda d: b"\xd2" + d, "not valid CBOR", id="tagged"),
        pytest.param(lambda d: b"\x9f" + d[1:] + b"\xff", "one form", id="indefinite-array"),
        pytest.param(lambda d: b"\x84\x58\x04" + d[2:], "one form", id="long-length"),
        pytest.param(
            lambda d: d.replace(b"\x59", b"\x5a\x00\x00", 1), "one form", id="longer-length"
        ),
        pytest.param(lambda d: bytes(20000), "credible length", id="huge"),
        pytest.param(lambda d: cbor2.dumps(cbor2.loads(d)[:3]), "COSE_Sign1", id="three"),
        pytest.param(lambda d: cbor2.dumps({}), "COSE_Sign1", id="map"),
        pytest.param(
            lambda d: cbor2.dumps([*cbor2.loads(d)[:3], b"s" * 95]), "wrong length", id="short-sign"
        ),
        pytest.param(
            lambda d: cbor2.dumps([*cbor2.loads(d)[:3], bytes(96)]),
            "key of its certificate",
            id="zero-sign",
        ),
        pytest.param(
            lambda d: cbor2.dumps([*cbor2.loads(d)[:3], b"\xff" * 96]),
            "key of its certificate",
            id="big-sign",
        ),
        pytest.param(
            lambda d: cbor2.dumps([*cbor2.loads(d)[:2], b"", bytes(96)]), "payload", id="no-payload"
        ),
    ],
)
def test_spoiled_structures_are_refused(
    enclave: Any, spoil: Callable[[bytes], bytes], why: str
) -> None:
    document = spoil(enclave.document())
    with pytest.raises(EvidenceError, match=why):
        enclave.verifier().inspect(enclave.evidence(document), NOW)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(lambda p: p + b"\x00", "one form", id="more"),
        pytest.param(lambda p: b"\xbf" + p[1:-1] + b"\x61a\x01\x61a\x02\xff", "CBOR", id="twice"),
        pytest.param(lambda p: p.replace(b"fdigest", b"x\x06igest"[:7]), "CBOR|form", id="key"),
        pytest.param(
            lambda p: p.replace(b"fdigest", b"\x78\x06digest"), "one form", id="long-key-length"
        ),
        pytest.param(
            lambda p: p.replace(b"fdigest", b"\x7ffdigest\xff"), "one form", id="indefinite-text"
        ),
        pytest.param(lambda p: b"\x80", "not a map", id="list"),
        pytest.param(lambda p: b"\xa0", "lacks a field", id="empty-map"),
        pytest.param(lambda p: b"\xbb" + b"\xff" * 8, "CBOR", id="endless-map"),
    ],
)
def test_spoiled_payloads_are_refused_though_signed(
    enclave: Any, spoil: Callable[[bytes], bytes], why: str
) -> None:
    payload = spoil(cbor2.loads(enclave.document())[2])
    with pytest.raises(EvidenceError, match=why):
        enclave.verifier().inspect(enclave.evidence(enclave.document(payload)), NOW)


def test_a_closed_outer_map_is_accepted_too(enclave: Any) -> None:
    document = enclave.document(cbor2.dumps(enclave.payload()))
    assert enclave.verifier().inspect(enclave.evidence(document), NOW).bound == BOUND


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"document": 1}, id="number"),
        pytest.param({"document": "%"}, id="no-base64"),
        pytest.param({"doc": ""}, id="other-field"),
        pytest.param({"document": "AA==", "more": 1}, id="more"),
    ],
)
def test_malformed_bodies_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(EvidenceError, match="malformed"):
        NitroVerifier().inspect(Evidence(kind="nitro", body=body), NOW)


def test_another_kind_is_refused(enclave: Any) -> None:
    other = Evidence(kind="snp", body=enclave.evidence().body)
    with pytest.raises(EvidenceError, match="another kind"):
        enclave.verifier().inspect(other, NOW)


PATHS = [
    pytest.param(
        lambda e, L: e.fields.update(cabundle=e.payload()["cabundle"][:1]), "not issued", id="short"
    ),
    pytest.param(lambda e, L: e.links.__setitem__(4, L("other")), "not trusted", id="other-root"),
    pytest.param(
        lambda e, L: e.fields.update(cabundle=[e.payload()["cabundle"][i] for i in (0, 1, 3)]),
        "not issued",
        id="one-missing",
    ),
    pytest.param(
        lambda e, L: e.links.__setitem__(1, L("instance", ca=False)), "may not issue", id="no-ca"
    ),
    pytest.param(
        lambda e, L: setattr(e.links[1], "ca", None), "may not issue", id="no-constraints"
    ),
    pytest.param(
        lambda e, L: setattr(e.links[2], "signs_certificates", False), "may not issue", id="usage"
    ),
    pytest.param(lambda e, L: setattr(e.links[2], "usage", False), "no key usage", id="no-usage"),
    pytest.param(lambda e, L: setattr(e.links[3], "path_length", 1), "so many CAs", id="too-long"),
    pytest.param(lambda e, L: setattr(e.links[0], "ca", True), "may not sign data", id="leaf-ca"),
    pytest.param(
        lambda e, L: setattr(e.links[0], "signs_data", False), "may not sign data", id="leaf-usage"
    ),
    pytest.param(
        lambda e, L: setattr(e.links[0], "signs_certificates", True),
        "may not sign data",
        id="leaf-both",
    ),
    pytest.param(
        lambda e, L: setattr(e.links[1], "curve", "secp256r1"), "another kind of key", id="p256"
    ),
    pytest.param(
        lambda e, L: setattr(e.links[1], "algorithm", hashes.SHA256), "another way", id="sha256"
    ),
    pytest.param(
        lambda e, L: setattr(e.links[1], "issuer_name", "region"), "not issued", id="issuer-name"
    ),
    pytest.param(lambda e, L: setattr(e.links[1], "signer", "other"), "not issued", id="forged"),
    pytest.param(
        lambda e, L: setattr(e.links[2], "extensions", ((x509.OCSPNoCheck(), True),)),
        "not understood",
        id="critical",
    ),
]


@pytest.mark.parametrize(("spoil", "why"), PATHS)
def test_spoiled_paths_are_refused(
    enclave: Any, make_link: Any, spoil: Callable[[Any, Any], object], why: str
) -> None:
    roots = enclave.roots
    spoil(enclave, make_link)
    with pytest.raises(EvidenceError, match=why):
        NitroVerifier(roots).inspect(enclave.evidence(), NOW)


def test_swapped_certificates_are_refused(enclave: Any) -> None:
    bundle = enclave.payload()["cabundle"]
    for first in range(len(bundle)):
        for second in range(first):
            swapped = list(bundle)
            swapped[first], swapped[second] = bundle[second], bundle[first]
            enclave.fields = {"cabundle": swapped}
            with pytest.raises(EvidenceError):
                enclave.verifier().inspect(enclave.evidence(), NOW)


def test_amazons_root_does_not_make_a_test_path_good(enclave: Any) -> None:
    enclave.fields = {"cabundle": [AWS_NITRO_ROOT, *enclave.payload()["cabundle"][1:]]}
    with pytest.raises(EvidenceError, match="not issued by"):
        NitroVerifier().inspect(enclave.evidence(), NOW)


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize(
    ("since", "until", "why"),
    [
        pytest.param(
            NOW + timedelta(minutes=6), NOW + timedelta(hours=1), "not valid yet", id="early"
        ),
        pytest.param(NOW - timedelta(hours=1), NOW - timedelta(minutes=6), "expired", id="late"),
    ],
)
def test_dates_of_certificates(
    enclave: Any, index: int, since: datetime, until: datetime, why: str
) -> None:
    enclave.links[index].since, enclave.links[index].until = since, until
    with pytest.raises(EvidenceError, match=f"certificate {index + 1} of 5 of .*{why}"):
        enclave.verifier().inspect(enclave.evidence(), NOW)


def test_a_certificate_made_a_moment_before_the_document_is_accepted(enclave: Any) -> None:
    enclave.links[0].since = NOW - timedelta(seconds=1)
    behind = NOW - timedelta(minutes=4)  # the verifier's clock
    assert enclave.verifier().authenticate(enclave.evidence(), BOUND, behind).issued == NOW


def test_old_documents_can_be_inspected_at_their_time_and_are_never_fresh(enclave: Any) -> None:
    later = NOW + timedelta(minutes=6)
    assert enclave.verifier().inspect(enclave.evidence(), later)
    with pytest.raises(EvidenceError, match="not fresh"):
        enclave.verifier().authenticate(enclave.evidence(), BOUND, later)
    with pytest.raises(EvidenceError, match="not fresh"):
        enclave.verifier().authenticate(enclave.evidence(), BOUND, NOW - timedelta(minutes=6))
    with pytest.raises(EvidenceError, match="expired"):
        enclave.verifier().inspect(enclave.evidence(), NOW + timedelta(days=1))


@pytest.mark.parametrize("user_data", [None, b"", bytes(64), BOUND[:63], BOUND + b"\x00"])
def test_other_report_data_is_refused(enclave: Any, user_data: bytes | None) -> None:
    enclave.user_data = user_data
    with pytest.raises(EvidenceError, match="bound to another nonce"):
        enclave.verifier().authenticate(enclave.evidence(), BOUND, NOW)


def test_the_nonce_field_does_not_bind(enclave: Any) -> None:
    enclave.user_data, enclave.fields = None, {"nonce": BOUND}
    with pytest.raises(EvidenceError, match="bound to another nonce"):
        enclave.verifier().authenticate(enclave.evidence(), BOUND, NOW)


def test_every_byte_counts(enclave: Any) -> None:
    document, verifier = enclave.document(), enclave.verifier()
    for at in range(0, len(document), 16):
        altered = bytearray(document)
        altered[at] ^= 1 << at % 8
        with pytest.raises(EvidenceError):
            verifier.inspect(enclave.evidence(bytes(altered)), NOW)


ROLE, INSTANCE = "arn:aws:iam::123456789012:role/clinic", "i-0827e799ec9232d44"


@pytest.mark.parametrize(
    ("policy", "met"),
    [
        ({}, None),
        ({"parent_roles": [ROLE]}, True),
        ({"parent_roles": ["other", ROLE], "parent_instances": [INSTANCE]}, True),
        ({"parent_roles": [ROLE], "parent_instances": [ROLE]}, False),
        ({"parent_roles": []}, False),
    ],
)
def test_policy(enclave: Any, policy: dict[str, Any], met: bool | None) -> None:
    enclave.pcrs[3] = hashlib.sha384(bytes(48) + ROLE.encode()).digest()
    # As the genuine document of this instance has it.
    enclave.pcrs[4] = bytes.fromhex(
        "7b3574ad9b7e88ec8335e8ce967315fac77218441e97eea9795de704d7f2678d0b298ecda39b544c1689669f"
        "48cba5e8"
    )
    claims = enclave.verifier().inspect(enclave.evidence(), NOW).claims
    clauses = judge_nitro(claims, NitroPolicy.from_fields(policy))
    assert all_met(clauses) is bool(met)
    assert (clauses == []) is (met is None)


def test_policy_of_an_enclave_without_a_role(enclave: Any) -> None:
    enclave.pcrs[3] = bytes(48)
    claims = enclave.verifier().inspect(enclave.evidence(), NOW).claims
    (clause,) = judge_nitro(claims, NitroPolicy(parent_roles=(ROLE,)))
    assert (clause.verdict, clause.found) == ("failed", "none")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused_in_words(data: bytes) -> None:
    for read in (decode, unwrap):
        with pytest.raises(EvidenceError):
            read(data)


CBOR = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.binary(max_size=40)
    | st.text(max_size=12)
    | st.floats(),
    lambda inside: (
        st.lists(inside, max_size=4)
        | st.dictionaries(st.text(max_size=12) | st.integers(0, 40), inside, max_size=4)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle", "public_key",
     "user_data", "nonce", "other"]
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(FIELDS, CBOR, max_size=10), st.binary(max_size=8))
def test_any_map_is_refused_in_words(fields: dict[str, Any], more: bytes) -> None:
    payload = cbor2.dumps(fields) + more
    with pytest.raises(EvidenceError):
        decode(cbor2.dumps([cbor2.dumps({1: -35}), {}, payload, bytes(96)]))


class TestGenuine:
    def test_document(self, evidence_folder: Path) -> None:
        raw = (evidence_folder / "nitro" / "nitro_attestation.bin").read_bytes()
        evidence = Evidence(kind="nitro", body=NitroVerifier.body_of(raw))
        claims, bound = NitroVerifier().inspect(evidence, GENUINE)
        assert bound == bytes(64)
        assert sorted(claims.measurements) == ["pcr0", "pcr1", "pcr2"]
        assert claims.measurements["pcr0"].startswith("sha384:5cb702954321826d")
        assert claims.properties["module_id"] == "i-0827e799ec9232d44-enc019b55a68bd2ed4b"
        assert claims.issued == datetime(2025, 12, 25, 13, 15, 37, 578000, tzinfo=UTC)
        assert NitroVerifier().authenticate(evidence, bytes(64), GENUINE) == claims
        with pytest.raises(EvidenceError, match="bound to another nonce"):
            NitroVerifier().authenticate(evidence, BOUND, GENUINE)
        with pytest.raises(EvidenceError, match=r"certificate 1 of 5 .*expired"):
            NitroVerifier().inspect(evidence, datetime(2026, 11, 22, tzinfo=UTC))
        with pytest.raises(EvidenceError, match=r"certificate 1 of 5 .*not valid yet"):
            NitroVerifier().inspect(evidence, datetime(2025, 12, 25, 13, 10, tzinfo=UTC))

    def test_debug_mode_is_refused(self, evidence_folder: Path) -> None:
        raw = (evidence_folder / "nitro" / "nitro_attestation_debug.bin").read_bytes()
        evidence = Evidence(kind="nitro", body=NitroVerifier.body_of(raw))
        with pytest.raises(EvidenceError, match="debug mode"):
            NitroVerifier().inspect(evidence, GENUINE_DEBUG)

    def test_certificates_of_another_instance_are_refused(self, evidence_folder: Path) -> None:
        folder = evidence_folder / "nitro"
        one = unwrap((folder / "nitro_attestation.bin").read_bytes())
        other = unwrap((folder / "nitro_attestation_debug.bin").read_bytes())
        ours, theirs = cbor2.loads(cbor2.loads(one)[2]), cbor2.loads(cbor2.loads(other)[2])
        outer = cbor2.loads(one)
        for name in ("certificate", "cabundle", "pcrs", "timestamp"):
            fields = {**ours, name: theirs[name]}
            inside = b"".join(cbor2.dumps(k) + cbor2.dumps(v) for k, v in fields.items())
            swapped = cbor2.dumps([outer[0], {}, b"\xbf" + inside + b"\xff", outer[3]])
            evidence = Evidence(kind="nitro", body={"document": b64(swapped)})
            with pytest.raises(EvidenceError, match="not signed by the key of its certificate"):
                NitroVerifier().inspect(evidence, GENUINE)

    @pytest.mark.parametrize(
        "step", [pytest.param(9, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]
    )
    def test_every_byte_counts(self, evidence_folder: Path, step: int) -> None:
        raw = (evidence_folder / "nitro" / "nitro_attestation.bin").read_bytes()
        document, verifier = unb64(NitroVerifier.body_of(raw)["document"]), NitroVerifier()
        for at in range(0, len(document), step):
            altered = bytearray(document)
            altered[at] ^= 1 << at % 8
            evidence = Evidence(kind="nitro", body={"document": b64(bytes(altered))})
            with pytest.raises(EvidenceError):
                verifier.inspect(evidence, GENUINE)


@pytest.mark.parametrize("raw", [b"", b"\x84\x44", b"\x84\x44\xa1\x01\x38\x22\xa0\x41a"])
def test_files_without_a_document(raw: bytes) -> None:
    with pytest.raises(InputError):
        NitroVerifier.body_of(raw)


def test_files_with_collateral(enclave: Any) -> None:
    with pytest.raises(InputError, match="carries its certificates"):
        NitroVerifier.body_of(enclave.document(), b"pem")


def test_files_with_header_tag_and_padding(enclave: Any) -> None:
    document = enclave.document()
    for raw in (document, b"\xd2" + document, b"\x00\x02\xbdF" + document + bytes(99)):
        assert NitroVerifier.body_of(raw) == {"document": b64(document)}
