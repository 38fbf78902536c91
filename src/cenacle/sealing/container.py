"""The sealed container, byte by byte: header, keys, nonces and layout. No I/O.

The specification is ``docs/sealed-container.md``; this module is its only implementation
of offsets and nonces, shared by the writer, the reader and the in-memory paths.

::

    header (80 bytes) | record 0 | ... | record n-1 | digest table (32 n bytes) | end record

A record is one chunk under AES-256-GCM with its tag. Nonces follow the STREAM construction
(Hoang, Reyhanitabar, Rogaway, Vizar: "Online Authenticated-Encryption and its Nonce-Reuse
Misuse-Resistance", CRYPTO 2015): a marker that tells chunks from the end, and a counter.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher as BlockCipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import GCM

from cenacle.crypto import SecretBytes, derive_key
from cenacle.errors import InputError, SealError

__all__ = [
    "ASSET_KEY_BYTES",
    "CHUNK_LOG2",
    "DIGEST_BYTES",
    "HEADER_BYTES",
    "KINDS",
    "MAGIC",
    "MAX_CHUNKS",
    "MAX_CHUNK_LOG2",
    "MIN_CHUNK_LOG2",
    "TAG_BYTES",
    "Cipher",
    "Header",
    "Layout",
    "content_digest",
    "parse_digest",
]

MAGIC: Final = b"CENACLE\x00"
VERSION: Final = 1
SUITE: Final = 1  # HKDF-SHA-256, AES-256-GCM, SHA-256
HEADER_BYTES: Final = 80
TAG_BYTES: Final = 16
DIGEST_BYTES: Final = 32
ASSET_KEY_BYTES: Final = 32
CHUNK_LOG2: Final = 20
MIN_CHUNK_LOG2: Final = 6
MAX_CHUNK_LOG2: Final = 24
MAX_CHUNKS: Final = 1 << 32
KINDS: Final = ("file", "table", "tensors", "package")

_FLAG_TABLE: Final = 1
_PREFIX: Final = struct.Struct(">8sBBBBB3s")
_CHUNK_NONCE: Final = struct.Struct(">IQ")
_LENGTH: Final = struct.Struct(">Q")
_DOMAIN: Final = b"cenacle/v1/sealing/content\x00"


def _not_a_container(what: str, found: object, expected: object) -> SealError:
    return SealError(
        what,
        found=found,
        expected=expected,
        remedy="fetch the sealed file again from its owner; it is damaged or not a sealed file",
    )


def parse_digest(text: str) -> bytes:
    """The 32 bytes of ``sha256:<64 hex digits>``; raises :class:`InputError`."""
    algorithm, _, digits = text.partition(":")
    try:
        raw = bytes.fromhex(digits) if len(digits) == 64 else b""
    except ValueError:
        raw = b""
    if algorithm != "sha256" or len(raw) != DIGEST_BYTES:
        raise InputError(
            "a digest is malformed", found=repr(text[:80]), expected="sha256: and 64 hex digits"
        )
    return raw


@dataclass(frozen=True, slots=True)
class Header:
    """The first 80 bytes, all of which the key derivation or the commitment covers.

    Attributes:
        kind: one of :data:`KINDS`.
        chunk_log2: binary logarithm of the plaintext bytes a chunk holds.
        table: whether the digest table follows the records.
        salt: 32 random bytes that make the file key unique.
        commitment: 32 bytes only the holder of this very key could have written.
    """

    kind: str
    chunk_log2: int
    table: bool
    salt: bytes
    commitment: bytes

    def prefix(self) -> bytes:
        """The 16 fixed bytes before the salt: the context of the key derivation."""
        return _PREFIX.pack(
            MAGIC,
            VERSION,
            SUITE,
            KINDS.index(self.kind) + 1,
            self.chunk_log2,
            _FLAG_TABLE if self.table else 0,
            bytes(3),
        )

    def encode(self) -> bytes:
        return self.prefix() + self.salt + self.commitment

    def digest(self) -> bytes:
        """SHA-256 of the 80 bytes; names the file key, so it pins the container."""
        return hashlib.sha256(self.encode()).digest()

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a header; everything not understood is refused.

        Raises:
            SealError: not a container, or one of another version, suite or kind.
        """
        if len(data) < HEADER_BYTES:
            raise _not_a_container(
                "a sealed file is cut short", f"{len(data)} bytes", f"{HEADER_BYTES} or more"
            )
        magic, version, suite, kind, chunk_log2, flags, reserved = _PREFIX.unpack_from(data)
        if magic != MAGIC:
            raise _not_a_container(
                "this is not a sealed file", "other first bytes", "the mark CENACLE"
            )
        if version != VERSION or suite != SUITE:
            raise SealError(
                "a sealed file has an unknown format",
                found=f"version {version}, suite {suite}",
                expected=f"version {VERSION}, suite {SUITE}",
                remedy="open it with the release of Cenacle that wrote it",
            )
        if not 1 <= kind <= len(KINDS):
            raise _not_a_container("a sealed file has an unknown kind", kind, f"1 to {len(KINDS)}")
        if not MIN_CHUNK_LOG2 <= chunk_log2 <= MAX_CHUNK_LOG2:
            raise _not_a_container(
                "a sealed file has an unusable chunk size",
                f"2^{chunk_log2} bytes",
                f"2^{MIN_CHUNK_LOG2} to 2^{MAX_CHUNK_LOG2}",
            )
        if flags & ~_FLAG_TABLE or reserved != bytes(3):
            raise _not_a_container("a sealed file has unknown flags", flags, "0 or 1")
        return cls(
            kind=KINDS[kind - 1],
            chunk_log2=chunk_log2,
            table=bool(flags & _FLAG_TABLE),
            salt=bytes(data[16:48]),
            commitment=bytes(data[48:HEADER_BYTES]),
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies. All lengths and offsets are in bytes.

    Attributes:
        chunk: plaintext bytes of every chunk but the last.
        plaintext: length of the whole plaintext.
        table: whether there is a digest table.
    """

    chunk: int
    plaintext: int
    table: bool

    @property
    def chunks(self) -> int:
        return -(-self.plaintext // self.chunk)

    @property
    def end_bytes(self) -> int:
        return _LENGTH.size + (DIGEST_BYTES if self.table else 0) + TAG_BYTES

    @property
    def table_offset(self) -> int:
        return HEADER_BYTES + self.plaintext + self.chunks * TAG_BYTES

    @property
    def table_bytes(self) -> int:
        return self.chunks * DIGEST_BYTES if self.table else 0

    @property
    def end_offset(self) -> int:
        return self.table_offset + self.table_bytes

    @property
    def container(self) -> int:
        return self.end_offset + self.end_bytes

    def record_offset(self, index: int) -> int:
        return HEADER_BYTES + index * (self.chunk + TAG_BYTES)

    def chunk_bytes(self, index: int) -> int:
        """Plaintext bytes of chunk ``index``."""
        return min(self.chunk, self.plaintext - index * self.chunk)

    @classmethod
    def of_container(cls, header: Header, size: int) -> Self:
        """The only layout with which a container of ``size`` bytes can have been written.

        Raises:
            SealError: no plaintext length gives this size.
        """
        chunk = 1 << header.chunk_log2
        empty = cls(chunk, 0, header.table)
        body = size - empty.container
        overhead = TAG_BYTES + (DIGEST_BYTES if header.table else 0)
        chunks = -(-body // (chunk + overhead))
        layout = cls(chunk, body - chunks * overhead, header.table)
        if body < 0 or layout.plaintext < 0 or layout.chunks != chunks or chunks > MAX_CHUNKS:
            raise _not_a_container(
                "a sealed file is cut short or extended",
                f"{size} bytes, a length no sealed file has",
                "the length its writer gave it",
            )
        return layout


class Cipher:
    """The keys of one container. Safe to use from several threads at once.

    Args:
        header: as read or made; its commitment must match ``key``.
        key: the 32-byte asset key.

    Raises:
        InputError: the asset key has the wrong length.
        SealError: the header was altered, or ``key`` is not the key it was sealed with.
    """

    __slots__ = ("_aead", "_key", "header", "header_bytes", "header_digest")

    def __init__(self, header: Header, key: SecretBytes) -> None:
        expected = _commitment(header, key)
        if not hmac.compare_digest(expected, header.commitment):
            raise SealError(
                "a sealed file does not open with this key",
                found="a key commitment that this key does not give",
                expected="the key and the unaltered header it was sealed with",
                remedy="use the key of this very asset, or fetch the sealed file again",
            )
        self.header = header
        self.header_bytes = header.encode()
        self.header_digest = header.digest()
        self._key = derive_key(key, "sealing/file", header.prefix(), salt=header.salt)
        self._aead = AESGCM(self._key.view())

    @classmethod
    def create(
        cls, key: SecretBytes, kind: str, *, chunk_log2: int = CHUNK_LOG2, table: bool = True
    ) -> Self:
        """Fresh keys for a new container, under a fresh random salt."""
        if kind not in KINDS:
            raise InputError("unknown kind of content", found=kind, expected=", ".join(KINDS))
        if not MIN_CHUNK_LOG2 <= chunk_log2 <= MAX_CHUNK_LOG2:
            raise InputError(
                "unusable chunk size",
                found=f"2^{chunk_log2} bytes",
                expected=f"2^{MIN_CHUNK_LOG2} to 2^{MAX_CHUNK_LOG2} bytes",
            )
        header = Header(kind, chunk_log2, table, secrets.token_bytes(32), bytes(32))
        return cls(
            Header(kind, chunk_log2, table, header.salt, _commitment(header, key)),
            key,
        )

    def seal(
        self, index: int, chunk: bytes | bytearray | memoryview, out: bytearray | memoryview
    ) -> None:
        """Encrypt chunk ``index`` into ``out`` of exactly ``len(chunk) + 16`` bytes."""
        nonce = _CHUNK_NONCE.pack(0, index)
        self._aead.encrypt_into(nonce, chunk, self.header_digest + nonce, out)

    def seal_pieces(
        self, index: int, pieces: Sequence[memoryview], out: bytearray | memoryview
    ) -> None:
        """As :meth:`seal`, for a chunk that lies in several places; nothing is copied."""
        if len(pieces) == 1:
            self.seal(index, pieces[0], out)
            return
        nonce = _CHUNK_NONCE.pack(0, index)
        gcm = BlockCipher(AES256(self._key.view()), GCM(nonce)).encryptor()
        gcm.authenticate_additional_data(self.header_digest + nonce)
        view = memoryview(out)
        done = 0
        for piece in pieces:
            done += gcm.update_into(piece, view[done:])
        gcm.finalize()
        view[done:] = gcm.tag

    def open(
        self, index: int, record: bytes | bytearray | memoryview, out: bytearray | memoryview
    ) -> None:
        """Decrypt record ``index`` into ``out`` of exactly ``len(record) - 16`` bytes.

        Raises:
            SealError: not the record sealed at this place of this container. ``out`` is
                zeroed then, so unauthenticated plaintext is never seen.
        """
        nonce = _CHUNK_NONCE.pack(0, index)
        try:
            self._aead.decrypt_into(nonce, record, self.header_digest + nonce, out)
        except InvalidTag:
            out[:] = bytes(len(out))
            raise SealError(
                "a sealed file is damaged or was altered",
                found=f"chunk {index} does not authenticate at its place",
                expected="the chunk its writer sealed there",
                remedy="fetch the sealed file again from its owner",
            ) from None

    def seal_end(self, layout: Layout, table_digest: bytes) -> bytes:
        """The end record: it authenticates the plaintext length and the digest table."""
        nonce = _CHUNK_NONCE.pack(1, layout.chunks)
        plain = _LENGTH.pack(layout.plaintext) + (table_digest if layout.table else b"")
        return self._aead.encrypt(nonce, plain, self.header_digest + nonce)

    def open_end(self, layout: Layout, record: bytes, table_digest: bytes) -> None:
        """Check the end record against what the container's size and table say.

        Raises:
            SealError: truncated, extended, or with another digest table.
        """
        nonce = _CHUNK_NONCE.pack(1, layout.chunks)
        expected = _LENGTH.pack(layout.plaintext) + (table_digest if layout.table else b"")
        try:
            plain = self._aead.decrypt(nonce, record, self.header_digest + nonce)
        except InvalidTag:
            plain = b""
        if plain != expected:
            raise SealError(
                "a sealed file is cut short, extended or altered",
                found=f"an end that does not belong to {layout.chunks} chunks",
                expected="the end its writer sealed",
                remedy="fetch the sealed file again from its owner",
            )


def _commitment(header: Header, key: SecretBytes) -> bytes:
    if len(key) != ASSET_KEY_BYTES:
        raise InputError(
            "an asset key has the wrong length",
            found=f"{len(key)} bytes",
            expected=f"{ASSET_KEY_BYTES} bytes",
        )
    with derive_key(key, "sealing/commitment", header.prefix(), salt=header.salt) as value:
        view = value.view()
        commitment = bytes(view)
        view.release()
    return commitment


def content_digest(header: Header, layout: Layout, table_digest: bytes, end: bytes) -> bytes:
    """The digest a manifest pins: it covers every byte of a container with a table.

    ``table_digest`` is the SHA-256 of the digest table; ``end`` the end record as stored.
    Computable without a key.
    """
    return hashlib.sha256(
        _DOMAIN + header.digest() + _LENGTH.pack(layout.plaintext) + table_digest + end
    ).digest()
