"""A TPM 2.0's public keys and signatures, as they travel: TPMT_PUBLIC and TPMT_SIGNATURE.

Same rules as in :mod:`cenacle.attestation.tpm_structures`: every length is checked, and sections
are those of Part 2 of the TCG's library specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag
from typing import Final, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cenacle.attestation.tpm_structures import Reader, digest_of, hasher, tpm2b
from cenacle.errors import EvidenceError

__all__ = [
    "SIGNING_SCHEMES",
    "EccParameters",
    "ObjectAttributes",
    "Public",
    "RsaParameters",
    "Scheme",
    "Signature",
    "Symmetric",
    "TpmKey",
    "same_key",
]

TpmKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

# TPM_ALG_ID (6.3)
_RSA, _NULL, _ECC = 0x0001, 0x0010, 0x0023
_RSASSA, _RSAPSS, _ECDSA = 0x0014, 0x0016, 0x0018
SIGNING_SCHEMES: Final = frozenset({_RSASSA, _RSAPSS, _ECDSA})
"""Schemes that attestation keys sign in."""

_WITH_HASH: Final = {
    _RSA: frozenset({_RSASSA, _RSAPSS, 0x0017}),  # and OAEP
    _ECC: frozenset({_ECDSA, 0x0019, 0x001B, 0x001C}),  # and ECDH, SM2, ECSchnorr
}
_SYMMETRIC: Final = frozenset({0x0006, 0x0013, 0x0026})  # AES, SM4, Camellia
_RSA_BITS: Final = frozenset({2048, 3072, 4096})
_EXPONENT: Final = 65537

_CURVES: Final[Mapping[int, type[ec.EllipticCurve]]] = {
    0x0003: ec.SECP256R1,
    0x0004: ec.SECP384R1,
    0x0005: ec.SECP521R1,
}


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "big")


@dataclass(frozen=True, slots=True)
class Signature:
    """TPMT_SIGNATURE (11.3.4): RSASSA, RSAPSS (``value``) or ECDSA (``value`` is r, ``s``)."""

    scheme: int
    hash: int
    value: bytes
    s: bytes = b""

    @classmethod
    def parse(cls, data: bytes) -> Self:
        reader = Reader(data, "a TPM signature")
        scheme = reader.u16()
        if scheme not in SIGNING_SCHEMES:
            raise reader.refuse(
                "is of an unknown scheme", f"{scheme:#06x}", "RSASSA, RSAPSS or ECDSA"
            )
        algorithm = reader.u16()
        hasher(algorithm)
        value = reader.sized()
        found = cls(scheme, algorithm, value, reader.sized() if scheme == _ECDSA else b"")
        reader.end()
        return found

    def pack(self) -> bytes:
        end = tpm2b(self.s) if self.scheme == _ECDSA else b""
        return _u16(self.scheme) + _u16(self.hash) + tpm2b(self.value) + end

    def verify(self, key: TpmKey, message: bytes) -> None:
        """Raises :class:`EvidenceError` unless this is ``key``'s signature of ``message``."""
        algorithm = hasher(self.hash)
        try:
            if isinstance(key, rsa.RSAPublicKey) and self.scheme in {_RSASSA, _RSAPSS}:
                pad: padding.AsymmetricPadding = padding.PKCS1v15()
                if self.scheme == _RSAPSS:  # the salt is as long as fits (Part 1, B.7)
                    pad = padding.PSS(padding.MGF1(algorithm), padding.PSS.AUTO)
                key.verify(self.value, message, pad, algorithm)
                return
            if isinstance(key, ec.EllipticCurvePublicKey) and self.scheme == _ECDSA:
                r, s = (int.from_bytes(part, "big") for part in (self.value, self.s))
                key.verify(encode_dss_signature(r, s), message, ec.ECDSA(algorithm))
                return
        except (InvalidSignature, ValueError):
            raise EvidenceError(
                "a TPM signature does not verify",
                found="bytes that the attestation key did not sign",
                expected="its signature over exactly these bytes",
                remedy="make fresh evidence; this was altered, or is another machine's",
            ) from None
        raise EvidenceError(
            "a TPM signature is of another type than the key",
            found=f"scheme {self.scheme:#06x}",
            expected=f"one for {type(key).__name__}",
        )


class ObjectAttributes(IntFlag):
    """TPMA_OBJECT (8.3): what a key may do, and where it can be."""

    FIXED_TPM = 1 << 1
    ST_CLEAR = 1 << 2
    FIXED_PARENT = 1 << 4
    SENSITIVE_DATA_ORIGIN = 1 << 5
    USER_WITH_AUTH = 1 << 6
    ADMIN_WITH_POLICY = 1 << 7
    FIRMWARE_LIMITED = 1 << 8
    SVN_LIMITED = 1 << 9
    NO_DA = 1 << 10
    ENCRYPTED_DUPLICATION = 1 << 11
    RESTRICTED = 1 << 16
    DECRYPT = 1 << 17
    SIGN = 1 << 18
    X509_SIGN = 1 << 19


_ATTRIBUTES: Final = sum(ObjectAttributes)


@dataclass(frozen=True, slots=True)
class Symmetric:
    """TPMT_SYM_DEF_OBJECT (11.1.7) of a storage key: how it protects its children."""

    algorithm: int
    key_bits: int
    mode: int

    def pack(self) -> bytes:
        return _u16(self.algorithm) + _u16(self.key_bits) + _u16(self.mode)


@dataclass(frozen=True, slots=True)
class RsaParameters:
    """The key of TPMS_RSA_PARMS (12.2.3.5) and its modulus; exponent 0 means 65537."""

    key_bits: int
    exponent: int
    modulus: bytes

    def pack_parameters(self) -> bytes:
        return _u16(self.key_bits) + self.exponent.to_bytes(4, "big")

    def pack_unique(self) -> bytes:
        return tpm2b(self.modulus)

    def public_key(self) -> rsa.RSAPublicKey:
        """The key; ``ValueError`` if it is too weak or malformed."""
        if self.key_bits not in _RSA_BITS or self.exponent not in {0, _EXPONENT}:
            raise ValueError(f"{self.key_bits} bits, exponent {self.exponent}")
        modulus = int.from_bytes(self.modulus, "big")
        if len(self.modulus) * 8 != self.key_bits or modulus.bit_length() != self.key_bits:
            raise ValueError(f"a modulus of {len(self.modulus)} bytes for {self.key_bits} bits")
        return rsa.RSAPublicNumbers(_EXPONENT, modulus).public_key()


@dataclass(frozen=True, slots=True)
class EccParameters:
    """The key of TPMS_ECC_PARMS (12.2.3.6) and its point; ``kdf`` is (scheme, hash) or None."""

    curve: int
    kdf: tuple[int, int] | None
    x: bytes
    y: bytes

    def pack_parameters(self) -> bytes:
        kdf = _u16(_NULL) if self.kdf is None else _u16(self.kdf[0]) + _u16(self.kdf[1])
        return _u16(self.curve) + kdf

    def pack_unique(self) -> bytes:
        return tpm2b(self.x) + tpm2b(self.y)

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The key; ``ValueError`` if the curve is unknown or the point is not on it."""
        kind = _CURVES.get(self.curve)
        if kind is None:
            raise ValueError(f"curve {self.curve:#06x}")
        x, y = (int.from_bytes(part, "big") for part in (self.x, self.y))
        return ec.EllipticCurvePublicNumbers(x, y, kind()).public_key()


@dataclass(frozen=True, slots=True)
class Scheme:
    """TPMT_RSA_SCHEME and TPMT_ECC_SCHEME (11.2.4.2, 11.2.5.6): an algorithm and its hash."""

    algorithm: int
    hash: int

    def pack(self) -> bytes:
        return _u16(self.algorithm) + _u16(self.hash)


def _read_scheme(reader: Reader, known: frozenset[int]) -> Scheme | None:
    algorithm = reader.u16()
    if algorithm == _NULL:
        return None
    if algorithm not in known:
        raise reader.refuse("has an unknown scheme", f"{algorithm:#06x}", "a known one, or none")
    return Scheme(algorithm, reader.u16())


def _read_symmetric(reader: Reader) -> Symmetric | None:
    algorithm = reader.u16()
    if algorithm == _NULL:
        return None
    if algorithm not in _SYMMETRIC:
        raise reader.refuse("has an unknown cipher", f"{algorithm:#06x}", "AES, SM4 or Camellia")
    return Symmetric(algorithm, reader.u16(), reader.u16())


@dataclass(frozen=True, slots=True)
class Public:
    """TPMT_PUBLIC (12.2.4) of an RSA or elliptic-curve key."""

    name_alg: int
    attributes: ObjectAttributes
    auth_policy: bytes
    symmetric: Symmetric | None
    scheme: Scheme | None
    key: RsaParameters | EccParameters

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """From TPMT_PUBLIC, without the length of a TPM2B_PUBLIC."""
        reader = Reader(data, "a TPM public key")
        kind = reader.u16()
        if kind not in {_RSA, _ECC}:
            raise reader.refuse("is of an unknown type", f"{kind:#06x}", "RSA or ECC")
        name_alg, bits = reader.u16(), reader.u32()
        hasher(name_alg)
        if bits & ~_ATTRIBUTES:
            raise reader.refuse("has reserved attributes", f"{bits:#010x}", "zeros there")
        policy, symmetric = reader.sized(), _read_symmetric(reader)
        scheme = _read_scheme(reader, _WITH_HASH[kind])
        key = _read_rsa(reader) if kind == _RSA else _read_ecc(reader)
        reader.end()
        return cls(name_alg, ObjectAttributes(bits), policy, symmetric, scheme, key)

    def pack(self) -> bytes:
        kind = _RSA if isinstance(self.key, RsaParameters) else _ECC
        head = _u16(kind) + _u16(self.name_alg) + int(self.attributes).to_bytes(4, "big")
        choices = b"".join(
            _u16(_NULL) if choice is None else choice.pack()
            for choice in (self.symmetric, self.scheme)
        )
        parameters = choices + self.key.pack_parameters()
        return head + tpm2b(self.auth_policy) + parameters + self.key.pack_unique()

    @property
    def name(self) -> bytes:
        """The Name (Part 1, 16): the algorithm, and the hash of the whole public area."""
        return _u16(self.name_alg) + digest_of(self.name_alg, self.pack())

    def public_key(self) -> TpmKey:
        """The key itself, with its numbers checked.

        Raises:
            EvidenceError: it is no RSA key of 2048 to 4096 bits with the exponent 65537, and no
                point of a NIST curve.
        """
        try:
            if isinstance(self.key, RsaParameters):
                return self.key.public_key()
            return self.key.public_key()
        except ValueError as error:
            raise EvidenceError(
                "a TPM public key is no key", found=str(error), expected="an RSA or ECC key"
            ) from None

    def verify(self, signature: Signature, message: bytes) -> None:
        """Raises unless the key signed ``message``, in the one scheme that it is made for."""
        if self.scheme is not None and self.scheme != Scheme(signature.scheme, signature.hash):
            raise EvidenceError(
                "a TPM signature is in another scheme than its key allows",
                found=f"{signature.scheme:#06x} with hash {signature.hash:#06x}",
                expected=f"{self.scheme.algorithm:#06x} with hash {self.scheme.hash:#06x}",
            )
        signature.verify(self.public_key(), message)


def _read_rsa(reader: Reader) -> RsaParameters:
    return RsaParameters(reader.u16(), reader.u32(), reader.sized())


def _read_ecc(reader: Reader) -> EccParameters:
    curve, kdf = reader.u16(), reader.u16()
    derivation = None if kdf == _NULL else (kdf, reader.u16())
    return EccParameters(curve, derivation, reader.sized(), reader.sized())


def same_key(one: object, other: object) -> bool:
    """Whether two public keys are the same RSA or elliptic-curve key."""
    if isinstance(one, rsa.RSAPublicKey) and isinstance(other, rsa.RSAPublicKey):
        return one.public_numbers() == other.public_numbers()
    if isinstance(one, ec.EllipticCurvePublicKey) and isinstance(other, ec.EllipticCurvePublicKey):
        return one.public_numbers() == other.public_numbers()
    return False
