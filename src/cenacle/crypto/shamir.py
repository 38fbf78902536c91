"""Secret sharing: any ``threshold`` of the shares give the secret back, fewer tell nothing.

Shamir's scheme over GF(256), exactly as SLIP-0039 splits its encrypted secrets (section "Shamir's
secret sharing"): polynomials over the field of AES, the secret at x = 255, and at x = 254 a
digest of it, by which wrong shares are noticed. ``cenacle`` shares are not mnemonics: each
carries which set it is of, its threshold, and two checksums.

The coordinates are public; values are handled without branches or table look-ups that depend on
them. Python promises no more than that about time.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, Self

from cenacle.crypto.memory import SecretBytes
from cenacle.errors import InputError, SealError

__all__ = ["MAX_SHARES", "RecoveryShare", "combine", "recover", "recovery_shares", "split"]

MAX_SHARES: Final = 16
_SECRET, _DIGEST = 255, 254
_DIGEST_BYTES: Final = 4
_KEY: Final = 32
_PREFIX: Final = "cenacle-share-1-"
_SET, _CHECK, _CHECKSUM = 8, 16, 4
_BYTES: Final = _SET + 2 + _KEY + _CHECK + _CHECKSUM


def _times(value: int, factor: int) -> int:
    """``value`` times the public ``factor`` in GF(256) modulo x^8 + x^4 + x^3 + x + 1."""
    product = 0
    while factor:
        product ^= value * (factor & 1)
        value = (value << 1 & 0xFF) ^ (value >> 7) * 0x1B
        factor >>= 1
    return product


@cache
def _inverse(value: int) -> int:
    """The multiplicative inverse of a public value: its 254th power."""
    result = 1
    for _ in range(254):
        result = _times(result, value)
    return result


def _interpolate(points: Mapping[int, bytes], x: int) -> bytes:
    """The polynomials through ``points``, one for each byte, at ``x``."""
    result = bytearray(len(next(iter(points.values()))))
    for i, value in points.items():
        factor = 1
        for j in points:
            if j != i:
                factor = _times(factor, _times(x ^ j, _inverse(i ^ j)))
        for place, octet in enumerate(value):
            result[place] ^= _times(octet, factor)
    return bytes(result)


def _digest(secret: bytes, salt: bytes) -> bytes:
    return hmac.digest(salt, secret, "sha256")[:_DIGEST_BYTES]


def split(
    secret: bytes,
    threshold: int,
    shares: int,
    random: Callable[[int], bytes] = secrets.token_bytes,
) -> list[bytes]:
    """The values of ``shares`` shares at x = 0, 1, 2 ..., each as long as ``secret``.

    Raises:
        InputError: the numbers are not 2 <= threshold <= shares <= 16, or the secret is shorter
            than 16 bytes.
    """
    if not 2 <= threshold <= shares <= MAX_SHARES:
        raise InputError(
            "a secret cannot be shared in this way",
            found=f"{threshold} of {shares}",
            expected=f"2 <= threshold <= shares <= {MAX_SHARES}",
        )
    if len(secret) < 16:
        raise InputError(
            "a secret is too short to be shared", found=len(secret), expected=">= 16 bytes"
        )
    salt = random(len(secret) - _DIGEST_BYTES)
    given = {x: random(len(secret)) for x in range(threshold - 2)}
    points = {**given, _DIGEST: _digest(secret, salt) + salt, _SECRET: secret}
    return [given[x] if x in given else _interpolate(points, x) for x in range(shares)]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret from the values of exactly as many shares as its threshold, by x.

    Raises:
        SealError: the shares are not of one secret, or not of this threshold.
    """
    sizes = {len(value) for value in shares.values()}
    if len(shares) < 2 or len(sizes) != 1 or min(sizes) < 16 or not set(shares) <= set(range(254)):
        raise SealError(
            "shares do not fit together",
            found=f"{len(shares)} shares",
            expected="at least two, of one length, each once",
        )
    secret, digest = _interpolate(shares, _SECRET), _interpolate(shares, _DIGEST)
    if not hmac.compare_digest(digest[:_DIGEST_BYTES], _digest(secret, digest[_DIGEST_BYTES:])):
        raise SealError(
            "the shares give no secret",
            found="a wrong digest",
            expected="genuine shares of one secret, as many as its threshold",
            remedy="ask for the shares again; one of them at least was altered",
        )
    return secret


@dataclass(frozen=True, slots=True, repr=False)
class RecoveryShare:
    """One party's share of a 32-byte key. A secret: wrap it to the party, and print it never.

    Attributes:
        set_id: random, the same in all shares of one sharing.
        threshold: how many are needed.
        index: this share's x, from 0.
        value: 32 bytes.
        check: proves the recovered key, 16 bytes, the same in all shares.
    """

    set_id: bytes
    threshold: int
    index: int
    value: bytes
    check: bytes

    def to_text(self) -> str:
        """``cenacle-share-1-`` and base32, for a file or a printed sheet."""
        head = self.set_id + bytes([self.threshold, self.index]) + self.value + self.check
        whole = head + hashlib.sha256(_PREFIX.encode() + head).digest()[:_CHECKSUM]
        return _PREFIX + base64.b32encode(whole).decode().rstrip("=").lower()

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The inverse of :meth:`to_text`; white space at both ends is left out.

        Raises:
            InputError: it is no share, or was mistyped. The text is not repeated in the error.
        """
        wrong = InputError(
            "a recovery share cannot be read",
            found=f"{len(text)} characters",
            expected=f"{_PREFIX} and base32, as it was handed out",
            remedy="copy it again, whole and unaltered",
        )
        body = text.strip()
        if not body.startswith(_PREFIX):
            raise wrong
        digits = body[len(_PREFIX) :]
        try:
            whole = base64.b32decode(digits.upper() + "=" * (-len(digits) % 8))
        except (binascii.Error, ValueError):
            raise wrong from None
        head, checksum = whole[:-_CHECKSUM], whole[-_CHECKSUM:]
        if len(whole) != _BYTES or not hmac.compare_digest(
            checksum, hashlib.sha256(_PREFIX.encode() + head).digest()[:_CHECKSUM]
        ):
            raise wrong
        share = cls(
            head[:_SET],
            head[_SET],
            head[_SET + 1],
            head[_SET + 2 : _SET + 2 + _KEY],
            head[_SET + 2 + _KEY :],
        )
        if share.to_text() != body or not 2 <= share.threshold <= MAX_SHARES > share.index:
            raise wrong
        return share

    def __repr__(self) -> str:
        return f"<RecoveryShare {self.index + 1}, {self.threshold} needed>"


def _check(secret: bytes, set_id: bytes, threshold: int) -> bytes:
    message = b"cenacle/recovery-share/v1" + set_id + bytes([threshold])
    return hmac.digest(secret, message, "sha256")[:_CHECK]


def recovery_shares(secret: SecretBytes, threshold: int, shares: int) -> tuple[RecoveryShare, ...]:
    """Share a 32-byte key; any ``threshold`` of the shares recover it.

    Raises:
        InputError: the key has another length, or not 2 <= threshold <= shares <= 16.
    """
    if len(secret) != _KEY:
        raise InputError(
            "only keys of 32 bytes are shared", found=f"{len(secret)} bytes", expected="32 bytes"
        )
    with secret.view() as view:
        key = bytes(view)
    set_id = secrets.token_bytes(_SET)
    check = _check(key, set_id, threshold & 0xFF)
    return tuple(
        RecoveryShare(set_id, threshold, index, value, check)
        for index, value in enumerate(split(key, threshold, shares))
    )


def recover(shares: Iterable[RecoveryShare]) -> SecretBytes:
    """The key again, from at least ``threshold`` shares of one sharing.

    Raises:
        InputError: too few, one twice, or of different sharings.
        SealError: one of them was altered.
    """
    given: Sequence[RecoveryShare] = tuple(shares)
    kinds = {(share.set_id, share.threshold, share.check) for share in given}
    if len(kinds) != 1:
        raise InputError(
            "recovery shares are not of one sharing",
            found=f"shares of {len(kinds)} sharings",
            expected="shares that were handed out together",
        )
    [(set_id, threshold, check)] = kinds
    values = {share.index: share.value for share in given}
    if len(values) != len(given) or len(values) < threshold:
        raise InputError(
            "there are too few recovery shares",
            found=f"{len(values)} different ones",
            expected=f"{threshold}",
            remedy="ask other parties for theirs",
        )
    used = dict(sorted(values.items())[:threshold])
    key = combine(used)
    if not hmac.compare_digest(_check(key, set_id, threshold), check) or any(
        not hmac.compare_digest(_interpolate(used, x), value) for x, value in values.items()
    ):
        raise SealError(
            "the shares give no secret",
            found="a share that does not fit the others",
            expected="genuine shares of one key",
            remedy="find out whose share was altered: try other combinations",
        )
    return SecretBytes(bytearray(key))
