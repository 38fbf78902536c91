"""NVIDIA GPUs: reports of test devices and a genuine one, and every way to spoil them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation.claims import Evidence
from cenacle.attestation.nvidia import NvidiaPolicy, NvidiaVerifier, judge_nvidia
from cenacle.attestation.nvidia_root import NVIDIA_DEVICE_ROOT, NVIDIA_DEVICE_ROOT_SHA256
from cenacle.attestation.nvidia_spdm import parse_report
from cenacle.documents.base import b64, unb64
from cenacle.documents.clauses import all_met
from cenacle.errors import EvidenceError, InputError

NOW = datetime(2027, 2, 1, 10, 0, 0, tzinfo=UTC)
TODAY = datetime(2026, 11, 22, tzinfo=UTC)
NONCE = b"\x01" * 32
BOUND = bytes(range(64))

Spoil = Callable[[Any], object]


def test_root_is_the_one_that_nvidia_publishes() -> None:
    root = x509.load_der_x509_certificate(NVIDIA_DEVICE_ROOT)
    assert root.fingerprint(hashes.SHA256()).hex() == NVIDIA_DEVICE_ROOT_SHA256
    assert root.subject.rfc4514_string() == "O=NVIDIA,CN=NVIDIA Device Identity CA"
    root.verify_directly_issued_by(root)


def test_claims(gpu: Any) -> None:
    claims, bound = gpu.verifier().inspect(gpu.evidence(), NOW)
    assert bound == NONCE
    assert claims.measurements == {
        "measurement-1": "sha384:" + "00" * 48,
        "measurement-2": "sha384:" + "22" * 48,
        "measurement-3": "sha384:" + "23" * 48,
    }
    assert claims.properties == {
        "chip": "GH100",
        "device": "GH100:48B02D0000000001",
        "driver": "550.90.07",
        "vbios": "96.00.9F.00.01",
        "project": "1010",
        "project_sku": "0200",
        "chip_sku": "882",
        "fwid": "sha384:" + "0f" * 48,
        "nvdec0": False,
        "protected_pcie": False,
    }
    assert (claims.kind, claims.protection, claims.issued) == ("nvidia", "tee", NOW)


@pytest.mark.parametrize(
    ("kind", "value", "shown"),
    [
        (0x81, b"\x01\x02", "hex:0102"),
        (0x01, b"\x02" * 32, "sha256:" + "02" * 32),
        (0x00, b"\x02" * 64, "sha512:" + "02" * 64),
    ],
)
def test_forms_of_measurements(gpu: Any, kind: int, value: bytes, shown: str) -> None:
    gpu.measurements[9], gpu.kinds[9] = value, kind
    claims = gpu.verifier().inspect(gpu.evidence(), NOW).claims
    assert claims.measurements["measurement-9"] == shown


def test_blackwell(make_gpu: Any, dice: Any) -> None:
    gpu = make_gpu(chip="GB100", dice=dice())
    gpu.opaque.update({33: b"\x07\x07", 34: b"\x01\x00", 36: b"\x01\x00"})
    del gpu.opaque[21]
    properties = gpu.verifier().inspect(gpu.evidence(), NOW).claims.properties
    assert properties["chip"] == "GB100"
    assert (properties["feature"], properties["protected_pcie"]) == ("mpt", False)


def test_old_drivers_state_less(gpu: Any) -> None:
    for kind in (20, 21):
        del gpu.opaque[kind]
    properties = gpu.verifier().inspect(gpu.evidence(), NOW).claims.properties
    assert "protected_pcie" not in properties
    assert properties["fwid"] == "sha384:" + "0f" * 48


def test_alone_it_is_never_enough(gpu: Any) -> None:
    nonce = gpu.verifier().part_binding(BOUND)
    evidence = gpu.evidence(gpu.report(nonce))
    assert gpu.verifier().inspect(evidence, NOW).bound == nonce
    with pytest.raises(EvidenceError, match="alone does not show which software"):
        gpu.verifier().authenticate(evidence, BOUND, NOW)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(
            lambda g: setattr(g, "request", b"\x12\xe0\x01\xff"), "version", id="spdm-1.2"
        ),
        pytest.param(
            lambda g: setattr(g, "request", b"\x11\x60\x01\xff"), "request code", id="code"
        ),
        pytest.param(
            lambda g: setattr(g, "request", b"\x11\xe0\x00\xff"), "signature", id="unsigned"
        ),
        pytest.param(
            lambda g: setattr(g, "request", b"\x11\xe0\x01\x02"), "choice", id="one-block"
        ),
        pytest.param(lambda g: setattr(g, "response", b"\x10\x60\x00\x00"), "version", id="1.0"),
        pytest.param(
            lambda g: setattr(g, "response", b"\x11\x7f\x00\x00"), "response code", id="err"
        ),
        pytest.param(lambda g: setattr(g, "slot", 1), "slot", id="slot"),
        pytest.param(lambda g: setattr(g, "tail", b"\x00"), "belong to nothing", id="more"),
        pytest.param(lambda g: g.measurements.clear(), "no measurement", id="no-measurement"),
        pytest.param(lambda g: g.measurements.update({0: bytes(48)}), "block", id="index-0"),
        pytest.param(lambda g: g.measurements.update({255: bytes(48)}), "block", id="index-255"),
        pytest.param(lambda g: g.measurements.update({4: bytes(47)}), "neither", id="47-bytes"),
        pytest.param(lambda g: g.measurements.update({4: b""}), "neither", id="empty"),
        pytest.param(
            lambda g: (g.kinds.update({4: 0x81}), g.measurements.update({4: b""})),
            "neither",
            id="raw",
        ),
        pytest.param(
            lambda g: (g.kinds.update({4: 0x81}), g.measurements.update({4: bytes(257)})),
            "neither",
            id="long-raw",
        ),
        pytest.param(lambda g: setattr(g, "specification", 2), "block", id="specification"),
        pytest.param(lambda g: g.opaque.pop(3), "state a driver version", id="no-driver"),
        pytest.param(lambda g: g.opaque.update({3: b"\x00"}), "driver version", id="empty-driver"),
        pytest.param(lambda g: g.opaque.update({3: b"5\xff0"}), "driver version", id="odd-driver"),
        pytest.param(lambda g: g.opaque.update({3: b"5" * 65}), "driver version", id="long-driver"),
        pytest.param(lambda g: g.opaque.pop(6), "VBIOS version", id="no-vbios"),
        pytest.param(
            lambda g: g.opaque.update({6: b"96.10.55.00.01"}), "as GPUs state it", id="switch-vbios"
        ),
        pytest.param(lambda g: g.opaque.pop(17), "state a project", id="no-project"),
        pytest.param(lambda g: g.opaque.update({20: bytes(48)}), "other firmware", id="fwid"),
        pytest.param(lambda g: g.opaque.update({20: b""}), "other firmware", id="fwid-empty"),
        pytest.param(lambda g: g.opaque.update({21: b"\x00"}), "Protected PCIe", id="pcie-status"),
        pytest.param(lambda g: g.opaque.update({11: b""}), "NVDEC", id="nvdec-status"),
        pytest.param(
            lambda g: g.opaque.update({34: b"\x02\x00"}), "later version", id="data-version"
        ),
        pytest.param(lambda g: g.opaque.update({36: b"\x03\x00"}), "unknown feature", id="feature"),
        pytest.param(
            lambda g: setattr(g, "signer", "other"), "key of its certificate", id="other-signer"
        ),
    ],
)
def test_spoiled_reports_are_refused(gpu: Any, spoil: Spoil, why: str) -> None:
    spoil(gpu)
    with pytest.raises(EvidenceError, match=why):
        gpu.verifier().inspect(gpu.evidence(), NOW)


def test_one_index_or_field_twice_is_refused(gpu: Any) -> None:
    signed = gpu.signed(NONCE)
    block = gpu.record()[:55]
    twice = signed.replace(gpu.record(), block + gpu.record()).replace(
        bytes([3]) + (165).to_bytes(3, "little"), bytes([4]) + (220).to_bytes(3, "little")
    )
    with pytest.raises(EvidenceError, match="every index once"):
        parse_report(twice + bytes(96))
    gpu.opaque = {3: b"1", 300: b"2"}
    signed = gpu.signed(NONCE).replace(struct.pack("<HH", 300, 1), struct.pack("<HH", 3, 1))
    with pytest.raises(EvidenceError, match="names a field twice"):
        parse_report(signed + bytes(96))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(lambda r: b"", "ends too early", id="empty"),
        pytest.param(lambda r: r[:36], "ends too early", id="half-a-request"),
        pytest.param(lambda r: r[:200], "ends too early", id="half-a-record"),
        pytest.param(lambda r: r[:-1], "ends too early", id="cut"),
        pytest.param(lambda r: r + bytes(20000), "too long", id="huge"),
        pytest.param(lambda r: r[:-96] + bytes(96), "key of its certificate", id="zero-signature"),
        pytest.param(
            lambda r: r[:-96] + b"\xff" * 96, "key of its certificate", id="big-signature"
        ),
        pytest.param(lambda r: r[:41] + b"\x04" + r[42:], "ends too early", id="block-more"),
        pytest.param(lambda r: r[:41] + b"\x02" + r[42:], "belong to nothing", id="block-less"),
        pytest.param(
            lambda r: r[:4] + b"\x02" * 32 + r[36:], "key of its certificate", id="other-nonce"
        ),
    ],
)
def test_spoiled_bytes_are_refused(gpu: Any, spoil: Callable[[bytes], bytes], why: str) -> None:
    with pytest.raises(EvidenceError, match=why):
        gpu.verifier().inspect(gpu.evidence(spoil(gpu.report())), NOW)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(lambda g, L: g.links.__setitem__(4, L("x", until=g.links[4].until)),
                     "not trusted", id="other-root"),
        pytest.param(lambda g, L: g.links.pop(2), "another number", id="four"),
        pytest.param(lambda g, L: g.links.insert(2, g.links[2]), "another number", id="six"),
        pytest.param(lambda g, L: setattr(g.links[1], "ca", False), "may not issue", id="no-ca"),
        pytest.param(lambda g, L: setattr(g.links[3], "path_length", 1), "so many CAs", id="long"),
        pytest.param(lambda g, L: setattr(g.links[0], "ca", True), "may not sign", id="leaf-ca"),
        pytest.param(lambda g, L: setattr(g.links[2], "signer", "x"), "not issued", id="forged"),
        pytest.param(lambda g, L: setattr(g.links[2], "until", NOW.replace(hour=9, minute=30)),
                     "expired", id="late"),
        pytest.param(lambda g, L: setattr(g.links[1], "since", NOW.replace(hour=11)),
                     "not valid yet", id="early"),
        pytest.param(lambda g, L: setattr(g.links[2], "curve", "secp256r1"),
                     "kind of key", id="p256"),
    ],
)  # fmt: skip
def test_spoiled_paths_are_refused(
    gpu: Any, make_link: Any, spoil: Callable[[Any, Any], object], why: str
) -> None:
    roots = gpu.roots
    spoil(gpu, make_link)
    with pytest.raises(EvidenceError, match=why):
        NvidiaVerifier(roots).inspect(gpu.evidence(), NOW)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (b"\x80\x00\x00\x01", None),
        (b"\x00\x00\x00\x01", None),
        (b"", None),
        (b"\x40\x00\x00\x01", "not secure"),
        (b"\x20\x00\x00\x01", "recovery"),
        (b"\x10\x00\x00\x01", "debug"),
        (b"\x10", "debug"),
    ],
)
def test_dice_flags(make_gpu: Any, dice: Any, flags: bytes, found: str | None) -> None:
    gpu = make_gpu(chip="GB100", dice=dice(flags=flags))
    if found is None:
        assert gpu.verifier().inspect(gpu.evidence(), NOW)
    else:
        with pytest.raises(EvidenceError, match=f"not to be trusted; found DICE flag: {found}"):
            gpu.verifier().inspect(gpu.evidence(), NOW)


def unrecognized(oid: str, value: str) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), bytes.fromhex(value))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        pytest.param("", "malformed", id="empty"),
        pytest.param("3000", "malformed", id="nothing-inside"),
        pytest.param("3003020101", "malformed", id="version-alone"),
        pytest.param("300402010100", "malformed", id="more"),
        pytest.param("30820003020101", "malformed", id="long-length"),
        pytest.param("3081030201013000", "malformed", id="long-short-length"),
        pytest.param("30800201010000", "malformed", id="indefinite"),
        pytest.param("3f1f03020101", "malformed", id="long-tag"),
        pytest.param("3009a60730050603290304", "malformed", id="other-algorithm"),
        pytest.param("3002a600", "malformed", id="no-fwid"),
        pytest.param("3006a6000000a600", "malformed", id="twice"),
        pytest.param("3084ffffffff", "malformed", id="endless"),
    ],
)
def test_malformed_dice_extensions_are_refused(make_gpu: Any, value: str, why: str) -> None:
    for oid in ("2.23.133.5.4.1", "2.23.133.5.4.1.1"):
        gpu = make_gpu(dice=unrecognized(oid, value))
        with pytest.raises(EvidenceError, match=why):
            gpu.verifier().inspect(gpu.evidence(), NOW)


def test_leaf_without_or_with_two_dice_extensions(make_gpu: Any, dice: Any) -> None:
    for more in ((), (dice(), False)):
        gpu = make_gpu()
        name, own = gpu.links[0].extensions
        gpu.links[0].extensions = (name, own, more) if more else (name,)
        with pytest.raises(EvidenceError, match="which firmware holds its key"):
            gpu.verifier().inspect(gpu.evidence(), NOW)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("NVIDIA:GH100", "another maker"),
        ("AMD:MI300:1", "another maker"),
        ("NVIDIA::1", "another maker"),
        ("NVIDIA:GH100:", "another maker"),
        ("NVIDIA:GH100:1:2", "another maker"),
        ("NVIDIA:GH\n00:1", "another maker"),
    ],
)
def test_names_of_devices(gpu: Any, name_device: Any, name: str, why: str) -> None:
    gpu.links[0].extensions = ((name_device(name), False), gpu.links[0].extensions[1])
    with pytest.raises(EvidenceError, match=why):
        gpu.verifier().inspect(gpu.evidence(), NOW)


def test_unnamed_devices(gpu: Any) -> None:
    own = gpu.links[0].extensions[1]
    for names in ((), ((x509.SubjectAlternativeName([x509.DNSName("gpu")]), False),)):
        gpu.links[0].extensions = (*names, own)
        with pytest.raises(EvidenceError, match="does not name the device"):
            gpu.verifier().inspect(gpu.evidence(), NOW)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"report": 1}, id="number"),
        pytest.param({"report": "%"}, id="no-base64"),
        pytest.param({"certificates": "AA=="}, id="no-list"),
        pytest.param({"certificates": ["%"]}, id="no-base64-inside"),
        pytest.param({"more": 1}, id="more"),
    ],
)
def test_malformed_bodies_are_refused(gpu: Any, change: dict[str, Any]) -> None:
    evidence = Evidence(kind="nvidia", body={**gpu.body(), **change})
    with pytest.raises(EvidenceError, match="malformed"):
        gpu.verifier().inspect(evidence, NOW)


def test_another_kind_is_refused(gpu: Any) -> None:
    with pytest.raises(EvidenceError, match="another kind"):
        gpu.verifier().inspect(Evidence(kind="nitro", body=gpu.body()), NOW)


@pytest.mark.parametrize(
    ("policy", "opaque", "met"),
    [
        ({}, {}, True),
        ({}, {21: b"\xaa"}, False),
        ({}, {36: b"\x02\x00"}, False),
        ({"allow_protected_pcie": True}, {21: b"\xaa"}, True),
        ({"devices": ["GH100:48B02D0000000001"]}, {}, True),
        ({"devices": ["GH100:48B02D0000000002"]}, {}, False),
        ({"devices": []}, {}, False),
        ({"drivers": ["550.90.07"]}, {}, True),
        ({"drivers": ["550.90.08"]}, {}, False),
    ],
)
def test_policy(gpu: Any, policy: dict[str, Any], opaque: dict[int, bytes], met: bool) -> None:
    gpu.opaque.update(opaque)
    claims = gpu.verifier().inspect(gpu.evidence(), NOW).claims
    assert all_met(judge_nvidia(claims, NvidiaPolicy.from_fields(policy))) is met


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused_in_words(data: bytes) -> None:
    for given_ in (data, bytes.fromhex("11e001ff") + bytes(33) + b"\x11\x60\x00\x00" + data):
        with pytest.raises(EvidenceError):
            parse_report(given_)


@settings(max_examples=60, deadline=None)
@given(
    record=st.binary(max_size=120),
    count=st.integers(0, 4),
    opaque=st.binary(max_size=40),
    more=st.binary(max_size=4),
)
def test_any_record_is_read_or_refused_in_words(
    record: bytes, count: int, opaque: bytes, more: bytes
) -> None:
    head = bytes.fromhex("11e001ff") + bytes(33) + b"\x11\x60\x00\x00" + bytes([count])
    head += len(record).to_bytes(3, "little") + record + bytes(32)
    data = head + len(opaque).to_bytes(2, "little") + opaque + bytes(96) + more
    try:
        report = parse_report(data)
    except EvidenceError:
        return
    assert len(report.measurements) == count
    assert not more


def test_every_byte_counts(gpu: Any) -> None:
    report, verifier = gpu.report(), gpu.verifier()
    for at in range(0, len(report), 16):
        altered = bytearray(report)
        altered[at] ^= 1 << at % 8
        with pytest.raises(EvidenceError):
            verifier.inspect(gpu.evidence(bytes(altered)), NOW)


class TestGenuine:
    @pytest.fixture
    def body(self, evidence_folder: Path) -> dict[str, Any]:
        folder = evidence_folder / "nvidia"
        return NvidiaVerifier.body_of(
            (folder / "hopperAttestationReport.txt").read_bytes(),
            (folder / "hopperCertChain.txt").read_bytes(),
        )

    def test_report(self, body: dict[str, Any]) -> None:
        claims, bound = NvidiaVerifier().inspect(Evidence(kind="nvidia", body=body), TODAY)
        assert bound.hex().startswith("931d8dd0add203ac")
        assert len(claims.measurements) == 64
        assert claims.measurements["measurement-2"].startswith("sha384:8048dfd18fe229bf")
        assert claims.properties["device"] == "GH100:48B02D92494BADF4"
        assert claims.properties["driver"] == "550.90.07"
        assert claims.properties["vbios"] == "96.00.9F.00.01"
        assert all_met(judge_nvidia(claims, NvidiaPolicy()))

    def test_dates(self, body: dict[str, Any]) -> None:
        before = datetime(2021, 1, 1, tzinfo=UTC)
        with pytest.raises(EvidenceError, match="not valid yet"):
            NvidiaVerifier().inspect(Evidence(kind="nvidia", body=body), before)

    def test_certificates_swapped(self, body: dict[str, Any]) -> None:
        chain = body["certificates"]
        for first in range(5):
            for second in range(first):
                swapped = list(chain)
                swapped[first], swapped[second] = chain[second], chain[first]
                evidence = Evidence(kind="nvidia", body={**body, "certificates": swapped})
                with pytest.raises(EvidenceError):
                    NvidiaVerifier().inspect(evidence, TODAY)

    @pytest.mark.parametrize(
        "step", [pytest.param(29, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]
    )
    def test_every_byte_counts(self, body: dict[str, Any], step: int) -> None:
        verifier = NvidiaVerifier()
        parts = [unb64(body["report"]), *map(unb64, body["certificates"])]
        for part, data in enumerate(parts):
            for at in range(part, len(data), step):
                altered = bytearray(data)
                altered[at] ^= 1 << at % 8
                shown = [b64(bytes(altered) if i == part else p) for i, p in enumerate(parts)]
                spoiled = {"report": shown[0], "certificates": shown[1:]}
                with pytest.raises(EvidenceError):
                    verifier.inspect(Evidence(kind="nvidia", body=spoiled), TODAY)


def test_raw_files(gpu: Any) -> None:
    report, pem = gpu.report(), gpu.pem()
    for raw in (report, report.hex().encode() + b"\n"):
        assert NvidiaVerifier.body_of(raw, pem + b"\x00\x00junk") == gpu.body(report)
    with pytest.raises(InputError, match="needs its certificate chain"):
        NvidiaVerifier.body_of(report)
    for wrong in (b"", b"-----END CERTIFICATE-----", pem.replace(b"M", b"%")):
        with pytest.raises(InputError, match="does not parse"):
            NvidiaVerifier.body_of(report, wrong)


def test_files_of_nvidias_tool(gpu: Any) -> None:
    report = gpu.report()
    entry = {"arch": "HOPPER", "evidence": b64(report), "certificate": b64(gpu.pem())}
    for fields in ([entry], {"evidences": [entry], "result_code": 0}):
        assert NvidiaVerifier.body_of(json.dumps(fields).encode()) == gpu.body(report)
    for wrong, why in (
        ([], "no evidence of a GPU"),
        ([entry, entry], "several GPUs"),
        ([{"evidence": 1}], "no evidence of a GPU"),
        ([{**entry, "evidence": "%"}], "base64"),
        ({"evidences": None}, "no evidence of a GPU"),
    ):
        with pytest.raises(InputError, match=why):
            NvidiaVerifier.body_of(json.dumps(wrong).encode())
