"""NVIDIA GPUs in confidential-computing mode (Hopper, Blackwell): a report signed by the GPU.

The body holds ``report``, the GPU's SPDM measurements as the driver library gives them, and
``certificates``, five of them in DER, the GPU's own first. Alone it proves what a GPU is, not who
uses it: it is accepted as a part of composite evidence, where the request's 32-byte nonce is a
hash of what is bound. Every measurement block counts, also those that are all zero: NVIDIA's
reference values demand zero of some and accept it of others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cenacle.attestation.accelerator_evidence import AcceleratorVerifier
from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.nvidia_dice import DiceIdentity, dice_identity
from cenacle.attestation.nvidia_root import NVIDIA_DEVICE_ROOT
from cenacle.attestation.nvidia_spdm import Field, SpdmReport, parse_report
from cenacle.attestation.p384_path import P384Path, check_signature
from cenacle.attestation.registry import Shown
from cenacle.documents.base import Base64, Frozen, JsonObject, b64, parse_json, unb64
from cenacle.documents.clauses import Clause, check
from cenacle.errors import CenacleError, EvidenceError, InputError

__all__ = ["NvidiaPolicy", "NvidiaVerifier", "judge_nvidia"]

_KIND: Final = "nvidia"
_PATH_LENGTH: Final = 5
_MAX_DATA_VERSION: Final = 1
_ON, _OFF = b"\xaa", b"\x55"
_FEATURES: Final = {0: "spt", 1: "mpt", 2: "ppcie"}
_DOMAIN: Final = b"cenacle/nvidia-nonce/v1\x00"


class _Body(Frozen):
    report: Base64
    certificates: tuple[Base64, ...]
    statement: JsonObject | None = None


class NvidiaPolicy(Frozen):
    """What a contract demands beside the measurements.

    Attributes:
        devices: accepted GPUs as ``CHIP:SERIAL``; ``None`` accepts any genuine one.
        drivers: accepted driver versions; ``None`` leaves it to the measurements.
        allow_protected_pcie: accept Protected PCIe, a mode for several GPUs on one board that
            leaves the traffic between them (NVLink) in plaintext.
    """

    devices: tuple[str, ...] | None = None
    drivers: tuple[str, ...] | None = None
    allow_protected_pcie: bool = False


class NvidiaVerifier(AcceleratorVerifier):
    """Checks signature, certificate path, dates and firmware identifier; refuses debug devices.

    Args:
        roots: DER of each trusted root; NVIDIA's own unless a test says otherwise.
    """

    kind = _KIND

    def __init__(self, roots: Sequence[bytes] = (NVIDIA_DEVICE_ROOT,)) -> None:
        self._roots = tuple(roots)

    def part_binding(self, bound: bytes) -> bytes:
        """The 32-byte nonce of the request."""
        return hashlib.sha256(_DOMAIN + bound).digest()

    def inspect(self, evidence: Evidence, now: datetime) -> Shown:
        if evidence.kind != _KIND:
            raise EvidenceError("evidence is of another kind", found=evidence.kind, expected=_KIND)
        try:
            body = _Body.from_fields(evidence.body)
            data = unb64(body.report)
            certificates = [unb64(certificate) for certificate in body.certificates]
        except CenacleError as error:
            raise EvidenceError("nvidia evidence is malformed", found=error.diagnostics()) from None
        if len(certificates) != _PATH_LENGTH:
            raise EvidenceError(
                "nvidia evidence has another number of certificates",
                found=len(certificates),
                expected=_PATH_LENGTH,
            )
        report = parse_report(data)
        path = P384Path(certificates, f"{_KIND} evidence")
        check_signature(path.leaf, report.signature, report.signed, f"{_KIND} evidence")
        path.check(self._roots)
        path.check_dates(now)
        identity = dice_identity(path.leaf)
        claims = Claims(
            kind=_KIND,
            protection=self.protection,
            measurements={
                f"measurement-{index}": value
                for index, value in sorted(report.measurements.items())
            },
            properties=_properties(report, identity),
            layers=(),
            issued=now,
        )
        return Shown(claims, report.nonce)

    @classmethod
    def body_of(cls, raw: bytes, collateral: bytes | None = None) -> dict[str, Any]:
        """From a report (raw, or hexadecimal text) and its certificate chain in PEM.

        Or from what ``nvattest collect-evidence`` writes for one GPU, which holds both.
        """
        if collateral is None:
            if raw.lstrip()[:1] not in (b"[", b"{"):
                raise InputError(
                    "nvidia evidence needs its certificate chain",
                    expected="a PEM file with five certificates, the GPU's own first",
                    remedy="give the chain as collateral",
                )
            raw, collateral = _collected(raw)
        if re.fullmatch(rb"\s*(?:[0-9a-fA-F]{2})+\s*", raw):
            raw = bytes.fromhex(raw.decode("ascii"))
        return {"report": b64(raw), "certificates": [b64(der) for der in _certificates(collateral)]}


def _collected(raw: bytes) -> tuple[bytes, bytes]:
    fields = parse_json(raw)
    match fields.get("evidences") if isinstance(fields, dict) else fields:
        case [{"evidence": str(report), "certificate": str(chain)}]:
            return unb64(report), unb64(chain)
        case list(listed) if len(listed) > 1:
            raise InputError(
                "the file holds the evidence of several GPUs",
                found=len(listed),
                expected="one",
                remedy="cut out one of the list",
            )
    raise InputError("the file holds no evidence of a GPU", expected="nvattest's JSON")


def _certificates(pem: bytes) -> list[bytes]:
    # The driver library pads the chain after its last line.
    end = pem.rfind(b"-----END CERTIFICATE-----")
    try:
        listed = x509.load_pem_x509_certificates(pem[: end + 25] + b"\n")
        return [certificate.public_bytes(Encoding.DER) for certificate in listed]
    except Exception:  # many kinds, warnings that a caller made errors among them
        raise InputError(
            "the certificate chain of an NVIDIA report does not parse", expected="PEM"
        ) from None


def _text(report: SpdmReport, field: int, name: str) -> str:
    data = report.opaque.get(field)
    text = (data or b"").rstrip(b"\x00").decode("ascii", "replace")
    if not text or len(text) > 64 or not text.isascii() or not text.isprintable():
        raise EvidenceError(
            f"an NVIDIA report does not state a {name}",
            found="nothing" if data is None else "no text",
            expected="a report of a GPU",
        )
    return text


def _vbios(data: bytes) -> str:
    """``96.00.9F.00.01``: the first word, little endian, and the lowest byte of the second."""
    if len(data) != 8:
        raise EvidenceError(
            "an NVIDIA report does not state a VBIOS version",
            found=f"{len(data)} bytes",
            expected="8 bytes, as GPUs state it",
        )
    return ".".join(f"{byte:02X}" for byte in (*data[3::-1], data[4]))


def _status(report: SpdmReport, field: int, name: str) -> bool | None:
    data = report.opaque.get(field)
    if data is None:
        return None
    if data not in (_ON, _OFF):
        raise EvidenceError(
            f"an NVIDIA report states an unknown {name}", found=data[:8].hex(), expected="aa or 55"
        )
    return data == _ON


def _feature(report: SpdmReport) -> str | None:
    data = report.opaque.get(Field.FEATURE)
    if data is None:
        return None
    feature = _FEATURES.get(int.from_bytes(data[:9], "little"))
    if feature is None:
        raise EvidenceError("an NVIDIA report states an unknown feature", found=data[:8].hex())
    return feature


def _properties(report: SpdmReport, identity: DiceIdentity) -> dict[str, Any]:
    version = int.from_bytes(report.opaque.get(Field.DATA_VERSION, b"")[:9], "little")
    if version > _MAX_DATA_VERSION:
        raise EvidenceError(
            "the opaque data of an NVIDIA report is of a later version",
            found=version,
            expected=f"<= {_MAX_DATA_VERSION}",
        )
    driver = _text(report, Field.DRIVER_VERSION, "driver version")
    fwid = report.opaque.get(Field.FWID)  # old drivers leave it out
    if fwid is not None and fwid != identity.fwid:
        raise EvidenceError(
            "an NVIDIA report is of other firmware than the certificate that signs it",
            found=fwid[:8].hex(),
            expected=identity.fwid[:8].hex(),
        )
    feature = _feature(report)
    protected = _status(report, Field.PROTECTED_PCIE, "Protected PCIe status")
    properties = {
        "chip": identity.chip,
        "device": f"{identity.chip}:{identity.serial}",
        "driver": driver,
        "vbios": _vbios(report.opaque.get(Field.VBIOS_VERSION, b"")),
        "project": _text(report, Field.PROJECT, "project"),
        "project_sku": _text(report, Field.PROJECT_SKU, "project SKU"),
        "chip_sku": _text(report, Field.CHIP_SKU, "chip SKU"),
        "fwid": f"sha384:{identity.fwid.hex()}",
        "feature": feature,
        "nvdec0": _status(report, Field.NVDEC0_STATUS, "NVDEC status"),
        "protected_pcie": protected or feature == "ppcie"
        if (protected, feature) != (None, None)
        else None,
    }
    return {name: value for name, value in properties.items() if value is not None}


def judge_nvidia(claims: Claims, policy: NvidiaPolicy) -> list[Clause]:
    """One clause for each demand that the policy makes."""
    found = claims.properties
    clauses = [
        check(
            "contract",
            f"nvidia {name}",
            found.get(name) in accepted,
            found.get(name, "not stated"),
            " or ".join(accepted) or "nothing is accepted",
            remedy,
        )
        for name, accepted, remedy in (
            ("device", policy.devices, "run on one of the accepted GPUs"),
            ("driver", policy.drivers, "install an accepted driver, or draft a new contract"),
        )
        if accepted is not None
    ]
    protected = found.get("protected_pcie") is True
    clauses.append(
        check(
            "contract",
            "nvidia mode",
            policy.allow_protected_pcie or not protected,
            "Protected PCIe" if protected else "not Protected PCIe",
            "any mode" if policy.allow_protected_pcie else "every link of the GPU encrypted",
            "set the GPUs to confidential computing without Protected PCIe, or allow it in a new "
            "contract",
        )
    )
    return clauses
