"""AMD's SEV-SNP attestation report: 1184 little-endian bytes, signed by the secure processor.

Source: "SEV Secure Nested Paging Firmware ABI Specification", AMD publication 56860, revisions
1.55 to 1.58: ATTESTATION_REPORT (section 7.3), TCB_VERSION (2.2), guest policy (4.3), signature
format (chapter 10). Report version 2 lasts until revision 1.55, 3 adds the processor's family,
model and stepping, 5 the mitigation vectors. Everything that is reserved must be zero here, so
that no byte of a report is without meaning.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Literal, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cenacle.attestation.amd_roots import Product
from cenacle.errors import EvidenceError

__all__ = [
    "REPORT_BYTES",
    "REPORT_VERSIONS",
    "SIGNED_BYTES",
    "Signer",
    "SnpReport",
    "tcb_parts",
]

Signer = Literal["VCEK", "VLEK"]

REPORT_BYTES: Final = 0x4A0
SIGNED_BYTES: Final = 0x2A0
REPORT_VERSIONS: Final = frozenset({2, 3, 5})

_LAYOUT: Final = struct.Struct(
    "<IIQ16s16sII8sQII64s48s32s48s48s32s32s8s3s21s64s8s3sB3sB8sQQ152s72s72s368s"
)
_ECDSA_P384_SHA384: Final = 1
_SIGNERS: Final[dict[int, Signer]] = {0: "VCEK", 1: "VLEK"}
_UNSIGNED: Final = 7
_COMPONENT: Final = 48  # bytes of r and s on P-384, in fields of 72

_POLICY_BITS: Final = {
    16: "smt",
    18: "migrate_ma",
    19: "debug",
    20: "single_socket",
    21: "cxl_allow",
    22: "mem_aes_256_xts",
    23: "rapl_dis",
    24: "ciphertext_hiding_dram",
    25: "page_swap_disable",
}
_POLICY_ONE: Final = 1 << 17  # reserved, must be one
_PLATFORM_BITS: Final = {
    0: "smt_en",
    1: "tsme_en",
    2: "ecc_en",
    3: "rapl_dis",
    4: "ciphertext_hiding_dram_en",
    5: "alias_check_complete",
    7: "tio_en",
}

_TCB_BYTES: Final[dict[str, dict[str, int]]] = {
    "Milan": {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7},
    "Genoa": {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7},
    "Turin": {"fmc": 0, "bootloader": 1, "tee": 2, "snp": 3, "microcode": 7},
}


def tcb_parts(raw: bytes, product: Product) -> dict[str, int]:
    """The security versions in a TCB_VERSION (8 bytes); Turin's family lays them out anew."""
    return {name: raw[at] for name, at in _TCB_BYTES[product].items()}


def _flags(value: int, bits: dict[int, str], what: str) -> dict[str, bool]:
    unknown = value & ~sum(1 << bit for bit in bits)
    if unknown:
        raise EvidenceError(
            f"the {what} of an SNP report has bits that this version does not know",
            found=f"{unknown:#x}",
            expected=f"bits {', '.join(map(str, bits))}",
            remedy="a newer version of cenacle may know them",
        )
    return {name: bool(value >> bit & 1) for bit, name in bits.items()}


def _version(parts: bytes) -> str:
    build, minor, major = parts
    return f"{major}.{minor}.{build}"


@dataclass(frozen=True, slots=True)
class SnpReport:
    """ATTESTATION_REPORT, parsed and not yet believed: see :meth:`verify`.

    Attributes:
        policy: what the guest's owner allowed, by the ABI's names; fixed at launch.
        platform: PLATFORM_INFO: what the machine has switched on.
        abi: the least ABI version that the guest's policy asks for, "major.minor".
        signer: the kind of key that signed.
        current_tcb, reported_tcb, committed_tcb, launch_tcb: TCB_VERSION, 8 bytes each, which
            only the product line tells how to read: :func:`tcb_parts`.
        cpuid: family, model and stepping; ``None`` in version 2.
        author_key_digest: ``None`` unless AUTHOR_KEY_EN is set.
        chip_id: 64 bytes; all zero where the host masks it.
        current_firmware, committed_firmware: "major.minor.build".
        mitigations: launch and current mitigation vectors; ``None`` before version 5.
    """

    version: int
    guest_svn: int
    abi: str
    policy: dict[str, bool]
    family_id: bytes
    image_id: bytes
    vmpl: int
    platform: dict[str, bool]
    signer: Signer
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes | None
    report_id: bytes
    report_id_ma: bytes
    current_tcb: bytes
    reported_tcb: bytes
    committed_tcb: bytes
    launch_tcb: bytes
    cpuid: tuple[int, int, int] | None
    chip_id: bytes
    current_firmware: str
    committed_firmware: str
    mitigations: tuple[int, int] | None
    signed: bytes
    signature: tuple[int, int]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a report.

        Raises:
            EvidenceError: another length or version, a reserved field in use, an unknown flag,
                or a report that nobody signed.
        """
        if len(data) != REPORT_BYTES:
            raise EvidenceError(
                "an SNP report has the wrong length",
                found=f"{len(data)} bytes",
                expected=f"{REPORT_BYTES} bytes",
            )
        (
            version,
            guest_svn,
            policy,
            family_id,
            image_id,
            vmpl,
            algorithm,
            current_tcb,
            platform,
            key_info,
            reserved_key,
            report_data,
            measurement,
            host_data,
            id_key_digest,
            author_key_digest,
            report_id,
            report_id_ma,
            reported_tcb,
            cpuid,
            reserved_cpuid,
            chip_id,
            committed_tcb,
            current_firmware,
            reserved_current,
            committed_firmware,
            reserved_committed,
            launch_tcb,
            launch_mitigations,
            current_mitigations,
            reserved_signed,
            r,
            s,
            reserved_signature,
        ) = _LAYOUT.unpack(data)
        if version not in REPORT_VERSIONS:
            raise EvidenceError(
                "an SNP report is of an unknown version",
                found=version,
                expected=" or ".join(map(str, sorted(REPORT_VERSIONS))),
            )
        _check_reserved(
            {
                "0x4C": reserved_key,
                "0x188": version == 2 and any(cpuid),
                "0x18B": any(reserved_cpuid),
                "0x1EB": reserved_current,
                "0x1EF": reserved_committed,
                "0x1F8": version < 5 and (launch_mitigations or current_mitigations),
                "0x208": any(reserved_signed),
                "0x2D0": any(r[_COMPONENT:]),
                "0x318": any(s[_COMPONENT:]),
                "0x330": any(reserved_signature),
                "0x48 (KEY_INFO)": key_info >> 5,
            }
        )
        if not policy & _POLICY_ONE:
            raise EvidenceError(
                "the guest policy of an SNP report is malformed",
                found=f"{policy:#x}",
                expected="bit 17 set",
            )
        if vmpl > 3:
            raise EvidenceError(
                "an SNP report was not asked for by the guest",
                found=f"VMPL {vmpl:#x}",
                expected="a privilege level of the guest, 0 to 3",
                remedy="the hypervisor made this report: ask for one inside the guest",
            )
        return cls(
            version=version,
            guest_svn=guest_svn,
            abi=f"{policy >> 8 & 0xFF}.{policy & 0xFF}",
            policy=_flags(policy & ~0xFFFF & ~_POLICY_ONE, _POLICY_BITS, "guest policy"),
            family_id=family_id,
            image_id=image_id,
            vmpl=vmpl,
            platform=_flags(platform, _PLATFORM_BITS, "platform information"),
            signer=_signer(key_info, algorithm),
            report_data=report_data,
            measurement=measurement,
            host_data=host_data,
            id_key_digest=id_key_digest,
            author_key_digest=author_key_digest if key_info & 1 else None,
            report_id=report_id,
            report_id_ma=report_id_ma,
            current_tcb=current_tcb,
            reported_tcb=reported_tcb,
            committed_tcb=committed_tcb,
            launch_tcb=launch_tcb,
            cpuid=None if version == 2 else (cpuid[0], cpuid[1], cpuid[2]),
            chip_id=chip_id,
            current_firmware=_version(current_firmware),
            committed_firmware=_version(committed_firmware),
            mitigations=None if version < 5 else (launch_mitigations, current_mitigations),
            signed=data[:SIGNED_BYTES],
            signature=(int.from_bytes(r, "little"), int.from_bytes(s, "little")),
        )

    def verify(self, key: ec.EllipticCurvePublicKey) -> None:
        """Raises :class:`EvidenceError` unless ``key`` (P-384) signed this report."""
        try:
            key.verify(
                encode_dss_signature(*self.signature), self.signed, ec.ECDSA(hashes.SHA384())
            )
        except InvalidSignature:
            raise EvidenceError(
                f"an SNP report is not signed by the {self.signer} that comes with it",
                found="another signature, or altered fields",
                expected=f"the {self.signer}'s signature over the first {SIGNED_BYTES} bytes",
                remedy="make fresh evidence, with the certificate of this chip and its TCB",
            ) from None


def _signer(key_info: int, algorithm: int) -> Signer:
    signing_key = key_info >> 2 & 7
    masked = key_info & 2 and signing_key == 0  # MASK_CHIP_KEY: no VCEK, zeros for a signature
    if masked or signing_key == _UNSIGNED:
        raise EvidenceError(
            "an SNP report is not signed",
            found="MASK_CHIP_KEY" if masked else "signing key NONE",
            expected="a VCEK's or VLEK's signature",
            remedy="have the host set MaskChipKey to 0 (SNP_CONFIG)",
        )
    signer = _SIGNERS.get(signing_key)
    if signer is None or algorithm != _ECDSA_P384_SHA384:
        raise EvidenceError(
            "an SNP report is signed in an unknown way",
            found=f"signing key {signing_key}, algorithm {algorithm}",
            expected="VCEK (0) or VLEK (1), ECDSA P-384 with SHA-384 (1)",
        )
    return signer


def _check_reserved(used: dict[str, object]) -> None:
    found = [at for at, value in used.items() if value]
    if found:
        raise EvidenceError(
            "an SNP report uses reserved bytes",
            found=f"non-zero at {', '.join(found)}",
            expected="zero in this report version",
        )
