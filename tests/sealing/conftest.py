"""A second implementation of docs/sealed-container.md, and files for the tests to seal.

The reference is written from the document with HKDF, AES-GCM and SHA-256 alone and shares no
code with ``cenacle.sealing``; where the two disagree, one of them is wrong.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cenacle.crypto import SecretBytes
from cenacle.sealing.container import Cipher

KINDS = {"file": 1, "table": 2, "tensors": 3, "package": 4}


def _field(data: bytes) -> bytes:
    return len(data).to_bytes(8, "big") + data


@dataclass
class Reference:
    """The parts of a container, as the document names them."""

    header: bytes
    records: list[bytes]
    table: bytes
    end: bytes
    content_digest: str | None

    @property
    def container(self) -> bytes:
        return self.header + b"".join(self.records) + self.table + self.end

    @property
    def header_digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.header).hexdigest()}"


def reference_seal(
    asset_key: bytes,
    salt: bytes,
    plaintext: bytes,
    *,
    kind: str = "file",
    chunk_log2: int = 6,
    table: bool = True,
) -> Reference:
    prefix = b"CENACLE\x00" + bytes([1, 1, KINDS[kind], chunk_log2, int(table), 0, 0, 0])

    def derive(label: bytes) -> bytes:
        info = _field(b"cenacle/v1") + _field(label) + _field(prefix)
        return HKDF(SHA256(), 32, salt, info).derive(asset_key)

    header = prefix + salt + derive(b"sealing/commitment")
    header_digest = hashlib.sha256(header).digest()
    gcm = AESGCM(derive(b"sealing/file"))
    size = 2**chunk_log2
    records = []
    for i, start in enumerate(range(0, len(plaintext), size)):
        nonce = bytes(4) + i.to_bytes(8, "big")
        records.append(gcm.encrypt(nonce, plaintext[start : start + size], header_digest + nonce))
    digests = b"".join(hashlib.sha256(record).digest() for record in records) if table else b""
    nonce = b"\0\0\0\1" + len(records).to_bytes(8, "big")
    length = len(plaintext).to_bytes(8, "big")
    table_digest = hashlib.sha256(digests).digest() if table else b""
    end = gcm.encrypt(nonce, length + table_digest, header_digest + nonce)
    content = hashlib.sha256(
        b"cenacle/v1/sealing/content\x00" + header_digest + length + table_digest + end
    ).hexdigest()
    return Reference(header, records, digests, end, f"sha256:{content}" if table else None)


KEY = bytes(range(32))


@pytest.fixture
def key() -> SecretBytes:
    return SecretBytes(KEY)


@pytest.fixture
def other_key() -> SecretBytes:
    return SecretBytes(bytes(32))


@pytest.fixture
def sealed() -> Reference:
    """200 bytes in chunks of 64: three full ones and one of 8."""
    return reference_seal(KEY, bytes(range(100, 132)), bytes(range(200)))


@pytest.fixture(name="reference_seal")
def reference_seal_fixture() -> object:
    return reference_seal


@pytest.fixture
def opened_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of all chunks that are decrypted from now on, in order."""
    opened: list[int] = []
    genuine = Cipher.open

    def spy(self: Cipher, index: int, record: Any, out: Any) -> None:
        opened.append(index)
        genuine(self, index, record, out)

    monkeypatch.setattr(Cipher, "open", spy)
    return opened
