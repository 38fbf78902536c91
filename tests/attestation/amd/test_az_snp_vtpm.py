"""Azure's vTPM: the chain from AMD's root to the registers, link by link."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from asn1crypto import pem
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation.amd_roots import AMD_ROOTS
from cenacle.attestation.az_hcl_report import RuntimeData, split_hcl_report, unb64url
from cenacle.attestation.az_snp_vtpm import AzSnpVtpmVerifier
from cenacle.attestation.claims import Evidence
from cenacle.attestation.snp_chain import endorse
from cenacle.documents.base import b64, unb64
from cenacle.errors import EvidenceError, InputError

GENUINE_TIME = datetime(2025, 12, 1, tzinfo=UTC)


@pytest.fixture
def azure(amd: Any) -> AzSnpVtpmVerifier:
    return AzSnpVtpmVerifier(amd.roots())


@pytest.mark.parametrize("product", ["Milan", "Genoa", "Turin"])
def test_a_good_vm_is_believed(amd: Any, azure: AzSnpVtpmVerifier, product: str) -> None:
    vm = amd.AzureVm(guest=amd.Guest(product=product))
    claims = azure.authenticate(vm.evidence(), bytes(range(64)), amd.NOW)
    assert (claims.kind, claims.protection, claims.issued) == ("az-snp-vtpm", "tee", amd.NOW)
    registers = {f"pcr{n}": "sha256:" + bytes([n]).hex() * 32 for n in range(24)}
    assert claims.measurements == {"launch": "sha384:" + "4d" * 48, **registers}
    properties = claims.properties
    assert properties["product"] == product
    assert properties["vm_configuration"]["secure-boot"] is True
    assert properties["user_data"] == "00" * 64
    assert properties["tpm"] == {
        "firmware": "2020031200120003",
        "clock_ms": "3513262",
        "clock_safe": True,
        "reset_count": 2,
        "restart_count": 0,
    }


def test_some_registers_are_enough_if_the_contract_names_no_others(
    amd: Any, azure: AzSnpVtpmVerifier
) -> None:
    vm = amd.AzureVm(
        registers={4: b"4" * 32, 9: b"9" * 32}, selection=bytes.fromhex("00000001000b03100200")
    )
    measured = azure.inspect(vm.evidence(), amd.NOW).claims.measurements
    assert set(measured) == {"launch", "pcr4", "pcr9"}


def test_a_quote_for_another_nonce_is_refused(amd: Any, azure: AzSnpVtpmVerifier) -> None:
    for nonce in (b"", b"challenge", bytes(32), bytes(range(64))[:32]):
        with pytest.raises(EvidenceError, match="bound to another nonce"):
            azure.authenticate(amd.AzureVm(nonce=nonce).evidence(), bytes(range(64)), amd.NOW)


def _runtime(a: Any, **changes: Any) -> Any:
    vm = a.AzureVm()
    vm.runtime = {**vm.runtime, **changes}
    return vm


def _keys(a: Any, *keys: Any) -> Any:
    return _runtime(a, keys=list(keys))


def _body(a: Any, **changes: Any) -> Any:
    return Evidence(kind="az-snp-vtpm", body={**a.AzureVm().body(), **changes})


LIES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "debug": (lambda a: a.AzureVm(guest=a.Guest(policy=1 << 17 | 1 << 19)), "may be debugged"),
    "asked for above the paravisor": (
        lambda a: a.AzureVm(guest=a.Guest(vmpl=2)),
        "not asked for by the paravisor; found VMPL 2",
    ),
    "other VCEK": (
        lambda a: a.AzureVm(guest=a.Guest(key=a.vek_key("other"))),
        "not signed by the VCEK",
    ),
    "other chip": (lambda a: a.AzureVm(guest=a.Guest(chip_id=b"\x02" * 64)), "of another chip"),
    "SNP evidence's report data": (
        lambda a: _body(a, report=a.Guest().body()["report"]),
        "not what the SNP report binds",
    ),
    "something beside the digest": (
        lambda a: a.AzureVm(unused=b"\x01" * 32),
        "not what the SNP report binds",
    ),
    "other runtime data": (
        lambda a: _body(a, runtime_data=b64(_runtime(a, keys=[]).runtime_data())),
        "not what the SNP report binds",
    ),
    "no JSON": (lambda a: a.AzureVm(text=b"{"), "runtime data is malformed"),
    "no object": (lambda a: a.AzureVm(text=b"[]"), "runtime data is malformed"),
    "a key of JSON twice": (
        lambda a: a.AzureVm(text=b'{"keys": [], "keys": []}'),
        "runtime data is malformed",
    ),
    "padded": (
        lambda a: a.AzureVm(text=a.AzureVm().runtime_data() + b"\0"),
        "runtime data is malformed",
    ),
    "no keys": (lambda a: _keys(a), "names no attestation key, or several; found 0"),
    "keys that are no list": (lambda a: _runtime(a, keys={"kid": "HCLAkPub"}), "found 0"),
    "keys that are no keys": (lambda a: _keys(a, "HCLAkPub", None), "found 0"),
    "two attestation keys": (
        lambda a: _keys(a, a.jwk(a.rsa_key("ak")), a.jwk(a.rsa_key("other"))),
        "names no attestation key, or several; found 2",
    ),
    "the other key named as attestation key": (
        lambda a: _keys(a, a.jwk(a.rsa_key("other"))),
        "TPM signature does not verify",
    ),
    "a key to encrypt": (
        lambda a: _keys(a, a.jwk(a.rsa_key("ak"), key_ops=["encrypt"])),
        "attestation key is of another kind",
    ),
    "a key on a curve": (
        lambda a: _keys(a, a.jwk(a.rsa_key("ak"), kty="EC")),
        "attestation key is of another kind",
    ),
    "a short key": (
        lambda a: _keys(a, a.jwk(a.rsa_key("ak"), n=a.b64url(b"\xff" * 128))),
        "attestation key is too weak; found 1024 bits",
    ),
    "exponent 3": (
        lambda a: _keys(a, a.jwk(a.rsa_key("ak"), e=a.b64url(b"\x03"))),
        "attestation key is too weak",
    ),
    "an even modulus": (
        lambda a: _keys(a, a.jwk(a.rsa_key("ak"), n=a.b64url(b"\xff" * 255 + b"\xfe"))),
        "attestation key is no RSA key|does not verify",
    ),
    "no modulus": (lambda a: _keys(a, a.jwk(a.rsa_key("ak"), n=None)), "does not decode"),
    "a modulus in plain base64": (
        lambda a: _keys(a, a.jwk(a.rsa_key("ak"), n="+/+/")),
        "does not decode",
    ),
    "no configuration": (
        lambda a: _runtime(a, **{"vm-configuration": None}),
        "lacks the VM's configuration",
    ),
    "user data in another form": (
        lambda a: _runtime(a, **{"user-data": 7}),
        "malformed user data",
    ),
    "quote by another key": (
        lambda a: a.AzureVm(signing=a.rsa_key("other")),
        "TPM signature does not verify",
    ),
    "not made by a TPM": (lambda a: a.AzureVm(magic=b"\xffTCH"), "was not made by a TPM"),
    "a certification": (lambda a: a.AzureVm(kind=0x8017), "cut off|is no quote|followed"),
    "another structure": (lambda a: a.AzureVm(kind=0x8014), "is of another type"),
    "SHA-1": (
        lambda a: a.AzureVm(selection=bytes.fromhex("00000001000403ffffff")),
        "rests on SHA-1",
    ),
    "no bank": (
        lambda a: a.AzureVm(selection=bytes(4)),
        "other than one bank of registers; found 0",
    ),
    "two banks": (
        lambda a: a.AzureVm(selection=bytes.fromhex("00000002000b03ffffff000c03ffffff")),
        "other than one bank of registers; found 2",
    ),
    "no registers": (
        lambda a: a.AzureVm(selection=bytes.fromhex("00000001000b03000000")),
        "other than one bank of registers",
    ),
    "a larger bank": (
        lambda a: a.AzureVm(selection=bytes.fromhex("00000001000c03ffffff")),
        "other registers are shown than the vTPM signed",
    ),
    "fewer registers than signed": (
        lambda a: a.AzureVm(registers={n: bytes([n]) * 32 for n in range(23)}),
        "other registers are shown than the vTPM signed",
    ),
    "more registers than signed": (
        lambda a: a.AzureVm(selection=bytes.fromhex("00000001000b03ffff7f")),
        "other registers are shown than the vTPM signed",
    ),
    "registers exchanged": (
        lambda a: _body(a, registers={str(n): bytes([n ^ 1]).hex() * 32 for n in range(24)}),
        "registers are not the ones that the vTPM signed",
    ),
    "signature cut off": (lambda a: _body(a, signature=b64(bytes(3))), "TPM signature"),
    "signature with more": (
        lambda a: _body(a, signature=b64(unb64(a.AzureVm().body()["signature"]) + b"\0")),
        "followed by other bytes",
    ),
    "signature of another scheme": (
        lambda a: _body(a, signature=b64(b"\x00\x18\x00\x0b\x00\x01\x01\x00\x01\x01")),
        "of another type than the key",
    ),
    "VLEK for a VCEK": (
        lambda a: a.AzureVm(guest=a.Guest(card=a.leaf("Milan", "VLEK"))),
        "another kind than the key",
    ),
    "no registers at all": (lambda a: _body(a, registers={}), "malformed"),
    "register 24": (lambda a: _body(a, registers={"24": "00" * 32}), "malformed"),
    "register 07": (lambda a: _body(a, registers={"07": "00" * 32}), "malformed"),
    "registers in capitals": (lambda a: _body(a, registers={"7": "AA" * 32}), "malformed"),
    "an unknown field": (lambda a: _body(a, extra=1), "malformed"),
    "no quote": (lambda a: _body(a, attest=None), "malformed"),
    "another kind": (lambda a: a.Guest(), "evidence is of another kind"),
}


@pytest.mark.parametrize("name", LIES)
def test_each_lie_is_refused_with_its_own_reason(
    amd: Any, azure: AzSnpVtpmVerifier, name: str
) -> None:
    make, reason = LIES[name]
    made = make(amd)
    evidence = made if isinstance(made, Evidence) else made.evidence()
    with pytest.raises(EvidenceError) as caught:
        azure.inspect(evidence, amd.NOW)
    assert re.search(reason, caught.value.diagnostics()), caught.value.diagnostics()


def test_bytes_all_over_synthetic_evidence_count(amd: Any, azure: AzSnpVtpmVerifier) -> None:
    body = amd.AzureVm(guest=amd.Guest(product="Turin", version=5)).body()
    azure.inspect(Evidence(kind="az-snp-vtpm", body=body), amd.NOW)
    for name, step in (("report", 17), ("runtime_data", 17), ("attest", 5), ("signature", 7)):
        data = unb64(body[name])
        for at in range(0, len(data), step):
            altered = bytearray(data)
            altered[at] ^= 0x80
            with pytest.raises(EvidenceError):
                azure.inspect(
                    Evidence(kind="az-snp-vtpm", body={**body, name: b64(bytes(altered))}), amd.NOW
                )


# Genuine evidence: a Milan VM in Azure that quoted 24 registers for the nonce "challenge".


def _genuine(folder: Path) -> tuple[bytes, dict[str, Any]]:
    raw = (folder / "az-snp-vtpm" / "az-snp-vtpm_evidence-v1.json").read_bytes()
    return raw, AzSnpVtpmVerifier.body_of(raw)


def test_the_genuine_vm_is_believed(evidence_folder: Path) -> None:
    raw, body = _genuine(evidence_folder)
    evidence = Evidence(kind="az-snp-vtpm", body=body)
    shown = AzSnpVtpmVerifier().inspect(evidence, GENUINE_TIME)
    assert shown.bound == b"challenge"
    measured = shown.claims.measurements
    pcrs = json.loads(raw)["tpm_quote"]["pcrs"]
    assert measured.pop("launch").startswith("sha384:6a063be9dd79f637")
    assert measured == {f"pcr{n}": f"sha256:{value}" for n, value in enumerate(pcrs)}
    assert len(pcrs) == 24
    properties = shown.claims.properties
    assert (properties["product"], properties["product_name"]) == ("Milan", "Milan-B0")
    assert properties["report_version"] == 3
    assert properties["cpuid"] == [0x19, 1, 1]
    reported = {"bootloader": 4, "tee": 0, "snp": 24, "microcode": 219}
    assert set(map(str, properties["tcb"].values())) == {str(reported)}
    assert properties["vm_configuration"]["secure-boot"] is True
    report = unb64(body["report"])
    assert report[0x50:0x70] == hashlib.sha256(unb64(body["runtime_data"])).digest()


def test_the_genuine_evidence_has_dates(evidence_folder: Path) -> None:
    _, body = _genuine(evidence_folder)
    evidence = Evidence(kind="az-snp-vtpm", body=body)
    for when, reason in (
        (datetime(2021, 1, 1, tzinfo=UTC), "SEV-VCEK is not yet valid"),
        (datetime(2039, 1, 1, tzinfo=UTC), "SEV-VCEK is no longer valid"),
    ):
        with pytest.raises(EvidenceError, match=reason):
            AzSnpVtpmVerifier().inspect(evidence, when)


def test_another_machines_vcek_is_refused(evidence_folder: Path) -> None:
    _, body = _genuine(evidence_folder)
    chain = (evidence_folder / "az-snp-vtpm" / "az-snp-vtpm_vcek.pem").read_bytes()
    other = [b64(der) for _, _, der in pem.unarmor(chain, multiple=True)][:1]
    assert other != body["certificates"]
    evidence = Evidence(kind="az-snp-vtpm", body={**body, "certificates": other})
    with pytest.raises(EvidenceError, match="not signed by the VCEK"):
        AzSnpVtpmVerifier().inspect(evidence, GENUINE_TIME)


def test_collateral_beside_the_evidence_adds_authorities_only(evidence_folder: Path) -> None:
    raw, body = _genuine(evidence_folder)
    chain = (evidence_folder / "az-snp-vtpm" / "az-snp-vtpm_vcek.pem").read_bytes()
    more = AzSnpVtpmVerifier.body_of(raw, chain)
    assert more["certificates"][0] == body["certificates"][0]
    assert len(more["certificates"]) == 3
    AzSnpVtpmVerifier().inspect(Evidence(kind="az-snp-vtpm", body=more), GENUINE_TIME)


def test_every_byte_of_the_genuine_evidence_counts(evidence_folder: Path) -> None:
    _, body = _genuine(evidence_folder)
    verifier = AzSnpVtpmVerifier()

    def refuse(altered: dict[str, Any]) -> None:
        with pytest.raises(EvidenceError):
            verifier.inspect(Evidence(kind="az-snp-vtpm", body=altered), GENUINE_TIME)

    for name in ("report", "runtime_data", "attest", "signature"):
        data = unb64(body[name])
        for at in range(len(data)):
            altered = bytearray(data)
            altered[at] ^= 0x01
            refuse({**body, name: b64(bytes(altered))})
    for number, value in body["registers"].items():
        for at in range(0, len(value), 2):
            flipped = f"{int(value[at : at + 2], 16) ^ 1:02x}"
            registers = {**body["registers"], number: value[:at] + flipped + value[at + 2 :]}
            refuse({**body, "registers": registers})
    vcek = unb64(body["certificates"][0])
    for at in range(len(vcek)):
        altered = bytearray(vcek)
        altered[at] ^= 0x01
        with pytest.raises(EvidenceError):
            endorse([bytes(altered)], "VCEK", GENUINE_TIME, AMD_ROOTS)


# Raw files


def test_every_byte_of_an_hcl_report_counts_or_is_looked_at(amd: Any) -> None:
    """The header is not signed: altered, it is refused, and nothing is taken from it."""
    vm = amd.AzureVm()
    raw = amd.make_hcl_report(vm.report(), vm.runtime_data())
    inner = split_hcl_report(raw)
    assert inner == (raw[32 : 32 + 1184], vm.runtime_data())
    carried = {*range(32, 32 + 1184), *range(1236, 1236 + len(vm.runtime_data()))}
    for at in range(len(raw)):
        altered = bytearray(raw)
        altered[at] ^= 0x01
        if at in carried:
            assert split_hcl_report(bytes(altered)) != inner
        else:
            with pytest.raises(EvidenceError):
                split_hcl_report(bytes(altered))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 3}, "another signature or version"),
        ({"request": 1}, "a header in another form"),
        ({"status": 1}, "a header in another form"),
        ({"type": 4}, "a report of other hardware"),
        ({"hash": 2}, "runtime data under another hash"),
        ({"length": 5000}, "runtime data of a wrong length"),
        ({"length": 0xFFFFFFFF}, "runtime data of a wrong length"),
        ({"length": 10}, "sizes that contradict each other"),
        ({"data_size": 10}, "sizes that contradict each other"),
    ],
)
def test_another_hcl_report_is_refused(amd: Any, change: dict[str, int], reason: str) -> None:
    vm = amd.AzureVm()
    with pytest.raises(EvidenceError, match=reason):
        split_hcl_report(amd.make_hcl_report(vm.report(), vm.runtime_data(), **change))


def test_versions_of_the_evidence_file(amd: Any, azure: AzSnpVtpmVerifier) -> None:
    vm = amd.AzureVm()
    newest = vm.trustee()
    hcl, quote = unb64url(newest["hcl_report"], "it"), newest["tpm_quote"]
    oldest = {
        "report": list(hcl),
        "vcek": pem.armor("CERTIFICATE", vm.guest.leaf()).decode(),
        "quote": {
            "message": list(bytes.fromhex(quote["message"])),
            "signature": list(bytes.fromhex(quote["signature"])),
            "pcrs": [list(bytes.fromhex(value)) for value in quote["pcrs"]],
        },
    }
    for fields in (newest, {**newest, "version": 2}, oldest):
        body = azure.body_of(json.dumps(fields).encode())
        claims = azure.inspect(Evidence(kind="az-snp-vtpm", body=body), amd.NOW).claims
        assert claims.measurements["pcr23"] == "sha256:" + "17" * 32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 3}, "found version 3"),
        ({"version": "1"}, "found version 1"),
        ({"hcl_report": "????"}, "does not decode"),
        ({"hcl_report": None}, "does not decode"),
        ({"hcl_report": "AAAA"}, "a wrong length"),
        ({"vcek": "AAAA"}, "certificate table is cut off"),
        ({"vcek": None}, "does not decode"),
        ({"tpm_quote": []}, "found version 1"),
        ({"tpm_quote": {"message": "00", "signature": "00", "pcrs": []}}, "without 24 registers"),
        ({"tpm_quote": {"message": "0", "signature": "00", "pcrs": [""] * 24}}, "another form"),
        ({"tpm_quote": {"message": "00", "signature": [256], "pcrs": [""] * 24}}, "another form"),
    ],
    ids=range(11),
)
def test_files_that_are_no_evidence(amd: Any, change: dict[str, Any], reason: str) -> None:
    fields = {**amd.AzureVm().trustee(), **change}
    with pytest.raises(InputError, match=reason):
        AzSnpVtpmVerifier.body_of(json.dumps(fields).encode())


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_files_that_are_no_json_object(raw: bytes) -> None:
    with pytest.raises(InputError):
        AzSnpVtpmVerifier.body_of(raw)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=2000))
def test_splitting_anything_raises_nothing_else(data: bytes) -> None:
    for raw in (data, b"HCLA\x01\0\0\0" + data):
        with pytest.raises(EvidenceError):
            split_hcl_report(raw)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "keys": _JSON
            | st.lists(
                st.fixed_dictionaries(
                    {"kid": st.just("HCLAkPub"), "kty": st.just("RSA"), "n": _JSON, "e": _JSON}
                ),
                max_size=2,
            ),
            "vm-configuration": _JSON,
            "user-data": _JSON,
        }
    )
)
def test_reading_any_runtime_data_raises_nothing_else(fields: dict[str, Any]) -> None:
    data = json.dumps(fields).encode()
    with pytest.raises(EvidenceError):
        RuntimeData.bound_by(hashlib.sha256(data).digest() + bytes(32), data)


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=40))
def test_url_safe_base64_has_one_spelling(data: bytes) -> None:
    padded = b64(data).replace("+", "-").replace("/", "_")
    assert unb64url(padded, "it") == unb64url(padded.rstrip("="), "it") == data


@pytest.mark.parametrize(
    "text", ["A", "AB", "A===", "AA=", "AAA==", "A A=", "AA+A", "AA/A", "é", 7]
)
def test_other_spellings_are_refused(text: object) -> None:
    with pytest.raises(EvidenceError, match="it does not decode"):
        unb64url(text, "it")
