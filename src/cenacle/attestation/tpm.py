"""TPM 2.0 evidence: a quote of the registers that the boot chain was measured into.

A quote is signed by an attestation key, which the issuer (a broker) certified after the TPM
proved that it holds both that key and an endorsement key that a vendor certified (see
:mod:`cenacle.attestation.tpm_credential`). So verification is pure: the certificate travels with
the quote.

What it proves: this machine's firmware and boot loader measured what the registers say, and
somebody with access to its TPM made the quote for this very report data. What the agent states
of itself is worth what the measured system lets run: where its administrator can start any
program, nothing. The kind ``ima`` adds which files the kernel ran.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Annotated, Any, Final, NamedTuple

from cryptography import x509
from pydantic import Field, StringConstraints

from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.registry import Shown, Verifier
from cenacle.attestation.tpm_credential import (
    AttestationKeyCertificate,
    check_attestation_key,
    open_certificate,
)
from cenacle.attestation.tpm_endorsement import certificate_digest, vendor_of
from cenacle.attestation.tpm_keys import Public, Signature
from cenacle.attestation.tpm_roots import vendor_roots
from cenacle.attestation.tpm_structures import (
    Attest,
    PcrSelection,
    QuoteInfo,
    digest_of,
    hash_name,
    hasher,
    pcr_composite,
)
from cenacle.crypto import VerifyKey
from cenacle.documents.base import Base64, Digest, Frozen, short, unb64
from cenacle.documents.clauses import Clause, check
from cenacle.documents.protection import Protection, protection_of
from cenacle.errors import CenacleError, EvidenceError

__all__ = [
    "RESETTABLE",
    "QuoteFields",
    "QuotedState",
    "TpmPolicy",
    "TpmVerifier",
    "inspect_quote",
    "judge_tpm",
    "qualifying_data",
    "quote_properties",
    "quoted_measurements",
]

RESETTABLE: Final = frozenset({16, 23})
"""Registers that any program may reset and extend as it likes (PC Client PTP, table 8)."""

_ENDORSEMENT: Final = (0x4000000B).to_bytes(4, "big")  # TPM_RH_ENDORSEMENT

_SOFTWARE: Final = frozenset({"id:00001014", "id:49424D00", "id:564D5700", "id:474F4F47"})
"""Manufacturers of TPMs in software: swtpm and IBM's, VMware's, Google's."""

_Register = Annotated[str, StringConstraints(pattern=r"^(?:[0-9]|[12][0-9]|3[01])$")]
_Hex = Annotated[str, StringConstraints(pattern=r"^(?:[0-9a-f]{2}){20,64}$")]


class QuoteFields(Frozen):
    """A quote as it stands in evidence, under ``quote``.

    Attributes:
        certificate: DSSE envelope of an
            :class:`~cenacle.attestation.tpm_credential.AttestationKeyCertificate`.
        key: the attestation key, TPMT_PUBLIC.
        attest: TPMS_ATTEST.
        signature: TPMT_SIGNATURE over ``attest``.
        registers: the quoted registers' values by number, hexadecimal.
    """

    certificate: dict[str, Any]
    key: Base64
    attest: Base64
    signature: Base64
    registers: Annotated[dict[_Register, _Hex], Field(min_length=1, max_length=32)]


class QuotedState(NamedTuple):
    """What an authenticated quote shows.

    Attributes:
        bank: ``sha256``, ``sha384`` or ``sha512``.
        registers: values by number, all of them signed for.
        bound: the qualifying data.
        attest: the rest: clock, counters of resets, version of the firmware.
        certificate: whose key signed, in which TPM.
    """

    bank: str
    registers: Mapping[int, bytes]
    bound: bytes
    attest: Attest
    certificate: AttestationKeyCertificate


def qualifying_data(report_data: bytes) -> bytes:
    """How a quote carries 64 bytes: as their SHA-256, since a TPM takes no more than a digest."""
    return sha256(report_data).digest()


def inspect_quote(
    fields: Any,
    issuers: Sequence[VerifyKey],
    roots: Sequence[x509.Certificate],
    now: datetime,
) -> QuotedState:
    """Authenticate a quote; says nothing about freshness, which is in ``bound``.

    Args:
        fields: of :class:`QuoteFields`.
        issuers: whose certificates of attestation keys count.
        roots: that the endorsement must have been judged by.

    Raises:
        EvidenceError: saying which check failed.
    """
    try:
        quote = QuoteFields.from_fields(fields)
        packed, signed, message = (
            unb64(part) for part in (quote.key, quote.signature, quote.attest)
        )
    except CenacleError as error:
        raise EvidenceError("a TPM quote is malformed", found=error.diagnostics()) from None
    certificate = open_certificate(quote.certificate, issuers, now)
    _check_root(certificate.root, roots)
    key = Public.parse(packed)
    if key.name.hex() != certificate.key_name:
        raise EvidenceError(
            "a TPM quote shows another attestation key than was certified",
            found=key.name.hex()[:16],
            expected=certificate.key_name[:16],
            remedy="send the certificate of the key that signs",
        )
    check_attestation_key(key)
    signature = Signature.parse(signed)
    key.verify(signature, message)
    attest = Attest.parse(message)
    if not isinstance(attest.attested, QuoteInfo):
        raise EvidenceError("a TPM attestation is no quote", expected="TPM2_Quote")
    _check_signer(key, attest)
    selection = _selection(attest.attested)
    registers = _registers(quote.registers, selection)
    found = pcr_composite(signature.hash, registers)
    if found != attest.attested.digest:
        raise EvidenceError(
            "the registers are not the ones that the TPM signed",
            found=found.hex()[:16],
            expected=attest.attested.digest.hex()[:16],
            remedy="make fresh evidence: a register changed meanwhile, or was altered",
        )
    return QuotedState(
        hash_name(selection.algorithm), registers, attest.extra_data, attest, certificate
    )


def _check_root(root: Digest, roots: Sequence[x509.Certificate]) -> None:
    trusted = [certificate_digest(certificate) for certificate in roots]
    if root not in trusted:
        raise EvidenceError(
            "the TPM was endorsed under a root that is not trusted here",
            found=short(root),
            expected=" or ".join(short(digest) for digest in trusted) or "no root is trusted",
            remedy="have the attestation key certified again, under a trusted root",
        )


def _check_signer(key: Public, attest: Attest) -> None:
    """A TPM hides its counters and firmware from keys of other hierarchies (Part 1, 36.7)."""
    qualified = digest_of(key.name_alg, _ENDORSEMENT + key.name)
    if attest.qualified_signer != key.name_alg.to_bytes(2, "big") + qualified:
        raise EvidenceError(
            "the attestation key is no primary key of the TPM's endorsement hierarchy",
            found=attest.qualified_signer.hex()[:20],
            expected=qualified.hex()[:16],
            remedy="quote with the key that cenacle makes",
        )


def _selection(quoted: QuoteInfo) -> PcrSelection:
    chosen = [selection for selection in quoted.selections if selection.registers]
    if len(chosen) != 1 or len(quoted.selections) != 1:
        raise EvidenceError(
            "a TPM quote covers other than one bank of registers",
            found=f"{len(chosen)} of {len(quoted.selections)}",
            expected="registers of one bank",
        )
    hasher(chosen[0].algorithm)
    if loose := sorted(RESETTABLE & set(chosen[0].registers)):
        raise EvidenceError(
            "a TPM quote covers registers that any program can reset",
            found=", ".join(map(str, loose)),
            expected="registers 0 to 15 and 17 to 22",
        )
    return chosen[0]


def _registers(given: Mapping[str, str], selection: PcrSelection) -> dict[int, bytes]:
    values = {int(number): bytes.fromhex(value) for number, value in given.items()}
    if sorted(values) != list(selection.registers):
        raise EvidenceError(
            "other registers are shown than the TPM signed",
            found=", ".join(map(str, sorted(values))),
            expected=", ".join(map(str, selection.registers)),
        )
    size = hasher(selection.algorithm).digest_size
    if any(len(value) != size for value in values.values()):
        raise EvidenceError(
            "a register has a wrong length for its bank", expected=f"{size} bytes each"
        )
    return values


def quote_properties(state: QuotedState) -> dict[str, Any]:
    """What a quote says beside its registers, as properties of claims.

    ``ek_vendor`` is the vendor whose pinned root endorsed the TPM, empty for any other root;
    ``software_tpm`` is what the endorsement itself says, so it is true for certain and false by
    the root's word alone. ``blank``: nothing was ever measured into any quoted register. Numbers of
    64 bits are text.
    """
    certificate, attest = state.certificate, state.attest
    return {
        "ek_root": certificate.root,
        "ek_vendor": vendor_of(certificate.root) or "",
        "manufacturer": certificate.manufacturer,
        "model": certificate.model,
        "tpm_version": certificate.tpm_version,
        "software_tpm": certificate.manufacturer.upper().replace("ID:", "id:") in _SOFTWARE,
        "firmware": f"{attest.firmware_version:016x}",
        "clock_ms": str(attest.clock_info.clock),
        "clock_safe": attest.clock_info.safe,
        "blank": all(
            set(value) <= {0} or set(value) == {0xFF} for value in state.registers.values()
        ),
        "reset_count": attest.clock_info.reset_count,
        "restart_count": attest.clock_info.restart_count,
        "key_name": certificate.key_name,
        "key_expires": certificate.expires,
    }


class TpmVerifier(Verifier):
    """Checks quotes by attestation keys that ``issuers`` certified.

    Measurements are the quoted registers (``pcr0`` ... ``pcr22``) and ``ek``, the digest of the
    endorsement key: a contract names the machines it accepts, since any machine with a genuine
    TPM that is in an attacker's hands can show any registers.

    Args:
        issuers: public keys of the brokers whose certificates count; usually this one's alone.
        roots: certificates of TPM vendors; the pinned ones unless given.
        software_roots: those of TPMs in software. Whoever has root on their host can make one
            say anything, so evidence under them is simulated, and a verifier with any is not
            for production.
    """

    kind = "tpm"

    def __init__(
        self,
        issuers: Sequence[VerifyKey],
        roots: Sequence[x509.Certificate] | None = None,
        software_roots: Sequence[x509.Certificate] = (),
    ) -> None:
        self.issuers = tuple(issuers)
        self.roots = vendor_roots() if roots is None else tuple(roots)
        self.software_roots = tuple(software_roots)

    @property
    def protection(self) -> Protection:
        return "simulated" if self.software_roots else super().protection

    @property
    def endorsement_roots(self) -> tuple[x509.Certificate, ...]:
        """Every root that a TPM may be endorsed under."""
        return (*self.roots, *self.software_roots)

    def binding(self, report_data: bytes) -> bytes:
        return qualifying_data(report_data)

    def inspect(self, evidence: Evidence, now: datetime) -> Shown:
        unknown = sorted(set(evidence.body) - {"quote", "statement"})
        if unknown:
            raise EvidenceError(
                "TPM evidence has unknown fields",
                found=", ".join(unknown)[:80],
                expected="quote and statement",
            )
        state = inspect_quote(evidence.body.get("quote"), self.issuers, self.endorsement_roots, now)
        software = {certificate_digest(root) for root in self.software_roots}
        simulated = state.certificate.root in software
        claims = Claims(
            kind=self.kind,
            protection="simulated" if simulated else protection_of(self.kind),
            measurements=quoted_measurements(state),
            properties=quote_properties(state),
            layers=(),
            issued=now,
        )
        return Shown(claims, state.bound)


def quoted_measurements(state: QuotedState) -> dict[str, str]:
    """``pcrN`` for every quoted register, and ``ek`` for the TPM."""
    registers = {f"pcr{n}": f"{state.bank}:{value.hex()}" for n, value in state.registers.items()}
    return {**registers, "ek": state.certificate.ek}


class TpmPolicy(Frozen):
    """What a contract demands of a TPM beside its registers and its identity.

    Attributes:
        roots: roots that count beside the vendors' pinned ones, by the SHA-256 of their DER
            form. A software TPM has no vendor's root, so this is where it is allowed by name.
        firmware: firmware versions that count, 16 hexadecimal digits each; absent: any.
    """

    roots: tuple[Digest, ...] = ()
    firmware: (
        Annotated[
            tuple[Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")], ...],
            Field(min_length=1),
        ]
        | None
    ) = None


def judge_tpm(claims: Claims, policy: TpmPolicy) -> list[Clause]:
    """The policy's clauses for claims of a quote (of the kinds ``tpm`` and ``ima``)."""
    found = claims.properties
    root, vendor = str(found.get("ek_root", "")), str(found.get("ek_vendor", ""))
    genuine = bool(vendor) and vendor == (vendor_of(root) or "")
    shown = f"{short(root)} of {vendor or 'no known vendor'}"
    if found.get("software_tpm") is not False:
        shown += ", a TPM in software"
        genuine = False
    named = " or ".join(short(digest) for digest in policy.roots)
    clauses = [
        check(
            "contract",
            "TPM root",
            genuine or root in policy.roots,
            shown,
            f"a vendor's pinned root{f', or {named}' if named else ''}",
            "run on a machine with a TPM of a known vendor, or name the root in "
            f"enclave.policy.{claims.kind}.roots of a new contract",
        ),
        check(
            "contract",
            "TPM registers",
            found.get("blank") is False,
            "all as the TPM starts" if found.get("blank") is not False else "measured into",
            "at least one that something was measured into",
            "quote registers that this machine's firmware or boot loader extends",
        ),
    ]
    if policy.firmware is not None:
        version = str(found.get("firmware", ""))
        clauses.append(
            check(
                "contract",
                "TPM firmware",
                version in policy.firmware,
                version,
                " or ".join(policy.firmware),
                "update the TPM's firmware, or name its version in a new contract",
            )
        )
    return clauses
