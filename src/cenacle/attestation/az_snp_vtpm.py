"""Azure confidential VMs on SEV-SNP: the paravisor's TPM, vouched for by the hardware's report.

The chain is AMD's root, VCEK, SNP report at VMPL 0, its REPORT_DATA, the paravisor's runtime
data, the vTPM's attestation key in it, a quote by that key, and the registers that it signs.

The body holds ``report``, ``certificates`` and perhaps ``crl`` as for ``snp``, then
``runtime_data`` (the JSON's bytes), ``attest`` (TPMS_ATTEST), ``signature`` (TPMT_SIGNATURE) and
``registers`` (values by number, hexadecimal). The quote carries the SHA-256 of the report data.
Measurements are ``launch`` (the paravisor and firmware that Azure launched) and ``pcrN``.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final

from pydantic import Field, StringConstraints

from cenacle.attestation.amd_roots import AMD_ROOTS, ProductRoots
from cenacle.attestation.az_hcl_report import RuntimeData, split_hcl_report, unb64url
from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.registry import Shown, Verifier
from cenacle.attestation.snp import (
    SnpCollateral,
    authenticate_report,
    collateral_of,
    launch_measurements,
    refuse_debug,
    report_properties,
)
from cenacle.attestation.snp_report import SnpReport
from cenacle.attestation.tpm import qualifying_data
from cenacle.attestation.tpm_keys import Signature
from cenacle.attestation.tpm_structures import (
    Attest,
    PcrSelection,
    QuoteInfo,
    hash_name,
    hasher,
    pcr_composite,
)
from cenacle.documents.base import Base64, JsonObject, b64, parse_json, unb64
from cenacle.errors import CenacleError, EvidenceError, InputError

__all__ = ["AzSnpVtpmVerifier"]

_KIND: Final = "az-snp-vtpm"
_RSASSA, _SHA256 = 0x0014, 0x000B

_Register = Annotated[str, StringConstraints(pattern=r"^(?:[0-9]|1[0-9]|2[0-3])$")]
_Hex = Annotated[str, StringConstraints(pattern=r"^(?:[0-9a-f]{2}){32,64}$")]


class _Body(SnpCollateral):
    report: Base64
    runtime_data: Base64
    attest: Base64
    signature: Base64
    registers: Annotated[dict[_Register, _Hex], Field(min_length=1)]
    statement: JsonObject | None = None


class AzSnpVtpmVerifier(Verifier):
    """Checks the chain from AMD's root to the registers; refuses VMs that may be debugged.

    Args:
        roots: trusted certificates by product line; AMD's own unless a test says otherwise.
    """

    kind = _KIND

    def __init__(self, roots: Mapping[str, ProductRoots] = AMD_ROOTS) -> None:
        self._roots = roots

    def binding(self, report_data: bytes) -> bytes:
        return qualifying_data(report_data)

    def inspect(self, evidence: Evidence, now: datetime) -> Shown:
        if evidence.kind != _KIND:
            raise EvidenceError("evidence is of another kind", found=evidence.kind, expected=_KIND)
        try:
            body = _Body.from_fields(evidence.body)
        except CenacleError as error:
            raise EvidenceError(
                f"{_KIND} evidence is malformed", found=error.diagnostics()
            ) from None
        report, endorsement = authenticate_report(unb64(body.report), body, now, self._roots)
        _check_paravisor(report)
        runtime = RuntimeData.bound_by(report.report_data, unb64(body.runtime_data))
        attest, bank, registers = _quoted(body, runtime)
        refuse_debug(report)
        clock = attest.clock_info
        claims = Claims(
            kind=_KIND,
            protection=self.protection,
            measurements={
                **launch_measurements(report),
                **{f"pcr{n}": f"{bank}:{value.hex()}" for n, value in registers.items()},
            },
            properties={
                **report_properties(report, endorsement),
                "vm_configuration": runtime.vm_configuration,
                "user_data": runtime.user_data.hex(),
                "tpm": {
                    "firmware": f"{attest.firmware_version:016x}",
                    "clock_ms": str(clock.clock),
                    "clock_safe": clock.safe,
                    "reset_count": clock.reset_count,
                    "restart_count": clock.restart_count,
                },
            },
            layers=(),
            issued=now,
        )
        return Shown(claims, attest.extra_data)

    @classmethod
    def body_of(cls, raw: bytes, collateral: bytes | None = None) -> dict[str, Any]:
        """From the evidence that the Confidential Containers project makes (JSON, version 0 to 2).

        Args:
            collateral: certificates beside the one in the evidence, as for ``snp``.
        """
        try:
            return _from_trustee(parse_json(raw), collateral)
        except CenacleError as error:
            raise InputError(
                error.what, found=error.found, expected=error.expected, remedy=error.remedy
            ) from None


def _check_paravisor(report: SnpReport) -> None:
    # Whatever runs above the paravisor can have any REPORT_DATA signed, but only for its own VMPL.
    if report.vmpl != 0:
        raise EvidenceError(
            "the SNP report was not asked for by the paravisor",
            found=f"VMPL {report.vmpl}",
            expected="VMPL 0",
            remedy="read the report from the vTPM",
        )


def _quoted(body: _Body, runtime: RuntimeData) -> tuple[Attest, str, dict[int, bytes]]:
    """The quote, its bank's name, and its registers by number, all signed by the vTPM."""
    message = unb64(body.attest)
    signature = Signature.parse(unb64(body.signature))
    signature.verify(runtime.attestation_key, message)
    attest = Attest.parse(message)
    if not isinstance(attest.attested, QuoteInfo):
        raise EvidenceError("a TPM attestation is no quote", expected="TPM2_Quote")
    selection = _selection(attest.attested)
    registers = {int(number): bytes.fromhex(value) for number, value in body.registers.items()}
    size = hasher(selection.algorithm).digest_size
    if sorted(registers) != list(selection.registers) or any(
        len(value) != size for value in registers.values()
    ):
        raise EvidenceError(
            "other registers are shown than the vTPM signed",
            found=", ".join(map(str, sorted(registers))),
            expected=f"{', '.join(map(str, selection.registers))} of {size} bytes each",
        )
    found = pcr_composite(signature.hash, registers)
    if found != attest.attested.digest:
        raise EvidenceError(
            "the registers are not the ones that the vTPM signed",
            found=found.hex()[:16],
            expected=attest.attested.digest.hex()[:16],
            remedy="make fresh evidence: a register changed meanwhile, or was altered",
        )
    return attest, hash_name(selection.algorithm), dict(sorted(registers.items()))


def _selection(quoted: QuoteInfo) -> PcrSelection:
    if len(quoted.selections) != 1 or not quoted.selections[0].registers:
        raise EvidenceError(
            "a TPM quote covers other than one bank of registers",
            found=len(quoted.selections),
            expected="registers of one bank",
        )
    return quoted.selections[0]


def _from_trustee(fields: Any, collateral: bytes | None) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise _unknown("no JSON object")
    version = fields.get("version", 0)
    names = ("report", "quote") if version == 0 else ("hcl_report", "tpm_quote")
    quote = fields.get(names[1])
    if version not in (0, 1, 2) or not isinstance(quote, dict):
        raise _unknown(f"version {version}")
    hcl, vcek = fields.get(names[0]), fields.get("vcek")
    report, runtime_data = split_hcl_report(
        _octets(hcl) if version == 0 else unb64url(hcl, "the HCL report")
    )
    if version == 0:
        own = vcek.encode("ascii", "replace") if isinstance(vcek, str) else b""
    else:
        own = unb64url(vcek, "the VCEK")
    sources = [own] if collateral is None else [own, collateral]
    values = quote.get("pcrs")
    if not isinstance(values, list) or len(values) != 24:
        raise _unknown("a quote without 24 registers")
    signature = Signature(_RSASSA, _SHA256, _octets(quote.get("signature")))
    return {
        "report": b64(report),
        "runtime_data": b64(runtime_data),
        "attest": b64(_octets(quote.get("message"))),
        "signature": b64(signature.pack()),
        "registers": {str(n): _octets(value).hex() for n, value in enumerate(values)},
        **collateral_of(SnpReport.parse(report), *sources).to_fields(),
    }


def _octets(value: Any) -> bytes:
    """Bytes as this format spells them: a list of numbers (version 0), or hexadecimal."""
    try:
        if isinstance(value, list) and len(value) <= 1 << 16:
            return bytes(value)
        if isinstance(value, str) and len(value) % 2 == 0 and value.isalnum():
            return bytes.fromhex(value)
    except (TypeError, ValueError):
        pass
    raise _unknown("bytes in another form")


def _unknown(found: str) -> EvidenceError:
    return EvidenceError(
        "the file is no Azure SNP vTPM evidence",
        found=found,
        expected="JSON with hcl_report, tpm_quote and vcek",
    )
