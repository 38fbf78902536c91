"""AWS Nitro attestation documents: COSE_Sign1 around a CBOR map, read strictly.

Source: "Nitro Enclaves Attestation Process" (aws/aws-nitro-enclaves-nsm-api,
docs/attestation_process.md), sections 2.2 and 3.2.2; COSE_Sign1 is RFC 9052, section 4.2. The
decoder is `cbor2`; what it accepts beyond the specification (tags, floats, indefinite strings,
integers that are longer than needed) is refused by encoding the result again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NoReturn

import cbor2

from cenacle.attestation.p384_path import SIGNATURE_BYTES
from cenacle.errors import EvidenceError

__all__ = ["NitroDocument", "decode", "unwrap"]

_MAX_PAYLOAD: Final = 16384
_MAX_BYTES: Final = _MAX_PAYLOAD + 256
_MAX_CHAIN: Final = 8
_MAX_DEPTH: Final = 3
_ES384: Final = cbor2.dumps({1: -35})
_SIGN1_TAG: Final = b"\xd2"
_START: Final = b"\x84\x44" + _ES384 + b"\xa0"
_PCR_BYTES: Final = frozenset({32, 48, 64})
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_MILLISECONDS: Final = 253402300799999  # the last that has a year of four digits

_MANDATORY: Final = ("module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle")
_OPTIONAL: Final = {"public_key": (1, 1024), "user_data": (0, 512), "nonce": (0, 512)}


def _refuse_tag(*_: Any) -> NoReturn:
    raise ValueError("a tag")


# Those that cbor2 would turn into objects; all others reach the hook.
_NO_TAGS: Final = dict.fromkeys(
    (*range(64), 100, *range(256, 280), 1004, 1010, 43000, 55799), _refuse_tag
)


def _decode(data: bytes, what: str) -> Any:
    try:
        return cbor2.loads(
            data,
            tag_hook=_refuse_tag,
            semantic_decoders=_NO_TAGS,
            max_depth=_MAX_DEPTH,
            allow_duplicate_keys=False,
        )
    except Exception as error:  # the decoder of hostile bytes has many ways to fail
        raise EvidenceError(
            f"{what} is not valid CBOR", found=str(error)[:120], expected="RFC 8949, without tags"
        ) from None


def _same(value: object, kind: type) -> bool:
    return type(value) is kind  # a bool is no integer here


@dataclass(frozen=True, slots=True)
class NitroDocument:
    """A document whose form is right and whose signature nobody has checked.

    Attributes:
        pcrs: index to value, for all locked registers.
        chain: DER, the enclave's certificate first and the root last.
        user_data: what the enclave chose, up to 512 bytes; ``None`` if absent.
        signed: the bytes under the signature (Sig_structure, RFC 9052, section 4.4).
        signature: r and s, 48 bytes each.
    """

    module_id: str
    issued: datetime
    pcrs: Mapping[int, bytes]
    chain: tuple[bytes, ...]
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None
    signed: bytes
    signature: bytes


def unwrap(raw: bytes) -> bytes:
    """The COSE_Sign1 structure in a file that may have a header, a tag or padding around it.

    Raises:
        EvidenceError: there is none.
    """
    start = raw[:64].find(_START)
    if start < 0:
        raise EvidenceError(
            "no Nitro attestation document is in the file", expected="a COSE_Sign1 structure, ES384"
        )
    head = start + len(_START)
    if raw[head : head + 1] != b"\x59":
        raise EvidenceError(
            "a Nitro attestation document has no payload", expected="256 bytes or more"
        )
    length = int.from_bytes(raw[head + 1 : head + 3], "big")
    return raw[start : head + 3 + length + 2 + SIGNATURE_BYTES]


def decode(data: bytes) -> NitroDocument:
    """Read exactly one untagged COSE_Sign1 structure.

    Raises:
        EvidenceError: naming the field that is not as the specification says.
    """
    if not 0 < len(data) <= _MAX_BYTES:
        raise EvidenceError(
            "a Nitro attestation document has no credible length",
            found=f"{len(data)} bytes",
            expected=f"1 to {_MAX_BYTES}",
        )
    outer = _decode(data, "a Nitro attestation document")
    if not _same(outer, list) or len(outer) != 4:
        raise EvidenceError(
            "a Nitro attestation document is not a COSE_Sign1 structure",
            expected="an array of four",
        )
    protected, unprotected, payload, signature = outer
    if not _same(protected, bytes) or protected != _ES384:
        raise EvidenceError(
            "a Nitro attestation document names another algorithm", expected="ES384 and no more"
        )
    if not _same(unprotected, dict) or unprotected:
        raise EvidenceError(
            "a Nitro attestation document has headers that nothing protects", expected="none"
        )
    if not _same(payload, bytes) or not 0 < len(payload) <= _MAX_PAYLOAD:
        raise EvidenceError(
            "a Nitro attestation document has no credible payload",
            expected=f"1 to {_MAX_PAYLOAD} bytes",
        )
    if not _same(signature, bytes) or len(signature) != SIGNATURE_BYTES:
        raise EvidenceError(
            "the signature of a Nitro attestation document has the wrong length",
            expected=f"{SIGNATURE_BYTES} bytes",
        )
    if cbor2.dumps(outer) != data:
        raise EvidenceError(
            "a Nitro attestation document is not in its one form",
            expected="definite lengths, as short as they go, and nothing after the structure",
        )
    return _read(payload, signature)


def _read(payload: bytes, signature: bytes) -> NitroDocument:
    fields = _decode(payload, "the payload of a Nitro attestation document")
    if not _same(fields, dict):
        raise EvidenceError("the payload of a Nitro attestation document is not a map")
    _check_spelling(fields, payload)
    known = {*_MANDATORY, *_OPTIONAL}
    if strange := [name for name in fields if name not in known]:
        raise EvidenceError(
            "a Nitro attestation document has an unknown field", found=repr(strange[0])[:60]
        )
    if missing := [name for name in _MANDATORY if fields.get(name) is None]:
        raise EvidenceError("a Nitro attestation document lacks a field", found=missing[0])
    if fields["digest"] != "SHA384":
        raise EvidenceError(
            "a Nitro attestation document uses another digest",
            found=repr(fields["digest"])[:40],
            expected="SHA384",
        )
    optional = {name: _bytes(fields, name, *limits) for name, limits in _OPTIONAL.items()}
    return NitroDocument(
        module_id=_module(fields["module_id"]),
        issued=_time(fields["timestamp"]),
        pcrs=_pcrs(fields["pcrs"]),
        chain=_chain(fields["certificate"], fields["cabundle"]),
        public_key=optional["public_key"],
        user_data=optional["user_data"],
        nonce=optional["nonce"],
        signed=cbor2.dumps(["Signature1", _ES384, b"", payload]),
        signature=signature,
    )


def _check_spelling(fields: dict[Any, Any], payload: bytes) -> None:
    # AWS leaves the length of the outer map open and of nothing else; RFC 8949 allows it closed.
    inside = b"".join(cbor2.dumps(name) + cbor2.dumps(value) for name, value in fields.items())
    if payload not in (b"\xbf" + inside + b"\xff", cbor2.dumps(fields)):
        raise EvidenceError(
            "the payload of a Nitro attestation document is not in its one form",
            expected="definite lengths, as short as they go, and nothing after the map",
        )


def _wrong(name: str, expected: str) -> EvidenceError:
    return EvidenceError(
        f"{name} of a Nitro attestation document is not as specified", expected=expected
    )


def _bytes(fields: dict[Any, Any], name: str, least: int, most: int) -> bytes | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, bytes) or not least <= len(value) <= most:
        raise _wrong(name, f"{least} to {most} bytes")
    return value


def _module(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 256 or not value.isprintable():
        raise _wrong("module_id", "1 to 256 characters of text")
    return value


def _time(value: object) -> datetime:
    if not isinstance(value, int) or not _same(value, int) or not 0 < value <= _MAX_MILLISECONDS:
        raise _wrong("timestamp", "milliseconds since 1970")
    return _EPOCH + timedelta(milliseconds=value)


def _pcrs(value: object) -> dict[int, bytes]:
    if not isinstance(value, dict) or not 0 < len(value) <= 32:
        raise _wrong("pcrs", "1 to 32 registers")
    for index, pcr in value.items():
        if not _same(index, int) or not 0 <= index < 32:
            raise _wrong("an index in pcrs", "0 to 31")
        if not isinstance(pcr, bytes) or len(pcr) not in _PCR_BYTES:
            raise _wrong(f"PCR {index}", "32, 48 or 64 bytes")
    return value


def _chain(certificate: object, cabundle: object) -> tuple[bytes, ...]:
    if not isinstance(cabundle, list) or not 0 < len(cabundle) < _MAX_CHAIN:
        raise _wrong("cabundle", f"1 to {_MAX_CHAIN - 1} certificates")
    chain = [certificate, *reversed(cabundle)]
    for der in chain:
        if not isinstance(der, bytes) or not 0 < len(der) <= 1024:
            raise _wrong("a certificate", "1 to 1024 bytes")
    return tuple(chain)
