"""What an NVIDIA device's certificate says of the device: its name, firmware and DICE flags.

Source: the subject alternative name of DMTF DSP0274, section 10.6.1 (leaf certificates), and
the TCG's DICE Attestation Architecture 1.0, section 6.1 (TcbInfo). Hopper's extension is an
older form that ends with one FWID; Blackwell's is a TcbInfo whose first FWID counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cryptography import x509

from cenacle.errors import EvidenceError

__all__ = ["DiceIdentity", "dice_identity"]

_NAME_OID: Final = x509.ObjectIdentifier("1.3.6.1.4.1.412.274.1")
_TCB_OIDS: Final = frozenset(
    {x509.ObjectIdentifier("2.23.133.5.4.1"), x509.ObjectIdentifier("2.23.133.5.4.1.1")}
)
_INTEGER, _BIT_STRING, _OCTETS, _OID, _UTF8, _SEQUENCE = 0x02, 0x03, 0x04, 0x06, 0x0C, 0x30
_FWIDS, _FLAGS = 0xA6, 0x87
_SHA384: Final = bytes.fromhex("608648016503040202")
_REFUSED_FLAGS: Final = {1: "not secure", 2: "recovery", 3: "debug"}


@dataclass(frozen=True, slots=True)
class DiceIdentity:
    """Who the device is.

    Attributes:
        chip: the product, e.g. ``GH100``.
        serial: unique to the device.
        fwid: SHA-384 of the firmware that holds the attestation key.
    """

    chip: str
    serial: str
    fwid: bytes


def _malformed(what: str) -> EvidenceError:
    return EvidenceError(f"{what} in an NVIDIA device's certificate is malformed", expected="DER")


def _items(data: bytes, what: str) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each element, in DER's one spelling of lengths below 64 KiB."""
    at = 0
    while at < len(data):
        head = data[at : at + 4]
        if len(head) < 2 or head[0] & 0x1F == 0x1F:
            raise _malformed(what)
        if head[1] < 0x80:
            length, size = head[1], 2
        elif head[1] == 0x81 and len(head) > 2 and head[2] >= 0x80:
            length, size = head[2], 3
        elif head[1] == 0x82 and len(head) > 3 and head[2]:
            length, size = int.from_bytes(head[2:4], "big"), 4
        else:
            raise _malformed(what)
        content = data[at + size : at + size + length]
        if len(content) != length:
            raise _malformed(what)
        yield head[0], content
        at += size + length


def _only(data: bytes, tag: int, what: str) -> bytes:
    items = list(_items(data, what))
    if len(items) != 1 or items[0][0] != tag:
        raise _malformed(what)
    return items[0][1]


def _name(certificate: x509.Certificate) -> tuple[str, str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise EvidenceError("an NVIDIA device's certificate does not name the device") from None
    for other in names.get_values_for_type(x509.OtherName):
        if other.type_id == _NAME_OID:
            text = _only(other.value, _UTF8, "the device's name").decode("ascii", "replace")
            match text.split(":"):
                case ["NVIDIA", chip, serial] if chip and serial and text.isprintable():
                    return chip, serial
            raise EvidenceError(
                "an NVIDIA device's certificate names another maker's device", found=text[:60]
            )
    raise EvidenceError("an NVIDIA device's certificate does not name the device")


def _fwid(data: bytes) -> bytes:
    match list(_items(data, "a firmware identifier")):
        case [(tag, algorithm), (kind, digest)] if (tag, kind) == (_OID, _OCTETS):
            if algorithm == _SHA384 and len(digest) == 48:
                return digest
    raise _malformed("a firmware identifier")


def _check_flags(data: bytes) -> None:
    flags = data[1:]
    for bit, meaning in _REFUSED_FLAGS.items():
        if bit < len(flags) * 8 and flags[bit // 8] & (0x80 >> bit % 8):
            raise EvidenceError(
                "the NVIDIA device's certificate says that the device is not to be trusted",
                found=f"DICE flag: {meaning}",
                expected="a production device",
                remedy="use a device with production fuses and firmware",
            )


def _tcb(certificate: x509.Certificate) -> bytes:
    found = [e for e in certificate.extensions if e.oid in _TCB_OIDS]
    if len(found) != 1 or not isinstance(found[0].value, x509.UnrecognizedExtension):
        raise EvidenceError(
            "an NVIDIA device's certificate does not say which firmware holds its key",
            found=f"{len(found)} DICE extensions",
            expected="one",
        )
    what = "the DICE extension"
    items = list(_items(_only(found[0].value.value, _SEQUENCE, what), what))
    match items:
        case [(tag, _), (key, _), (fwid, content)] if (tag, key, fwid) == (
            _INTEGER,
            _SEQUENCE,
            _SEQUENCE,
        ):
            return _fwid(content)
    fields = dict(items)
    if len(fields) != len(items) or _FWIDS not in fields:
        raise _malformed(what)
    _check_flags(fields.get(_FLAGS, b""))
    fwids = [content for tag, content in _items(fields[_FWIDS], what) if tag == _SEQUENCE]
    if not fwids:
        raise _malformed(what)
    return _fwid(fwids[0])


def dice_identity(certificate: x509.Certificate) -> DiceIdentity:
    """Read a device's own certificate.

    Raises:
        EvidenceError: it does not name an NVIDIA device and its firmware, or a DICE flag says
            that the device is in debug or recovery mode, or not secure.
    """
    chip, serial = _name(certificate)
    return DiceIdentity(chip=chip, serial=serial, fwid=_tcb(certificate))
