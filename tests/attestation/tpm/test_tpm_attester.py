from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from cenacle.attestation.attesters import attester_kinds
from cenacle.attestation.registry import Attester
from cenacle.attestation.tpm import TpmVerifier, qualifying_data
from cenacle.attestation.tpm_attester import (
    BOOT_REGISTERS,
    TpmAttester,
    certify_attestation_key,
    make_quote,
)
from cenacle.attestation.tpm_credential import (
    AttestationKeyAnswer,
    AttestationKeyChallenge,
    AttestationKeyRequest,
)
from cenacle.attestation.tpm_device import ATTESTATION_KEY, TpmDevice
from cenacle.attestation.tpm_keys import ObjectAttributes
from cenacle.attestation.tpm_structures import PcrSelection
from cenacle.documents.base import b64, unb64
from cenacle.documents.dsse import Envelope
from cenacle.errors import EvidenceError, InputError, UnavailableError
from tests.support.swtpm import LocalIssuer, Tpm

REPORT = bytes(range(64))
SHA256 = 0x000B
BOOT = PcrSelection(SHA256, BOOT_REGISTERS)


@pytest.fixture
def issuer(tpm: Tpm, quoted: Any) -> LocalIssuer:
    return LocalIssuer(tpm.manufacturer.root, now=quoted.now)


@pytest.fixture
def attester(tpm: Tpm, issuer: LocalIssuer) -> TpmAttester:
    return TpmAttester(tpm.tcti, issuer=issuer, authorities=tpm.authorities)


def verifier(issuer: LocalIssuer) -> TpmVerifier:
    return TpmVerifier([issuer.key.verify_key], issuer.roots)


def test_a_changed_register_changes_the_measurement(
    tpm: Tpm, attester: TpmAttester, issuer: LocalIssuer, opened: Callable[[Tpm], Any]
) -> None:
    before = verifier(issuer).authenticate(
        attester.attest(REPORT, {}, (), issuer.now), REPORT, issuer.now
    )
    with opened(tpm) as device:
        device.extend(4, SHA256, b"\x07" * 32)
    evidence = attester.attest(REPORT, {}, (), issuer.now)
    after = verifier(issuer).authenticate(evidence, REPORT, issuer.now)
    changed = {n for n in before.measurements if before.measurements[n] != after.measurements[n]}
    assert changed == {"pcr4"}
    assert before.properties["blank"] is True
    assert after.properties["blank"] is False
    reference = {name: (value,) for name, value in before.measurements.items()}
    with pytest.raises(EvidenceError, match=r"other software than approved \(measurement pcr4\)"):
        verifier(issuer).verify(evidence, reference, REPORT, issuer.now)


def test_the_same_tpm_makes_the_same_key_and_keeps_its_certificate(
    tpm: Tpm, attester: TpmAttester, issuer: LocalIssuer
) -> None:
    attester.attest(REPORT, {}, (), issuer.now)
    kept = attester.certificate
    later = TpmAttester(tpm.tcti, certificate=kept)
    evidence = later.attest(REPORT, {}, (), issuer.now)
    verifier(issuer).authenticate(evidence, REPORT, issuer.now)
    assert later.certificate is kept


def _forget(device: TpmDevice, index: int) -> None:
    """Remove the vendor's certificate, as the machine's owner can."""
    tss = importlib.import_module("tpm2_pytss")
    handle = device.esapi.tr_from_tpmpublic(index)
    device.esapi.nv_undefine_space(handle, tss.ESYS_TR.PLATFORM)


def _evict(device: TpmDevice, index: int) -> None:
    """Remove the key that the vendor left loaded, so that it has to be made anew."""
    tss = importlib.import_module("tpm2_pytss")
    handle = device.esapi.tr_from_tpmpublic(index)
    device.esapi.evict_control(tss.ESYS_TR.OWNER, handle, index)


@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize("certificate", [0x01C00002, 0x01C00016])
def test_rsa_and_elliptic_endorsement_keys_serve(
    tpm: Tpm, attester: TpmAttester, issuer: LocalIssuer, certificate: int, evicted: bool
) -> None:
    """RSA-2048 with SHA-256 (template L-1), and P-384 with SHA-384 (H-3)."""
    other = {0x01C00002: 0x01C00016, 0x01C00016: 0x01C00002}[certificate]
    with TpmDevice(tpm.tcti) as device:
        _forget(device, other)
        if evicted:
            _evict(device, {0x01C00002: 0x81010001, 0x01C00016: 0x81010016}[certificate])
    evidence = attester.attest(REPORT, {}, (), issuer.now)
    verifier(issuer).authenticate(evidence, REPORT, issuer.now)


def test_authorities_that_the_tpm_holds_need_not_be_given(tpm: Tpm, issuer: LocalIssuer) -> None:
    tss, index, data = importlib.import_module("tpm2_pytss"), 0x01C00100, tpm.authorities[0]
    rights = tss.TPMA_NV.OWNERWRITE | tss.TPMA_NV.OWNERREAD | tss.TPMA_NV.AUTHREAD
    public = tss.TPM2B_NV_PUBLIC(
        nvPublic=tss.TPMS_NV_PUBLIC(
            nvIndex=index,
            nameAlg=tss.TPM2_ALG.SHA256,
            attributes=rights,
            dataSize=len(data) + 7,  # padded, as vendors do
        )
    )
    with TpmDevice(tpm.tcti) as device:
        handle = device.esapi.nv_define_space(None, public)
        for start in range(0, len(data), 512):
            device.esapi.nv_write(
                handle, data[start : start + 512], start, auth_handle=tss.ESYS_TR.OWNER
            )
    evidence = TpmAttester(tpm.tcti, issuer=issuer).attest(REPORT, {}, (), issuer.now)
    verifier(issuer).authenticate(evidence, REPORT, issuer.now)


def test_a_tpm_without_an_endorsement_certificate_is_told(
    tpm: Tpm, attester: TpmAttester, issuer: LocalIssuer
) -> None:
    with TpmDevice(tpm.tcti) as device:
        for index in (0x01C00002, 0x01C00016):
            _forget(device, index)
    with pytest.raises(UnavailableError, match="holds no endorsement certificate"):
        attester.attest(REPORT, {}, (), issuer.now)


def test_a_certificate_is_renewed_before_it_expires(
    attester: TpmAttester, issuer: LocalIssuer
) -> None:
    attester.attest(REPORT, {}, (), issuer.now)
    first = attester.certificate
    issuer.now += timedelta(hours=23, minutes=55)
    verifier(issuer).authenticate(attester.attest(REPORT, {}, (), issuer.now), REPORT, issuer.now)
    assert attester.certificate != first


def test_without_an_issuer_a_certificate_is_needed(tpm: Tpm, quoted: Any) -> None:
    with pytest.raises(UnavailableError, match="no valid certificate"):
        TpmAttester(tpm.tcti).attest(REPORT, {}, (), quoted.now)


def test_another_tpms_certificate_is_of_no_use(
    tpm: Tpm, other_tpm: Tpm, attester: TpmAttester, issuer: LocalIssuer
) -> None:
    attester.attest(REPORT, {}, (), issuer.now)
    with pytest.raises(UnavailableError, match="one of another key"):
        TpmAttester(other_tpm.tcti, certificate=attester.certificate).attest(
            REPORT, {}, (), issuer.now
        )


def test_slots_are_freed(attester: TpmAttester, issuer: LocalIssuer) -> None:
    """A TPM has three: a fourth attestation would fail if one were left occupied."""
    for _ in range(5):
        attester.certificate = None
        attester.attest(REPORT, {}, (), issuer.now)


def test_slots_are_freed_after_a_refusal(tpm: Tpm, quoted: Any) -> None:
    stranger = LocalIssuer(now=quoted.now)  # trusts no root
    refused = TpmAttester(tpm.tcti, issuer=stranger, authorities=tpm.authorities)
    for _ in range(4):
        with pytest.raises(EvidenceError, match="does not lead to a trusted root"):
            refused.attest(REPORT, {}, (), quoted.now)


@pytest.mark.parametrize("registers", [(), (16,), (23,), (24,), (-1,), (0, 99)])
def test_registers_that_prove_nothing_are_not_quoted(registers: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="cannot vouch with these registers"):
        TpmAttester("swtpm:path=/nowhere", registers)


def test_a_weak_bank_is_not_quoted() -> None:
    with pytest.raises(InputError, match="of sha1; expected"):
        TpmAttester("swtpm:path=/nowhere", bank="sha1")


def test_a_bank_that_is_off_is_named(tpm: Tpm, attester: TpmAttester, issuer: LocalIssuer) -> None:
    other = TpmAttester(tpm.tcti, bank="sha512", issuer=issuer, authorities=tpm.authorities)
    with pytest.raises(UnavailableError, match="does not have these registers"):
        other.attest(REPORT, {}, (), issuer.now)


@pytest.mark.parametrize("tcti", ["swtpm:path=/nowhere/tpm", "nonsense:", "device:/dev/null/tpm"])
def test_a_tpm_that_is_not_there(tcti: str) -> None:
    with pytest.raises(UnavailableError, match="does not let this process open it"):
        TpmDevice(tcti)


def test_without_the_library_one_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tpm2_pytss", None)
    with pytest.raises(UnavailableError, match=r"pip install 'cenacle\[tpm\]'"):
        TpmDevice("swtpm:path=/nowhere")


class Moving(TpmDevice):
    """A TPM whose kernel extends a register after each of the first quotes."""

    left = 3

    def quote(self, ak: Any, selection: PcrSelection, data: bytes) -> tuple[bytes, bytes]:
        made = super().quote(ak, selection, data)
        if self.left:
            self.left -= 1
            self.extend(selection.registers[0], SHA256, b"\x01" * 32)
        return made


def test_registers_that_change_meanwhile_are_quoted_again(tpm: Tpm, issuer: LocalIssuer) -> None:
    with Moving(tpm.tcti) as device, device.attestation_key() as ak:
        certificate = certify_attestation_key(device, ak, issuer, tpm.authorities)
        fields = make_quote(device, ak, certificate, BOOT, qualifying_data(REPORT))
        assert device.left == 0
        device.left = 99
        with pytest.raises(UnavailableError, match="keep changing"):
            make_quote(device, ak, certificate, BOOT, qualifying_data(REPORT))
    assert fields["registers"]["0"] != "00" * 32


def test_it_is_an_attester() -> None:
    assert issubclass(TpmAttester, Attester)
    assert TpmAttester.kind == "tpm"
    assert "simulated" in attester_kinds()


# ------------------------------------------------------------------ attacks on certification


class Between:
    """Someone between a host and the issuer, with a TPM of his own."""

    def __init__(self, issuer: LocalIssuer, **changes: Any) -> None:
        self.issuer = issuer
        self.changes = changes

    def challenge_attestation_key(self, request: AttestationKeyRequest) -> AttestationKeyChallenge:
        return self.issuer.challenge_attestation_key(request.model_copy(update=self.changes))

    def certify_attestation_key(self, answer: AttestationKeyAnswer) -> Envelope:
        request = answer.request.model_copy(update=self.changes)
        return self.issuer.certify_attestation_key(answer.model_copy(update={"request": request}))


@pytest.fixture
def other_request(other_tpm: Tpm, issuer: LocalIssuer, opened: Callable[[Tpm], Any]) -> Any:
    """What the other TPM's host would send."""
    with opened(other_tpm) as device, device.attestation_key() as ak:
        endorsement = device.endorsement_key()
        with device.load_endorsement_key(endorsement) as ek:
            return AttestationKeyRequest(
                certificates=tuple(
                    b64(der) for der in (*endorsement.certificates, *other_tpm.authorities)
                ),
                endorsement_key=b64(ek.public.pack()),
                attestation_key=b64(ak.public.pack()),
            )


@pytest.mark.parametrize(
    "replaced",
    [
        ("attestation_key",),  # a genuine TPM vouches for a key that it does not hold
        ("certificates", "endorsement_key"),  # our key under another TPM's name
        ("certificates", "endorsement_key", "attestation_key"),
    ],
)
def test_a_tpm_certifies_no_key_of_another(
    tpm: Tpm, issuer: LocalIssuer, other_request: Any, replaced: tuple[str, ...]
) -> None:
    changes = {name: getattr(other_request, name) for name in replaced}
    between = Between(issuer, **changes)
    unsolved = pytest.raises(UnavailableError, match="does not let this process activate")
    with TpmDevice(tpm.tcti) as device, device.attestation_key() as ak, unsolved:
        certify_attestation_key(device, ak, between, tpm.authorities)


@pytest.mark.parametrize("replaced", ["certificates", "endorsement_key"])
def test_an_endorsement_is_for_its_own_key(
    tpm: Tpm, issuer: LocalIssuer, other_request: Any, replaced: str
) -> None:
    changes = {replaced: getattr(other_request, replaced)}
    refused = pytest.raises(EvidenceError, match="is for another key than the one shown")
    with TpmDevice(tpm.tcti) as device, device.attestation_key() as ak, refused:
        certify_attestation_key(device, ak, Between(issuer, **changes), tpm.authorities)


@pytest.mark.parametrize(
    "missing", ["RESTRICTED", "FIXED_TPM", "FIXED_PARENT", "SENSITIVE_DATA_ORIGIN"]
)
def test_a_key_that_only_claims_to_be_in_the_tpm_is_not_certified(
    tpm: Tpm, issuer: LocalIssuer, device: TpmDevice, missing: str
) -> None:
    """Attributes are part of the Name, so a TPM that lacks one cannot hide that."""
    attribute = getattr(ObjectAttributes, missing)
    with device.attestation_key() as ak:
        loose = replace(ak.public, attributes=ak.public.attributes & ~attribute)
        with pytest.raises(EvidenceError, match="other attributes than it needs"):
            certify_attestation_key(
                device, ak, Between(issuer, attestation_key=b64(loose.pack())), tpm.authorities
            )


def test_a_real_unrestricted_key_is_not_certified(
    tpm: Tpm, issuer: LocalIssuer, device: TpmDevice
) -> None:
    loose = replace(
        ATTESTATION_KEY, attributes=ATTESTATION_KEY.attributes & ~ObjectAttributes.RESTRICTED
    )
    with device.primary(loose) as ak:
        with pytest.raises(EvidenceError, match="without restricted"):
            certify_attestation_key(device, ak, issuer, tpm.authorities)
        # Nor if it says in the request that it were restricted: its Name is another.
        claimed = replace(ak.public, attributes=ATTESTATION_KEY.attributes)
        with pytest.raises(UnavailableError, match="does not let this process activate"):
            certify_attestation_key(
                device, ak, Between(issuer, attestation_key=b64(claimed.pack())), tpm.authorities
            )


def test_a_guessed_secret_is_refused(tpm: Tpm, issuer: LocalIssuer, device: TpmDevice) -> None:
    class Guessing(Between):
        def certify_attestation_key(self, answer: AttestationKeyAnswer) -> Envelope:
            guess = bytes([unb64(answer.secret)[0] ^ 1]) + unb64(answer.secret)[1:]
            return self.issuer.certify_attestation_key(
                answer.model_copy(update={"secret": b64(guess)})
            )

    with device.attestation_key() as ak, pytest.raises(EvidenceError, match="was not solved"):
        certify_attestation_key(device, ak, Guessing(issuer), tpm.authorities)
