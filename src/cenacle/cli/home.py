"""The user's folder: party keys, pinned brokers, the last seen log heads.

``$CENACLE_HOME``, or ``~/.cenacle``::

    parties/NAME/party.json    the signed Party document, to hand out
    parties/NAME/keys          signing and HPKE seeds; mode 0600, never printed
    brokers/ALIAS.json         pinned identities; ``default`` unless told otherwise
    heads/DIGEST.txt           the newest verified head of each broker's log
    installation.key           signs this installation's simulated evidence
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from cenacle.attestation.simulated import InstallationKey
from cenacle.broker.client import BrokerClient
from cenacle.broker.identity import BrokerIdentity
from cenacle.broker.log import TreeHead, parse_and_verify_head
from cenacle.crypto import HpkePrivateKey, SecretBytes, SigningKey
from cenacle.documents.base import b64, canonical_json, format_time, parse_json
from cenacle.documents.contract import EnclaveRequirements
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party
from cenacle.errors import ConflictError, InputError
from cenacle.sealing.disk import AtomicFile, disk_errors, pwrite_all

__all__ = ["Home", "PartyKeys", "write_file"]

_SEEDS = (32, 96)  # Ed25519; ML-KEM-768 and X25519
_ALIAS = re.compile(r"^[a-z0-9][a-z0-9-]{0,62}$")


def write_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file whole or not at all."""
    with AtomicFile(path, mode) as file, disk_errors(f"write {path}"):
        pwrite_all(file.fd, data, 0)
        file.commit()


def _rename_new(made: Path, folder: Path) -> None:
    """Give a folder its name, unless something has that name already."""
    taken = folder.exists()
    if not taken:
        try:
            made.rename(folder)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            taken = True  # somebody else was first
    if taken:
        raise ConflictError(
            "a party of this name exists here already",
            found=str(folder),
            expected="a new name",
            remedy="show it with `cenacle party show`, or choose another name",
        )


@dataclass(frozen=True)
class PartyKeys:
    """A party of this user's: its document and both private keys."""

    party: Party
    envelope: Envelope
    signing_key: SigningKey
    hpke_key: HpkePrivateKey


class Home:
    """The folder and what it knows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def default(cls) -> Self:
        return cls(Path(os.environ.get("CENACLE_HOME") or Path.home() / ".cenacle"))

    def _private(self, *parts: str) -> Path:
        folder = self.folder.joinpath(*parts)
        with disk_errors(f"make the folder {folder}"):
            # Apart: the mode does not apply to parents that are made on the way.
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    # ------------------------------------------------------------------ parties

    def new_party(self, name: str) -> PartyKeys:
        """Make keys and the self-signed document; refuses a name that exists."""
        signing, hpke = SigningKey.generate(), HpkePrivateKey.generate()
        party = Party.from_fields(
            {
                "name": name,
                "signing_key": b64(signing.verify_key.raw),
                "hpke_key": b64(hpke.public_key.raw),
                "created": format_time(datetime.now(UTC)),
            }
        )
        parties = self._private("parties")
        folder = parties / name
        envelope = Envelope.sign(party, signing)
        # Made under a hidden name first: a folder of a party is whole or not there.
        made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parties))
        try:
            with signing.seed().view() as first, hpke.seed().view() as second:
                write_file(made / "keys", bytes(first) + bytes(second), 0o600)
            write_file(made / "party.json", envelope.to_json().encode())
            _rename_new(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return PartyKeys(party, envelope, signing, hpke)

    def party(self, name: str) -> PartyKeys:
        """One of this user's parties.

        Raises:
            InputError: there is none of this name, or its keys are damaged or open to others.
        """
        folder = self.folder / "parties" / name
        if not _ALIAS.match(name) or not folder.is_dir():
            raise InputError(
                "no party of this name has its keys here",
                found=name,
                expected=" or ".join(self.parties()) or "a party made with `cenacle party new`",
            )
        keys = folder / "keys"
        with disk_errors(f"read {keys}"):
            if stat.S_IMODE(keys.stat().st_mode) & 0o077:
                raise InputError(
                    "a party's keys can be read by others",
                    found=f"{keys} with mode {stat.S_IMODE(keys.stat().st_mode):04o}",
                    expected="mode 0600",
                    remedy=f"run: chmod 600 {keys}",
                )
            data = bytearray(keys.read_bytes())
        document = folder / "party.json"
        with disk_errors(f"read {document}"):
            envelope = Envelope.from_json(document.read_bytes())
        if len(data) != sum(_SEEDS):
            raise InputError(
                "a party's key file is damaged",
                found=f"{len(data)} bytes in {keys}",
                expected=f"{sum(_SEEDS)} bytes",
                remedy="restore it from a backup",
            )
        signing = SigningKey.from_seed(SecretBytes(data[: _SEEDS[0]]))
        hpke = HpkePrivateKey(SecretBytes(data[_SEEDS[0] :]))
        data[:] = bytes(len(data))
        party = envelope.open(Party, signing.verify_key)
        if party.hpke_public_key.raw != hpke.public_key.raw:
            raise InputError(
                "a party's key file is damaged",
                found=f"another encryption key in {keys}",
                expected=f"the one that {document} states",
                remedy="restore it from a backup",
            )
        return PartyKeys(party, envelope, signing, hpke)

    def parties(self) -> list[str]:
        folder = self.folder / "parties"
        if not folder.is_dir():
            return []
        return sorted(p.name for p in folder.iterdir() if _ALIAS.match(p.name))

    # ------------------------------------------------------------------ brokers

    def pin(self, identity: BrokerIdentity, alias: str = "default") -> Path:
        """Remember a broker; a pinned one with other keys is never replaced silently."""
        if not _ALIAS.match(alias):
            raise InputError("a broker's alias cannot be used", found=alias, expected="a-z 0-9 -")
        path = self._private("brokers") / f"{alias}.json"
        if path.exists():
            identity_before = self.broker(alias)
            if identity_before.digest != identity.digest:
                raise ConflictError(
                    "another broker is pinned under this name",
                    found=identity_before.digest,
                    expected=identity.digest,
                    remedy=f"remove {path} if that is meant, or pin under another --alias",
                )
        write_file(path, identity.model_dump_json().encode())
        return path

    def broker(self, alias: str = "default") -> BrokerIdentity:
        """A pinned broker: by alias, or a path to its identity file."""
        path = self.folder / "brokers" / f"{alias}.json"
        if not _ALIAS.match(alias):
            path = Path(alias)
        if not path.is_file():
            raise InputError(
                "no broker is pinned under this name",
                found=alias,
                expected="an alias, or the path of a broker's identity file",
                remedy="pin one with `cenacle broker pin FILE`",
            )
        with disk_errors(f"read {path}"):
            return BrokerIdentity.from_fields(parse_json(path.read_bytes()))

    def _reference_path(self, identity: BrokerIdentity) -> Path:
        # By the broker's keys: whatever name or file it is called by, the same must be proved.
        name = identity.digest.removeprefix("sha256:")
        return self.folder / "brokers" / f"{name}.reference.json"

    def pin_reference(self, reference: EnclaveRequirements, identity: BrokerIdentity) -> Path:
        """Remember what a broker must prove before it gets a key."""
        self._private("brokers")
        path = self._reference_path(identity)
        write_file(path, canonical_json(reference.to_fields()))
        return path

    def broker_reference(self, identity: BrokerIdentity) -> EnclaveRequirements | None:
        """What a broker must prove; ``None`` if nothing was pinned."""
        path = self._reference_path(identity)
        if not path.is_file():
            return None
        with disk_errors(f"read {path}"):
            return EnclaveRequirements.from_fields(parse_json(path.read_bytes()))

    @contextmanager
    def client(self, alias: str = "default") -> Iterator[BrokerClient]:
        """A connection to a pinned broker."""
        with BrokerClient(self.broker(alias)) as client:
            yield client

    @contextmanager
    def client_as(
        self, party: str, alias: str = "default"
    ) -> Iterator[tuple[PartyKeys, BrokerClient]]:
        """The keys of one of this user's parties and a connection to a pinned broker."""
        keys = self.party(party)
        with self.client(alias) as client:
            yield keys, client

    # ------------------------------------------------------------------ logs

    def _head_path(self, broker: BrokerIdentity) -> Path:
        return self._private("heads") / f"{broker.digest.removeprefix('sha256:')}.txt"

    def last_head(self, broker: BrokerIdentity) -> TreeHead | None:
        """The newest head of the broker's log that this user verified."""
        path = self._head_path(broker)
        if not path.is_file():
            return None
        return parse_and_verify_head(path.read_text(), broker.origin, broker.verify_key)

    def remember_head(self, broker: BrokerIdentity, text: str) -> None:
        write_file(self._head_path(broker), text.encode())

    # ------------------------------------------------------------------ this machine

    @property
    def installation_path(self) -> Path:
        return self.folder / "installation.key"

    def installation(self) -> InstallationKey:
        self._private()
        return InstallationKey.load_or_create(self.installation_path)
