"""What Azure's paravisor (HCL) puts around an SNP report, and what it says of the VM.

The paravisor runs in the guest at VMPL 0, below the guest's system, and is the VM's TPM. Its
report is in the TPM's NV index 0x01400001: a header, the hardware's report, and runtime data in
JSON, whose SHA-256 is the report's REPORT_DATA. Source: Microsoft, "Confidential VM guest
attestation design detail"; the structures ATTESTATION_REPORT and IGVM_REQUEST_DATA of OpenHCL.
"""

from __future__ import annotations

import binascii
import struct
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final, Self

from cryptography.hazmat.primitives.asymmetric import rsa

from cenacle.attestation.snp_report import REPORT_BYTES
from cenacle.documents.base import JsonObject, parse_json
from cenacle.errors import CenacleError, EvidenceError

__all__ = ["HCL_REPORT_INDEX", "RuntimeData", "split_hcl_report", "unb64url"]

HCL_REPORT_INDEX: Final = 0x01400001
"""The NV index of the vTPM that holds the report."""

_HEADER: Final = struct.Struct("<4s4I12s")  # signature, version, size, request, status, reserved
_REQUEST: Final = struct.Struct("<5I")  # size, version, report type, hash type, size of the data
_SIGNATURE: Final = b"HCLA"
_VERSIONS: Final = frozenset({1, 2})
_AK_CERTIFICATE_REQUEST: Final = 2
_SNP: Final = 2
_SHA256: Final = 1
_MAX_RUNTIME_DATA: Final = 16384

_AK_NAME: Final = "HCLAkPub"
_MIN_KEY_BITS: Final = 2048
_EXPONENT: Final = 65537


def _malformed(what: str, found: object, expected: object) -> EvidenceError:
    return EvidenceError(
        f"an HCL report has {what}",
        found=found,
        expected=expected,
        remedy=f"read the vTPM's NV index {HCL_REPORT_INDEX:#010x} again, in an SEV-SNP VM",
    )


def split_hcl_report(raw: bytes) -> tuple[bytes, bytes]:
    """The SNP report and the runtime data in an HCL report.

    Nothing around them is signed, so nothing else is taken from it, and it has to look as the
    paravisor makes it.

    Raises:
        EvidenceError: it does not, or the report is of other hardware.
    """
    head = _HEADER.size + REPORT_BYTES
    if len(raw) < head + _REQUEST.size:
        raise _malformed("a wrong length", f"{len(raw)} bytes", f"> {head + _REQUEST.size}")
    signature, version, size, request, status, reserved = _HEADER.unpack_from(raw)
    if signature != _SIGNATURE or version not in _VERSIONS:
        raise _malformed("another signature or version", f"{signature!r} {version}", "HCLA 1 or 2")
    if request != _AK_CERTIFICATE_REQUEST or status or any(reserved):
        raise _malformed(
            "a header in another form", f"request {request}, status {status}", "request 2, status 0"
        )
    data_size, data_version, hardware, hash_type, length = _REQUEST.unpack_from(raw, head)
    if data_version != 1 or hardware != _SNP:
        raise _malformed("a report of other hardware", f"type {hardware}", f"SEV-SNP ({_SNP})")
    if hash_type != _SHA256:
        raise _malformed("runtime data under another hash", hash_type, f"SHA-256 ({_SHA256})")
    end = head + _REQUEST.size + length
    if length > _MAX_RUNTIME_DATA or end > len(raw):
        raise _malformed("runtime data of a wrong length", f"{length} bytes", f"in {len(raw)}")
    if size != end or data_size != _REQUEST.size + length:
        raise _malformed("sizes that contradict each other", f"{size} and {data_size}", end)
    if any(raw[end:]):
        raise _malformed("something behind its runtime data", "other bytes", "zeros")
    return raw[_HEADER.size : head], raw[head + _REQUEST.size : end]


def unb64url(text: object, what: str) -> bytes:
    """URL-safe base64 (RFC 4648, section 5) with or without padding, in one spelling."""
    try:
        if not isinstance(text, str):
            raise ValueError
        bare = text.rstrip("=")
        plain = bare.encode("ascii").translate(bytes.maketrans(b"-_+/", b"+/::"))
        data = binascii.a2b_base64(plain + b"=" * (-len(bare) % 4), strict_mode=True)
        again = binascii.b2a_base64(data, newline=False).rstrip(b"=")
        if again != plain or len(text) - len(bare) not in {0, -len(bare) % 4}:
            raise ValueError
    except ValueError:
        raise EvidenceError(f"{what} does not decode", expected="URL-safe base64") from None
    return data


@dataclass(frozen=True, slots=True)
class RuntimeData:
    """What the paravisor says, in JSON that the hardware's report binds.

    Attributes:
        attestation_key: the public key that the vTPM signs quotes with.
        vm_configuration: e.g. ``secure-boot``, ``console-enabled``, ``vmUniqueId``.
        user_data: 64 bytes that the guest put into NV index 0x01400002; zeros otherwise.
    """

    attestation_key: rsa.RSAPublicKey
    vm_configuration: JsonObject
    user_data: bytes

    @classmethod
    def bound_by(cls, report_data: bytes, data: bytes) -> Self:
        """Read runtime data that REPORT_DATA (64 bytes) is the digest of.

        Raises:
            EvidenceError: it is not, or the data has another form.
        """
        digest = sha256(data).digest()
        if report_data != digest + bytes(32):
            raise EvidenceError(
                "the runtime data is not what the SNP report binds",
                found=digest[:12].hex(),
                expected=report_data[:12].hex(),
                remedy="read report and runtime data from the vTPM together",
            )
        try:
            fields = parse_json(data)
        except CenacleError as error:
            raise EvidenceError("the runtime data is malformed", found=error.what) from None
        if not isinstance(fields, dict):
            raise EvidenceError("the runtime data is malformed", expected="a JSON object")
        return cls(_key(fields), _configuration(fields), _user_data(fields))


def _key(fields: dict[str, Any]) -> rsa.RSAPublicKey:
    listed = fields.get("keys")
    keys = listed if isinstance(listed, list) else []
    found = [key for key in keys if isinstance(key, dict) and key.get("kid") == _AK_NAME]
    if len(found) != 1:
        raise EvidenceError(
            "the runtime data names no attestation key, or several",
            found=len(found),
            expected=f"one key {_AK_NAME}",
        )
    jwk = found[0]
    if jwk.get("kty") != "RSA" or jwk.get("key_ops") not in (["sign"], None):
        raise EvidenceError(
            "the vTPM's attestation key is of another kind", expected="RSA, to sign"
        )
    modulus, exponent = (
        int.from_bytes(unb64url(jwk.get(part), "the vTPM's attestation key"), "big")
        for part in ("n", "e")
    )
    if modulus.bit_length() < _MIN_KEY_BITS or exponent != _EXPONENT:
        raise EvidenceError(
            "the vTPM's attestation key is too weak",
            found=f"{modulus.bit_length()} bits",
            expected=f">= {_MIN_KEY_BITS}, exponent {_EXPONENT}",
        )
    try:
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError:
        raise EvidenceError("the vTPM's attestation key is no RSA key") from None


def _configuration(fields: dict[str, Any]) -> JsonObject:
    found = fields.get("vm-configuration")
    if not isinstance(found, dict):
        raise EvidenceError("the runtime data lacks the VM's configuration")
    return found


def _user_data(fields: dict[str, Any]) -> bytes:
    found = fields.get("user-data", "")
    try:
        return bytes.fromhex(found)
    except (TypeError, ValueError):
        raise EvidenceError("the runtime data has malformed user data", expected="hex") from None
