"""Who a broker is: its keys, kept in one file of its folder, and what others pin of them.

The keys are in a single file that appears whole or not at all, so a folder is never half
made. A file that is missing, damaged or of another broker is refused; nothing is ever made
anew in its place, because parties have wrapped their asset keys to the old ones.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

from pydantic import field_validator

from cenacle.broker.log import check_origin
from cenacle.crypto.hpke import PUBLIC_KEY_BYTES, HpkePrivateKey, HpkePublicKey
from cenacle.crypto.memory import SecretBytes
from cenacle.crypto.signing import SigningKey, VerifyKey
from cenacle.documents.base import (
    Base64,
    Frozen,
    b64,
    canonical_json,
    parse_json,
    sha256_digest,
    unb64,
)
from cenacle.errors import DocumentError, InputError, VerificationError
from cenacle.sealing.disk import AtomicFile, disk_errors, pread_into, pwrite_all

__all__ = [
    "KEY_FILE",
    "SEALED_FILE",
    "BrokerIdentity",
    "BrokerKeys",
    "check_private_file",
    "private_folder",
    "read_private",
    "write_private",
]

KEY_FILE: Final = "broker.key"
SEALED_FILE: Final = "broker.sealed"
_FORMAT: Final = "cenacle-broker-key-v1"
_MAX_FILE: Final = 64 * 1024
_PARTIAL: Final = re.compile(r"\.cenacle-[0-9a-f]+\.partial")


class BrokerIdentity(Frozen):
    """What a party pins. The address and certificate may change; the keys may not.

    Attributes:
        origin: the name of the broker's log, the first line of its tree heads.
        signing_key: Ed25519 public key, base64 of 32 bytes.
        hpke_key: ML-KEM-768 + X25519 public key, base64 of 1216 bytes.
        url: where it answers, ``https://...``; None while it answers nowhere.
        tls_certificate: PEM; None while it answers nowhere.
    """

    origin: str
    signing_key: Base64
    hpke_key: Base64
    url: str | None = None
    tls_certificate: str | None = None

    @field_validator("origin")
    @classmethod
    def _check_origin(cls, origin: str) -> str:
        try:
            return check_origin(origin)
        except InputError as error:
            raise ValueError(error.diagnostics()) from None

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if not url.startswith("https://") or len(url) > 2048 or not url.isprintable():
            raise ValueError("a broker's url starts with https://")
        return url

    @field_validator("signing_key")
    @classmethod
    def _check_signing_key(cls, text: str) -> str:
        if len(unb64(text)) != 32:
            raise ValueError("an Ed25519 public key has 32 bytes")
        return text

    @field_validator("hpke_key")
    @classmethod
    def _check_hpke_key(cls, text: str) -> str:
        if len(unb64(text)) != PUBLIC_KEY_BYTES:
            raise ValueError(f"an HPKE public key has {PUBLIC_KEY_BYTES} bytes")
        return text

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of the two keys alone."""
        keys = {
            "format": "cenacle-broker-v1",
            "hpke_key": self.hpke_key,
            "signing_key": self.signing_key,
        }
        return sha256_digest(canonical_json(keys))

    @property
    def verify_key(self) -> VerifyKey:
        return VerifyKey(unb64(self.signing_key))

    @property
    def hpke_public(self) -> HpkePublicKey:
        return HpkePublicKey(unb64(self.hpke_key))

    def require_digest(self, pinned: str) -> None:
        """Raise :class:`VerificationError` unless the keys are the pinned ones."""
        if self.digest != pinned:
            raise VerificationError(
                "a broker is not the one that was pinned",
                found=self.digest,
                expected=pinned,
                remedy="do not hand it keys; ask its owner over another channel",
            )


class BrokerKeys:
    """The private side: made by :meth:`create` or :meth:`load`.

    Attributes:
        signing_key: the Ed25519 key for tree heads.
        hpke_key: the key that parties wrap asset keys to.
        identity: the public half; without an address until :meth:`published_at`.
    """

    def __init__(self, origin: str, signing_key: SigningKey, hpke_key: HpkePrivateKey) -> None:
        self.signing_key = signing_key
        self.hpke_key = hpke_key
        self.identity = BrokerIdentity.from_fields(
            {
                "origin": check_origin(origin),
                "signing_key": b64(signing_key.verify_key.raw),
                "hpke_key": b64(hpke_key.public_key.raw),
            }
        )

    @classmethod
    def create(cls, folder: Path, origin: str) -> Self:
        """Make keys in a folder (made too, mode 0700) that has none.

        Raises:
            InputError: the folder has keys already, or others can read it.
            UnavailableError: the disk has no room; nothing was left behind.
        """
        keys = cls(origin, SigningKey.generate(), HpkePrivateKey.generate())
        with private_folder(folder):
            path = folder / KEY_FILE
            if os.path.lexists(path) or os.path.lexists(folder / SEALED_FILE):
                raise InputError(
                    "a broker's folder has keys already",
                    found=str(folder),
                    expected="a folder without keys",
                    remedy="start the broker with that folder, or choose another",
                )
            write_private(path, keys.to_file())
        return keys

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a folder's keys.

        Raises:
            InputError: they are missing, damaged, or readable by others.
        """
        path = folder / KEY_FILE
        if os.path.lexists(folder / SEALED_FILE):
            raise InputError(
                "a broker's keys are sealed to its machine's TPM",
                found=str(folder / SEALED_FILE),
                expected=f"{path}",
                remedy="open them with open_keys, which asks the TPM",
            )
        if not os.path.lexists(folder) or not os.path.lexists(path):
            raise InputError(
                "a broker's folder has no keys",
                found=f"no {path}",
                expected="the file that its first start made",
                remedy="restore it from a backup; new keys could not open what parties handed in",
            )
        with private_folder(folder):
            return cls.from_file(read_private(path), path)

    @classmethod
    def open(cls, folder: Path, origin: str) -> Self:
        """:meth:`load`, or :meth:`create` in a folder that is absent or empty.

        Raises:
            InputError: as they do; also when the folder has other files but no keys, or keys
                of another origin.
        """
        with private_folder(folder):
            # A first start that was killed may have left a nameless partial file.
            fresh = all(_PARTIAL.fullmatch(path.name) for path in folder.iterdir())
        if fresh:
            try:
                return cls.create(folder, origin)
            except InputError:
                if not (folder / KEY_FILE).exists():  # otherwise another process was first
                    raise
        keys = cls.load(folder)
        found = keys.identity.origin
        if found != origin:
            raise InputError("a broker's folder is of another broker", found=found, expected=origin)
        return keys

    def published_at(self, url: str, tls_certificate: str) -> BrokerIdentity:
        """Set the address and certificate that parties pin; the digest stays what it was."""
        self.identity = BrokerIdentity.from_fields(
            {**self.identity.to_fields(), "url": url, "tls_certificate": tls_certificate}
        )
        return self.identity

    def to_file(self) -> bytes:
        """The content of the key file: secret, in the clear."""
        with self.signing_key.seed().view() as signing, self.hpke_key.seed().view() as hpke:
            fields = {
                "format": _FORMAT,
                "origin": self.identity.origin,
                "signing_seed": b64(bytes(signing)),
                "hpke_seed": b64(bytes(hpke)),
            }
        # Not every bit of an ML-KEM seed shows in its public key, so damage is sought here.
        return canonical_json({**fields, "checksum": sha256_digest(canonical_json(fields))})

    @classmethod
    def from_file(cls, data: bytes, path: Path) -> Self:
        """The inverse of :meth:`to_file`; ``path`` is what errors name."""
        try:
            fields: Any = parse_json(data)
            checksum = fields.pop("checksum")
            whole = (
                checksum == sha256_digest(canonical_json(fields))
                and set(fields) == {"format", "origin", "signing_seed", "hpke_seed"}
                and fields["format"] == _FORMAT
            )
            keys = cls(
                fields["origin"],
                SigningKey.from_seed(SecretBytes(bytearray(unb64(fields["signing_seed"])))),
                HpkePrivateKey(SecretBytes(bytearray(unb64(fields["hpke_seed"])))),
            )
        except (DocumentError, InputError, KeyError, TypeError, ValueError, AttributeError):
            whole = False
        if not whole:
            raise InputError(
                "a broker's key file is damaged",
                found=str(path),
                expected="the file that its first start made, unaltered",
                remedy="restore it from a backup; do not make new keys in its place",
            )
        return keys


@contextmanager
def private_folder(folder: Path) -> Iterator[None]:
    """A folder of the broker's alone (made with mode 0700 if absent), held while in use.

    Raises:
        InputError: others can read or write it, or it is no folder.
    """
    with disk_errors(f"open the folder {folder}"):
        try:
            folder.mkdir(mode=0o700, parents=False)
        except FileExistsError:
            pass
        else:
            folder.chmod(0o700)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        _check_private(os.fstat(fd), folder, 0o700)
        fcntl.flock(fd, fcntl.LOCK_EX)  # two first starts at once make one set of keys
        yield
    finally:
        os.close(fd)


def check_private_file(path: Path) -> None:
    """Raise :class:`InputError` unless only this user can read the file ``path``."""
    with disk_errors(f"read {path}"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_private(os.fstat(fd), path, 0o600)
    finally:
        os.close(fd)


def write_private(path: Path, data: bytes) -> None:
    """A file with mode 0600, whole or not at all; replaces one that is there."""
    with AtomicFile(path, 0o600) as file, disk_errors(f"write {path}"):
        os.fchmod(file.fd, 0o600)
        pwrite_all(file.fd, data, 0)
        file.commit()


def _check_private(status: os.stat_result, path: Path, mode: int) -> None:
    if mode == 0o600 and not stat.S_ISREG(status.st_mode):
        raise InputError("a secret is not an ordinary file", found=str(path))
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        raise InputError(
            "a broker's secrets can be read or changed by others",
            found=f"{path} with mode {stat.S_IMODE(status.st_mode):04o}",
            expected=f"mode {mode:04o} and the broker's own user",
            remedy=f"run: chmod {mode:o} {path}",
        )


def read_private(path: Path) -> bytes:
    """A small file that only this user can read.

    Raises:
        InputError: it is missing, others can read it, or it is no ordinary file.
    """
    with disk_errors(f"read {path}"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        _check_private(os.fstat(fd), path, 0o600)
        buffer = bytearray(_MAX_FILE)
        return bytes(buffer[: pread_into(fd, memoryview(buffer), 0)])
    finally:
        os.close(fd)
