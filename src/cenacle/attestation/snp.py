"""AMD SEV-SNP: a report that the secure processor signs with a key that AMD certified.

The body holds ``report`` (1184 bytes), ``certificates`` (DER: the VCEK or VLEK, then, if one
likes, the ASK or ASVK and the ARK) and perhaps ``crl``, AMD's revocation list. The 64 bytes of
report data are REPORT_DATA. Measurements are ``launch``, what the guest was launched with, and
``host_data``, what the host attached to it, where that is not zero. All else is properties, for
:mod:`cenacle.attestation.snp_policy` to judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from asn1crypto import pem
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field

from cenacle.attestation.amd_roots import AMD_ROOTS, PRODUCTS, Product, ProductRoots
from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.registry import Shown, Verifier
from cenacle.attestation.snp_certificates import Certificate
from cenacle.attestation.snp_chain import Endorsement, certificate_table, endorse
from cenacle.attestation.snp_report import REPORT_BYTES, Signer, SnpReport, tcb_parts
from cenacle.documents.base import Base64, Frozen, JsonObject, b64, format_time, unb64
from cenacle.documents.protection import Measured
from cenacle.errors import CenacleError, EvidenceError, InputError

__all__ = [
    "SnpCollateral",
    "SnpVerifier",
    "authenticate_report",
    "collateral_of",
    "kds_url",
    "launch_measurements",
    "product_of",
    "refuse_debug",
    "report_properties",
]

_KIND: Final = "snp"
# CPUID families and models of each line (revision guides of families 19h and 1Ah).
_MODELS: Final[dict[str, tuple[int, tuple[range, ...]]]] = {
    "Milan": (0x19, (range(0x10),)),
    "Genoa": (0x19, (range(0x10, 0x20), range(0xA0, 0xB0))),
    "Turin": (0x1A, (range(0x20),)),
}
_KDS: Final = "https://kdsintf.amd.com"
_SPL: Final = {
    "fmc": "fmcSPL",
    "bootloader": "blSPL",
    "tee": "teeSPL",
    "snp": "snpSPL",
    "microcode": "ucodeSPL",
}


class SnpCollateral(Frozen):
    """What comes with a report: certificates and perhaps a revocation list, in DER."""

    certificates: Annotated[tuple[Base64, ...], Field(min_length=1, max_length=3)]
    crl: Base64 | None = None


class _Body(SnpCollateral):
    report: Base64
    statement: JsonObject | None = None


class SnpVerifier(Verifier):
    """Checks report, certificates and dates; refuses guests that may be debugged.

    Args:
        roots: trusted certificates by product line; AMD's own unless a test says otherwise.
    """

    kind = _KIND

    def __init__(self, roots: Mapping[str, ProductRoots] = AMD_ROOTS) -> None:
        self._roots = roots

    def inspect(self, evidence: Evidence, now: datetime) -> Shown:
        if evidence.kind != _KIND:
            raise EvidenceError("evidence is of another kind", found=evidence.kind, expected=_KIND)
        try:
            body = _Body.from_fields(evidence.body)
        except CenacleError as error:
            raise EvidenceError("snp evidence is malformed", found=error.diagnostics()) from None
        report, endorsement = authenticate_report(unb64(body.report), body, now, self._roots)
        refuse_debug(report)
        claims = Claims(
            kind=_KIND,
            protection=self.protection,
            measurements=launch_measurements(report),
            properties=report_properties(report, endorsement),
            layers=(),
            issued=now,
        )
        return Shown(claims, report.report_data)

    @classmethod
    def body_of(cls, raw: bytes, collateral: bytes | None = None) -> dict[str, Any]:
        """From a report, alone or with the host's certificate table behind it.

        Args:
            collateral: PEM (certificates, and perhaps a revocation list), one certificate in
                DER, or a certificate table.
        """
        try:
            report = SnpReport.parse(raw[:REPORT_BYTES])
            found = collateral_of(report, collateral or raw[REPORT_BYTES:])
        except EvidenceError as error:
            raise InputError(
                error.what, found=error.found, expected=error.expected, remedy=error.remedy
            ) from None
        return {"report": b64(raw[:REPORT_BYTES]), **found.to_fields()}


def authenticate_report(
    raw: bytes, collateral: SnpCollateral, now: datetime, roots: Mapping[str, ProductRoots]
) -> tuple[SnpReport, Endorsement]:
    """A report that a genuine chip signed, and what AMD says of its key.

    Raises:
        EvidenceError: the chain, a date, the signature, or what the certificate says of TCB,
            chip or processor does not hold.
    """
    report = SnpReport.parse(raw)
    endorsement = endorse(
        [unb64(der) for der in collateral.certificates],
        report.signer,
        now,
        roots,
        None if collateral.crl is None else unb64(collateral.crl),
    )
    report.verify(endorsement.key)
    if endorsement.tcb != report.reported_tcb:
        raise EvidenceError(
            f"the {report.signer} is for another TCB than the report",
            found=_versions(endorsement.tcb, endorsement.product),
            expected=_versions(report.reported_tcb, endorsement.product),
            remedy="fetch the certificate for the reported TCB",
        )
    _check_chip(report, endorsement)
    _check_processor(report, endorsement.product)
    return report, endorsement


def _versions(tcb: bytes, product: Product) -> str:
    return ", ".join(f"{name} {value}" for name, value in tcb_parts(tcb, product).items())


def _check_chip(report: SnpReport, endorsement: Endorsement) -> None:
    masked = not any(report.chip_id)  # MASK_CHIP_ID; the VCEK still says which chip it is
    if endorsement.hwid is None or masked:
        return
    if report.chip_id != endorsement.hwid.ljust(len(report.chip_id), b"\x00"):
        raise EvidenceError(
            "the VCEK is of another chip than the report",
            found=endorsement.hwid[:8].hex(),
            expected=report.chip_id[:8].hex(),
            remedy="fetch the certificate for this chip",
        )


def product_of(report: SnpReport) -> Product | None:
    """The line of processors by the report's own word; ``None`` in version 2, or if unknown."""
    if report.cpuid is None:
        return None
    family, model, _ = report.cpuid
    for product in PRODUCTS:
        of_product, models = _MODELS[product]
        if family == of_product and any(model in some for some in models):
            return product
    return None


def _check_processor(report: SnpReport, product: Product) -> None:
    if report.cpuid is not None and product_of(report) != product:
        family, model, _ = report.cpuid
        raise EvidenceError(
            "an SNP report is of another processor than its key",
            found=f"family {family:#x}, model {model:#x}",
            expected=product,
        )


def refuse_debug(report: SnpReport) -> None:
    """Raises :class:`EvidenceError` for a guest whose policy lets the host debug it."""
    if report.policy["debug"]:
        raise EvidenceError(
            "the SNP guest may be debugged: the host can read and change its memory",
            found="guest policy with DEBUG set",
            expected="a guest that cannot be debugged",
            remedy="launch the guest with bit 19 of its policy clear",
        )


def launch_measurements(report: SnpReport) -> dict[str, Measured]:
    """``launch`` and, unless it is zero, ``host_data``."""
    found = {"launch": f"sha384:{report.measurement.hex()}"}
    if any(report.host_data):
        found["host_data"] = f"hex:{report.host_data.hex()}"
    return found


def report_properties(report: SnpReport, endorsement: Endorsement) -> JsonObject:
    """The fields of :class:`~cenacle.attestation.snp_policy.SnpProperties`."""
    product = endorsement.product
    chip = endorsement.hwid
    if chip is None and any(report.chip_id):
        chip = report.chip_id[: 8 if product == "Turin" else None]
    fields = {
        "product": product,
        "product_name": endorsement.product_name,
        "signer": report.signer,
        "chip_id": chip and chip.hex(),
        "csp_id": endorsement.csp_id,
        "report_version": report.version,
        "guest_svn": report.guest_svn,
        "guest_abi": report.abi,
        "guest_policy": report.policy,
        "vmpl": report.vmpl,
        "platform": report.platform,
        "tcb": {
            "reported": tcb_parts(report.reported_tcb, product),
            "committed": tcb_parts(report.committed_tcb, product),
            "current": tcb_parts(report.current_tcb, product),
            "launch": tcb_parts(report.launch_tcb, product),
        },
        "firmware": {
            "current": report.current_firmware,
            "committed": report.committed_firmware,
        },
        "cpuid": report.cpuid and list(report.cpuid),
        "family_id": report.family_id.hex(),
        "image_id": report.image_id.hex(),
        "report_id": report.report_id.hex(),
        "report_id_ma": report.report_id_ma.hex(),
        "id_key_digest": _digest(report.id_key_digest),
        "author_key_digest": _digest(report.author_key_digest),
        "mitigations": report.mitigations
        and {
            "launch": f"{report.mitigations[0]:016x}",
            "current": f"{report.mitigations[1]:016x}",
        },
        "revocations": endorsement.revocations
        and {
            "this_update": format_time(endorsement.revocations[0].astimezone(UTC)),
            "next_update": format_time(endorsement.revocations[1].astimezone(UTC)),
        },
    }
    return {name: value for name, value in fields.items() if value is not None}


def _digest(value: bytes | None) -> str | None:
    return f"sha384:{value.hex()}" if value and any(value) else None


def collateral_of(report: SnpReport, *sources: bytes) -> SnpCollateral:
    """Certificates for a report in any form that hosts and AMD give them in.

    Args:
        sources: each of PEM (also with a revocation list), one certificate in DER, or a host's
            table. Where several are of the kind that signed, the report's signature decides.

    Raises:
        EvidenceError: there is none of the kind that signed, or a source cannot be read.
    """
    ders: list[bytes] = []
    crl = None
    for source in sources:
        more, listed = _read_collateral(source, report.signer)
        ders += [der for der in more if der not in ders]
        crl = crl or listed
    names = {der: Certificate.parse(der).name for der in ders}
    leaves = [der for der in ders if names[der] == f"SEV-{report.signer}"]
    if not leaves:
        url = kds_url(report)
        raise EvidenceError(
            f"no certificate of the {report.signer} comes with the report",
            found=", ".join(names.values()) or "none",
            expected=f"one of the {report.signer}, in PEM, DER or a host's certificate table",
            remedy=f"fetch {url or 'it from the cloud provider or AMD'} and give it as collateral",
        )
    leaf = next((der for der in leaves if _is_signed_by(report, der)), leaves[0])
    issuer = Certificate.parse(leaf).issuer_name  # SEV-Milan, or SEV-VLEK-Milan
    chain = {name: der for der, name in names.items() if name in (issuer, _root_of(issuer))}
    fields = {"certificates": [b64(der) for der in (leaf, *chain.values())]}
    return SnpCollateral.from_fields(fields if crl is None else {**fields, "crl": b64(crl)})


def kds_url(report: SnpReport) -> str | None:
    """Where AMD publishes the VCEK that signed a report (publication 57230, section 4.1).

    ``None`` where the report does not tell: a VLEK is given to its cloud provider alone, the
    host may mask the chip, and version 2 does not name the processor.
    """
    product = product_of(report)
    if report.signer == "VLEK" or product is None or not any(report.chip_id):
        return None
    chip = report.chip_id[:8] if product == "Turin" else report.chip_id
    parts = tcb_parts(report.reported_tcb, product)
    query = "&".join(f"{_SPL[name]}={value:02}" for name, value in parts.items())
    return f"{_KDS}/vcek/v1/{product}/{chip.hex()}?{query}"


def _root_of(issuer: str) -> str:
    return f"ARK-{issuer.rpartition('-')[2]}"


def _is_signed_by(report: SnpReport, der: bytes) -> bool:
    key = Certificate.parse(der).key
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            report.verify(key)
            return True
    except EvidenceError:
        pass
    return False


def _read_collateral(data: bytes, signer: Signer) -> tuple[list[bytes], bytes | None]:
    if b"-----BEGIN" not in data:
        if data[:1] == b"\x30":
            return [data], None
        table = certificate_table(data)
        return [table[name] for name in (signer, "ASK", "ARK") if name in table], None
    ders, crl = [], None
    try:
        for label, _, der in pem.unarmor(data, multiple=True):
            if label == "CERTIFICATE":
                ders.append(der)
            elif label == "X509 CRL" and crl is None:
                crl = der
            else:
                raise EvidenceError("a PEM file holds something unexpected", found=label)
    except (ValueError, TypeError):
        raise EvidenceError("a PEM file cannot be read", expected="certificates") from None
    return ders, crl
