"""The broker's transparency log: what it decided, for everyone to check.

An entry is canonical JSON that states its ``kind``; its bytes are the leaf of an RFC 9162 tree.
The broker signs tree heads as C2SP checkpoints (https://c2sp.org/tlog-checkpoint), which are
signed notes (https://c2sp.org/signed-note)::

    hospitals.example/broker
    20852163
    CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=
    timestamp 2027-01-31T12:00:00Z

    — hospitals.example/broker Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/...

Parsing and verifying are pure and raise. A head without a good signature is never returned.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol, Self

from cenacle.broker import merkle
from cenacle.crypto.signing import SigningKey, VerifyKey
from cenacle.documents.base import b64, format_time, parse_time, unb64
from cenacle.errors import DocumentError, InputError, ProofError, SignatureError

__all__ = [
    "LogEntryProof",
    "LogReader",
    "PlacedEntry",
    "TransparencyLog",
    "TreeHead",
    "check_origin",
    "key_id",
    "open_note",
    "parse_and_verify_head",
    "sign_head",
    "sign_note",
    "verify_consistency",
]

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_SIGNATURES: Final = 16
_ED25519: Final = b"\x01"
_DASH: Final = "\u2014"
_SIZE: Final = re.compile(r"^(?:0|[1-9][0-9]{0,18})$", re.ASCII)
_TIMESTAMP: Final = "timestamp "


@dataclass(frozen=True, slots=True)
class TreeHead:
    """What the broker vouches for: the log named ``origin`` had this root at this size.

    ``root`` is 32 bytes; ``timestamp`` is RFC 3339, UTC, whole seconds.
    """

    origin: str
    size: int
    root: bytes
    timestamp: str

    def note_text(self) -> str:
        """The signed part of the checkpoint, with its final newline."""
        return f"{self.origin}\n{self.size}\n{b64(self.root)}\n{_TIMESTAMP}{self.timestamp}\n"


def check_origin(origin: str) -> str:
    """A log's name: non-empty, no white space, control characters or plus signs (C2SP)."""
    if not origin or len(origin) > 255 or not origin.isprintable() or re.search(r"[\s+]", origin):
        raise InputError(
            "a log's origin cannot be used",
            found=repr(origin[:80]),
            expected="a name such as hospitals.example/broker, without spaces or plus signs",
        )
    return origin


def key_id(name: str, key: VerifyKey) -> bytes:
    """The first four bytes of SHA-256(name || 0x0A || 0x01 || public key): C2SP signed-note."""
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + key.raw).digest()[:4]


def sign_note(text: str, name: str, key: SigningKey) -> str:
    """A signed note with one Ed25519 signature; ``text`` ends in a newline."""
    signature = key_id(name, key.verify_key) + key.sign(text.encode())
    return f"{text}\n{_DASH} {name} {b64(signature)}\n"


def sign_head(head: TreeHead, key: SigningKey) -> str:
    """The head as a checkpoint, signed under its origin as key name."""
    check_origin(head.origin)
    parse_time(head.timestamp)
    return sign_note(head.note_text(), head.origin, key)


def open_note(note: str, name: str, key: VerifyKey) -> str:
    """The text of a note that ``key`` signed under ``name``.

    Signatures by other keys are ignored, as C2SP asks; a wrong one by this key is not.

    Raises:
        ProofError: it is not a signed note.
        SignatureError: ``key`` did not sign exactly this text.
    """
    if len(note) > MAX_HEAD_BYTES:
        raise _malformed("it is too long")
    try:
        note.encode()
    except UnicodeEncodeError:
        raise _malformed("it is not Unicode text") from None
    if any(character < " " and character != "\n" for character in note):
        raise _malformed("it holds control characters")
    text, separator, block = note.rpartition("\n\n")
    if not separator or not block.endswith("\n"):
        raise _malformed("it has no signature lines")
    text += "\n"
    lines = block[:-1].split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise _malformed("it has too many signatures")
    wanted = key_id(name, key)
    signed = False
    for line in lines:
        fields = line.split(" ")
        if len(fields) != 3 or fields[0] != _DASH or not fields[1] or "+" in fields[1]:
            raise _malformed("a signature line has the wrong form")
        try:
            signature = unb64(fields[2])
        except DocumentError:
            raise _malformed("a signature is not base64") from None
        if len(signature) < 5:
            raise _malformed("a signature is too short")
        if fields[1] == name and signature[:4] == wanted:
            key.verify(signature[4:], text.encode())
            signed = True
    if not signed:
        raise SignatureError(
            "a log's head is not signed by the expected key",
            found=f"{len(lines)} signatures by others",
            expected=f"one by {name} with key {key.keyid[:16]}",
            remedy="check that this is the broker whose identity was pinned",
        )
    return text


def parse_and_verify_head(text: str, origin: str, key: VerifyKey) -> TreeHead:
    """Parse a checkpoint and check that ``key`` signed it for the log ``origin``.

    Raises:
        ProofError: the text is no checkpoint, or of another log.
        SignatureError: the signature is missing or wrong.
    """
    lines = open_note(text, origin, key).split("\n")
    if len(lines) != 5 or lines[4] != "" or not lines[3].startswith(_TIMESTAMP):
        raise _malformed("it is not origin, size, root and timestamp")
    if lines[0] != origin:
        raise ProofError(
            "a tree head is of another log", found=repr(lines[0][:255]), expected=repr(origin)
        )
    if not _SIZE.match(lines[1]) or int(lines[1]) > merkle.MAX_SIZE:
        raise _malformed("its size is not a whole number")
    try:
        root = unb64(lines[2])
        timestamp = lines[3].removeprefix(_TIMESTAMP)
        parse_time(timestamp)
    except DocumentError as error:
        raise _malformed(error.what) from None
    if len(root) != merkle.HASH_BYTES:
        raise _malformed(f"its root has {len(root)} bytes")
    size = int(lines[1])
    if size == 0 and root != merkle.EMPTY_ROOT:
        raise _malformed("it is empty and has another root than the empty tree")
    return TreeHead(origin, size, root, timestamp)


def verify_consistency(earlier: TreeHead, later: TreeHead, path: tuple[bytes, ...]) -> None:
    """Check that ``later`` only appended to ``earlier``.

    Raises:
        ProofError: the log was rewritten, became shorter, or the proof is wrong.
    """
    if earlier.origin != later.origin:
        raise ProofError(
            "two tree heads are of different logs", found=later.origin, expected=earlier.origin
        )
    merkle.verify_consistency(earlier.size, later.size, earlier.root, later.root, path)


@dataclass(frozen=True, slots=True)
class LogEntryProof:
    """That an entry is in the log: its index, the tree's size, and the path of 32-byte hashes."""

    index: int
    size: int
    path: tuple[bytes, ...]

    def verify(self, leaf: bytes, head: TreeHead) -> None:
        """Check that the entry with body ``leaf`` is in the tree of ``head``.

        Raises:
            ProofError: it is not, or the proof is for another size.
        """
        if head.size != self.size:
            raise ProofError(
                "an inclusion proof is for another tree head",
                found=f"a proof for {self.size} entries",
                expected=f"{head.size} entries",
            )
        merkle.verify_inclusion(merkle.leaf_hash(leaf), self.index, self.size, self.path, head.root)

    def to_dict(self) -> dict[str, Any]:
        return {"index": self.index, "size": self.size, "path": [b64(step) for step in self.path]}

    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        """The inverse of :meth:`to_dict`; raises ProofError for anything else."""
        if not isinstance(fields, dict) or set(fields) != {"index", "size", "path"}:
            raise ProofError("an inclusion proof is malformed", expected="index, size and path")
        index, size, path = fields["index"], fields["size"], fields["path"]
        if type(index) is not int or type(size) is not int or not 0 <= index < size:
            raise ProofError(
                "an inclusion proof is malformed",
                found=f"index {index!r:.40}, size {size!r:.40}",
                expected="whole numbers, the index below the size",
            )
        if not isinstance(path, list) or len(path) > 63:
            raise ProofError(
                "an inclusion proof is malformed", expected="a path of up to 63 hashes"
            )
        steps = []
        for step in path:
            try:
                raw = unb64(step) if isinstance(step, str) else b""
            except DocumentError:
                raw = b""
            if len(raw) != merkle.HASH_BYTES:
                raise ProofError(
                    "an inclusion proof is malformed", expected="hashes of 32 bytes in base64"
                )
            steps.append(raw)
        return cls(index, size, tuple(steps))


class LogReader(Protocol):
    """What the log needs of a store's transaction."""

    def log_size(self) -> int: ...

    def log_root(self, size: int | None = None) -> bytes: ...

    def inclusion_path(self, index: int, size: int | None = None) -> tuple[bytes, ...]: ...

    def consistency_path(self, first: int, second: int | None = None) -> tuple[bytes, ...]: ...


class PlacedEntry(Protocol):
    """The tree in which a batch of entries became durable."""

    @property
    def size(self) -> int: ...

    @property
    def root(self) -> bytes: ...


def _now() -> datetime:
    return datetime.now(UTC)


class TransparencyLog:
    """Signs and proves what a store's transaction holds.

    A head signed inside a committer's closure is safe to hand out once the closure's future
    is resolved: by then the entries under it are durable. On failure it must be dropped,
    which is what the future's exception does.

    Args:
        origin: the log's name, the first line of every head.
        key: the broker's signing key.
        clock: the time that heads carry.
    """

    def __init__(self, origin: str, key: SigningKey, clock: Callable[[], datetime] = _now) -> None:
        self.origin = check_origin(origin)
        self._key = key
        self._clock = clock
        self._newest: tuple[tuple[int, bytes], str] = (-1, b""), ""

    def signed_head(self, tx: LogReader) -> str:
        """The newest head that the transaction sees, as a signed checkpoint."""
        size = tx.log_size()
        head = TreeHead(self.origin, size, tx.log_root(size), format_time(self._clock()))
        return sign_head(head, self._key)

    def signed_place(self, place: PlacedEntry) -> str:
        """The head of the tree that an entry was placed in, signed once for all in its batch."""
        known, text = self._newest
        if known != (place.size, place.root):
            head = TreeHead(self.origin, place.size, place.root, format_time(self._clock()))
            text = sign_head(head, self._key)
            self._newest = (place.size, place.root), text
        return text

    def entry_proof(self, tx: LogReader, index: int, size: int | None = None) -> LogEntryProof:
        """Inclusion of entry ``index`` in the tree of ``size`` entries (default: the newest)."""
        size = tx.log_size() if size is None else size
        return LogEntryProof(index, size, tx.inclusion_path(index, size))


def _malformed(reason: str) -> ProofError:
    return ProofError(
        f"a tree head is malformed: {reason}",
        expected="a C2SP checkpoint with a timestamp line",
        remedy="fetch the head from the broker again",
    )
