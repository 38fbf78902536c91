"""SNP evidence: genuine and synthetic, accepted; every byte altered, and every lie, refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from asn1crypto import pem

from cenacle.attestation.amd_roots import AMD_ROOTS
from cenacle.attestation.claims import Evidence
from cenacle.attestation.registry import Verifier
from cenacle.attestation.snp import SnpCollateral, SnpVerifier, authenticate_report
from cenacle.attestation.snp_chain import endorse
from cenacle.documents.base import b64, unb64
from cenacle.errors import EvidenceError, InputError

GENUINE_TIME = datetime(2026, 1, 1, tzinfo=UTC)
PRODUCTS = ("Milan", "Genoa", "Turin")


@pytest.mark.parametrize("signer", ["VCEK", "VLEK"])
@pytest.mark.parametrize("version", [2, 3, 5])
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_good_guest_is_believed(
    amd: Any, verifier: SnpVerifier, product: str, version: int, signer: str
) -> None:
    guest = amd.Guest(product=product, version=version, signer=signer)
    shown = verifier.inspect(guest.evidence(), amd.NOW)
    assert shown.bound == bytes(range(64))
    claims = shown.claims
    assert (claims.kind, claims.protection, claims.layers) == ("snp", "tee", ())
    assert claims.issued == amd.NOW
    assert claims.measurements == {"launch": "sha384:" + "4d" * 48}
    properties = claims.properties
    assert (properties["product"], properties["signer"]) == (product, signer)
    assert ("cpuid" in properties) == (version > 2)
    assert ("mitigations" in properties) == (version == 5)
    if signer == "VCEK":
        assert properties["chip_id"] == amd.hwid(product).hex()
    else:
        assert properties["csp_id"] == "CN=cc-test.example.com"
        assert "chip_id" not in properties
    json.dumps(claims.to_fields())


def test_what_the_host_attached_is_a_measurement(amd: Any, verifier: SnpVerifier) -> None:
    guest = amd.Guest(put={0xC0: b"\xaa" * 32})
    claims = verifier.inspect(guest.evidence(), amd.NOW).claims
    assert claims.measurements["host_data"] == "hex:" + "aa" * 32


def test_a_masked_chip_is_known_by_its_vcek(amd: Any, verifier: SnpVerifier) -> None:
    claims = verifier.inspect(amd.Guest(chip_id=b"").evidence(), amd.NOW).claims
    assert claims.properties["chip_id"] == amd.hwid("Milan").hex()


@pytest.mark.parametrize(("product", "size"), [("Milan", 64), ("Turin", 8)])
def test_a_vlek_shows_the_chip_that_the_report_names(
    amd: Any, verifier: SnpVerifier, product: str, size: int
) -> None:
    chip = amd.hwid(product).ljust(64, b"\0")
    guest = amd.Guest(product=product, signer="VLEK", chip_id=chip)
    claims = verifier.inspect(guest.evidence(), amd.NOW).claims
    assert claims.properties["chip_id"] == chip[:size].hex()


def test_evidence_is_bound_to_report_data(amd: Any, verifier: Verifier) -> None:
    data = b"\x07" * 64
    evidence = amd.Guest(report_data=data).evidence()
    assert verifier.authenticate(evidence, data, amd.NOW).measurements
    with pytest.raises(EvidenceError, match="bound to another nonce"):
        verifier.authenticate(evidence, b"\x08" * 64, amd.NOW)


def _other_tcb(amd: Any, at: int) -> bytes:
    tcb = bytearray(amd.TCBS["Milan"])
    tcb[at] += 1
    return bytes(tcb)


LIES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "debug": (lambda a: a.Guest(policy=1 << 17 | 1 << 19), "may be debugged"),
    "debug, VLEK": (
        lambda a: a.Guest(policy=1 << 17 | 1 << 19, signer="VLEK"),
        "may be debugged",
    ),
    "other key": (lambda a: a.Guest(key=a.vek_key("other")), "not signed by the VCEK"),
    "older bootloader": (lambda a: a.Guest(reported_tcb=_other_tcb(a, 0)), "for another TCB"),
    "older TEE": (lambda a: a.Guest(reported_tcb=_other_tcb(a, 1)), "for another TCB"),
    "reserved SPL": (lambda a: a.Guest(reported_tcb=_other_tcb(a, 3)), "for another TCB"),
    "older SNP": (lambda a: a.Guest(reported_tcb=_other_tcb(a, 6)), "for another TCB"),
    "older microcode": (lambda a: a.Guest(reported_tcb=_other_tcb(a, 7)), "for another TCB"),
    "other FMC": (
        lambda a: a.Guest(product="Turin", reported_tcb=b"\x04\x05\x02\x09\0\0\0\x47"),
        "for another TCB than the report; found fmc 3, .*expected fmc 4,",
    ),
    "other chip": (lambda a: a.Guest(chip_id=b"\x02" * 64), "of another chip"),
    "other chip, Turin": (
        lambda a: a.Guest(product="Turin", chip_id=bytes(range(1, 9)) + b"\1" + bytes(55)),
        "of another chip",
    ),
    "other family": (
        lambda a: a.Guest(put={0x188: b"\x1a\x01\x01"}),
        "another processor.*found family 0x1a, model 0x1; expected Milan",
    ),
    "other model": (lambda a: a.Guest(put={0x188: b"\x19\x11\x01"}), "another processor"),
    "Genoa's Zen 4c is no Milan": (
        lambda a: a.Guest(put={0x188: b"\x19\xa0\x01"}),
        "another processor",
    ),
    "Milan's chain, Genoa's report": (
        lambda a: a.Guest(product="Genoa", card=a.leaf("Milan")),
        "for another TCB",
    ),
    "VLEK's report, VCEK's certificate": (
        lambda a: a.Guest(signer="VLEK", card=a.leaf("Milan")),
        "another kind than the key that the report names; found SEV-VCEK",
    ),
    "VCEK's report, VLEK's certificate": (
        lambda a: a.Guest(card=a.leaf("Milan", "VLEK")),
        "another kind than the key that the report names; found SEV-VLEK",
    ),
    "revoked": (
        lambda a: a.Guest(crl=a.revocation_list("Milan", (65537,))),
        "SEV-Milan was revoked",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_each_lie_is_refused_with_its_own_reason(
    amd: Any, refused: Callable[..., str], name: str
) -> None:
    make, reason = LIES[name]
    text = refused(make(amd).evidence())
    assert re.search(reason, text), text


@pytest.mark.parametrize(("days", "reason"), [(-31, "not yet valid"), (31, "no longer valid")])
def test_another_date_is_refused(
    amd: Any, refused: Callable[..., str], days: int, reason: str
) -> None:
    text = refused(amd.Guest().evidence(), now=amd.NOW + timedelta(days=days))
    assert reason in text


@pytest.mark.parametrize(
    "change",
    [
        {"report": "????"},
        {"report": None},
        {"report": ""},
        {"report": b64(bytes(100))},
        {"report": 5},
        {"certificates": []},
        {"certificates": ["AA=="]},
        {"certificates": "AA=="},
        {"certificates": None},
        {"crl": "AA=="},
        {"crl": 7},
        {"extra": "field"},
        {"statement": "text"},
    ],
    ids=range(13),
)
def test_a_malformed_body_is_refused(
    amd: Any, refused: Callable[..., str], change: dict[str, Any]
) -> None:
    assert refused(Evidence(kind="snp", body={**amd.Guest().body(), **change}))


def test_another_kind_is_refused(amd: Any, refused: Callable[..., str]) -> None:
    assert "another kind" in refused(Evidence(kind="tdx", body=amd.Guest().body()))


def test_amds_roots_do_not_accept_test_evidence(amd: Any, refused: Callable[..., str]) -> None:
    text = refused(amd.Guest().evidence(), by=SnpVerifier())
    assert "issued by another authority" in text


def test_bytes_all_over_synthetic_evidence_count(amd: Any, verifier: SnpVerifier) -> None:
    """Turin, version 5, VLEK, with its authority in the evidence; every byte of genuine ones
    is below."""
    roots = amd.roots()["Turin"]
    guest = amd.Guest(product="Turin", version=5, signer="VLEK", authorities=(roots.asvk,))
    body = guest.body()
    verifier.inspect(Evidence(kind="snp", body=body), amd.NOW)
    for part in range(3):
        field = unb64([body["report"], *body["certificates"]][part])
        for at in range(0, len(field), 11):
            altered = bytearray(field)
            altered[at] ^= 0x80
            parts = [body["report"], *body["certificates"]]
            parts[part] = b64(bytes(altered))
            flipped = {"report": parts[0], "certificates": parts[1:]}
            with pytest.raises(EvidenceError):
                verifier.inspect(Evidence(kind="snp", body=flipped), amd.NOW)


# Genuine evidence: a Milan guest whose policy allows debugging.


def _genuine(folder: Path) -> dict[str, Any]:
    snp = folder / "snp"
    return SnpVerifier.body_of(
        (snp / "attestation.bin").read_bytes(), (snp / "vcek.testcer").read_bytes()
    )


def test_the_genuine_report_is_of_a_genuine_chip(evidence_folder: Path) -> None:
    body = _genuine(evidence_folder)
    raw = unb64(body["report"])
    collateral = SnpCollateral.from_fields({"certificates": body["certificates"]})
    report, endorsement = authenticate_report(raw, collateral, GENUINE_TIME, AMD_ROOTS)
    assert (endorsement.product, endorsement.product_name) == ("Milan", "Milan-B0")
    assert endorsement.tcb == report.reported_tcb == bytes.fromhex("0200000000000544")
    assert endorsement.hwid == report.chip_id
    assert report.report_data == bytes([1, 2, 3, 4, 5]) + bytes(59)
    assert report.policy["debug"]


def test_the_genuine_guest_is_refused_for_its_debug_policy_alone(evidence_folder: Path) -> None:
    evidence = Evidence(kind="snp", body=_genuine(evidence_folder))
    with pytest.raises(EvidenceError, match="may be debugged"):
        SnpVerifier().inspect(evidence, GENUINE_TIME)


@pytest.mark.parametrize(
    ("when", "reason"),
    [
        (datetime(2022, 9, 23, tzinfo=UTC), "SEV-VCEK is not yet valid"),
        (datetime(2029, 9, 25, tzinfo=UTC), "SEV-VCEK is no longer valid"),
        (datetime(2020, 10, 22, tzinfo=UTC), "ARK-Milan is not yet valid"),
    ],
)
def test_the_genuine_certificates_have_dates(
    evidence_folder: Path, when: datetime, reason: str
) -> None:
    evidence = Evidence(kind="snp", body=_genuine(evidence_folder))
    with pytest.raises(EvidenceError, match=reason):
        SnpVerifier().inspect(evidence, when)


def test_every_byte_of_the_genuine_report_and_vcek_counts(evidence_folder: Path) -> None:
    """Refused for another reason than the debug policy: nothing altered gets that far."""
    body, verifier = _genuine(evidence_folder), SnpVerifier()
    report, leaf = unb64(body["report"]), unb64(body["certificates"][0])
    for part, field in enumerate((report, leaf)):
        for at in range(len(field)):
            altered = bytearray(field)
            altered[at] ^= 0x01
            parts = [report, leaf]
            parts[part] = bytes(altered)
            flipped = {"report": b64(parts[0]), "certificates": [b64(parts[1])]}
            with pytest.raises(EvidenceError) as caught:
                verifier.inspect(Evidence(kind="snp", body=flipped), GENUINE_TIME)
            assert "debugged" not in caught.value.what, (part, at)


def test_every_byte_of_the_genuine_authorities_counts(evidence_folder: Path) -> None:
    body = _genuine(evidence_folder)
    data = (evidence_folder / "snp" / "ask_ark_milan.pem").read_bytes()
    chain = [unb64(body["certificates"][0]), *(d for _, _, d in pem.unarmor(data, multiple=True))]
    endorse(chain, "VCEK", GENUINE_TIME, AMD_ROOTS)
    for part in (1, 2):
        for at in range(len(chain[part])):
            altered = bytearray(chain[part])
            altered[at] ^= 0x01
            flipped = [*chain[:part], bytes(altered), *chain[part + 1 :]]
            with pytest.raises(EvidenceError):
                endorse(flipped, "VCEK", GENUINE_TIME, AMD_ROOTS)


# Raw files


@pytest.mark.parametrize("form", ["der", "pem", "chain", "crl", "table", "extended"])
def test_raw_reports_and_their_collateral(amd: Any, verifier: SnpVerifier, form: str) -> None:
    guest, roots = amd.Guest(), amd.roots()["Milan"]
    leaf, crl = guest.leaf(), amd.revocation_list("Milan")
    raw = guest.report()
    block = "CERTIFICATE"
    table = amd.make_table({"VCEK": leaf, "ASK": roots.ask, "ARK": roots.ark})
    collateral = {
        "der": leaf,
        "pem": pem.armor(block, leaf),
        "chain": b"".join(pem.armor(block, der) for der in (roots.ask, roots.ark, leaf)),
        "crl": pem.armor(block, leaf) + pem.armor("X509 CRL", crl),
        "table": table,
        "extended": None,
    }[form]
    if form == "extended":
        raw += table
    body = SnpVerifier.body_of(raw, collateral)
    claims = verifier.inspect(Evidence(kind="snp", body=body), amd.NOW).claims
    assert ("revocations" in claims.properties) == (form == "crl")


@pytest.mark.parametrize(
    ("raw", "collateral", "reason"),
    [
        (lambda a: b"", lambda a: a.Guest().leaf(), "wrong length"),
        (lambda a: a.Guest().report()[:-1], lambda a: a.Guest().leaf(), "wrong length"),
        (
            lambda a: a.Guest().report(),
            lambda a: None,
            "no certificate of the VCEK.*Fetch https://kdsintf.amd.com/vcek/v1/Milan/0102",
        ),
        (lambda a: a.Guest().report(), lambda a: bytes(24), "no certificate of the VCEK"),
        (lambda a: a.Guest().report(), lambda a: a.roots()["Milan"].ask, "no certificate of the"),
        (lambda a: a.Guest().report(), lambda a: b"-----BEGIN CERT", "PEM file cannot be read"),
        (
            lambda a: a.Guest().report(),
            lambda a: b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
            "something unexpected; found PRIVATE KEY",
        ),
        (lambda a: a.Guest().report() + b"abc", lambda a: None, "table is cut off"),
    ],
    ids=range(8),
)
def test_raw_files_that_are_no_evidence(amd: Any, raw: Any, collateral: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        SnpVerifier.body_of(raw(amd), collateral(amd))


def test_a_guest_may_be_changed_and_signed_again(amd: Any, verifier: SnpVerifier) -> None:
    """The builder signs what it builds, so a refusal above is for the lie that it names."""
    guest = amd.Guest()
    assert verifier.inspect(replace(guest, guest_svn=9).evidence(), amd.NOW)
