"""From the key that signed an SNP report to AMD's root, and the table that hosts hand out.

Source: AMD publications 57230 (VCEK) and 58369 (VLEK): ARK signs ASK and ASVK, an ASK signs
VCEKs, an ASVK signs VLEKs, and extensions say for which TCB_VERSION, chip or cloud provider a
key is. The table is of the "Guest-Hypervisor Communication Block" specification, AMD publication
56421, MSG_REPORT_REQ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Final, NamedTuple
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric import ec

from cenacle.attestation.amd_roots import PRODUCTS, Product, ProductRoots
from cenacle.attestation.snp_certificates import Certificate, RevocationList
from cenacle.attestation.snp_report import Signer
from cenacle.errors import EvidenceError

__all__ = ["Endorsement", "certificate_table", "endorse"]

_AMD: Final = "1.3.6.1.4.1.3704.1."
_STRUCTURE_VERSION, _PRODUCT_NAME, _HWID, _CSP_ID = (f"{_AMD}{n}" for n in (1, 2, 4, 5))
# Which extension (.3.1 bootloader, .3.2 TEE, .3.3 SNP, .3.4 to .3.7 reserved, .3.8 microcode,
# .3.9 FMC) speaks of which byte of the TCB_VERSION.
_TCB: Final[dict[str, tuple[int, ...]]] = {
    "Milan": (1, 2, 4, 5, 6, 7, 3, 8),
    "Genoa": (1, 2, 4, 5, 6, 7, 3, 8),
    "Turin": (9, 1, 2, 3, 5, 6, 7, 8),
}
# Siena and Bergamo have Genoa's root and its authorities.
_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "Milan": ("Milan",),
    "Genoa": ("Genoa", "Bergamo", "Siena"),
    "Turin": ("Turin",),
}
_HWID_BYTES: Final = {"Milan": 64, "Genoa": 64, "Turin": 8}
_INTEGER, _OCTET_STRING, _IA5_STRING = 0x02, 0x04, 0x16

_GUIDS: Final = {
    UUID("63da758d-e664-4564-adc5-f4b93be8accd"): "VCEK",
    UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1"): "VLEK",
    UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782"): "ASK",  # or the ASVK
    UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae"): "ARK",
}
_ENTRY_BYTES: Final = 24
_MAX_ENTRIES: Final = 64


@dataclass(frozen=True, slots=True)
class Endorsement:
    """What AMD says of the key that signed a report.

    Attributes:
        product_name: with the stepping where AMD gives it, e.g. ``Milan-B0``.
        hwid: the chip that a VCEK belongs to (64 bytes, 8 from Turin on); ``None`` for a VLEK.
        csp_id: the cloud provider that a VLEK belongs to; ``None`` for a VCEK.
        tcb: the TCB_VERSION (8 bytes) that the key is for.
        revocations: from when to when the revocation list that came along is valid, or ``None``.
    """

    product: Product
    product_name: str
    signer: Signer
    key: ec.EllipticCurvePublicKey
    hwid: bytes | None
    csp_id: str | None
    tcb: bytes
    revocations: tuple[datetime, datetime] | None = None


def endorse(
    certificates: Sequence[bytes],
    signer: Signer,
    now: datetime,
    roots: Mapping[str, ProductRoots],
    revocations: bytes | None = None,
) -> Endorsement:
    """Follow the chain from a VCEK or VLEK to AMD's root.

    Args:
        certificates: DER, the VCEK or VLEK first; then, in any order, the ASK or ASVK and the
            ARK, or neither. A missing ASK or ASVK is taken from the roots.
        signer: the kind of key that the report names.
        revocations: the ARK's certificate revocation list in DER.

    Raises:
        EvidenceError: naming the certificate and what is wrong with it.
    """
    if not 1 <= len(certificates) <= 3:
        raise EvidenceError(
            "SNP evidence has a wrong number of certificates",
            found=len(certificates),
            expected=f"the {signer}, with or without its authorities",
        )
    leaf = _leaf(certificates[0], signer)
    product = _product(leaf, signer)
    trusted = roots.get(product)
    if trusted is None:
        raise EvidenceError(
            "no root certificate is trusted for this line of processors",
            found=product,
            expected=", ".join(roots) or "none",
        )
    given = [der for der in certificates[1:] if der != trusted.ark]
    if len(given) > 1 or len(set(certificates)) != len(certificates):
        raise _not_in_chain(
            f"{len(certificates) - 1} beside the {signer}",
            f"at most {_authority(signer, product)} and ARK-{product} as it is pinned",
        )
    pinned = trusted.ask if signer == "VCEK" else trusted.asvk
    path = _path(certificates[0], given[0] if given else pinned, trusted.ark, signer, product)
    for certificate in path.certificates:
        certificate.check_date(now)
    if revocations is None:
        return path.endorsement
    listed = RevocationList.parse(revocations)
    ark, authority, _ = path.certificates
    listed.check(ark, authority, now)
    return replace(path.endorsement, revocations=(listed.this_update, listed.next_update))


def _authority(signer: Signer, product: str) -> str:
    return f"SEV-{product}" if signer == "VCEK" else f"SEV-VLEK-{product}"


def _product(leaf: Certificate, signer: Signer) -> Product:
    # A name that is not believed yet only chooses the key that must have signed it.
    for product in PRODUCTS:
        if leaf.issuer_name == _authority(signer, product):
            return product
    raise EvidenceError(
        f"the {signer} was not issued by AMD for a known line of processors",
        found=leaf.issuer_name,
        expected=" or ".join(_authority(signer, product) for product in PRODUCTS),
    )


def _not_in_chain(found: str, expected: str) -> EvidenceError:
    return EvidenceError(
        "SNP evidence has a certificate that is not in its chain",
        found=found,
        expected=expected,
        remedy="give the chain that AMD's key distribution service gives",
    )


# What follows depends on the certificates alone, and the same few come again and again: a machine
# makes evidence with the same ones until its firmware is updated. Dates and revocations are
# judged anew each time.


@lru_cache(maxsize=64)
def _leaf(der: bytes, signer: Signer) -> Certificate:
    leaf = Certificate.parse(der, f"the {signer}")
    if leaf.name != f"SEV-{signer}":
        raise EvidenceError(
            "the first certificate is of another kind than the key that the report names",
            found=leaf.name,
            expected=f"SEV-{signer}",
            remedy=f"give the {signer}'s certificate first",
        )
    return leaf


@lru_cache(maxsize=8)
def _root(der: bytes, name: str) -> Certificate:
    root = Certificate.parse(der, name)
    root.check_issued_by(root)
    return root


@lru_cache(maxsize=16)
def _issuer(der: bytes, name: str, root: bytes, root_name: str) -> Certificate:
    found = Certificate.parse(der, name)
    if found.name != name:
        raise _not_in_chain(found.name, f"{name}, or {root_name} as it is pinned")
    found.check_issued_by(_root(root, root_name))
    return found


class _Path(NamedTuple):
    certificates: tuple[Certificate, Certificate, Certificate]
    endorsement: Endorsement


@lru_cache(maxsize=64)
def _path(der: bytes, authority: bytes, ark: bytes, signer: Signer, product: Product) -> _Path:
    root = _root(ark, f"ARK-{product}")
    issuer = _issuer(authority, _authority(signer, product), ark, f"ARK-{product}")
    leaf = _leaf(der, signer)
    leaf.check_issued_by(issuer)
    return _Path((root, issuer, leaf), _read_leaf(leaf, signer, product))


def _read_leaf(leaf: Certificate, signer: Signer, product: Product) -> Endorsement:
    key = leaf.key
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EvidenceError(f"the {signer} has a key of another type", expected="P-384")
    if leaf.signs_certificates:
        raise EvidenceError(f"the {signer} is a certificate authority", expected="an end entity")
    structure = _integer(leaf, _STRUCTURE_VERSION)
    if structure not in {0, 1}:
        raise EvidenceError(
            f"the {signer} has a structure that this version does not know",
            found=structure,
            expected="0 or 1",
        )
    name = _text(leaf, _PRODUCT_NAME)
    if name.partition("-")[0] not in _NAMES[product]:
        raise EvidenceError(
            f"the {signer} is for another line of processors", found=name, expected=product
        )
    has_hwid, has_csp = _HWID in leaf.extensions, _CSP_ID in leaf.extensions
    if (has_hwid, has_csp) != ((True, False) if signer == "VCEK" else (False, True)):
        raise EvidenceError(
            f"the {signer} names a chip and a cloud provider wrongly",
            found=f"chip {has_hwid}, provider {has_csp}",
            expected="a VCEK for one chip, a VLEK for one provider",
        )
    return Endorsement(
        product=product,
        product_name=name,
        signer=signer,
        key=key,
        hwid=_hwid(leaf, _HWID_BYTES[product]) if has_hwid else None,
        csp_id=_text(leaf, _CSP_ID) if has_csp else None,
        tcb=bytes(_integer(leaf, f"{_AMD}3.{n}") for n in _TCB[product]),
    )


def _extension(leaf: Certificate, name: str) -> bytes:
    found = leaf.extensions.get(name)
    if found is None:
        raise EvidenceError(f"{leaf.name} lacks an extension", expected=name)
    return found[1]


def _value(leaf: Certificate, name: str, tag: int) -> bytes:
    raw = _extension(leaf, name)
    if len(raw) < 3 or raw[0] != tag or raw[1] != len(raw) - 2 or raw[1] > 0x7F:
        raise EvidenceError(f"{leaf.name} has a malformed extension", found=name)
    return raw[2:]


def _integer(leaf: Certificate, name: str) -> int:
    value = int.from_bytes(_value(leaf, name, _INTEGER), "big", signed=True)
    if not 0 <= value <= 0xFF:
        raise EvidenceError(
            f"{leaf.name} has a number out of range",
            found=f"{value} in {name}",
            expected="0 to 255",
        )
    return value


def _text(leaf: Certificate, name: str) -> str:
    try:
        return _value(leaf, name, _IA5_STRING).decode("ascii")
    except UnicodeDecodeError:
        raise EvidenceError(f"{leaf.name} has a malformed extension", found=name) from None


def _hwid(leaf: Certificate, size: int) -> bytes:
    raw = _extension(leaf, _HWID)
    # AMD gives the bytes bare, where X.509 would have an OCTET STRING in them.
    value = raw if len(raw) == size else _value(leaf, _HWID, _OCTET_STRING)
    if len(value) != size:
        raise EvidenceError(
            f"{leaf.name} names the chip in another form",
            found=f"{len(value)} bytes",
            expected=f"{size} bytes",
        )
    return value


def certificate_table(data: bytes) -> dict[str, bytes]:
    """The certificates in the table that a host gives with a report (GHCB, MSG_REPORT_REQ).

    Returns:
        DER by ``VCEK``, ``VLEK``, ``ASK`` and ``ARK``; entries of other kinds are left out, and
        an empty table gives none.

    Raises:
        EvidenceError: an entry points outside the table, into its header, or comes twice.
    """
    if not data:
        return {}
    entries: list[tuple[UUID, int, int]] = []
    for at in range(0, (_MAX_ENTRIES + 1) * _ENTRY_BYTES, _ENTRY_BYTES):
        entry = data[at : at + _ENTRY_BYTES]
        if len(entry) < _ENTRY_BYTES:
            raise EvidenceError("a certificate table is cut off", found=f"{len(data)} bytes")
        if not any(entry):
            break
        offset, size = (int.from_bytes(entry[n : n + 4], "little") for n in (16, 20))
        entries.append((UUID(bytes=entry[:16]), offset, size))
    else:
        raise EvidenceError("a certificate table is too long", expected=f"<= {_MAX_ENTRIES}")
    start = (len(entries) + 1) * _ENTRY_BYTES
    if len({guid for guid, _, _ in entries}) != len(entries):
        raise EvidenceError("a certificate table has an entry twice")
    found = {}
    for guid, offset, size in entries:
        if offset < start or offset + size > len(data):
            raise EvidenceError(
                "a certificate table points outside of itself",
                found=f"{offset} to {offset + size}",
                expected=f"{start} to {len(data)}",
            )
        name = _GUIDS.get(guid)
        if name is not None and size:
            found[name] = data[offset : offset + size]
    return found
