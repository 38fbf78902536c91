"""Queries that only the enclave reads, and answers that only their client reads: pure.

A client draws 32 bytes for each query and seals them with HPKE to the key that the enclave's
evidence vouches for, under the contract's digest. Two keys are derived from them. One encrypts
the query (AES-256-GCM; the key is used once, so its nonce is zero). The other encrypts answers,
under a nonce of their own, with the contract's digest and the query's encapsulation and tag as
associated data: an answer opens only for the client that asked, only as the answer to that query,
under that contract.

Whoever repeats a sealed query gets what it got, and cannot read it: the answer goes to the
client's key again. Where a contract asks for tickets, their desk decides what a repetition is.

What is encrypted is padded to sizes of the form that Padmé allows, at least one KiB, so that a
length tells O(log log) bits of itself and costs at most 12 % (Nikitin et al. 2019, *Reducing
Metadata Leakage from Encrypted Files and Communication with PURBs*, section 4). The host still
sees when a query comes, how large its class is, and how long its answer takes. An error is
sealed like an answer, and padded to the size of the answer that it takes the place of.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from cenacle.crypto import HpkePrivateKey, HpkePublicKey, SecretBytes, derive_key
from cenacle.crypto.kdf import encode_fields
from cenacle.enclave.serving_messages import ERROR_FIELDS, MAX_TEXT
from cenacle.enclave.tensor_bytes import (
    Parts,
    Tensors,
    byte_count,
    pack_tensors,
    to_json,
    unpack_tensors,
)
from cenacle.errors import CenacleError, DataError, SealError

__all__ = [
    "OVERHEAD_BYTES",
    "AnswerKey",
    "Query",
    "open_answer",
    "open_query",
    "padded_size",
    "read_query",
    "seal_answer",
    "seal_query",
]

_SECRET: Final = 32
_TAG: Final = 16
_NONCE: Final = 12
_WRAPPED: Final = 1088 + 32 + _SECRET + _TAG  # X-Wing's ciphertext, and what it encrypts
_LEAST: Final = 1024
_MAX_HEADER: Final = 256 * 1024
_ALIGNMENT: Final = 16
_ONCE: Final = bytes(_NONCE)

OVERHEAD_BYTES: Final = _WRAPPED + _TAG
"""What sealing adds to a padded query."""


class AnswerKey:
    """Encrypts or opens the answers to one query."""

    __slots__ = ("_bound", "_cipher")

    def __init__(self, secret: SecretBytes, contract: str, sealed: bytes | memoryview) -> None:
        # The encapsulation and the tag stand for the query to the two who have its keys.
        ends = bytes(sealed[:_WRAPPED]) + bytes(sealed[-_TAG:])
        self._bound = encode_fields(b"cenacle/answer", contract.encode(), ends)
        self._cipher = _cipher(secret, "serving/answer")

    def encrypt(self, plaintext: bytes | bytearray) -> bytes:
        """``nonce (12) | ciphertext | tag (16)``."""
        nonce = secrets.token_bytes(_NONCE)
        return nonce + self._cipher.encrypt(nonce, plaintext, self._bound)

    def decrypt(self, data: bytes | bytearray | memoryview) -> bytes:
        """The inverse of :meth:`encrypt`; raises SealError."""
        try:
            return self._cipher.decrypt(bytes(data[:_NONCE]), data[_NONCE:], self._bound)
        except (InvalidTag, ValueError):
            raise SealError(
                "a sealed answer does not open",
                found=f"{len(data)} bytes",
                expected="the enclave's answer to this very query",
                remedy="ask again; if it goes on, somebody on the way alters answers",
            ) from None


@dataclass(frozen=True, slots=True)
class Query:
    """What a sealed query holds: tensors, and the use of a ticket if there is one."""

    tensors: dict[str, NDArray[Any]]
    ticket: dict[str, Any] | None


def padded_size(size: int) -> int:
    """The least size that Padmé allows for ``size`` bytes, and at least 1024."""
    size = max(size, _LEAST)
    exponent = size.bit_length() - 1
    mask = (1 << (exponent - exponent.bit_length())) - 1
    return (size + mask) & ~mask


def seal_query(
    enclave: HpkePublicKey,
    contract: str,
    tensors: Tensors,
    ticket: Mapping[str, Any] | None = None,
) -> tuple[bytes, AnswerKey]:
    """Encrypt a query to the enclave; returns it, and what opens its answer.

    Args:
        enclave: the key that verified evidence vouches for.
        contract: digest of the contract that the enclave serves under.

    Raises:
        DataError: tensors that cannot be sent.
    """
    headers, parts = pack_tensors(tensors)
    fields: dict[str, Any] = {"tensors": headers}
    if ticket is not None:
        fields["ticket"] = dict(ticket)
    plaintext = _lay_out(fields, parts, 0)
    with SecretBytes.random(_SECRET) as secret:
        with secret.view() as view:
            wrapped = enclave.seal(view, *_context(contract))
        body = _cipher(secret, "serving/query").encrypt(_ONCE, plaintext, wrapped)
        sealed = wrapped + body
        return sealed, AnswerKey(secret, contract, sealed)


def open_query(
    key: HpkePrivateKey, contract: str, sealed: bytes | bytearray | memoryview
) -> tuple[bytearray, AnswerKey]:
    """Decrypt a query, without looking at what it says; see :func:`read_query`.

    Raises:
        SealError: it is for another key or contract, or was altered.
    """
    data = memoryview(sealed)
    plaintext = bytearray(max(0, data.nbytes - OVERHEAD_BYTES))
    try:
        if not plaintext:
            raise ValueError
        wrapped = bytes(data[:_WRAPPED])
        with key.open(wrapped, *_context(contract)) as secret:
            if len(secret) != _SECRET:
                raise ValueError
            opened = _cipher(secret, "serving/query")
            opened.decrypt_into(_ONCE, data[_WRAPPED:], wrapped, plaintext)
            return plaintext, AnswerKey(secret, contract, data)
    except (SealError, InvalidTag, ValueError):
        raise SealError(
            "a sealed query does not open",
            found=f"{data.nbytes} bytes",
            expected="a query sealed to this enclave's key under its contract",
            remedy="fetch the enclave's evidence again: it may have been started anew",
        ) from None


def read_query(plaintext: bytes | bytearray | memoryview) -> Query:
    """What a decrypted query says.

    Raises:
        DataError: it has another form; the error quotes nothing of it.
    """
    fields, payload = _read(plaintext, "query", ({"tensors"}, {"tensors", "ticket"}))
    ticket = fields.get("ticket")
    if ticket is not None and not isinstance(ticket, dict):
        raise _malformed("query")
    return Query(unpack_tensors(fields["tensors"], payload), ticket)


def seal_answer(key: AnswerKey, answer: Tensors | CenacleError, *, at_least: int = 0) -> bytes:
    """Encrypt an answer, or the error in its place, for the client that asked.

    Args:
        at_least: bytes of tensors that the answer is made to seem to hold.
    """
    if isinstance(answer, CenacleError):
        told = {
            name: value[:MAX_TEXT]
            for name, value in answer.to_dict().items()
            if name in ERROR_FIELDS and value is not None
        }
        return key.encrypt(_lay_out({"error": told}, [], at_least))
    headers, parts = pack_tensors(answer)
    return key.encrypt(_lay_out({"tensors": headers}, parts, at_least))


def open_answer(key: AnswerKey, answer: bytes | bytearray | memoryview) -> dict[str, NDArray[Any]]:
    """The tensors of an answer.

    Raises:
        SealError: it is not the enclave's answer to this query.
        DataError: it has another form.
        CenacleError: what the enclave answered instead.
    """
    fields, payload = _read(key.decrypt(answer), "answer", ({"tensors"}, {"error"}))
    if "error" not in fields:
        return unpack_tensors(fields["tensors"], payload)
    told = fields["error"]
    if not isinstance(told, dict) or not all(isinstance(text, str) for text in told.values()):
        raise _malformed("answer")
    raise CenacleError.from_dict(told)


def _context(contract: str) -> tuple[bytes, bytes]:
    return b"cenacle/query", contract.encode()


def _cipher(secret: SecretBytes, label: str) -> AESGCM:
    with derive_key(secret, label) as derived, derived.view() as view:
        return AESGCM(view)


def _lay_out(fields: Mapping[str, Any], parts: Parts, at_least: int) -> bytearray:
    """``header length (4) | tensors' length (8) | header | tensors | zeros``."""
    header = to_json(fields)
    header += b" " * (-(12 + len(header)) % _ALIGNMENT)  # tensors begin at a multiple of 16
    size = byte_count(parts)
    start = 12 + len(header)
    # The words of an error are longer than the names of a tensor or two: neither shows.
    plaintext = bytearray(padded_size(max(start, _LEAST) + max(size, at_least)))
    plaintext[:start] = len(header).to_bytes(4, "big") + size.to_bytes(8, "big") + header
    for part in parts:
        plaintext[start : start + len(part)] = part
        start += len(part)
    return plaintext


def _read(
    plaintext: bytes | bytearray | memoryview, what: str, forms: tuple[set[str], ...]
) -> tuple[dict[str, Any], memoryview]:
    data = memoryview(plaintext)
    header, size = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:12], "big")
    start = 12 + header
    if data.nbytes < 12 or header > _MAX_HEADER or start + size > data.nbytes:
        raise _malformed(what)
    try:
        fields = json.loads(bytes(data[12:start]))
    except (ValueError, RecursionError):
        raise _malformed(what) from None
    if not isinstance(fields, dict) or set(fields) not in forms:
        raise _malformed(what)
    if "tensors" in fields and not isinstance(fields["tensors"], list):
        raise _malformed(what)
    return fields, data[start : start + size]


def _malformed(what: str) -> DataError:
    return DataError(
        f"a sealed {what} opens, and holds something else",
        found="another form",
        expected="tensors as this version of cenacle sends them",
        remedy="use the same version of cenacle on both sides",
    )
