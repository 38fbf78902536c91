from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.registry import VerifierSet
from cenacle.attestation.tpm import (
    QuoteFields,
    TpmPolicy,
    TpmVerifier,
    inspect_quote,
    judge_tpm,
    qualifying_data,
    quote_properties,
    quoted_measurements,
)
from cenacle.attestation.tpm_attester import TpmAttester, make_quote
from cenacle.attestation.tpm_credential import certify_key
from cenacle.attestation.tpm_device import ATTESTATION_KEY, TpmDevice
from cenacle.attestation.tpm_endorsement import certificate_digest, verify_endorsement
from cenacle.attestation.tpm_keys import ObjectAttributes
from cenacle.attestation.tpm_roots import VENDOR_ROOTS, vendor_roots
from cenacle.attestation.tpm_structures import PcrSelection
from cenacle.crypto import SigningKey
from cenacle.documents.base import b64, unb64
from cenacle.documents.clauses import all_met, failed
from cenacle.documents.dsse import Envelope
from cenacle.errors import CenacleError, EvidenceError
from tests.support.swtpm import LocalIssuer, Tpm

NOW = datetime(2027, 2, 1, 10, tzinfo=UTC)
REPORT = bytes(range(64))
SHA1, SHA256, SHA384 = 0x0004, 0x000B, 0x000C


def test_genuine_evidence(quoted: Any) -> None:
    claims = quoted.authenticate()
    assert (claims.kind, claims.protection) == ("tpm", "measured")
    assert set(claims.measurements) == {*(f"pcr{n}" for n in range(10)), "ek"}
    assert claims.measurements["pcr0"] == "sha256:" + "00" * 32
    assert claims.properties["ek_root"] == certificate_digest(quoted.tpm.manufacturer.root)
    assert claims.properties["software_tpm"] is True
    assert claims.properties["ek_vendor"] == ""
    assert claims.issued == quoted.now


def test_the_machine_is_a_measurement(quoted: Any) -> None:
    """So a contract names the machines that it accepts, and another one's evidence fails."""
    claims = quoted.authenticate()
    reference = {name: (value,) for name, value in claims.measurements.items()}
    quoted.verifier().verify(quoted.evidence, reference, REPORT, quoted.now)
    other = {**reference, "ek": ("sha256:" + "0" * 64,)}
    with pytest.raises(EvidenceError, match=r"other software than approved \(measurement ek\)"):
        quoted.verifier().verify(quoted.evidence, other, REPORT, quoted.now)
    without = {name: value for name, value in reference.items() if name != "ek"}
    with pytest.raises(EvidenceError, match="measurement ek"):
        quoted.verifier().verify(quoted.evidence, without, REPORT, quoted.now)


@pytest.mark.parametrize("report", [REPORT[::-1], bytes(64)])
def test_a_replayed_quote_is_refused(quoted: Any, report: bytes) -> None:
    with pytest.raises(EvidenceError, match="bound to another nonce"):
        quoted.verifier().authenticate(quoted.evidence, report, quoted.now)


def test_report_data_is_bound_by_its_hash(quoted: Any) -> None:
    shown = quoted.verifier().inspect(quoted.evidence, quoted.now)
    statement = quoted.verifier().statement(quoted.evidence)
    assert shown.bound == qualifying_data(statement.bind(REPORT))
    assert quoted.verifier().binding(REPORT) == qualifying_data(REPORT)


@pytest.mark.parametrize("name", ["key", "attest", "signature"])
def test_every_byte_counts(quoted: Any, name: str) -> None:
    raw = unb64(quoted.evidence.body["quote"][name])
    for at in range(len(raw)):
        for mask in (1, 0x80):
            wrong = raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :]
            with pytest.raises(EvidenceError):
                quoted.authenticate(quoted.altered(**{name: b64(wrong)}))
    for wrong in (b"", raw[:-1], raw + b"\x00"):
        with pytest.raises(EvidenceError):
            quoted.authenticate(quoted.altered(**{name: b64(wrong)}))


def test_every_register_counts(quoted: Any) -> None:
    registers = quoted.evidence.body["quote"]["registers"]
    for number in registers:
        changed = {**registers, number: "01" + registers[number][2:]}
        with pytest.raises(EvidenceError, match="not the ones that the TPM signed"):
            quoted.authenticate(quoted.altered(registers=changed))
        without = {n: value for n, value in registers.items() if n != number}
        with pytest.raises(EvidenceError, match="other registers are shown"):
            quoted.authenticate(quoted.altered(registers=without))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: {**r, "10": "00" * 32}, "other registers are shown"),
        (lambda r: {**r, "0": "00" * 48}, "wrong length for its bank"),
        (lambda r: {**r, "0": "00" * 19}, "malformed"),
        (lambda r: {**r, "00": "00" * 32}, "malformed"),
        (lambda r: {**r, "32": "00" * 32}, "malformed"),
        (lambda r: {**r, "0": "AA" * 32}, "malformed"),
        (lambda r: {}, "malformed"),
        (lambda r: None, "malformed"),
    ],
)
def test_registers_have_one_form(quoted: Any, change: Callable[[Any], Any], said: str) -> None:
    registers = change(quoted.evidence.body["quote"]["registers"])
    with pytest.raises(EvidenceError, match=said):
        quoted.authenticate(quoted.altered(registers=registers))


@pytest.mark.parametrize("quote", [None, 1, "quote", [], {}, {"key": "AA=="}])
def test_what_is_no_quote_is_refused(quoted: Any, quote: Any) -> None:
    with pytest.raises(EvidenceError, match="malformed"):
        quoted.authenticate(Evidence(kind="tpm", body={"quote": quote}))


def test_unknown_fields_are_refused(quoted: Any) -> None:
    body = {**quoted.evidence.body, "trust_me": True}
    with pytest.raises(EvidenceError, match="unknown fields; found trust_me"):
        quoted.authenticate(Evidence(kind="tpm", body=body))
    with pytest.raises(EvidenceError, match="extra: unknown field"):
        quoted.authenticate(quoted.altered(extra=1))


def test_the_agents_statement_counts_only_as_it_was_bound(quoted: Any) -> None:
    statement = quoted.evidence.body["statement"]
    for changed in (None, {**statement, "layers": ["seccomp"]}):
        body = {**quoted.evidence.body, "statement": changed}
        if changed is None:
            del body["statement"]
        with pytest.raises(EvidenceError, match="bound to another"):
            quoted.authenticate(Evidence(kind="tpm", body=body))


def test_an_agent_cannot_state_what_the_tpm_measures(tpm: Tpm, quoted: Any) -> None:
    issuer = LocalIssuer(tpm.manufacturer.root, now=quoted.now)
    attester = TpmAttester(tpm.tcti, issuer=issuer, authorities=tpm.authorities)
    evidence = attester.attest(REPORT, {"pcr0": "sha256:" + "0" * 64}, (), quoted.now)
    with pytest.raises(EvidenceError, match="only tpm hardware can take; found pcr0"):
        TpmVerifier([issuer.key.verify_key], issuer.roots).authenticate(
            evidence, REPORT, quoted.now
        )


# ------------------------------------------------------------------ certificates


def test_the_certificate_expires(quoted: Any) -> None:
    for shift in (timedelta(days=1, seconds=1), timedelta(days=-1)):
        with pytest.raises(EvidenceError, match="not valid now"):
            quoted.verifier().inspect(quoted.evidence, quoted.now + shift)


def test_a_certificate_of_another_broker_does_not_count(quoted: Any) -> None:
    verifier = quoted.verifier(SigningKey.generate().verify_key)
    with pytest.raises(EvidenceError, match="not by a trusted issuer"):
        verifier.authenticate(quoted.evidence, REPORT, quoted.now)
    with pytest.raises(EvidenceError, match="not by a trusted issuer"):
        TpmVerifier([], quoted.issuer.roots).authenticate(quoted.evidence, REPORT, quoted.now)


@pytest.mark.parametrize("roots", [None, ()])
def test_a_root_that_is_no_longer_trusted_voids_certificates(quoted: Any, roots: Any) -> None:
    verifier = TpmVerifier([quoted.issuer.key.verify_key], roots)
    with pytest.raises(EvidenceError, match="under a root that is not trusted"):
        verifier.authenticate(quoted.evidence, REPORT, quoted.now)


def test_the_pinned_roots_are_the_default() -> None:
    assert TpmVerifier([]).roots == vendor_roots()


def test_another_keys_certificate_does_not_count(
    quoted: Any, other_tpm: Tpm, opened: Callable[[Tpm], Any]
) -> None:
    """The evidence of one TPM under the certificate of another's key: a relay."""
    with opened(other_tpm) as device, device.attestation_key() as ak:
        chain = [*device.endorsement_key().certificates, *other_tpm.authorities]
        endorsement = verify_endorsement(chain, quoted.issuer.roots, quoted.now)
        certificate = certify_key(ak.public, endorsement, quoted.issuer.key, quoted.now)
        with pytest.raises(EvidenceError, match="another attestation key than was certified"):
            quoted.authenticate(quoted.altered(certificate=certificate.to_fields()))
        fields = make_quote(device, ak, certificate, PcrSelection(SHA256, (0,)), b"")
    for name in ("key", "attest", "signature"):
        with pytest.raises(EvidenceError):
            quoted.authenticate(quoted.altered(**{name: fields[name]}))
    with pytest.raises(EvidenceError):  # wholly the other's, but bound to nothing of ours
        quoted.authenticate(Evidence(kind="tpm", body={**quoted.evidence.body, "quote": fields}))


# ------------------------------------------------------------------ other keys, other structures


@pytest.fixture
def quote_with(tpm: Tpm, quoted: Any, device: TpmDevice) -> Callable[..., Any]:
    """A quote by a key of some template, certified by a careless issuer."""

    def make(
        selection: PcrSelection,
        hierarchy: str = "ENDORSEMENT",
        without: ObjectAttributes = ObjectAttributes(0),  # noqa: B008
        **changes: Any,
    ) -> Claims:
        template = replace(
            ATTESTATION_KEY, attributes=ATTESTATION_KEY.attributes & ~without, **changes
        )
        chain = [*device.endorsement_key().certificates, *tpm.authorities]
        endorsement = verify_endorsement(chain, quoted.issuer.roots, quoted.now)
        with device.primary(template, hierarchy) as ak:
            certificate = certify_key(ak.public, endorsement, quoted.issuer.key, quoted.now)
            fields = make_quote(device, ak, certificate, selection, qualifying_data(REPORT))
        evidence = Evidence(kind="tpm", body={"quote": fields})
        claims: Claims = quoted.authenticate(evidence)
        return claims

    return make


def test_other_banks_count_too(quote_with: Any) -> None:
    claims = quote_with(PcrSelection(SHA384, (0, 17)))
    assert claims.measurements["pcr17"] == "sha384:" + "ff" * 48


def test_sha1_registers_are_refused(quote_with: Any) -> None:
    with pytest.raises(EvidenceError, match="rests on SHA-1"):
        quote_with(PcrSelection(SHA1, (0,)))


def test_registers_that_any_program_resets_are_refused(quote_with: Any) -> None:
    for number in (16, 23):
        with pytest.raises(EvidenceError, match=f"any program can reset; found {number}"):
            quote_with(PcrSelection(SHA256, (0, number)))


def test_keys_that_sign_anything_are_refused(quote_with: Any) -> None:
    """Such a key would sign a forged quote that its owner wrote."""
    with pytest.raises(EvidenceError, match="other attributes than it needs"):
        quote_with(PcrSelection(SHA256, (0,)), without=ObjectAttributes.RESTRICTED)


def test_keys_of_another_hierarchy_are_refused(quote_with: Any) -> None:
    """A TPM falsifies counters and firmware for them, to hide which TPM it is."""
    with pytest.raises(EvidenceError, match="no primary key of the TPM's endorsement hierarchy"):
        quote_with(PcrSelection(SHA256, (0,)), "OWNER")


def test_a_certification_is_no_quote(tpm: Tpm, quoted: Any, device: TpmDevice) -> None:
    issuer = quoted.issuer
    chain = [*device.endorsement_key().certificates, *tpm.authorities]
    endorsement = verify_endorsement(chain, issuer.roots, quoted.now)
    scheme = importlib.import_module("tpm2_pytss").TPMT_SIG_SCHEME(scheme=0x0010)
    with device.attestation_key() as ak:
        certificate = certify_key(ak.public, endorsement, issuer.key, quoted.now)
        fields = make_quote(device, ak, certificate, PcrSelection(SHA256, (0,)), b"")
        made, signature = device.esapi.certify(
            ak.handle, ak.handle, qualifying_data(REPORT), scheme
        )
    fields |= {"attest": b64(bytes(made)), "signature": b64(signature.marshal())}
    with pytest.raises(EvidenceError, match="is no quote"):
        quoted.authenticate(Evidence(kind="tpm", body={"quote": fields}))


def test_two_banks_in_one_quote_are_refused(tpm: Tpm, quoted: Any, device: TpmDevice) -> None:
    issuer = quoted.issuer
    chain = [*device.endorsement_key().certificates, *tpm.authorities]
    endorsement = verify_endorsement(chain, issuer.roots, quoted.now)
    with device.attestation_key() as ak:
        certificate = certify_key(ak.public, endorsement, issuer.key, quoted.now)
        fields = make_quote(device, ak, certificate, PcrSelection(SHA256, (0,)), b"")
        made, signature = device.esapi.quote(ak.handle, "sha1:0+sha256:0", b"x")
    fields |= {"attest": b64(bytes(made)), "signature": b64(signature.marshal())}
    with pytest.raises(EvidenceError, match="other than one bank"):
        quoted.authenticate(Evidence(kind="tpm", body={"quote": fields}))


# ------------------------------------------------------------------ reuse and policy


def test_a_quote_can_be_inspected_by_itself(quoted: Any) -> None:
    """What the kind ``ima`` builds on."""
    state = inspect_quote(
        quoted.evidence.body["quote"],
        [quoted.issuer.key.verify_key],
        quoted.issuer.roots,
        quoted.now,
    )
    assert state.bank == "sha256"
    assert state.registers == dict.fromkeys(range(10), bytes(32))
    assert quoted_measurements(state)["ek"] == state.certificate.ek
    assert quote_properties(state)["reset_count"] == state.attest.clock_info.reset_count
    assert QuoteFields.from_fields(quoted.evidence.body["quote"])


VENDOR = VENDOR_ROOTS[0]


def _claims(quoted: Any, **properties: Any) -> Claims:
    claims = quoted.authenticate()
    genuine = {
        "ek_root": VENDOR.digest,
        "ek_vendor": VENDOR.vendor,
        "software_tpm": False,
        "manufacturer": "id:414D4400",
        "blank": False,
    }
    changed: Claims = claims.model_copy(
        update={"properties": {**claims.properties, **genuine, **properties}}
    )
    return changed


def test_a_vendors_tpm_meets_the_strictest_policy(quoted: Any) -> None:
    assert all_met(judge_tpm(_claims(quoted), TpmPolicy()))


@pytest.mark.parametrize(
    ("properties", "clause", "found"),
    [
        ({"ek_root": "sha256:" + "1" * 64, "ek_vendor": ""}, "TPM root", "no known vendor"),
        ({"ek_root": "sha256:" + "1" * 64}, "TPM root", "AMD"),
        ({"ek_vendor": "Infineon"}, "TPM root", "Infineon"),
        ({"software_tpm": True}, "TPM root", "a TPM in software"),
        ({"software_tpm": None}, "TPM root", "a TPM in software"),
        ({"blank": True}, "TPM registers", "all as the TPM starts"),
        ({"blank": None}, "TPM registers", "all as the TPM starts"),
    ],
)
def test_what_the_strictest_policy_refuses(
    quoted: Any, properties: dict[str, Any], clause: str, found: str
) -> None:
    [wrong] = failed(judge_tpm(_claims(quoted, **properties), TpmPolicy()))
    assert wrong.name == clause
    assert found in wrong.found


def test_a_software_tpm_counts_only_under_a_root_that_the_contract_names(quoted: Any) -> None:
    claims = _claims(quoted, **{**quoted.authenticate().properties, "blank": False})
    [wrong] = failed(judge_tpm(claims, TpmPolicy()))
    assert "no known vendor, a TPM in software" in wrong.found
    named = certificate_digest(quoted.tpm.manufacturer.root)
    assert all_met(judge_tpm(claims, TpmPolicy(roots=(named,))))
    assert not all_met(judge_tpm(claims, TpmPolicy(roots=("sha256:" + "0" * 64,))))


def test_firmware_versions_can_be_demanded(quoted: Any) -> None:
    claims = _claims(quoted)
    version = claims.properties["firmware"]
    assert all_met(judge_tpm(claims, TpmPolicy(firmware=(version,))))
    [wrong] = failed(judge_tpm(claims, TpmPolicy(firmware=("0" * 16,))))
    assert (wrong.name, wrong.found) == ("TPM firmware", version)


@pytest.mark.parametrize(
    "fields",
    [{"firmware": []}, {"firmware": ["1"]}, {"roots": ["x"]}, {"root": []}, {"roots": None}],
)
def test_a_policy_has_known_fields_only(fields: dict[str, Any]) -> None:
    with pytest.raises(CenacleError):
        TpmPolicy.from_fields(fields)


def test_a_production_broker_may_hold_the_verifier() -> None:
    assert VerifierSet.of_production(TpmVerifier([])).kinds == ("tpm",)


def test_evidence_of_a_tpm_in_software_is_simulated(quoted: Any) -> None:
    root, issuers = quoted.tpm.manufacturer.root, [quoted.issuer.key.verify_key]
    for verifier in (TpmVerifier(issuers, (), (root,)), TpmVerifier(issuers, (root,), (root,))):
        claims = verifier.authenticate(quoted.evidence, REPORT, quoted.now)
        assert claims.protection == "simulated"
        with pytest.raises(EvidenceError, match="production broker cannot hold a simulated"):
            VerifierSet.of_production(verifier)
    assert TpmVerifier(issuers, (), (root,)).endorsement_roots == (root,)
    with pytest.raises(EvidenceError, match="under a root that is not trusted"):
        TpmVerifier(issuers, None).authenticate(quoted.evidence, REPORT, quoted.now)


@settings(max_examples=40)
@given(st.data())
def test_hostile_fields_are_refused_with_a_reason(data: Any) -> None:
    junk: st.SearchStrategy[Any] = st.one_of(
        st.none(), st.integers(0, 9), st.text(max_size=8), st.just({}), st.just([])
    )
    names = ("certificate", "key", "attest", "signature", "registers", "quote")
    quote = {name: data.draw(junk) for name in names[: data.draw(st.integers(0, 6))]}
    body = {"quote": data.draw(st.one_of(junk, st.just(quote)))}
    with pytest.raises(EvidenceError):
        TpmVerifier([]).inspect(Evidence(kind="tpm", body=body), NOW)


def test_certificates_in_odd_forms_are_refused(quoted: Any) -> None:
    fields = quoted.evidence.body["quote"]["certificate"]
    for changed in ({**fields, "more": 1}, Envelope.from_fields(fields).payload.decode(), [fields]):
        with pytest.raises(EvidenceError):
            quoted.authenticate(quoted.altered(certificate=changed))
