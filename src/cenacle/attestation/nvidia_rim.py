"""NVIDIA's reference integrity manifests (RIM): signed lists of accepted measurements.

A driver's RIM and a VBIOS's together cover the measurements of a GPU. Each is an ISO/IEC 19770-2
SWID tag with TCG's RIM attributes, signed with an enveloped XML signature: ECDSA P-384 over
Canonical XML 1.1. From them come reference values for a contract. Files are NVIDIA's to give out
(rim.attestation.nvidia.com, and in NVIDIA/nvtrust); nothing is fetched here.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cenacle.attestation.nvidia_root import NVIDIA_RIM_ROOT
from cenacle.attestation.p384_path import P384Path, check_signature
from cenacle.attestation.plain_xml import Element, canonical, parse_xml
from cenacle.documents.protection import Measured
from cenacle.errors import EvidenceError, InputError

__all__ = ["Rim", "read_rim", "reference_values"]

_WHAT: Final = "an NVIDIA RIM"
_SWID: Final = "{http://standards.iso.org/iso/19770/-2/2015/schema.xsd}"
_HASH: Final = "{http://www.w3.org/2001/04/xmlenc#sha384}Hash"
_DSIG: Final = "{http://www.w3.org/2000/09/xmldsig#}"
_C14N: Final = "http://www.w3.org/2006/12/xml-c14n11"
_ENVELOPED: Final = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"
_ECDSA: Final = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
_SHA384: Final = "http://www.w3.org/2001/04/xmldsig-more#sha384"
_DIGEST: Final = re.compile(r"[0-9a-f]{96}")
_NUMBER: Final = re.compile(r"[0-9]{1,3}")
_MAX_INDEX: Final = 253  # an SPDM index is one more, and 255 means all
_MAX_ALTERNATIVES: Final = 64
_UNDECIDED: Final[tuple[Measured, ...]] = (f"sha384:{'0' * 96}",)


@dataclass(frozen=True, slots=True)
class Rim:
    """One manifest.

    Attributes:
        product: the chip, e.g. ``GH100``.
        version: of the driver or the VBIOS.
        accepted: SPDM index (one more than in the file) to the values that NVIDIA accepts, for
            the measurements that this manifest decides.
        size: how many measurements the GPU has.
    """

    product: str
    version: str
    accepted: dict[int, tuple[Measured, ...]]
    size: int


def read_rim(
    data: bytes, at: datetime | None = None, roots: Sequence[bytes] = (NVIDIA_RIM_ROOT,)
) -> Rim:
    """Check the signature of a manifest and read it.

    Args:
        at: when its certificates must have been valid, aware; ``None`` leaves the dates out,
            for software older than NVIDIA's signing certificates last (two years).
        roots: DER of each trusted root; NVIDIA's own unless a test says otherwise.

    Raises:
        InputError: the file is no manifest.
        EvidenceError: its signature or its certificates are not right.
    """
    root = parse_xml(data)
    if root.tag != f"{_SWID}SoftwareIdentity":
        raise InputError("a file is no NVIDIA RIM", found=root.tag[:80], expected="a SWID tag")
    _check_signature(root, at, roots)
    meta = root.one(f"{_SWID}Meta")
    accepted: dict[int, tuple[Measured, ...]] = {}
    seen = set()
    for resource in root.one(f"{_SWID}Payload"):
        index, values = _resource(resource)
        if index in seen:
            raise InputError("an NVIDIA RIM lists a measurement twice", found=index)
        seen.add(index)
        if resource.attributes["active"] == "True":
            accepted[index + 1] = values
    if seen != set(range(len(seen))) or not accepted:
        raise InputError(
            "an NVIDIA RIM does not list the measurements of a GPU",
            found=f"{len(accepted)} of {len(seen)} active",
            expected="each index from 0 on, one of them active",
        )
    return Rim(
        product=meta.attributes.get("product", ""),
        version=meta.attributes.get("colloquialVersion", ""),
        accepted=accepted,
        size=len(seen),
    )


def _resource(element: Element) -> tuple[int, tuple[Measured, ...]]:
    given = element.attributes
    index, count = given.get("index", ""), given.get("alternatives", "")
    if (
        element.tag != f"{_SWID}Resource"
        or given.get("type") != "Measurement"
        or given.get("active") not in ("True", "False")
        or not _NUMBER.fullmatch(index)
        or not _NUMBER.fullmatch(count)
        or not 0 < int(count) <= _MAX_ALTERNATIVES
        or int(index) > _MAX_INDEX
    ):
        raise InputError(
            "an entry of an NVIDIA RIM is not as expected", found=given.get("name", "")[:60]
        )
    hashes = [given.get(f"{_HASH}{number}", "") for number in range(int(count))]
    if given.get("size") != "48" or not all(map(_DIGEST.fullmatch, hashes)):
        raise InputError(
            "an entry of an NVIDIA RIM is no SHA-384 digest",
            found=given.get("name", "")[:60],
            expected=f"{count} digests of 48 bytes",
        )
    return int(index), tuple(f"sha384:{value}" for value in hashes)


def _check_signature(root: Element, at: datetime | None, roots: Sequence[bytes]) -> None:
    signature = root.one(f"{_DSIG}Signature")
    signed = signature.one(f"{_DSIG}SignedInfo")
    reference = signed.one(f"{_DSIG}Reference")
    transforms = [t.attributes for t in reference.one(f"{_DSIG}Transforms")]
    form = [
        signed.one(f"{_DSIG}CanonicalizationMethod").attributes,
        signed.one(f"{_DSIG}SignatureMethod").attributes,
        reference.attributes,
        *transforms,
        reference.one(f"{_DSIG}DigestMethod").attributes,
    ]
    expected = [
        {"Algorithm": _C14N},
        {"Algorithm": _ECDSA},
        {"URI": ""},
        {"Algorithm": _ENVELOPED},
        {"Algorithm": _C14N},
        {"Algorithm": _SHA384},
    ]
    if form != expected:
        raise EvidenceError(
            f"{_WHAT} is signed in another way",
            expected="one reference to the whole file, Canonical XML 1.1, ECDSA with SHA-384",
        )
    digest = hashlib.sha384(canonical(root, without=signature)).digest()
    if digest != _base64(reference.one(f"{_DSIG}DigestValue")):
        raise EvidenceError(
            f"{_WHAT} was altered after it was signed", remedy="get the file from NVIDIA again"
        )
    listed = signature.one(f"{_DSIG}KeyInfo").one(f"{_DSIG}X509Data")
    path = P384Path([_base64(certificate) for certificate in listed], _WHAT)
    check_signature(
        path.leaf, _base64(signature.one(f"{_DSIG}SignatureValue")), canonical(signed), _WHAT
    )
    path.check(roots)
    if at is not None:
        path.check_dates(at)


def _base64(element: Element) -> bytes:
    try:
        return base64.b64decode("".join(element.text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{_WHAT} holds bytes that are no base64") from None


def reference_values(
    rims: Sequence[Rim], *, prefix: str = "gpu."
) -> dict[str, tuple[Measured, ...]]:
    """Reference values for a contract from the driver's manifest and the VBIOS's.

    What no manifest decides must be zero.

    Args:
        prefix: before each name; ``gpu.`` is what all GPUs of composite evidence share.

    Raises:
        InputError: the manifests are not of one GPU, or two decide one measurement.
    """
    if len({(rim.product, rim.size) for rim in rims}) != 1:
        raise InputError(
            "the manifests are not of one GPU",
            found=", ".join(f"{rim.product} {rim.version}" for rim in rims) or "none",
            expected="a driver's and a VBIOS's, of one chip",
        )
    values = dict.fromkeys(range(1, rims[0].size + 1), _UNDECIDED)
    decided: set[int] = set()
    for rim in rims:
        if both := sorted(decided & set(rim.accepted)):
            raise InputError(
                "two manifests decide one measurement",
                found=", ".join(map(str, both[:8])),
                expected="a driver's and a VBIOS's",
            )
        decided |= set(rim.accepted)
        values |= rim.accepted
    return {f"{prefix}measurement-{index}": accepted for index, accepted in values.items()}
